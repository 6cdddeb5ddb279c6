"""Runge-Kutta methods: of second order in sigma / alpha, with churn too, and explicit ones in t on the probability flow."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffjax import numerics as nu
from diffjax.solvers import table
from diffjax.solvers.checks import check_number
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
        check_number(name, value)
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


def edm_rk2(process: Process, grid: Any, alpha: Any = 0.5, *, inverse: bool = False) -> Solver:
    """The second-order Runge-Kutta methods of `d(x / alpha) = eps d(sigma / alpha)`; two evaluations a step.

    x_s / alpha_s = x_t / alpha_t + (r_s - r_t) ((1 - 1 / (2 a)) eps_t + 1 / (2 a) eps_m),   r = sigma / alpha
    at r_m = r_t + a (r_s - r_t): a = 1 is `heun`, 1/2 the midpoint method, 2/3 Ralston's. With a < 1 the step to sigma = 0
    is of second order too. A step that begins or ends at alpha = 0 is `ddim`.

    Args: process: Gaussian.   grid: [n + 1].   alpha: the place of the second evaluation, in (0, 1].   inverse: the grid
    increases.
    Returns: a table of at most 2 n rows, one state, one value.
    Raises: ValueError: bad grid or alpha.
    Reference: Karras et al. 2022, arXiv:2206.00364, Algorithm 3.
    """
    check_number("alpha, the place of the second evaluation in the step,", alpha, high=1.0, above=True)
    k = table.nodes(process, grid, inverse, alpha)
    xp = k.xp
    usable = (k.alpha_t > 0) & (k.alpha_s > 0) & (k.finite | (alpha < 1))
    a_t, a_s, s_t, s_s = (xp.where(usable, c, 1.0) for c in (k.alpha_t, k.alpha_s, k.sigma_t, k.sigma_s))
    rise = xp.where(usable, s_s / a_s - s_t / a_t, -0.5)
    t_m = xp.where(usable, process.time_of_log_snr(-xp.log(s_t / a_t + alpha * rise)), k.s)
    a_m = xp.where(usable, process.alpha(t_m), 1.0)
    both, zero = lambda a, b: table.interleave(xp, a, b), xp.zeros_like(rise)
    first = lambda a, b: xp.where(usable, a, b)
    return table.build(
        "edm_rk2", k,
        t=both(k.t, t_m),
        u=(both(first(0.0, k.alpha_s), zero), both(first(1.0, k.sigma_s), zero + 1)),
        qx=(both(first(a_m / a_t, 0.0), first(a_s / a_m, 1.0)),),
        qd=(both(zero, first(a_s * rise * (1 - 1 / (2 * alpha) - alpha), 0.0)),),
        qn=both(first(a_m * alpha * rise, 1.0), first(a_s * rise / (2 * alpha), 0.0)),
        accept=both(~usable, usable),
        skip=both(~usable & False, ~usable),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- methods in t

# Butcher tableaus: a[i][j] weighs stage j in the point of stage i, which is at c_i = sum_j a[i][j]; b weighs the stages.
MIDPOINT = ((), (1 / 2,)), (0, 1)
TRAPEZOID = ((), (1,)), (1 / 2, 1 / 2)
CLASSIC = ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def flow_midpoint(process: Process, grid: Any, *, inverse: bool = False) -> Solver:
    """The midpoint method on the probability-flow ODE in t; two evaluations a step.   x_s = x_t + (s - t) u_m

    u = alpha' x0 + sigma' eps,  u_m = u(x_t + (s - t) / 2 u_t, (t + s) / 2)

    Args: process: Gaussian; the natural one is rectified flow, which runs from t = 1 to t = 0.   grid: [n + 1].   inverse:
    the grid increases.
    Returns: a table of 2 n rows, one state, one value.
    Raises: ValueError: bad grid, or an evaluation where alpha' or sigma' is infinite (for this method at the start of a step).
    Reference: Lipman et al. 2023, arXiv:2210.02747, Section 6.
    """
    return _explicit("flow_midpoint", process, grid, MIDPOINT, inverse)


def flow_heun(process: Process, grid: Any, *, inverse: bool = False) -> Solver:
    """Heun's method on the probability-flow ODE in t; two evaluations a step.   x_s = x_t + (s - t) (u_t + u_s) / 2

    Args, Returns, Raises: as `flow_midpoint`; the end of a step is evaluated too, which excludes t = 0 where sigma' is
    infinite (`vp`): use `heun` there, or stop above 0.
    Reference: Ma et al. 2024, arXiv:2401.08740.
    """
    return _explicit("flow_heun", process, grid, TRAPEZOID, inverse)


def flow_rk4(process: Process, grid: Any, *, inverse: bool = False) -> Solver:
    """The classic fourth-order Runge-Kutta method on the probability-flow ODE in t; four evaluations a step.

    x_s = x_t + (s - t) (u_1 + 2 u_2 + 2 u_3 + u_4) / 6, with u_2 and u_3 at the middle of the step and u_4 at its end

    Args, Returns, Raises: as `flow_heun`, with 4 n rows and three values.
    Reference: Lipman et al. 2023, arXiv:2210.02747, Section 6.

    Example:
        >>> from diffjax import processes, times
        >>> flow_rk4(processes.rectified(), times.uniform(3)).evaluations
        12
    """
    return _explicit("flow_rk4", process, grid, CLASSIC, inverse)


def _explicit(name: str, process: Process, grid: Any, tableau: tuple, inverse: bool) -> Solver:
    """An explicit Runge-Kutta method in t: one row a stage, of which the last one moves the state."""
    a, b = tableau
    k = table.nodes(process, grid, inverse)
    xp = k.xp
    h, stages = k.s - k.t, len(b)
    each = lambda columns: xp.stack([xp.asarray(c, h.dtype) + 0 * h for c in columns], axis=1).reshape(-1)
    t = each([k.s if sum(row) == 1 else k.t + sum(row) * h for row in a])
    weight = lambda row, j: row[j] if 0 <= j < len(row) else 0.0
    stage = range(stages)
    last = np.arange(stages * h.shape[0]) % stages == stages - 1
    return table.build(
        name, k, t=t,
        pd=tuple(each([weight(a[i], i - 1 - j) * h for i in stage]) for j in range(stages - 1)),
        u=(process.dalpha(t), process.dsigma(t)),
        qx=(1.0,),
        qd=tuple(each([weight(b, i - 1 - j) * h if i == stages - 1 else 0.0 for i in stage]) for j in range(stages - 1)),
        qn=each([b[-1] * h if i == stages - 1 else 0.0 for i in stage]),
        accept=last,
    )  # fmt: skip


CARDS = {
    "heun": Card(heun, "arXiv:2206.00364#Alg.1", "Heun in sigma / alpha", 2, 2, exact=("eps",)),
    "edm_rk2": Card(edm_rk2, "arXiv:2206.00364#Alg.3", "second-order Runge-Kutta in sigma / alpha", 2, 2, exact=("eps",)),
    "edm_heun": Card(edm_heun, "arXiv:2206.00364#Alg.2", "Heun with EDM's churn", 2, 2, noise=True),
    "flow_midpoint": Card(flow_midpoint, "arXiv:2210.02747#Sec.6", "midpoint in t on the probability flow", 2, 2),
    "flow_heun": Card(
        flow_heun, "arXiv:2401.08740", "Heun in t on the probability flow", 2, 2, flags=("finite_velocity",)
    ),
    "flow_rk4": Card(
        flow_rk4, "arXiv:2210.02747#Sec.6", "classic Runge-Kutta in t on the probability flow", 4, 4,
        flags=("finite_velocity",),
    ),
}  # fmt: skip
