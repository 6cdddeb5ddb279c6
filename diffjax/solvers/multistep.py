"""DPM-Solver++ multistep and its stochastic forms: Taylor expansions of a kept prediction in lambda."""

from __future__ import annotations

from typing import Any

import jax

from diffjax import numerics as nu
from diffjax.solvers import table
from diffjax.solvers.adams import X0, or_ddim, ratio
from diffjax.solvers.checks import check_integer, check_inverse, check_number, is_zero
from diffjax.solvers.singlestep import phi, stages
from diffjax.types import Card, Process, Solver


def dpmpp(
    process: Process,
    grid: Any,
    order: int = 2,
    eta: Any = 0.0,
    *,
    heun: bool = False,
    s_noise: Any = 1.0,
    inverse: bool = False,
) -> Solver:
    """DPM-Solver++ and SDE-DPM-Solver++ multistep of order 1, 2 or 3; one evaluation a step.

    x_s = (sigma_s / sigma_t) e^{-eta h} x + alpha_s (1 - e^{-g}) D + sigma_s sqrt(1 - e^{-2 eta h}) z,   h = lam_s - lam_t,
    g = (1 + eta) h;   order 2: D = x0 + (x0 - x0_prev) h / (2 h_prev)

    This solves dx = [f x - (1 + eta) / 2 g^2 score] dt + sqrt(eta) g dW, exactly where x0 is constant. With eta = 0 order 1
    is `ddim`, with eta = 1 it is `ddpm`. The first steps build the order up; a step to or from sigma = 0 is first order, one from
    alpha = 0 forgets its start if eta > 0. Order 3 is the published update, whose second-difference term is half of the
    exact one, so that it converges with order 2; `dpmpp_3m_exact` has the exact one. For eta > 0 the mean and covariance
    of Gaussian data converge with order min(order, 2).

    Args: process: Gaussian.   grid: [n + 1].   order: 1, 2 or 3.   eta: >= 0, the noise, 1 for the reverse SDE.
    heun: in second-order steps replace the factor (1 - e^{-g}) / 2 of the difference by the exact 1 - (1 - e^{-g}) / g.
    s_noise: factor on the noise alone.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order - 1` values.
    Raises: ValueError: bad grid, order or eta; eta > 0 with inverse.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.vp()
        >>> dpmpp(p, times.log_snr(p, 20), order=2).evaluations
        20

    Reference: Lu et al. 2022, arXiv:2211.01095, Algorithm 2 and Appendix B.
    """
    check_integer("order", order, (1, 2, 3))
    k, decay, noise = _stochastic(process, grid, eta, s_noise, inverse)
    w = _weights(k, order, eta, heun, second_difference=0.5)
    return or_ddim(f"dpmpp({order})", k, k.sigma_t > 0, X0, (ratio(k) * decay,), w[1:order], w[0], noise)


def dpmpp_3m_exact(process: Process, grid: Any, *, inverse: bool = False) -> Solver:
    """DPM-Solver++ multistep that converges with order 3: the exact second difference, after two steps of DPM-Solver++ 2S.

    x_s = (sigma_s / sigma_t) x + alpha_s integral_0^h e^{tau - h} P(tau) dtau,  P the parabola through the last three x0

    Published third-order multistep updates halve the parabola's quadratic term and start at first order; either of the
    two alone holds the order at 2. From the third step on this is `exp_ab(order=3, value=X0)`.

    Args: process: Gaussian.   grid: [n + 1].   inverse: the grid increases.
    Returns: a table of at most n + 2 rows, one state, two values.
    Raises: ValueError: bad grid.
    Reference: Lu et al. 2022, arXiv:2211.01095, Appendix B; Hochbruck and Ostermann 2010, Section 2.
    """
    k = table.nodes(process, grid, inverse)
    xp = k.xp
    w = _weights(k, 3, 0.0, False, second_difference=1.0)
    zero, no = xp.zeros_like(w[0]), xp.zeros_like(k.finite)
    later = {
        "t": k.t, "px": (zero + 1,), "pd": (zero, zero), "u": (zero + 1, zero), "qx": (ratio(k),), "qd": tuple(w[1:]),
        "qn": w[0], "accept": ~no, "skip": no, "keep": ~no,
    }  # fmt: skip
    pair = [s | {"keep": no if i else ~no} for i, s in enumerate(stages(process, k, 2, registers=2, value=X0))]
    start = jax.tree.map(lambda *c: table.interleave(xp, *(a[:2] for a in c)), *pair)
    return table.build("dpmpp_3m_exact", k, **jax.tree.map(lambda a, b: xp.concatenate([a, b[2:]]), start, later))


def dpm_solver_sde(process: Process, grid: Any, order: int = 2, eta: Any = 1.0, *, s_noise: Any = 1.0) -> Solver:
    """SDE-DPM-Solver multistep of order 1 or 2, which keeps eps; one evaluation a step.

    x_s = (alpha_s / alpha_t) x - (1 + eta) sigma_s (e^h - 1) E + sqrt(eta) sigma_s sqrt(e^{2h} - 1) z,   h = lam_s - lam_t;
    order 2: E = eps + (eps - eps_prev) h / (2 h_prev)

    The SDE is that of `dpmpp`. Here the noise of a step grows without bound with h, and the next ones have to take it out
    again, so that large steps favour `dpmpp`. A step with an infinite lambda at one end is `ddim`.

    Args: process: Gaussian.   grid: [n + 1].   order: 1 or 2.   eta: >= 0, the noise, 1 for the reverse SDE.
    s_noise: factor on the noise alone.
    Returns: a table of n rows, one state, `order - 1` values.
    Raises: ValueError: bad grid, order or eta.
    Reference: Lu et al. 2022, arXiv:2211.01095, SDE-DPM-Solver.
    """
    check_integer("order", order, (1, 2))
    check_number("eta", eta)
    check_number("s_noise", s_noise)
    k = table.nodes(process, grid, options=(eta, s_noise))
    xp = k.xp
    only = lambda a, other: xp.where(k.finite, a, other)
    h = only(k.lam_s, 1.0) - only(k.lam_t, 0.0)
    whole = -(1 + eta) * k.sigma_s * xp.expm1(h)
    use, r0, _ = _spacing(k, order, h)
    share = xp.where(use[1], whole / (2 * r0), 0.0) if order == 2 else xp.zeros_like(h)
    noise = only(s_noise * k.sigma_s * nu.safe_sqrt(eta * xp.expm1(2 * h), xp), 0.0)
    return table.build(
        f"dpm_solver_sde({order})", k,
        u=(only(0.0, k.alpha_s), only(1.0, k.sigma_s)),
        qx=(only(k.alpha_s / only(k.alpha_t, 1.0), 0.0),),
        qd=(only(-share, 0.0),) * (order - 1),
        qn=only(whole + share, 1.0),
        noise=None if is_zero(eta) else noise,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- weights


def _stochastic(process: Process, grid: Any, eta: Any, s_noise: Any, inverse: bool) -> tuple[table.Nodes, Any, Any]:
    """The nodes, e^{-eta h}, and the deviation of the noise of every step (None where eta is concretely zero)."""
    check_number("eta", eta)
    check_number("s_noise", s_noise)
    k = table.nodes(process, grid, inverse, (eta, s_noise))
    if is_zero(eta):
        return k, 1.0, None
    check_inverse(inverse, "eta", eta)
    h = k.xp.where(k.finite, k.lam_s, 1.0) - k.xp.where(k.finite, k.lam_t, 0.0)
    infinite = k.xp.where(k.xp.asarray(eta, h.dtype) > 0, 0.0, 1.0)
    decay = k.xp.where(k.finite, k.xp.exp(-eta * h), infinite)
    gone = k.xp.where(k.finite, -k.xp.expm1(-2 * eta * h), 1 - infinite)
    return k, decay, s_noise * k.sigma_s * nu.safe_sqrt(gone, k.xp)


def _spacing(k: table.Nodes, order: int, h: Any) -> tuple[list[Any], Any, Any]:
    """Which past values a step may use, and the steps before it, relative to its own h."""
    xp = k.xp
    use = [*table.known(k, order), None, None][:3]
    lam = xp.where(xp.isfinite(k.lam_t), k.lam_t, 0.0)
    gaps, h0 = [], None
    for j in (1, 2):
        h0 = xp.where(use[j], table.past(k, lam, j - 1, 0.0) - table.past(k, lam, j, 0.0), h) if order > j else h
        gaps.append(h0 / h)
    return use, *gaps


def _weights(k: table.Nodes, order: int, eta: Any, heun: bool, second_difference: float) -> list[Any]:
    """The weights of x0 and the two before it in x_s.

    With d' and d'' / 2 the divided differences of x0 in units of h, newest first, the exact change is
    alpha_s [(1 - e^{-g}) x0 + p2 d' + 2 p3 d'' / 2],   p2 = 1 - (1 - e^{-g}) / g,   p3 = 1/2 - p2 / g.
    """
    xp = k.xp
    h = xp.where(k.finite, k.lam_s, 1.0) - xp.where(k.finite, k.lam_t, 0.0)
    g = (1 + eta) * h
    whole = k.alpha_s * xp.where(k.finite, -xp.expm1(-g), 1.0)  # to sigma = 0, or from alpha = 0
    use, r0, r1 = _spacing(k, order, h)
    zero = xp.zeros_like(whole)
    w = [whole, zero, zero]
    if order == 1:
        return w
    p2 = -phi(xp, -g)
    low = xp.where(use[1], (k.alpha_s * p2 if heun else whole / 2) / r0, 0.0)
    if order == 2:
        return [whole + low, -low, zero]
    first, second = k.alpha_s * p2, k.alpha_s * (0.5 - p2 / g) * 2 * second_difference
    # d' = f01 + r0 b and d'' / 2 = b, with b = (f01 - f12) / (r0 + r1), f01 = (m0 - m1) / r0, f12 = (m1 - m2) / r1
    bend = (first * r0 + second) / (r0 + r1)
    on01, on12 = (first + bend) / r0, -bend / r1
    third = lambda a, b: xp.where(use[2], a, b)
    return [whole + third(on01, low), third(on12 - on01, -low), third(-on12, 0.0)]


_ODE, _SDE = "DPM-Solver++ multistep, data prediction", "SDE-DPM-Solver++ multistep, data prediction"
_PAPER = "arXiv:2211.01095"
CARDS = {
    "dpmpp_1": Card(table.options(dpmpp, order=1), f"{_PAPER}#Alg.2", _ODE, 1, 1, exact=("x0", "eps")),
    "dpmpp_2m": Card(table.options(dpmpp, order=2), f"{_PAPER}#Alg.2", _ODE, 2, 1, exact=("x0",)),
    "dpmpp_3m": Card(table.options(dpmpp, order=3), f"{_PAPER}#App.B", _ODE, 2, 1, exact=("x0",)),
    "dpmpp_3m_exact": Card(
        dpmpp_3m_exact, f"{_PAPER}#App.B", "DPM-Solver++ 3M with an exact parabola and 2S start", 3, 1, exact=("x0",)
    ),
    "dpmpp_sde_1": Card(table.options(dpmpp, order=1, eta=1.0), _PAPER, _SDE, 1, 1, noise=True),
    "dpmpp_2m_sde": Card(table.options(dpmpp, order=2, eta=1.0), _PAPER, _SDE, 2, 1, noise=True),
    "dpmpp_2m_sde_heun": Card(table.options(dpmpp, order=2, eta=1.0, heun=True), _PAPER, _SDE, 2, 1, noise=True),
    "dpmpp_3m_sde": Card(table.options(dpmpp, order=3, eta=1.0, heun=True), _PAPER, _SDE, 2, 1, noise=True),
    "dpm_solver_sde_1": Card(
        table.options(dpm_solver_sde, order=1), _PAPER, "SDE-DPM-Solver, noise prediction", 1, 1, noise=True
    ),
    "dpm_solver_sde_2m": Card(
        table.options(dpm_solver_sde, order=2), _PAPER, "SDE-DPM-Solver multistep, noise prediction", 2, 1, noise=True
    ),
}
