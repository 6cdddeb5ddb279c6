"""The closed-form processes: VP, sub-VP, cosine, sigmoid, VE, EDM and rectified flow.

Every function takes `(xp, p, t, u)` with `u = 1 - t`, and is written so that float32 keeps its relative accuracy at
both ends: what vanishes at `t = 0` is a product with `t` (or an `expm1` of one), at `t = 1` a product with `u`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from diffjax.numerics import safe_sqrt
from diffjax.processes.curves import LINEAR, SUB_VARIANCE_PRESERVING, UNIT, VARIANCE_PRESERVING, safe_log
from diffjax.types import Family, Process, Scalar

# Where log-SNR is infinite at an end, grids are spaced between these values of sigma / alpha.
LEAST_NOISE, MOST_NOISE = 0.005, 100.0


def number(name: str, value: Any, low: Scalar = -math.inf, high: Scalar = math.inf) -> Any:
    """A parameter as a leaf: host numbers become floats and are checked to lie in (low, high); JAX values pass."""
    if isinstance(value, jax.core.Tracer):
        return value
    if np.shape(value) == () and not (math.isfinite(value) and low < value < high):
        raise ValueError(f"{name} must be a finite number in ({low}, {high}); got {value!r}")
    return value if isinstance(value, jax.Array) else float(value) if np.shape(value) == () else value


def ordered(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Refuse a concrete pair that does not increase."""
    if any(isinstance(v, jax.core.Tracer) for v in (low, high)):
        return
    if np.any(np.asarray(low) >= np.asarray(high)):
        raise ValueError(f"{low_name} must be smaller than {high_name}; got {low_name}={low!r}, {high_name}={high!r}")


# ---------------------------------------------------------------------------- VP and sub-VP: one linear beta(t)


def vp_exponent(p: Any, t: Any) -> Any:
    """`A(t) = -log alpha`, half the integral of `beta` from 0 to `t`."""
    return t * (0.25 * t * (p["beta_max"] - p["beta_min"]) + 0.5 * p["beta_min"])


def vp_half_beta(p: Any, t: Any) -> Any:
    """`A'(t) = beta(t) / 2`."""
    return 0.5 * (p["beta_min"] + t * (p["beta_max"] - p["beta_min"]))


def vp_time(xp: Any, p: Any, exponent: Any) -> Any:
    """The time at which `A(t)` equals `exponent`: the root that does not cancel."""
    low, slope = p["beta_min"], p["beta_max"] - p["beta_min"]
    return 4 * exponent / (low + xp.sqrt(low * low + 4 * slope * exponent))


def _vp_alpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.exp(-vp_exponent(p, t))


def _vp_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return safe_sqrt(-xp.expm1(-2 * vp_exponent(p, t)), xp)


def _vp_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    a = vp_exponent(p, t)
    return -a - 0.5 * safe_log(xp, -xp.expm1(-2 * a))


def _vp_time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    return vp_time(xp, p, 0.5 * xp.logaddexp(xp.zeros_like(lam), -2 * lam))


def _vp_dalpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -vp_half_beta(p, t) * _vp_alpha(xp, p, t, u)


def _vp_dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    a = vp_exponent(p, t)
    return vp_half_beta(p, t) * xp.exp(-2 * a) / safe_sqrt(-xp.expm1(-2 * a), xp)


def _vp_ends(xp: Any, p: Any) -> tuple[Any, Any]:
    return _vp_time_of_log_snr(xp, p, xp.asarray(-math.log(LEAST_NOISE))), 1.0


VP = Family(
    "vp",
    VARIANCE_PRESERVING,
    _vp_alpha,
    _vp_sigma,
    _vp_log_snr,
    _vp_time_of_log_snr,
    _vp_dalpha,
    _vp_dsigma,
    _vp_ends,
)


def vp(beta_min: Scalar = 0.1, beta_max: Scalar = 20.0) -> Process:
    """Variance preserving, linear beta.   log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2

    Args: beta_min: > 0.   beta_max: > beta_min; `log_snr(1)` is finite (alpha(1) = 0.0066 with the defaults).
    Raises: ValueError: a concrete parameter out of range.
    Reference: arXiv:2011.13456, Eq. 33.

    Example:
        >>> p = vp()
        >>> round(float(p.alpha(1.0)), 6), float(p.sigma(0.0))
        (0.006572, 0.0)
    """
    p = {"beta_min": number("beta_min", beta_min, 0), "beta_max": number("beta_max", beta_max, 0)}
    ordered("beta_min", p["beta_min"], "beta_max", p["beta_max"])
    return Process(p, VP)


def _sub_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -xp.expm1(-2 * vp_exponent(p, t))


def _sub_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -vp_exponent(p, t) - safe_log(xp, _sub_sigma(xp, p, t, u))


def _sub_time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    # e^lam = alpha / (1 - alpha^2) = 1 / (2 sinh A).
    return vp_time(xp, p, xp.arcsinh(0.5 * xp.exp(-lam)))


def _sub_dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return 2 * vp_half_beta(p, t) * xp.exp(-2 * vp_exponent(p, t))


def _sub_ends(xp: Any, p: Any) -> tuple[Any, Any]:
    return _sub_time_of_log_snr(xp, p, xp.asarray(-math.log(LEAST_NOISE))), 1.0


SUB_VP = Family(
    "sub_vp",
    SUB_VARIANCE_PRESERVING,
    _vp_alpha,
    _sub_sigma,
    _sub_log_snr,
    _sub_time_of_log_snr,
    _vp_dalpha,
    _sub_dsigma,
    _sub_ends,
)


def sub_vp(beta_min: Scalar = 0.1, beta_max: Scalar = 20.0) -> Process:
    """Sub-variance preserving: the alpha of `vp` with less noise.   sigma = 1 - alpha^2

    Args: beta_min: > 0.   beta_max: > beta_min.
    Raises: ValueError: a concrete parameter out of range.
    Reference: arXiv:2011.13456, Eq. 29.

    Example:
        >>> p = sub_vp()
        >>> float(p.sigma(0.3) + p.alpha(0.3) ** 2)
        1.0
    """
    return Process(vp(beta_min, beta_max).params, SUB_VP)


# -------------------------------------------------------------------------------------------------------- cosine


def _cosine_alpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.sin(0.5 * math.pi * u)


def _cosine_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.sin(0.5 * math.pi * t)


def _cosine_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return safe_log(xp, _cosine_alpha(xp, p, t, u)) - safe_log(xp, _cosine_sigma(xp, p, t, u))


def angle_of_log_snr(xp: Any, lam: Any) -> Any:
    """`theta = atan(sigma / alpha)` in [0, pi/2], without overflow at either end."""
    return xp.arctan2(xp.exp(xp.minimum(-lam, 0.0)), xp.exp(xp.minimum(lam, 0.0)))


def _cosine_time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    return (2 / math.pi) * angle_of_log_snr(xp, lam)


def _cosine_dalpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -0.5 * math.pi * xp.sin(0.5 * math.pi * t)


def _cosine_dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return 0.5 * math.pi * xp.sin(0.5 * math.pi * u)


def _cosine_ends(xp: Any, p: Any) -> tuple[Any, Any]:
    return 2 / math.pi * math.atan(LEAST_NOISE), 2 / math.pi * math.atan(MOST_NOISE)


COSINE = Family(
    "cosine",
    VARIANCE_PRESERVING,
    _cosine_alpha,
    _cosine_sigma,
    _cosine_log_snr,
    _cosine_time_of_log_snr,
    _cosine_dalpha,
    _cosine_dsigma,
    _cosine_ends,
)


def cosine() -> Process:
    """The cosine process.   alpha = cos(pi t / 2),  sigma = sin(pi t / 2)
    Reference: arXiv:2102.09672, Eq. 17 (offset s = 0); arXiv:2202.00512, Section 2.

    Example:
        >>> p = cosine()
        >>> float(p.alpha(1.0)), float(p.sigma(0.0))
        (0.0, 0.0)
    """
    return Process({}, COSINE)


# ------------------------------------------------------------------------------------------------------- sigmoid
# With s = start / tau, e = end / tau, L = e - s, w = s + t L, the differences of logistic functions are exactly
#   sigmoid(e) - sigmoid(w) = sinh(u L / 2) / (2 cosh(e / 2) cosh(w / 2)), and so on for the other two.


def _sigmoid_parts(p: Any, t: Any, u: Any) -> tuple[Any, Any, Any, Any]:
    s, e = p["start"] / p["tau"], p["end"] / p["tau"]
    return s, e, e - s, u * s + t * e


def _sigmoid_alpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    s, _, width, w = _sigmoid_parts(p, t, u)
    return safe_sqrt(xp.sinh(0.5 * u * width) / xp.sinh(0.5 * width) * (xp.cosh(0.5 * s) / xp.cosh(0.5 * w)), xp)


def _sigmoid_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    _, e, width, w = _sigmoid_parts(p, t, u)
    return safe_sqrt(xp.sinh(0.5 * t * width) / xp.sinh(0.5 * width) * (xp.cosh(0.5 * e) / xp.cosh(0.5 * w)), xp)


def _sigmoid_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return safe_log(xp, _sigmoid_alpha(xp, p, t, u)) - safe_log(xp, _sigmoid_sigma(xp, p, t, u))


def _sigmoid_time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    s, e, width, _ = _sigmoid_parts(p, 0.0, 1.0)
    ratio = xp.exp(2 * lam) * xp.cosh(0.5 * e) / xp.cosh(0.5 * s)
    return xp.log1p(2 * xp.sinh(0.5 * width) / (ratio + xp.exp(-0.5 * width))) / width


def _sigmoid_rate(xp: Any, p: Any, t: Any, u: Any) -> Any:
    """`-d(alpha^2)/dt = d(sigma^2)/dt`."""
    s, e, width, w = _sigmoid_parts(p, t, u)
    return 0.5 * width * xp.cosh(0.5 * e) * xp.cosh(0.5 * s) / (xp.sinh(0.5 * width) * xp.cosh(0.5 * w) ** 2)


def _sigmoid_dalpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -0.5 * _sigmoid_rate(xp, p, t, u) / _sigmoid_alpha(xp, p, t, u)


def _sigmoid_dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return 0.5 * _sigmoid_rate(xp, p, t, u) / _sigmoid_sigma(xp, p, t, u)


def _sigmoid_ends(xp: Any, p: Any) -> tuple[Any, Any]:
    bound = [_sigmoid_time_of_log_snr(xp, p, xp.asarray(-math.log(s))) for s in (LEAST_NOISE, MOST_NOISE)]
    return bound[0], bound[1]


SIGMOID = Family(
    "sigmoid",
    VARIANCE_PRESERVING,
    _sigmoid_alpha,
    _sigmoid_sigma,
    _sigmoid_log_snr,
    _sigmoid_time_of_log_snr,
    _sigmoid_dalpha,
    _sigmoid_dsigma,
    _sigmoid_ends,
)


def sigmoid(start: Scalar = -3.0, end: Scalar = 3.0, tau: Scalar = 1.0) -> Process:
    """The sigmoid process.   alpha^2 = (S(1) - S(t)) / (S(1) - S(0)),  S(t) = sigmoid((start + t (end - start)) / tau)

    Args: start: < end.   tau: > 0, a temperature; (end - start) / tau at most 80, beyond that float32 overflows.
    Raises: ValueError: a concrete parameter out of range.
    Reference: arXiv:2212.11972, Algorithm 1.

    Example:
        >>> p = sigmoid()
        >>> round(float(p.alpha(0.5) ** 2), 12), float(p.alpha(1.0))
        (0.5, 0.0)
    """
    p = {"start": number("start", start), "end": number("end", end), "tau": number("tau", tau, 0)}
    ordered("start", p["start"], "end", p["end"])
    if not any(isinstance(v, jax.core.Tracer) for v in p.values()) and np.any((p["end"] - p["start"]) / p["tau"] > 80):
        raise ValueError(f"(end - start) / tau must be at most 80; got start={start}, end={end}, tau={tau}: raise tau")
    return Process(p, SIGMOID)


# ---------------------------------------------------------------------------------- alpha = 1: VE and EDM


def _one(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.ones_like(t)


def _zero(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.zeros_like(t)


def _ve_log_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return u * xp.log(p["sigma_min"]) + t * xp.log(p["sigma_max"])


def _ve_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.exp(_ve_log_sigma(xp, p, t, u))


def _ve_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -_ve_log_sigma(xp, p, t, u)


def _ve_time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    return -(lam + xp.log(p["sigma_min"])) / xp.log(p["sigma_max"] / p["sigma_min"])


def _ve_dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.log(p["sigma_max"] / p["sigma_min"]) * _ve_sigma(xp, p, t, u)


def _whole(xp: Any, p: Any) -> tuple[Any, Any]:
    return 0.0, 1.0


VE = Family("ve", UNIT, _one, _ve_sigma, _ve_log_snr, _ve_time_of_log_snr, _zero, _ve_dsigma, _whole)


def ve(sigma_min: Scalar = 0.01, sigma_max: Scalar = 50.0) -> Process:
    """Variance exploding.   alpha = 1,  sigma = sigma_min^(1 - t) sigma_max^t

    Args: sigma_min: > 0, what `t = 0` still carries.   sigma_max: > sigma_min; the prior starts there.
    Raises: ValueError: a concrete parameter out of range.
    Reference: arXiv:2011.13456, Eq. 30.

    Example:
        >>> p = ve(0.01, 100.0)
        >>> round(float(p.sigma(0.5)), 12)
        1.0
    """
    p = {"sigma_min": number("sigma_min", sigma_min, 0), "sigma_max": number("sigma_max", sigma_max, 0)}
    ordered("sigma_min", p["sigma_min"], "sigma_max", p["sigma_max"])
    return Process(p, VE)


def _edm_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return p["sigma_max"] * t


def _edm_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -xp.log(p["sigma_max"]) - safe_log(xp, t)


def _edm_time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    return xp.exp(-lam) / p["sigma_max"]


def _edm_dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return p["sigma_max"] * xp.ones_like(t)


def _edm_ends(xp: Any, p: Any) -> tuple[Any, Any]:
    return p["sigma_min"] / p["sigma_max"], 1.0


EDM = Family("edm", UNIT, _one, _edm_sigma, _edm_log_snr, _edm_time_of_log_snr, _zero, _edm_dsigma, _edm_ends)


def edm(sigma_min: Scalar = 0.002, sigma_max: Scalar = 80.0) -> Process:
    """EDM's sigma(t) = t, with time rescaled to [0, 1].   alpha = 1,  sigma = sigma_max t

    Args: sigma_min: > 0, bounds grids only (`ends`).   sigma_max: > sigma_min; the prior starts there.
    Raises: ValueError: a concrete parameter out of range.
    Reference: arXiv:2206.00364, Table 1.

    Example:
        >>> p = edm()
        >>> float(p.sigma(0.5)), float(p.sigma(0.0))
        (40.0, 0.0)
    """
    return Process(ve(sigma_min, sigma_max).params, EDM)


# ------------------------------------------------------------------------------------------------ rectified flow


def _rectified_alpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return u


def _rectified_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return t


def _rectified_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return safe_log(xp, u) - safe_log(xp, t)


def _rectified_time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    noise, data = xp.exp(xp.minimum(-lam, 0.0)), xp.exp(xp.minimum(lam, 0.0))
    return noise / (noise + data)


def _minus_one(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -xp.ones_like(t)


def _rectified_ends(xp: Any, p: Any) -> tuple[Any, Any]:
    return LEAST_NOISE / (1 + LEAST_NOISE), MOST_NOISE / (1 + MOST_NOISE)


RECTIFIED = Family(
    "rectified",
    LINEAR,
    _rectified_alpha,
    _rectified_sigma,
    _rectified_log_snr,
    _rectified_time_of_log_snr,
    _minus_one,
    _one,
    _rectified_ends,
)


def rectified() -> Process:
    """Rectified flow, the straight path.   alpha = 1 - t,  sigma = t
    Reference: arXiv:2209.03003, Eq. 1 (our t is 1 - theirs).

    Example:
        >>> p = rectified()
        >>> float(p.log_snr(0.5)), float(p.time_of_log_snr(0.0))
        (0.0, 0.5)
    """
    return Process({}, RECTIFIED)
