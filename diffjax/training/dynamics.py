"""What happens to magnitudes during training: weights kept at norm one, monitors, the noise of the gradient, loss by level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax import numerics as nu
from diffjax.losses.levels import LOSS, SHARE
from diffjax.numerics import PyTree
from diffjax.training.optimizer import matrices
from diffjax.training.state import widen

Mask = PyTree | Callable[[PyTree], PyTree]


def unit_weights(params: PyTree, mask: Mask = matrices) -> PyTree:
    """Weights divided, per output, by the root mean square over their inputs.   w_j <- w_j sqrt(n) / |w_j|

    So scaled, an update of size one per entry turns the weights of every layer by the same angle, whatever its width n;
    layers that use `w / |w|` compute the same before and after.

    Args: params: the last axis of a leaf counts outputs, all others inputs.   mask: which leaves, a tree of bools or a
        function of the parameters; default those with two axes or more.
    Returns: the parameters; weights that are all zero stay so.

    Example:
        >>> unit_weights({"kernel": jnp.full((4, 1), 3.0), "gain": jnp.ones(1)})["kernel"].ravel().tolist()
        [1.0, 1.0, 1.0, 1.0]

    Reference: Karras et al. 2024, arXiv:2312.02696, Eq. 66.
    """
    chosen = mask(params) if callable(mask) else mask

    def leaf(p: Any, on: bool) -> Any:
        if not on:
            return p
        square = jnp.square(widen(p)).mean(tuple(range(p.ndim - 1)), keepdims=True)
        return (widen(p) * jax.lax.rsqrt(jnp.where(square > 0, square, 1))).astype(p.dtype)

    return jax.tree.map(leaf, params, chosen)


def normalise_weights(mask: Mask = matrices) -> optax.GradientTransformation:
    """Forced weight normalisation, the last link of a chain: after every update the weights have norm one again.

    p + update' = unit_weights(p + update). Without state.

    Args: mask: as for `unit_weights`.
    Raises: ValueError: at the update, no parameters were given.

    Example:
        >>> tx = optax.chain(optax.sgd(0.1), normalise_weights())

    Reference: Karras et al. 2024, arXiv:2312.02696, Eq. 66.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("normalise_weights needs the parameters: call update(grads, state, params)")
        chosen = mask(params) if callable(mask) else mask
        new = unit_weights(optax.apply_updates(params, updates), chosen)
        return jax.tree.map(lambda u, n, p, on: n - p if on else u, updates, new, params, chosen), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def rms_by_layer(tree: PyTree, prefix: str) -> dict[str, jax.Array]:
    """Root mean square of the leaves of every layer, the leaves that share a parent.   {prefix/layer: float32 []}

    Example:
        >>> rms = rms_by_layer({"a": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}}, "weight_rms")
        >>> {name: round(float(v), 3) for name, v in rms.items()}
        {'weight_rms/a': 3.536}
    """
    sums: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            name = jax.tree_util.keystr(path[:-1] or path, simple=True, separator="/")
            sums.setdefault(name, []).append((jnp.sum(jnp.square(widen(leaf))), leaf.size))
    return {
        f"{prefix}/{name}": jnp.sqrt(sum(s for s, _ in pairs) / sum(n for _, n in pairs))
        for name, pairs in sums.items()
    }


def magnitudes(params: PyTree, grads: PyTree, new: PyTree) -> dict[str, jax.Array]:
    """Root mean squares of weights, gradients and updates by layer, for `make_train_step(monitor=magnitudes)`.

    Args: params: before the update.   grads: as the optimizer got them.   new: the parameters after it.
    Returns: `weight_rms/LAYER`, `gradient_rms/LAYER`, `update_rms/LAYER`.

    Reference: Karras et al. 2024, arXiv:2312.02696, Section 2, which watches these and the activations.
    """
    return (
        rms_by_layer(new, "weight_rms")
        | rms_by_layer(grads, "gradient_rms")
        | rms_by_layer(nu.sub(new, params), "update_rms")
    )


def gradient_noise(small: Any, big: Any, n_small: int, n_big: int) -> tuple[Any, Any]:
    """Unbiased `(tr Sigma, |G|^2)` from squared norms of gradients over few and over many examples.

    E|g_n|^2 = |G|^2 + tr(Sigma) / n  at two n.  The noise scale tr(Sigma) / |G|^2 is the batch beyond which more examples
    help little; take the ratio of means over many steps, not the mean of ratios.

    Args: small, big: the (mean) squared norms.   n_small < n_big: examples.
    Raises: ValueError: n_small not below n_big.

    Example:
        >>> gradient_noise(5.0, 2.0, 1, 4)
        (4.0, 1.0)

    Reference: McCandlish et al. 2018, arXiv:1812.06162, Appendix A.
    """
    if not 0 < n_small < n_big:
        raise ValueError(
            f"the gradient's noise needs gradients of parts of the batch; got parts of {n_small} and a whole of {n_big} "
            "examples. Use accumulate >= 2, or shard_map or pmap on several devices"
        )
    trace = (small - big) / (1 / n_small - 1 / n_big)
    return trace, (n_big * big - n_small * small) / (n_big - n_small)


def summarise(means: Mapping[str, Any], items: Any) -> dict[str, Any]:
    """Means over a window of steps with the ratios that they stand for: loss by noise level, and the noise scale.

    Args: means: of the metrics of a training step.   items: examples in the window.
    Returns: the same, where `bin_loss/L` and `bin_share/L` became `loss/L`, the mean of the items of that level, and
        `items/L`, their number, and `noise_scale` joined its two parts.

    Example:
        >>> summarise({"loss": 2.0, "bin_loss/0..1": 0.5, "bin_share/0..1": 0.25}, 40)
        {'loss': 2.0, 'loss/0..1': 2.0, 'items/0..1': 10.0}
    """
    out = {name: v for name, v in means.items() if not name.startswith((LOSS, SHARE))}
    for name, share in means.items():
        if name.startswith(SHARE):
            level = name.removeprefix(SHARE)
            if share > 0 and LOSS + level in means:
                out[f"loss/{level}"] = means[LOSS + level] / share
            out[f"items/{level}"] = float(round(share * items))
    if means.get("gradient_signal", 0) > 0:
        out["noise_scale"] = means["gradient_trace"] / means["gradient_signal"]
    return out
