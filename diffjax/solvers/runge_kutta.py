"""Heun's method in sigma / alpha and its stochastic form with churn."""

from __future__ import annotations

from typing import Any

from diffjax import numerics as nu
from diffjax.solvers import table
from diffjax.types import Card, Process, Solver


def heun(process: Process, grid: Any, *, inverse: bool = False) -> Solver:
    """Heun's second-order method on `d(x / alpha) = eps d(sigma / alpha)`; two evaluations a step.

    x' = (alpha_s / alpha_t) x + d_s eps_t,   x_s = x' + d_s (eps_s - eps_t) / 2,   d_s = alpha_s (r_s - r_t),  r = sigma / alpha

    A step that begins at alpha = 0 or ends at sigma = 0 is the first-order one (`ddim`), as in EDM.

    Args: process: Gaussian.   grid: [n + 1].   inverse: the grid increases.
    Returns: a table of at most 2 n rows, one state, one value.
    Raises: ValueError: bad grid.

    Example:
        >>> from diffjax import processes, times
        >>> heun(processes.edm(), times.karras(processes.edm(), 18)).evaluations
        35

    Reference: Karras et al. 2022, arXiv:2206.00364, Algorithm 1.
    """
    k = table.nodes(process, grid, inverse)
    return _heun("heun", k, k.t, k.alpha_t, k.sigma_t, start=(1.0, None))


def edm_heun(
    process: Process,
    grid: Any,
    s_churn: Any = 40.0,
    s_min: Any = 0.05,
    s_max: Any = 50.0,
    s_noise: Any = 1.003,
) -> Solver:
    """Heun with churn: every step first raises the noise from r = sigma / alpha to r (1 + gamma).

    gamma = min(s_churn / n, sqrt(2) - 1) where s_min <= r <= s_max;   x_hat / alpha_hat = x / alpha + s_noise sqrt(r_hat^2 - r^2) z

    Args: process: Gaussian, able to represent r_hat (the first step from t = 1 of a process that ends there does not
    churn).   grid: [n + 1].   s_churn, s_min, s_max, s_noise: EDM's parameters, the defaults are those for ImageNet-64.
    Returns: a table of at most 2 n rows, one state, one value, shared noise.
    Raises: ValueError: bad grid or a negative parameter.
    Reference: Karras et al. 2022, arXiv:2206.00364, Algorithm 2 and Table 5.
    """
    for name, value in {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise}.items():
        if not isinstance(value, (int, float)):
            continue
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0; got {value}")
    k = table.nodes(process, grid, options=(s_churn, s_min, s_max, s_noise))
    xp = k.xp
    r = xp.exp(-k.lam_t)
    gamma = xp.where((r >= s_min) & (r <= s_max), xp.minimum(s_churn / k.t.shape[0], 2**0.5 - 1), 0.0)
    churned = (gamma > 0) & k.finite
    lam = xp.where(k.finite, k.lam_t, 0.0)
    t_hat = xp.where(churned, process.time_of_log_snr(lam - xp.log1p(gamma)), k.t)
    # the noise level really reached, should the process end before r_hat
    lam_hat = xp.where(churned, process.log_snr(t_hat), lam)
    alpha_hat, sigma_hat = process.alpha(t_hat), process.sigma(t_hat)
    rise = nu.safe_sqrt(xp.where(churned, -xp.expm1(2 * (lam_hat - lam)), 0.0), xp)  # sqrt(1 - r^2 / r_hat^2)
    ratio = xp.where(k.finite, alpha_hat / xp.where(k.finite, k.alpha_t, 1.0), 1.0)
    return _heun("edm_heun", k, t_hat, alpha_hat, sigma_hat, start=(ratio, s_noise * sigma_hat * rise))


def _heun(name: str, k: table.Nodes, t: Any, alpha: Any, sigma: Any, start: tuple[Any, Any]) -> Solver:
    """Two rows a step from `y = start[0] x + start[1] z` at time t; both ends finite, else one first-order row."""
    xp = k.xp
    ratio = xp.where(k.finite, k.alpha_s / xp.where(k.finite, alpha, 1.0), 0.0)
    d = xp.where(k.finite, k.sigma_s - ratio * sigma, 1.0)  # alpha_s (r_s - r_t)
    zero, both = xp.zeros_like(d), lambda a, b: table.interleave(xp, a, b)
    column = lambda c: xp.broadcast_to(xp.asarray(c, d.dtype), d.shape)
    shared = {}
    if start[1] is not None:
        shared = {"pz": both(column(start[1]), zero), "qz": both(ratio * start[1], zero)}
    u0 = xp.where(k.finite, 0.0, k.alpha_s)  # a first-order row returns alpha_s x0 + sigma_s eps as its value
    u1 = xp.where(k.finite, 1.0, k.sigma_s)
    half = xp.where(k.finite, d / 2, 0.0)
    return table.build(
        name, k,
        t=both(t, k.s),
        px=(both(column(start[0]), zero + 1),),
        u=(both(u0, zero), both(u1, zero + 1)),
        qx=(both(ratio * start[0], zero + 1),),
        qd=(both(zero, -half),),
        qn=both(d, half),
        accept=both(~k.finite, k.finite),
        skip=both(~k.finite & False, ~k.finite),
        **shared,
    )  # fmt: skip


CARDS = {
    "heun": Card(heun, "arXiv:2206.00364#Alg.1", "Heun in sigma / alpha", 2, 2, exact=("eps",)),
    "edm_heun": Card(edm_heun, "arXiv:2206.00364#Alg.2", "Heun with EDM's churn", 2, 2, noise=True),
}
