"""What a batch must be before it is trained on, and the dropping of conditions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.prediction import broadcast_null
from diffjax.types import Cond, Denoiser, Key


def drop_labels(key: Key, denoiser: Denoiser, cond: Cond, items: Any, rate: float) -> Cond:
    """The condition with whole items replaced by the null condition, each with probability `rate`.

    Raises: ValueError: a condition to drop, and no null condition in the denoiser.
    """
    if rate == 0 or cond is None:
        return cond
    if denoiser.null is None:
        raise ValueError(
            f"label_drop = {rate} needs a null condition and the denoiser has none; give denoiser(..., null=...), or "
            "label_drop=0 to train without classifier-free guidance"
        )
    keys = nu.item_keys(key, items)
    dropped = jax.vmap(lambda k: jax.random.bernoulli(k, rate))(keys)
    cond = jax.tree.map(jnp.asarray, cond)
    return nu.tree_where(dropped, broadcast_null(denoiser.null, cond, items.shape[0]), cond)


def check_labels(cond: Any, num_classes: int) -> None:
    """Refuse class labels outside 0 .. num_classes - 1, on the host: inside `jit` values cannot be seen.

    Args: cond: integer labels, any shape.   num_classes: > 0.
    Raises: ValueError: no integers, or labels out of range; names the first one and its position.

    Example:
        >>> check_labels(np.array([0, 9]), 10)
    """
    labels = np.asarray(cond)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers in [0, {num_classes}); got dtype {labels.dtype}")
    bad = np.argwhere((labels < 0) | (labels >= num_classes))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{len(bad)} of {labels.size} labels are outside [0, {num_classes}); the first is {labels[first]} at position "
            f"{first[0] if len(first) == 1 else first}. Check num_classes, or whether labels start at 1"
        )


def check_batch(x0: PyTree) -> None:
    """Refuse an empty batch, integer data and values that are not finite, on the host.

    Inside `jit` a value that is not finite makes the loss of its own item NaN and no other's.
    Raises: ValueError: names the leaf and the first item.
    """
    nu.batch_size(x0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(x0):
        a, name = np.asarray(leaf), "x0" + jax.tree_util.keystr(path)
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating; got dtype {a.dtype}. Scale the data to [-1, 1] or unit variance"
            )
        finite = np.isfinite(a.astype(np.float64)).reshape(a.shape[0], -1).all(1)
        if not finite.all():
            raise ValueError(
                f"{name} has values that are not finite in {int((~finite).sum())} of {len(finite)} items, the first at "
                f"position {int(np.argmin(finite))}; remove or repair them"
            )
