"""Classifier-free guidance: the conditional and the unconditional prediction of one network, extrapolated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.guidance.skip import choose, host_number
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.prediction import broadcast_null
from diffjax.types import Cond, Denoiser, Evaluation, Prediction

SHARED = -1  # the item axis of a state leaf that does not grow with the batch


@pytree_dataclass
class Cfg:
    """See `cfg`; weight and null condition are leaves."""

    weight: Any
    null: Any = None
    skip: bool = static(default=True)

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The guided denoiser."""
        if self.null is None and denoiser.null is None:
            raise ValueError(
                "guidance without a null condition: the denoiser has none. Give cfg(weight, null=...), or "
                "denoiser(..., null=...) if the network was trained with one"
            )
        return denoiser.wrap(_evaluate, self, _init)


def cfg(weight: Any, null: Cond = None, *, skip: bool = True) -> Cfg:
    """Classifier-free guidance.   pred = u + w (c - u);  w = 1 is the conditional model, w = 0 the unconditional one

    Items whose weight is 0 or 1 need one condition only: when all do, the network is called once with B items, else
    once with 2B (each item beside its unconditional twin, so that a batch sharded over devices stays where it is).
    A stateful denoiser keeps one state for the batch of 2B; an evaluation that is skipped leaves its half as it was.

    Args: weight: scalar, [B], or any shape that broadcasts from the left against the state; 1 + w in papers that write
    so.   null: the condition that means "no condition", without batch axis; default `denoiser.null`.   skip: False
    always makes the call of 2B, which `jax.grad` with respect to a weight of exactly 0 or 1 needs (a skipped evaluation
    has no gradient).
    Returns: a transform.
    Raises: ValueError: no null condition here or in the denoiser, no condition at the call, a weight not finite.
    Reference: arXiv:2207.12598, Eq. 6.

    Example:
        >>> from diffjax import processes, testing
        >>> m = testing.mixture([1, 1], [[-1.0], [1.0]], stds=[0.5, 0.5])
        >>> d = cfg(2.0)(testing.oracle(m, processes.rectified()))
        >>> round(float(d(jnp.zeros((1, 1)), 1.0, jnp.ones(1, int)).x0[0, 0]), 6)
        2.0
    """
    return Cfg(host_number("weight", weight), null, skip)


def _evaluate(own: Cfg, inner: Denoiser, state: PyTree, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    n = nu.batch_size(x)
    cond, null = _conditions(own, inner, cond, n)
    axes = _item_axes(inner, state, x, cond)
    off, single = _flags(own.weight)

    def one() -> Evaluation:
        kept, spare = _halves(axes, state, off)
        e = inner.evaluate(x, t, nu.tree_where(off, null, cond), state=kept, key=key)
        return Evaluation(e.prediction, _join(axes, e.state, spare, off), e.aux)

    def both() -> Evaluation:
        e = inner.evaluate(twice(x), _twice_times(t, n), beside(cond, null), state=state, key=key)
        c, u = (jax.tree.map(lambda a, i=i: side(a, 0, i), e.prediction) for i in (0, 1))
        w = own.weight
        blend = lambda ui, ci: nu.add(nu.scale(1 - w, ui), nu.scale(w, ci))
        aux = jax.tree.map(lambda a: side(a, 0, 0) if jnp.shape(a)[:1] == (2 * n,) else a, e.aux)
        return Evaluation(Prediction(blend(u.x0, c.x0), blend(u.eps, c.eps)), e.state, aux)

    return choose(single, one, both) if own.skip else both()


def _init(own: Cfg, inner: Denoiser, x: PyTree, cond: Cond) -> PyTree:
    cond, null = _conditions(own, inner, cond, nu.batch_size(x))
    return inner.init_state(twice(x), beside(cond, null))


def _conditions(own: Cfg, inner: Denoiser, cond: Cond, n: int) -> tuple[Cond, Cond]:
    """The condition and the null condition, both batched."""
    if cond is None:
        raise ValueError(
            "classifier-free guidance needs a condition and got None; use denoiser.bind(cond), or cfg(0.0) of the null "
            "condition for unconditional samples"
        )
    cond = jax.tree.map(lambda c: jnp.broadcast_to(c, (n,)) if jnp.ndim(c) == 0 else jnp.asarray(c), cond)
    return cond, broadcast_null(inner.null if own.null is None else own.null, cond, n)


def _flags(weight: Any) -> tuple[Any, Any]:
    """Which items ([B], [1] or scalar) have weight zero, and whether every item needs one condition only."""
    w = weight if isinstance(weight, jax.Array) else np.asarray(weight)
    rest = tuple(range(1, w.ndim))
    off, on = (w == 0).all(rest), (w == 1).all(rest)
    return off, (off | on).all()


# ------------------------------------------------------------------------------------------- batches of 2B and states


def beside(a: PyTree, b: PyTree) -> PyTree:
    """Items of two batches in turn.   [B, ...], [B, ...] -> [2B, ...] = a_0, b_0, a_1, b_1, ..."""
    return jax.tree.map(lambda ai, bi: _interleave(ai, bi, 0), a, b)


def twice(x: PyTree) -> PyTree:
    """Every item twice in a row."""
    return beside(x, x)


def side(leaf: Any, axis: int, i: int) -> jax.Array:
    """Every second item along `axis`, from item i: the inverse of `beside`."""
    shape = jnp.shape(leaf)
    pairs = jnp.reshape(leaf, (*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :]))
    return jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False)


def _interleave(a: Any, b: Any, axis: int) -> jax.Array:
    shape = jnp.shape(a)
    return jnp.stack([a, b], axis + 1).reshape(*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


def _twice_times(t: PyTree, n: int) -> PyTree:
    return jax.tree.map(lambda ti: _interleave(ti, ti, 0) if jnp.shape(ti)[:1] == (n,) else ti, t)


def _item_axes(inner: Denoiser, state: PyTree, x: PyTree, cond: Cond) -> PyTree:
    """The axis of every state leaf that grows with the batch, `SHARED` for leaves that do not."""
    if not jax.tree.leaves(state):
        return state
    single = jax.eval_shape(inner.init_state, x, cond)

    def axis(one: Any, two: Any) -> int:
        grows = [i for i, (a, b) in enumerate(zip(one.shape, jnp.shape(two), strict=True)) if a != b]
        return grows[0] if grows else SHARED

    return jax.tree.map(axis, single, state)


def _along(flag: Any, axis: int, leaf: Any) -> Any:
    """`flag` (scalar, [1] or [B]) placed along `axis` of `leaf`."""
    if np.ndim(flag) == 0:
        return flag
    return flag.reshape((1,) * axis + flag.shape + (1,) * (leaf.ndim - axis - 1))


def _halves(axes: PyTree, state: PyTree, off: Any) -> tuple[PyTree, PyTree]:
    """The state of the condition that is evaluated, and that of the other one."""

    def half(which: int) -> PyTree:
        def leaf(axis: int, s: Any) -> Any:
            if axis == SHARED:
                return s
            c, u = side(s, axis, 0), side(s, axis, 1)
            flag = _along(off, axis, c)
            return jnp.where(flag, u, c) if which == 0 else jnp.where(flag, c, u)

        return jax.tree.map(leaf, axes, state)

    return half(0), half(1)


def _join(axes: PyTree, new: PyTree, spare: PyTree, off: Any) -> PyTree:
    """The state of 2B from the half that was evaluated and the half that was not."""

    def leaf(axis: int, a: Any, b: Any) -> Any:
        if axis == SHARED:
            return a
        flag = _along(off, axis, a)
        return _interleave(jnp.where(flag, b, a), jnp.where(flag, a, b), axis)

    return jax.tree.map(leaf, axes, new, spare)
