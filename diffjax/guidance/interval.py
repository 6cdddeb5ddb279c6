"""Guidance in a limited interval of noise levels; outside it the extra evaluations are not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.guidance.skip import apply_transform, as_value, choose, host_number
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.types import Cond, Denoiser, Evaluation, Prediction, Process, Transform


def in_time(process: Process, t: PyTree) -> PyTree:
    """Bounds are times in [0, 1]."""
    return t


def in_log_snr(process: Process, t: PyTree) -> PyTree:
    """Bounds are half log-SNRs, `log(alpha / sigma)`."""
    return process.log_snr(t)


def in_sigma(process: Process, t: PyTree) -> PyTree:
    """Bounds are EDM's noise levels `sigma / alpha = exp(-log_snr)`, the unit of arXiv:2404.07724."""
    return jax.tree.map(lambda lam: nu.namespace(lam).exp(-lam), process.log_snr(t))


class Sides(NamedTuple):
    """The states of the guided and of the plain denoiser; the one that is not evaluated does not move."""

    guided: PyTree
    plain: PyTree


@pytree_dataclass
class Interval:
    """See `interval`; the guide and the bounds are leaves."""

    guide: Any
    lo: Any
    hi: Any
    unit: Callable[[Process, PyTree], PyTree] = static(default=in_time)

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser that is guided inside the interval only."""
        apply_transform(self.guide, denoiser)  # its errors are raised here, not at the first call
        return denoiser.wrap(_evaluate, self, _init)


def interval(guide: Transform, lo: Any, hi: Any, *, unit: Callable[[Process, PyTree], PyTree] = in_time) -> Interval:
    """`guide` where lo <= unit(t) <= hi, the plain conditional model elsewhere.   interval(cfg(2.0), 0.2, 0.8)

    The published form is an interval of EDM's sigma: `unit=in_sigma` takes such numbers as they are, for every process;
    in time it is `process.time_of_log_snr(-log(sigma))`, and `unit=in_log_snr` takes `-log(sigma)`.

    Args: guide: the transform to limit.   lo, hi: scalar bounds, both inside.   unit: `in_time`, `in_log_snr` or
    `in_sigma`.
    With one time for the whole batch one side is evaluated; with times per item or frame a side is evaluated where any
    entry asks for it, and entries choose.
    Returns: a transform. Its state holds one state for each side.
    Raises: ValueError: bounds that are not finite or not in order, and whatever the guide raises.
    Reference: arXiv:2404.07724, Section 3.

    Example:
        >>> from diffjax import guidance
        >>> interval(guidance.cfg(2.0), 0.19, 1.61, unit=in_sigma).hi
        1.61
    """
    lo, hi = host_number("lo", lo), host_number("hi", hi)
    if nu.namespace(lo, hi) is np and not np.all(lo <= hi):
        raise ValueError(f"an interval needs lo <= hi in the unit {unit.__name__}; got lo={lo}, hi={hi}")
    return Interval(as_value(guide), lo, hi, unit)


def _init(own: Interval, inner: Denoiser, x: PyTree, cond: Cond) -> Sides:
    return Sides(own.guide(inner).init_state(x, cond), inner.init_state(x, cond))


def _evaluate(own: Interval, inner: Denoiser, state: Sides, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    where = jax.tree.map(lambda u: (u >= own.lo) & (u <= own.hi), own.unit(inner.process, t))
    flags = jax.tree.leaves(where)

    def guided() -> Evaluation:
        e = own.guide(inner).evaluate(x, t, cond, state=state.guided, key=key)
        return Evaluation(e.prediction, Sides(e.state, state.plain), e.aux)

    def plain() -> Evaluation:
        e = inner.evaluate(x, t, cond, state=state.plain, key=key)
        return Evaluation(e.prediction, Sides(state.guided, e.state), e.aux)

    if len(flags) == 1 and np.ndim(flags[0]) == 0:
        return choose(flags[0], guided, plain)

    nothing = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(plain))
    some = lambda parts: sum(parts[1:], parts[0]) > 0
    a = choose(some([f.any().astype(int) for f in flags]), guided, nothing)
    b = choose(some([(~f).any().astype(int) for f in flags]), plain, nothing)
    select = lambda on, off: jax.tree.map(lambda f, p, q: nu.tree_where(f, p, q), where, on, off)
    prediction = Prediction(*(select(p, q) for p, q in zip(a.prediction, b.prediction, strict=True)))
    return Evaluation(prediction, Sides(a.state.guided, b.state.plain), b.aux)
