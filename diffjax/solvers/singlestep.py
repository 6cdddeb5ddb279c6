"""Exponential singlestep solvers: DPM-Solver and DPM-Solver++ of orders 1 to 3, and their ancestral forms."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffjax import numerics as nu
from diffjax.solvers import table
from diffjax.solvers.adams import EPS, X0, Value
from diffjax.solvers.checks import check_inverse, check_noise_fits, check_number, is_zero
from diffjax.types import Card, Process, Solver

NODES = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}  # the intermediate lambdas of a step, as fractions of it


def exp_rk(
    process: Process,
    grid: Any,
    order: int | tuple[int, ...] = 2,
    value: Value = EPS,
    eta: Any = 0.0,
    *,
    s_noise: Any = 1.0,
    inverse: bool = False,
) -> Solver:
    """Exponential Runge-Kutta steps in lambda on eps (DPM-Solver) or x0 (DPM-Solver++); `order` evaluations a step.

    x_s = (alpha_s / alpha_t) x - sigma_s integral_0^h e^{h - tau} eps(lam_t + tau) dtau,   h = lam_s - lam_t
    order 2: the integral is (e^h - 1) eps(lam_t + h/2), the midpoint rule in log(sigma / alpha), also known as DPM2
    order 3: it is (e^h - 1) eps_t + (3/2) ((e^h - 1) / h - 1) (eps(lam_t + 2h/3) - eps_t), with a second node at h/3

    x0 takes the place of eps when alpha is exchanged with sigma and h with -h. Order 1 is `ddim`. With eta every step
    goes down to r_down and then back up by fresh noise, r = sigma / alpha (see `ancestral`), which converges to the
    reverse SDE with order 1 whatever the order of the steps. A step with an infinite lambda at one end, or whose r_down is
    zero, is first order.

    Args: process: Gaussian.   grid: [n + 1].   order: 1, 2 or 3, or one of them for every step.   value: `EPS` or `X0`.
    eta: >= 0, at most 1 on any grid.   s_noise: factor on the noise alone.   inverse: the grid increases.
    Returns: a table of at most sum(order) rows, one state, `max(order) - 1` values.
    Raises: ValueError: bad grid, order, value or eta; eta > 0 with inverse.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.vp()
        >>> exp_rk(p, times.log_snr(p, 6, start=0.99, stop=0.01), order=3).evaluations
        18

    Reference: Lu et al. 2022, arXiv:2206.00927, Algorithms 1 and 2; arXiv:2211.01095, Algorithm 1.
    """
    if value not in (EPS, X0):
        raise ValueError(f"value must be EPS or X0; got {getattr(value, 'name', value)!r}. exp_ab also takes V")
    check_number("eta", eta)
    check_number("s_noise", s_noise)
    k = table.nodes(process, grid, inverse, (eta, s_noise))
    n = k.t.shape[0]
    orders = tuple(order) if isinstance(order, (tuple, list)) else (order,) * n
    if len(orders) != n or any(
        isinstance(o, bool) or not isinstance(o, (int, np.integer)) or o not in NODES for o in orders
    ):
        raise ValueError(f"order must be 1, 2 or 3, or one of them for each of the {n} steps; got {order!r}")
    name = f"exp_rk({order}, {value.name})"
    if is_zero(eta):
        return _table(name, process, k, orders, value)
    check_inverse(inverse, "eta", eta)
    gain = -k.xp.expm1(2 * (k.lam_t - k.lam_s))  # r_up^2 = eta^2 r_s^2 gain
    rest = (1 - eta**2) + eta**2 * (1 - gain)  # r_down^2 = r_s^2 rest
    check_noise_fits(eta, gain, rest)
    down, noise = (k.sigma_s * nu.safe_sqrt(part, k.xp) for part in (rest, gain))
    lam_down = k.lam_s - k.xp.log(k.xp.where(rest > 0, rest, 1.0)) / 2
    return _table(name, process, k, orders, value, (lam_down, down), eta * s_noise * noise)


def dpm_solver_fast(process: Process, grid: Any, evaluations: int | None = None, *, inverse: bool = False) -> Solver:
    """DPM-Solver with a budget: steps of order 3 and, at the end, of order 2 and 1, with exactly this many evaluations.

    orders: 3, ..., 3, 2, 1 if 3 divides the evaluations, else 3, ..., 3 and the remainder

    Args: process: Gaussian.   grid: [n + 1], n = evaluations // 3 + 1, equal steps in lambda in the paper.   evaluations: of
    the network; default the most that the grid allows, 3 n - 1.   inverse: the grid increases.
    Returns: a table of `evaluations` rows (two fewer for every step of order 3 with an infinite lambda at one end).
    Raises: ValueError: bad grid, or a grid whose length does not fit the evaluations.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.vp()
        >>> dpm_solver_fast(p, times.log_snr(p, 10 // 3 + 1, start=0.99, stop=0.01), 10).evaluations
        10

    Reference: Lu et al. 2022, arXiv:2206.00927, DPM-Solver-fast.
    """
    n = np.shape(grid)[0] - 1 if np.ndim(grid) == 1 else 0
    m = 3 * n - 1 if evaluations is None else evaluations
    if isinstance(m, bool) or not isinstance(m, (int, np.integer)):
        raise ValueError(f"evaluations must be an int or None; got {evaluations!r}")
    if n > 0 and (m < 1 or m // 3 + 1 != n):
        raise ValueError(
            f"{evaluations} evaluations need a grid of evaluations // 3 + 1 steps; got {n}. {n} steps take "
            f"{max(3 * n - 3, 1)} to {3 * n - 1} evaluations"
        )
    orders = (3,) * (n - 2) + (2, 1) if m % 3 == 0 else (3,) * (n - 1) + (m % 3,)
    return exp_rk(process, grid, orders if n > 0 else 1, EPS, inverse=inverse)


# ------------------------------------------------------------------------------------------------- weights of one step


def phi(xp: Any, g: Any) -> Any:
    """`(e^g - 1) / g - 1`, by its series where the quotient would cancel."""
    small = xp.abs(g) < 0.05
    series = g / 2 * (1 + g / 3 * (1 + g / 4 * (1 + g / 5 * (1 + g / 6 * (1 + g / 7 * (1 + g / 8))))))
    safe = xp.where(small, 1.0, g)
    return xp.where(small, series, xp.expm1(safe) / safe - 1)


def stage_weights(xp: Any, order: int, nodes: tuple[float, ...], j: int, scale: Any, g: Any) -> tuple:
    """Weights of the values d_0 ... d_j in what they lead to: intermediate node j + 1, or the end of the step.

    The exact change is -scale integral_0^g e^{g - u} d(u) du, with g = h, scale = sigma for eps and -h, alpha for x0, at
    the arrival.   nodes: the fractions of the step where d_1, d_2 are.
    """
    whole = -scale * xp.expm1(g)
    if j == 0:
        return (whole,)
    if order == 2:
        share = whole / (2 * nodes[0])
        return whole - share, share
    slope = -scale * phi(xp, g)  # weight of the derivative of d along the way to this arrival
    if j == 1:
        share = slope * nodes[1] / nodes[0]
        return whole - share, share
    return whole - slope / nodes[1], xp.zeros_like(whole), slope / nodes[1]


def stages(
    process: Process, k: table.Nodes, order: int, registers: int, value: Value, down: tuple[Any, Any] | None = None
) -> list[dict[str, Any]]:
    """The columns [n] of every stage of a step: a stage keeps the state and pushes its value, the last one moves.

    Steps that are not finite are `ddim` in their first stage and copies in the others.   registers: of values.
    down: log-SNR and sigma that a step reaches where it is not `sigma_s`.
    """
    lam_down, down = (k.lam_s, k.sigma_s) if down is None else down
    finite = k.finite & (down > 0)
    xp = k.xp
    safe = lambda a, fill: xp.where(finite, a, fill)
    lam, alpha, sigma = safe(k.lam_t, 0.0), safe(k.alpha_t, 1.0), safe(k.sigma_t, 1.0)
    h = safe(lam_down, 1.0) - lam
    eps, fractions = value is EPS, NODES[order]
    zero, one = xp.zeros_like(lam), xp.ones_like(lam)
    times = [k.t, *(safe(process.time_of_log_snr(lam + r * h), k.t) for r in fractions)]
    reached = [*((process.alpha(t), process.sigma(t)) for t in times[1:]), (k.alpha_s, safe(down, 1.0))]
    arrivals = []
    for j, (r, (a, s)) in enumerate(zip((*fractions, 1.0), reached, strict=True)):
        carry, scale, g = (a / alpha, s, r * h) if eps else (s / sigma, a, -r * h)
        weights = tuple(safe(w, 0.0) for w in stage_weights(xp, order, fractions, j, scale, g))
        arrivals.append((carry, weights[::-1]))  # newest first, as registers are
    fill = lambda ws: (*ws, *(zero,) * (registers - len(ws)))
    columns = []
    for j, t in enumerate(times):
        first, last = j == 0, j == order - 1
        to = arrivals[j - 1] if j else (one, ())
        carry, weights = arrivals[j] if last else (one, (zero,))
        columns.append(
            {
                "t": t,
                "px": (safe(to[0], 1.0),),
                "pd": fill(to[1]),
                "u": (safe(0.0 if eps else 1.0, k.alpha_s), safe(1.0 if eps else 0.0, down)),
                "qx": (safe(carry, 0.0 if first else 1.0),),
                "qd": fill(weights[1:]),
                "qn": safe(weights[0], 1.0 if first else 0.0),
                "accept": (finite & last) | (~finite & first),
                "skip": ~finite & (not first),
            }
        )
    return columns


def _table(
    name: str,
    process: Process,
    k: table.Nodes,
    orders: tuple[int, ...],
    value: Value,
    down: Any = None,
    noise: Any = None,
) -> Solver:
    """All stages of all steps, with the noise in the last row of a step; every step has an order of its own."""
    xp = k.xp
    parts, place, offset = [], {}, 0
    for order in sorted(set(orders)):
        parts.append(
            jax.tree.map(lambda *c: table.interleave(xp, *c), *stages(process, k, order, max(orders) - 1, value, down))
        )
        place[order], offset = offset, offset + order * len(orders)
    # which rows of all these belong to step i: known before any value is
    rows = np.concatenate([place[o] + i * o + np.arange(o) for i, o in enumerate(orders)])
    columns = jax.tree.map(lambda *c: xp.concatenate(c)[rows], *parts)
    if noise is not None:
        columns["noise"] = xp.where(columns["accept"], noise[np.repeat(np.arange(len(orders)), orders)], 0.0)
    return table.build(name, k, **columns)


_DPM = "DPM-Solver singlestep, noise prediction"
_DPMPP = "DPM-Solver++ singlestep, data prediction"
_SINGLE = {order: table.options(exp_rk, order=order) for order in NODES}
CARDS = {
    "dpm_solver_1": Card(_SINGLE[1], "arXiv:2206.00927#Eq.3.7", _DPM, 1, 1, exact=("x0", "eps")),
    "dpm_solver_2": Card(_SINGLE[2], "arXiv:2206.00927#Alg.1", _DPM, 2, 2, exact=("eps",)),
    "dpm_solver_3": Card(_SINGLE[3], "arXiv:2206.00927#Alg.2", _DPM, 3, 3, exact=("eps",)),
    "dpm_solver_fast": Card(
        dpm_solver_fast, "arXiv:2206.00927", "DPM-Solver with a budget of evaluations", 3, 3, exact=("eps",)
    ),
    "dpmpp_2s": Card(
        table.options(exp_rk, order=2, value=X0), "arXiv:2211.01095#Alg.1", _DPMPP, 2, 2, exact=("x0",)
    ),
    "dpmpp_3s": Card(table.options(exp_rk, order=3, value=X0), "arXiv:2211.01095", _DPMPP, 3, 3, exact=("x0",)),
    "dpm2": Card(
        _SINGLE[2], "arXiv:2206.00927#Alg.1", "midpoint in log sigma: dpm_solver_2", 2, 2, exact=("eps",)
    ),
    "dpm2_ancestral": Card(
        table.options(exp_rk, order=2, eta=1.0), "arXiv:2206.00927#Alg.1", "dpm2 down, then noise up", 1, 2, noise=True
    ),
    "dpmpp_2s_ancestral": Card(
        table.options(exp_rk, order=2, value=X0, eta=1.0), "arXiv:2211.01095#Alg.1",
        "dpmpp_2s down, then noise up", 1, 2, noise=True,
    ),
}  # fmt: skip
