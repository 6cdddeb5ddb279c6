"""Processes made from processes: shifted SNR, truncated time, zero terminal SNR.

The parameters are `(own, base parameters)`; the family wraps the base family by value, so it nests and hashes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffjax.numerics import safe_sqrt
from diffjax.processes import betas, gaussian
from diffjax.processes.curves import safe_log
from diffjax.processes.gaussian import number, vp_exponent, vp_half_beta, vp_time
from diffjax.types import Family, Process, Scalar

TINY = 1e-30  # stands in for exact ends where a derivative is a limit of the kind 0 * inf


@dataclasses.dataclass(frozen=True)
class _Around:
    """`f` with the base family bound; equal and hashed by value."""

    f: Callable[..., Any]
    base: Family

    def __call__(self, xp: Any, p: Any, *args: Any) -> Any:
        return self.f(self.base, xp, p, *args)

    def __hash__(self) -> int:  # the base's name is enough, and keeps nested families cheap to hash
        return hash((self.f, self.base.name))


def _wrap(name: str, base: Family, *functions: Callable[..., Any]) -> Family:
    return Family(f"{name}({base.name})", base.curve, *(_Around(f, base) for f in functions))


# --------------------------------------------------------------------------------------------------- shifted SNR


def _shifted_pair(base: Family, xp: Any, p: Any, t: Any, u: Any) -> tuple[Any, Any, Any]:
    shift, inner = p
    a, b = base.alpha(xp, inner, t, u), shift * base.sigma(xp, inner, t, u)
    return a, b, base.curve.norm(xp, a, b)


def _shifted_alpha(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    a, _, n = _shifted_pair(base, xp, p, t, u)
    return a / n


def _shifted_sigma(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    _, b, n = _shifted_pair(base, xp, p, t, u)
    return b / n


def _shifted_log_snr(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    return base.log_snr(xp, p[1], t, u) - xp.log(p[0])


def _shifted_time(base: Family, xp: Any, p: Any, lam: Any) -> Any:
    return base.time_of_log_snr(xp, p[1], lam + xp.log(p[0]))


def _shifted_derivatives(base: Family, xp: Any, p: Any, t: Any, u: Any) -> tuple[Any, Any]:
    # The norm is homogeneous, n = n_a a + n_b b, so both derivatives share W = a b' - b a' and nothing cancels.
    t, u = xp.maximum(t, TINY), xp.maximum(u, TINY)
    a, b, n = _shifted_pair(base, xp, p, t, u)
    n_a, n_b = base.curve.gradient(xp, a, b)
    w = (a * p[0] * base.dsigma(xp, p[1], t, u) - b * base.dalpha(xp, p[1], t, u)) / (n * n)
    return -n_b * w, n_a * w


def _shifted_dalpha(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    return _shifted_derivatives(base, xp, p, t, u)[0]


def _shifted_dsigma(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    return _shifted_derivatives(base, xp, p, t, u)[1]


def _shifted_ends(base: Family, xp: Any, p: Any) -> tuple[Any, Any]:
    return base.ends(xp, p[1])


@functools.cache
def _shifted_family(base: Family) -> Family:
    return _wrap(
        "shifted",
        base,
        _shifted_alpha,
        _shifted_sigma,
        _shifted_log_snr,
        _shifted_time,
        _shifted_dalpha,
        _shifted_dsigma,
        _shifted_ends,
    )


def shifted(process: Process, shift: Scalar) -> Process:
    """The same curve with more noise at every time.   sigma / alpha -> shift * sigma / alpha

    For `rectified` this is the time warp `t' = shift t / (1 + (shift - 1) t)`. For images of another resolution
    than the schedule was tuned for, `shift = resolution / reference`.
    Args: process: any.   shift: > 0.
    Raises: ValueError: a concrete shift that is not positive.
    Reference: arXiv:2403.03206, Eq. 23; arXiv:2301.11093, Section 2.2.

    Example:
        >>> float(shifted(gaussian.rectified(), 3.0).sigma(0.5))
        0.75
    """
    return Process((number("shift", shift, 0), process.params), _shifted_family(process.family))


# ------------------------------------------------------------------------------------------------ truncated time


def _inner(p: Any, t: Any, u: Any) -> tuple[Any, Any, Any]:
    stop, rest = p[0]["stop"], p[0]["rest"]
    span = 1 - rest - stop
    return stop + t * span, rest + u * span, span


def _truncated_alpha(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    return base.alpha(xp, p[1], *_inner(p, t, u)[:2])


def _truncated_sigma(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    return base.sigma(xp, p[1], *_inner(p, t, u)[:2])


def _truncated_log_snr(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    return base.log_snr(xp, p[1], *_inner(p, t, u)[:2])


def _truncated_time(base: Family, xp: Any, p: Any, lam: Any) -> Any:
    stop, rest = p[0]["stop"], p[0]["rest"]
    return (base.time_of_log_snr(xp, p[1], lam) - stop) / (1 - rest - stop)


def _truncated_dalpha(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    inner, rest, span = _inner(p, t, u)
    return span * base.dalpha(xp, p[1], inner, rest)


def _truncated_dsigma(base: Family, xp: Any, p: Any, t: Any, u: Any) -> Any:
    inner, rest, span = _inner(p, t, u)
    return span * base.dsigma(xp, p[1], inner, rest)


def _truncated_ends(base: Family, xp: Any, p: Any) -> tuple[Any, Any]:
    stop, rest = p[0]["stop"], p[0]["rest"]
    data, noise = (xp.clip((xp.asarray(t) - stop) / (1 - rest - stop), 0.0, 1.0) for t in base.ends(xp, p[1]))
    return data, noise


@functools.cache
def _truncated_family(base: Family) -> Family:
    return _wrap(
        "truncated",
        base,
        _truncated_alpha,
        _truncated_sigma,
        _truncated_log_snr,
        _truncated_time,
        _truncated_dalpha,
        _truncated_dsigma,
        _truncated_ends,
    )


def truncated(process: Process, start: Scalar = 1.0, stop: Scalar = 0.0) -> Process:
    """A part of a process as a process of its own.   t' = stop + t (start - stop)

    Args: process: any.   start: the time of its noise end.   stop: the time of its data end, 0 <= stop < start <= 1.
    Raises: ValueError: concrete times out of range or order.

    Example:
        >>> p = truncated(gaussian.rectified(), start=0.75, stop=0.25)
        >>> p.sigma(np.array([0.0, 1.0])).tolist()
        [0.25, 0.75]
    """
    start, stop = number("start", start), number("stop", stop)
    if not any(isinstance(v, jax.core.Tracer) for v in (start, stop)) and not 0 <= stop < start <= 1:
        raise ValueError(f"start and stop are times with 0 <= stop < start <= 1; got {start=}, {stop=}")
    # 1 - start is the leaf: as a float32 it keeps the digits that a float32 start would lose.
    return Process(({"stop": stop, "rest": 1 - start}, process.params), _truncated_family(process.family))


# --------------------------------------------------------------------------------------------- zero terminal SNR
# alpha = (e^-A(t) - e^-A(1)) / (1 - e^-A(1)) for VP and sub-VP; A(1) - A(t) has the factor u = 1 - t in closed form.


def _rest(xp: Any, p: Any, u: Any) -> tuple[Any, Any]:
    """`A(1) - A(t)` and `A(1)`."""
    total = 0.25 * (p["beta_max"] - p["beta_min"]) + 0.5 * p["beta_min"]
    return u * (0.25 * (2 - u) * (p["beta_max"] - p["beta_min"]) + 0.5 * p["beta_min"]), total


def _zero_alpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    rest, total = _rest(xp, p, u)
    return xp.expm1(rest) / xp.expm1(total)


def _zero_beta(xp: Any, p: Any, t: Any) -> Any:
    """`1 - alpha`."""
    return xp.expm1(-vp_exponent(p, t)) / xp.expm1(-_rest(xp, p, t)[1])


def _zero_dalpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return vp_half_beta(p, t) * xp.exp(-vp_exponent(p, t)) / xp.expm1(-_rest(xp, p, u)[1])


def _zero_time(xp: Any, p: Any, loss: Any) -> Any:
    """The time at which `1 - alpha` equals `loss`."""
    return vp_time(xp, p, -xp.log1p(loss * xp.expm1(-_rest(xp, p, loss)[1])))


def _zero_vp_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    loss = _zero_beta(xp, p, t)
    return safe_sqrt(loss * (1 + _zero_alpha(xp, p, t, u)), xp)


def _zero_vp_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return safe_log(xp, _zero_alpha(xp, p, t, u)) - safe_log(xp, _zero_vp_sigma(xp, p, t, u))


def _zero_vp_time(xp: Any, p: Any, lam: Any) -> Any:
    theta = gaussian.angle_of_log_snr(xp, lam)  # alpha = cos(theta), 1 - alpha = 2 sin(theta / 2)^2
    return _zero_time(xp, p, 2 * xp.sin(0.5 * theta) ** 2)


def _zero_vp_dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -_zero_dalpha(xp, p, t, u) * _zero_alpha(xp, p, t, u) / _zero_vp_sigma(xp, p, t, u)


def _zero_sub_sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return _zero_beta(xp, p, t) * (1 + _zero_alpha(xp, p, t, u))


def _zero_sub_log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return safe_log(xp, _zero_alpha(xp, p, t, u)) - safe_log(xp, _zero_sub_sigma(xp, p, t, u))


def _zero_sub_time(xp: Any, p: Any, lam: Any) -> Any:
    # alpha = e^-asinh(e^-lam / 2), as in `sub_vp`.
    return _zero_time(xp, p, -xp.expm1(-xp.arcsinh(0.5 * xp.exp(-lam))))


def _zero_sub_dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -2 * _zero_alpha(xp, p, t, u) * _zero_dalpha(xp, p, t, u)


def _ends_by(time: Callable[..., Any], xp: Any, p: Any) -> tuple[Any, Any]:
    lams = [-np.log(s) for s in (gaussian.LEAST_NOISE, gaussian.MOST_NOISE)]
    return time(xp, p, xp.asarray(float(lams[0]))), time(xp, p, xp.asarray(float(lams[1])))


def _zero_vp_ends(xp: Any, p: Any) -> tuple[Any, Any]:
    return _ends_by(_zero_vp_time, xp, p)


def _zero_sub_ends(xp: Any, p: Any) -> tuple[Any, Any]:
    return _ends_by(_zero_sub_time, xp, p)


ZERO_VP = Family(
    "zero_terminal_snr(vp)",
    gaussian.VP.curve,
    _zero_alpha,
    _zero_vp_sigma,
    _zero_vp_log_snr,
    _zero_vp_time,
    _zero_dalpha,
    _zero_vp_dsigma,
    _zero_vp_ends,
)
ZERO_SUB_VP = Family(
    "zero_terminal_snr(sub_vp)",
    gaussian.SUB_VP.curve,
    _zero_alpha,
    _zero_sub_sigma,
    _zero_sub_log_snr,
    _zero_sub_time,
    _zero_dalpha,
    _zero_sub_dsigma,
    _zero_sub_ends,
)
_ALREADY_ZERO = {gaussian.COSINE, gaussian.SIGMOID, gaussian.RECTIFIED, ZERO_VP, ZERO_SUB_VP}


def zero_terminal_snr(process: Process) -> Process:
    """The process with alpha shifted and scaled so that alpha(1) = 0.   alpha -> (alpha - alpha(1)) / (1 - alpha(1))

    On a discrete schedule this moves the knots, which is the published algorithm. A process that ends at alpha = 0 is
    returned as it is; a shifted process is rescaled inside.
    Args: process: `vp`, `sub_vp`, `from_betas`, `shifted` of these, or one that ends at alpha = 0 already.
    Raises: ValueError: a process whose alpha(1) cannot be made zero (`ve`, `edm`, a truncated or learned one).
    Reference: arXiv:2305.08891, Algorithm 1.

    Example:
        >>> p = zero_terminal_snr(gaussian.vp())
        >>> float(p.alpha(1.0)), float(p.alpha(0.0))
        (0.0, 1.0)
    """
    family, params = process.family, process.params
    if family in _ALREADY_ZERO:
        return process
    if family == gaussian.VP:
        return Process(params, ZERO_VP)
    if family == gaussian.SUB_VP:
        return Process(params, ZERO_SUB_VP)
    if family == betas.DISCRETE:
        return betas.rescaled(process)
    around = family.alpha
    if isinstance(around, _Around) and around.f is _shifted_alpha:
        return shifted(zero_terminal_snr(Process(params[1], around.base)), params[0])
    raise ValueError(
        f"process {family.name!r} cannot end at alpha = 0; accepted: vp, sub_vp, from_betas and shifted forms of them; "
        "rescale before `truncated`"
    )
