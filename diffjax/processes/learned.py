"""A schedule that is learned: log-SNR is a small monotone network, whose weights are the parameters of the process."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.processes.curves import VARIANCE_PRESERVING
from diffjax.processes.gaussian import number, ordered
from diffjax.types import Family, Process, Scalar

_LOOPS = {np.dtype("float64"): 52, np.dtype("float32"): 24}  # halvings of [0, 1]: the mantissa


def _loop(xp: Any, n: int, body: Any, value: Any) -> Any:
    if xp is jnp:
        return jax.lax.fori_loop(0, n, lambda _, v: body(v), value)
    for _ in range(n):
        value = body(value)
    return value


def _cast(p: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(like.dtype), p)


def _hidden(xp: Any, p: Any, t: Any) -> tuple[Any, Any, Any]:
    """Positive weights and the pre-activations `e^{k_h} (2 t - 1) + b_h`, with H as the first axis."""
    out, rate, bias = (nu.expand(leaf, t[None]) for leaf in (xp.exp(p["log_out"]), xp.exp(p["log_in"]), p["bias"]))
    return out, rate, rate * (2 * t - 1)[None] + bias


def _raw(xp: Any, p: Any, t: Any) -> Any:
    out, _, pre = _hidden(xp, p, t)
    return xp.exp(p["log_slope"]) * t + xp.sum(out * xp.tanh(pre), 0)


def _raw_slope(xp: Any, p: Any, t: Any) -> Any:
    out, rate, pre = _hidden(xp, p, t)
    return xp.exp(p["log_slope"]) + xp.sum(2 * out * rate * (1 - xp.tanh(pre) ** 2), 0)


def _span(xp: Any, p: Any, t: Any) -> tuple[Any, Any]:
    ends = _raw(xp, p, xp.asarray([0.0, 1.0], t.dtype))
    return ends[0], ends[1] - ends[0]


def _log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    p = _cast(p, t)
    first, span = _span(xp, p, t)
    share = (_raw(xp, p, t) - first) / span
    return p["high"] + share * (p["low"] - p["high"])


def _alpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.exp(-0.5 * xp.logaddexp(xp.zeros_like(t), -2 * _log_snr(xp, p, t, u)))


def _sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.exp(-0.5 * xp.logaddexp(xp.zeros_like(t), 2 * _log_snr(xp, p, t, u)))


def _dlog_snr(xp: Any, p: Any, t: Any) -> Any:
    p = _cast(p, t)
    return _raw_slope(xp, p, t) / _span(xp, p, t)[1] * (p["low"] - p["high"])


def _dalpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return _alpha(xp, p, t, u) * _sigma(xp, p, t, u) ** 2 * _dlog_snr(xp, p, t)


def _dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -_sigma(xp, p, t, u) * _alpha(xp, p, t, u) ** 2 * _dlog_snr(xp, p, t)


def _time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    # Bisection finds the root; one Newton step from there gives the last digits and, as the implicit function theorem,
    # the derivatives with respect to lam and the parameters.
    fixed, target = (p, lam) if xp is np else jax.lax.stop_gradient((p, lam))

    def halve(bounds: Any) -> Any:
        low, high = bounds
        middle = 0.5 * (low + high)
        early = _log_snr(xp, fixed, middle, 1 - middle) > target
        return xp.where(early, middle, low), xp.where(early, high, middle)

    low, high = _loop(xp, _LOOPS[np.dtype(lam.dtype)], halve, (xp.zeros_like(lam), xp.ones_like(lam)))
    t = 0.5 * (low + high)
    return t - (_log_snr(xp, p, t, 1 - t) - lam) / _dlog_snr(xp, fixed, t)


def _ends(xp: Any, p: Any) -> tuple[Any, Any]:
    return 0.0, 1.0


LEARNED = Family(
    "learned",
    VARIANCE_PRESERVING,
    _alpha,
    _sigma,
    _log_snr,
    _time_of_log_snr,
    _dalpha,
    _dsigma,
    _ends,
)


def learned(key: Any = 0, width: int = 16, log_snr_max: Scalar = 6.65, log_snr_min: Scalar = -2.5) -> Process:
    """Variance preserving, learned.   lambda(t) = high + (low - high) (g(t) - g(0)) / (g(1) - g(0))

    g(t) = e^c t + sum_h e^{w_h} tanh(e^{k_h} (2 t - 1) + b_h) increases for any weights, which are the leaves, as are
    the two ends of lambda (half of the paper's -gamma: 13.3 and -5). At first lambda is nearly linear in `t`.
    Args: key: JAX key or int seed of the host.   width: H >= 1.   log_snr_max, log_snr_min: lambda(0) > lambda(1).
    Raises: ValueError: width or ends out of range.
    Reference: arXiv:2107.00630, Appendix H.

    Example:
        >>> p = learned()
        >>> round(float(p.log_snr(0.0)), 6), round(float(p.log_snr(1.0)), 6)
        (6.65, -2.5)
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be an int >= 1; got {width!r}")
    high, low = number("log_snr_max", log_snr_max), number("log_snr_min", log_snr_min)
    ordered("log_snr_min", low, "log_snr_max", high)
    if isinstance(key, int):
        noise: Any = np.random.default_rng(key).normal(size=(2, width))
    else:
        noise = jax.random.normal(key, (2, width))
    return Process(
        {
            "high": high,
            "low": low,
            "log_slope": 0.0,
            "log_in": 1.0 + 0.5 * noise[0],
            "bias": 2.0 * noise[1],
            "log_out": 0.1 * noise[1] - float(np.log(10 * width)),
        },
        LEARNED,
    )
