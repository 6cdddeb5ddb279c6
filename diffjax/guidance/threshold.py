"""Transforms that limit the predicted clean data and keep the pair consistent with the state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.guidance.skip import host_number
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.types import Cond, Denoiser, Evaluation, Prediction, Process


def with_x0(prediction: Prediction, x0: PyTree, process: Process, t: PyTree) -> Prediction:
    """The pair with another x0 and the eps that belongs to it.   eps' = eps + alpha (x0 - x0') / sigma

    The same as `(x - alpha x0') / sigma` for a pair that is consistent, but exact where x0 is left as it is, and at
    `sigma = 0`, where eps is free, it keeps eps.
    """
    moved = nu.divide(nu.scale(process.alpha(t), nu.sub(prediction.x0, x0)), process.sigma(t))
    return Prediction(x0, nu.add(prediction.eps, moved))


def _channels(limit: Any, like: jax.Array) -> jax.Array:
    """`limit`, a scalar or an array over the last axes, with the rank and dtype of `like`."""
    limit = jnp.asarray(limit, like.dtype)
    return limit.reshape((1,) * (like.ndim - limit.ndim) + limit.shape)


@pytree_dataclass
class ClipX0:
    """See `clip_x0`; the bounds are leaves."""

    low: Any
    high: Any
    keep_eps: bool = static(default=False)

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser whose x0 is clipped."""
        return denoiser.wrap(_clip, self)


def clip_x0(limit: Any = 1.0, low: Any = None, *, keep_eps: bool = False) -> ClipX0:
    """The prediction with `x0` clipped to the range of the data, eps re-derived.   x0' = min(max(x0, low), limit)

    Args: limit: upper bound, a scalar or an array over the last axes (channels).   low: lower bound, default `-limit`.
    keep_eps: leave eps as it was, so that the pair does not fit x, as some published DDIM samplers do.
    Raises: ValueError: a bound that is not finite, or low >= limit.
    Reference: arXiv:2205.11487, Section 2.3 (static thresholding).

    Example:
        >>> from diffjax import from_x0, denoiser, processes
        >>> d = clip_x0(1.0)(denoiser(lambda x, t: 3 * x, processes.rectified(), from_x0))
        >>> d(jnp.ones((1, 1)), 0.5).x0.tolist(), d(jnp.ones((1, 1)), 0.5).eps.tolist()
        ([[1.0]], [[1.0]])
    """
    limit = host_number("limit", limit)
    low = -limit if low is None else host_number("low", low)
    if nu.namespace(low, limit) is np and not np.all(low < limit):
        raise ValueError(f"clip_x0 needs low < limit; got low={low}, limit={limit}")
    return ClipX0(low, limit, keep_eps)


def _clip(own: ClipX0, inner: Denoiser, state: PyTree, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    e = inner.evaluate(x, t, cond, state=state, key=key)
    clip = lambda a: jnp.clip(a, _channels(own.low, a), _channels(own.high, a))
    x0 = jax.tree.map(clip, e.prediction.x0)
    return e._replace(prediction=_limited(own, e.prediction, x0, inner.process, t))


def _limited(own: Any, prediction: Prediction, x0: PyTree, process: Process, t: PyTree) -> Prediction:
    return prediction._replace(x0=x0) if own.keep_eps else with_x0(prediction, x0, process, t)


@pytree_dataclass
class DynamicThreshold:
    """See `dynamic_threshold`; the numbers are leaves."""

    percentile: Any
    floor: Any
    ceiling: Any = None
    keep_eps: bool = static(default=False)

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser whose x0 is thresholded."""
        return denoiser.wrap(_dynamic, self)


def dynamic_threshold(
    percentile: Any = 0.995, floor: Any = 1.0, *, ceiling: Any = None, keep_eps: bool = False
) -> DynamicThreshold:
    """`x0` clipped at a quantile of its own size and scaled back into range, eps re-derived.

    s = max(quantile_percentile(|x0|), floor) per item,   x0' = (floor / s) min(max(x0, -s), s)

    Args: percentile: in (0, 1], the quantile over all entries of an item.   floor: > 0, the range of the data.
    ceiling: >= floor, the most that s can be, default any.   keep_eps: as in `clip_x0`.
    Raises: ValueError: percentile, floor or ceiling out of range.
    Reference: arXiv:2205.11487, Section 2.3.

    Example:
        >>> from diffjax import from_x0, denoiser, processes
        >>> d = dynamic_threshold(1.0)(denoiser(lambda x, t: 4 * x, processes.rectified(), from_x0))
        >>> d(jnp.array([[1.0, 0.5]]), 0.5).x0.tolist()
        [[1.0, 0.5]]
    """
    percentile, floor = host_number("percentile", percentile), host_number("floor", floor)
    if isinstance(percentile, float) and not 0 < percentile <= 1:
        raise ValueError(f"percentile must be in (0, 1], for example 0.995; got {percentile}")
    if isinstance(floor, float) and not floor > 0:
        raise ValueError(f"floor must be > 0, the size of the data's range; got {floor}")
    if ceiling is not None:
        ceiling = host_number("ceiling", ceiling)
        if isinstance(ceiling, float) and isinstance(floor, float) and ceiling < floor:
            raise ValueError(f"ceiling must be at least floor={floor}; got {ceiling}")
    return DynamicThreshold(percentile, floor, ceiling, keep_eps)


def _dynamic(own: Any, inner: Denoiser, state: PyTree, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    e = inner.evaluate(x, t, cond, state=state, key=key)
    leaves = jax.tree.leaves(e.prediction.x0)
    size = jnp.concatenate([jnp.abs(a).reshape(a.shape[0], -1) for a in leaves], axis=1)
    floor = jnp.asarray(own.floor, size.dtype)
    s = jnp.maximum(jnp.quantile(size, jnp.asarray(own.percentile, size.dtype), axis=1), floor)
    s = s if own.ceiling is None else jnp.minimum(s, jnp.asarray(own.ceiling, size.dtype))
    limit = lambda a: (nu.expand(floor / s, a) * jnp.clip(a, -nu.expand(s, a), nu.expand(s, a))).astype(a.dtype)
    x0 = jax.tree.map(limit, e.prediction.x0)
    return e._replace(prediction=_limited(own, e.prediction, x0, inner.process, t))
