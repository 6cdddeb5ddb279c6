"""A discrete schedule as a process in continuous time: the angle `theta = atan2(sigma, alpha)`, linear between knots.

Step `k` of the K steps that a network was trained on sits at `t = (k + 1) / K`; `t = 0` is clean data. Both `theta` and
`pi / 2 - theta` are stored, and the place between two knots is measured from the nearer end of [0, 1], so that neither
sigma near data nor alpha near noise is a difference of close numbers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.processes.curves import VARIANCE_PRESERVING, safe_log
from diffjax.processes.gaussian import MOST_NOISE, angle_of_log_snr
from diffjax.types import Family, Process, PyTree


def _place(xp: Any, p: Any, t: Any, u: Any) -> tuple[Any, Any, Any, Any]:
    """Index of the nearer knot, signed fraction towards the next one, and the interval between them."""
    steps = p["gap"].shape[0]
    late = u < t
    near = xp.where(late, u, t) * steps
    whole = xp.clip(xp.floor(near), 0, steps - 1)
    fraction = near - whole
    i = whole.astype(int)
    return xp.where(late, steps - i, i), xp.where(late, -fraction, fraction), xp.where(late, steps - 1 - i, i), steps


def _angle(xp: Any, p: Any, t: Any, u: Any) -> Any:
    knot, fraction, interval, _ = _place(xp, p, t, u)
    return p["theta"].astype(t.dtype)[knot] + fraction * p["gap"].astype(t.dtype)[interval]


def _complement(xp: Any, p: Any, t: Any, u: Any) -> Any:
    knot, fraction, interval, _ = _place(xp, p, t, u)
    return p["complement"].astype(t.dtype)[knot] - fraction * p["gap"].astype(t.dtype)[interval]


def _rate(xp: Any, p: Any, t: Any, u: Any) -> Any:
    _, _, interval, steps = _place(xp, p, t, u)
    return steps * p["gap"].astype(t.dtype)[interval]


def _alpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.sin(_complement(xp, p, t, u))


def _sigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return xp.sin(_angle(xp, p, t, u))


def _log_snr(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return safe_log(xp, _alpha(xp, p, t, u)) - safe_log(xp, _sigma(xp, p, t, u))


def _time_of_log_snr(xp: Any, p: Any, lam: Any) -> Any:
    theta, complement, gap = (p[name].astype(lam.dtype) for name in ("theta", "complement", "gap"))
    steps = gap.shape[0]
    angle, rest = angle_of_log_snr(xp, lam), angle_of_log_snr(xp, -lam)
    i = xp.clip(xp.searchsorted(theta, angle, side="right") - 1, 0, steps - 1)
    up, down = (angle - theta[i]) / gap[i], (rest - complement[i + 1]) / gap[i]
    return xp.where(lam > 0, (i.astype(lam.dtype) + up) / steps, 1 - ((steps - 1 - i).astype(lam.dtype) + down) / steps)


def _dalpha(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return -_rate(xp, p, t, u) * xp.cos(_complement(xp, p, t, u))


def _dsigma(xp: Any, p: Any, t: Any, u: Any) -> Any:
    return _rate(xp, p, t, u) * xp.cos(_angle(xp, p, t, u))


def _ends(xp: Any, p: Any) -> tuple[Any, Any]:
    steps = p["gap"].shape[0]
    bound = _time_of_log_snr(xp, p, xp.asarray(-math.log(MOST_NOISE)))
    return 1 / max(steps, 2), xp.where(p["complement"][-1] > 0, 1.0, bound)


DISCRETE = Family(
    "from_betas",
    VARIANCE_PRESERVING,
    _alpha,
    _sigma,
    _log_snr,
    _time_of_log_snr,
    _dalpha,
    _dsigma,
    _ends,
)


def from_log_alphas(xp: Any, log_alpha: Any) -> Process:
    """The process through `log alpha` [K] (decreasing, negative; `-inf` only last) at the times `(k + 1) / K`."""
    return _through(xp, xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha)))


def _through(xp: Any, alpha: Any, sigma: Any) -> Process:
    """The process through the points `(alpha, sigma)` [K] of the circle."""
    zero, right = xp.zeros_like(alpha[:1]), xp.full_like(alpha[:1], 0.5 * np.pi)
    theta = xp.concatenate([zero, xp.arctan2(sigma, alpha)])
    complement = xp.concatenate([right, xp.arctan2(alpha, sigma)])
    # Differences of the smaller of the two angles lose the fewest digits.
    gap = xp.where(theta[1:] < 0.25 * np.pi, theta[1:] - theta[:-1], complement[:-1] - complement[1:])
    return Process({"theta": theta, "complement": complement, "gap": gap}, DISCRETE)


def from_betas(betas: Any) -> Process:
    """The process of a discrete schedule.   alpha((k + 1) / K)^2 = prod_{j <= k} (1 - beta_j),  alpha(0) = 1

    Between knots `atan(sigma / alpha)` is linear in `t`. A schedule is learned through `betas`, not through the knots.
    Args: betas: [K], in (0, 1]; only the last may be 1 (zero terminal SNR).
    Raises: ValueError: not one axis, empty, or a value outside (0, 1].
    Reference: arXiv:2006.11239, Eq. 4.

    Example:
        >>> p = from_betas([0.5, 0.5])
        >>> (p.alpha(np.array([0.0, 0.5, 1.0])) ** 2).round(12).tolist()
        [1.0, 0.5, 0.25]
    """
    if isinstance(betas, jax.core.Tracer):
        return from_log_alphas(jnp, 0.5 * jnp.cumsum(jnp.log1p(-betas)))
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a non-empty sequence of numbers, [K]; got shape {betas.shape}")
    if not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
        raise ValueError(
            f"betas must lie in (0, 1), the last in (0, 1]; got values from {betas.min()} to {betas.max()}"
        )
    with np.errstate(divide="ignore"):
        return from_log_alphas(np, 0.5 * np.cumsum(np.log1p(-betas)))


def rescaled(process: Process) -> Process:
    """The discrete schedule with alpha shifted and scaled so that the last is zero."""
    theta, complement = process.params["theta"], process.params["complement"]
    xp = nu.namespace(theta, complement)
    # 1 - alpha = 2 sin(theta / 2)^2, and alpha - alpha_K is a product too: nothing near either end cancels.
    last, rest = complement[-1], complement[1:]
    scale = 2 * xp.sin(0.5 * theta[-1]) ** 2
    alpha = 2 * xp.sin(0.5 * (rest - last)) * xp.cos(0.5 * (rest + last)) / scale
    loss = 2 * xp.sin(0.5 * theta[1:]) ** 2 / scale
    return _through(xp, alpha, xp.sqrt(loss * (1 + alpha)))


def number_of_steps(process: Process) -> int:
    """K of a process from `from_betas`.   Raises: ValueError: another process."""
    if process.family is not DISCRETE and process.family != DISCRETE:
        raise ValueError(f"only a process from `from_betas` has integer steps; got {process.family.name!r}")
    return process.params["gap"].shape[-1]


def step_of_time(process: Process, t: PyTree) -> PyTree:
    """The time code of a network that was trained on K integer steps.   k = t K - 1

    Args: process: from `from_betas`.   t: times, any shape or pytree.
    Raises: ValueError: a process without integer steps.

    Example:
        >>> step_of_time(from_betas(np.full(4, 0.1)), np.array([0.25, 1.0])).tolist()
        [0.0, 3.0]
    """
    steps = number_of_steps(process)
    return jax.tree.map(lambda ti: ti * steps - 1, t)
