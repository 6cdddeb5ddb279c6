"""Small numerical tools that everything else is written in: pytree dataclasses, namespaces, left broadcasting, item noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
T = TypeVar("T")

PRIOR_STEP = 2**31 - 1  # the step index whose noise is the start of a trajectory; solvers use 0, 1, 2, ...


def static(**kwargs: Any) -> Any:
    """A field of a `pytree_dataclass` that is part of the tree's structure: it must hash by value."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def pytree_dataclass(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a JAX pytree; fields marked `static()` are structure, the others are leaves.

    Two instances are equal only if they are one object: leaves may be arrays, which have no truth value.

    Example:
        >>> @pytree_dataclass
        ... class Line:
        ...     slope: float
        ...     name: str = static(default="line")
        >>> jax.tree.leaves(Line(2.0))
        [2.0]
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


def namespace(*trees: PyTree) -> Any:
    """NumPy if every leaf is a concrete host value (float, int, `np.ndarray`), else `jax.numpy`.

    Host values keep float64 coefficients free of cancellation; one JAX leaf, traced or not, makes the result JAX.
    """
    host = all(isinstance(leaf, (int, float, np.ndarray, np.generic)) for leaf in jax.tree.leaves(trees))
    return np if host else jnp


def host_float64(*values: PyTree) -> tuple[Any, Any]:
    """The namespace of `values` and the values themselves, as float64 arrays if that namespace is NumPy.

    Returns: `(xp, values)`; with JAX values every leaf is `jnp.asarray`-ed to a floating type and left on its device.
    """
    xp = namespace(values)
    if xp is np:
        return xp, jax.tree.map(lambda v: np.asarray(v, np.float64), values)
    return xp, jax.tree.map(as_float, values)


def as_float(value: Any) -> jax.Array:
    """`value` as a JAX array of floating type (integers become the default float; weak types stay weak)."""
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.result_type(float))


def expand(a: Any, like: Any) -> Any:
    """Broadcast `a` against `like` from the left: append ones until the ranks agree.   [B] -> [B, 1, ..., 1]

    Args: a: scalar or array of rank <= that of `like`.   like: array.
    Raises: ValueError: `a` has more axes than `like`.

    Example:
        >>> expand(np.ones(4), np.ones((4, 8, 8, 1))).shape
        (4, 1, 1, 1)
    """
    rank, target = np.ndim(a), np.ndim(like)
    if rank == 0:
        return a
    if rank > target:
        raise ValueError(
            f"a coefficient or time of shape {np.shape(a)} cannot be broadcast from the left against a state of shape "
            f"{np.shape(like)}; give at most {target} axes, batch first"
        )
    return a.reshape(np.shape(a) + (1,) * (target - rank))


def _cast(a: Any, x: jax.Array) -> Any:
    """`a` in the dtype of `x`, so that a float32 state stays float32 whatever its coefficients are."""
    if isinstance(a, (int, float)):
        return a
    return a.astype(x.dtype) if isinstance(a, jax.Array) else jnp.asarray(a, x.dtype)


def scale(a: PyTree, x: PyTree) -> PyTree:
    """`a * x` with `a` broadcast from the left; `a` is one array for the whole state or a pytree prefix of it.

    Example:
        >>> scale(2.0, {"u": jnp.ones(2), "v": jnp.ones((2, 3))})["u"].tolist()
        [2.0, 2.0]
    """
    return jax.tree.map(lambda ai, xi: jax.tree.map(lambda leaf: expand(_cast(ai, leaf), leaf) * leaf, xi), a, x)


def divide(x: PyTree, a: PyTree) -> PyTree:
    """`x / a` as in `scale`; where `a` is exactly zero the result is zero, with zero gradient."""

    def leaf(ai: Any, xl: jax.Array) -> jax.Array:
        ai = expand(_cast(ai, xl), xl)
        zero = ai == 0
        return jnp.where(zero, jnp.zeros_like(xl), xl / jnp.where(zero, jnp.ones_like(ai), ai))

    return jax.tree.map(lambda ai, xi: jax.tree.map(lambda xl: leaf(ai, xl), xi), a, x)


def add(*trees: PyTree) -> PyTree:
    """Leafwise sum of pytrees of one structure."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def sub(x: PyTree, y: PyTree) -> PyTree:
    """Leafwise `x - y`."""
    return jax.tree.map(lambda a, b: a - b, x, y)


def safe_sqrt(a: Any, xp: Any = jnp) -> Any:
    """`sqrt(max(a, 0))` whose derivative at zero is zero instead of infinite."""
    positive = a > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, a, 1.0)), 0.0)


def batch_size(x: PyTree) -> int:
    """The length of the leading axis that every leaf of `x` shares.

    Raises: ValueError: no leaves, a scalar leaf, an empty batch, or leading axes that differ.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(x)]
    sizes = {s[:1] for s in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(f"every leaf of a state needs the same leading batch axis; got shapes {shapes}")
    (size,) = sizes.pop()
    if size == 0:
        raise ValueError(f"the batch is empty: got shapes {shapes}; give at least one item")
    return size


def item_indices(items: Any, batch: int) -> jax.Array:
    """`items` as an array of global item indices, default arange(B).   Raises: ValueError: another number of them."""
    items = jnp.arange(batch) if items is None else jnp.asarray(items)
    if items.shape != (batch,):
        raise ValueError(f"items must hold one global index per item, shape ({batch},); got {items.shape}")
    return items


def item_keys(key: jax.Array, items: jax.Array) -> jax.Array:
    """One key per item: `fold_in(key, items[b])`, [B]. Items are global indices, so chunks and devices agree."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, items)


def item_normal(keys: jax.Array, step: Any, like: PyTree) -> PyTree:
    """Standard normal noise shaped like the state `like`, drawn item by item.   z_b ~ N(0, I) from fold_in(keys[b], step)

    Args: keys: [B] item keys.   step: integer, which draw of the trajectory.   like: pytree of [B, ...] arrays or shapes.
    """
    leaves, tree = jax.tree.flatten(like)
    folded = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    if len(leaves) == 1:
        streams = [folded]
    else:
        streams = [jax.vmap(jax.random.fold_in, (0, None))(folded, i) for i in range(len(leaves))]
    drawn = [
        jax.vmap(lambda k, leaf=leaf: jax.random.normal(k, leaf.shape[1:], leaf.dtype))(k)
        for k, leaf in zip(streams, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def state_leaf(leaf: Any) -> jax.Array:
    """A leaf of the state as a floating array of at least float32, or an error."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"the state x must be floating; got dtype {leaf.dtype}. Use x.astype(jnp.float32)")
    return leaf.astype(jnp.float32) if leaf.dtype in (jnp.bfloat16, jnp.float16) else leaf


def tree_where(flag: Any, on: PyTree, off: PyTree) -> PyTree:
    """Leafwise `where(flag, on, off)` with `flag` broadcast from the left."""
    return jax.tree.map(lambda a, b: jnp.where(expand(flag, a), a, b), on, off)


def sliding_window(t: Any, units: int, size: int, alpha: float = 1.0) -> jax.Array:
    """A window of units that slides from the first ones at t = 0 to the last ones at t = 1.   [B] -> bool [B, units]

    True on `size` units from round(t^alpha (units - size)) on.

    Example:
        >>> sliding_window(jnp.array([0.0, 0.5, 1.0]), 4, 2).astype(int).tolist()
        [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    start = jnp.round(jnp.clip(t, 0, 1) ** alpha * (units - size))[..., None]
    unit = jnp.arange(units, dtype=start.dtype).reshape((1,) * (start.ndim - 1) + (-1,))
    return (unit >= start) & (unit < start + size)


def derivative(f: Callable[[Any], Any], t: Any) -> Any:
    """`df/dt` elementwise by forward mode; for elementwise `f`."""
    t = as_float(t)
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]
