"""PNDM: Adams-Bashforth and Runge-Kutta slopes put through the transfer of DDIM."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffjax.solvers import adams, table
from diffjax.solvers.checks import check_integer
from diffjax.types import Card, Process, Solver

# weights of Adams-Bashforth for equal steps, newest first
BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
WARMUP = 3  # Runge-Kutta steps before the four slopes of order 4 are there


def transfer(xp: Any, taken: Any, start: tuple[Any, Any], end: tuple[Any, Any]) -> tuple[Any, Any]:
    """`(carry, d)` of the transfer  x_s = carry x_t + d e,  carry = alpha_s / alpha_t,  d = alpha_s (rho_s - rho_t)

    Linear in x and e, also where e is not the eps of x at t. Args: taken: [n] where alpha_t > 0.   start, end: (alpha, sigma).
    """
    carry = xp.where(taken, end[0] / xp.where(taken, start[0], 1.0), 0.0)
    return carry, end[1] - carry * start[1]


def exactly(use: list[Any], m: int) -> Any:
    """Whether m of the values of `use` are known and not more.   [n] bool"""
    return use[m - 1] & ~use[m] if m < len(use) else use[m - 1]


def _slopes(k: table.Nodes, taken: Any, order: int) -> list[Any]:
    """`b[j][i]`: the weight of the slope j steps back, of the highest order that is known."""
    xp = k.xp
    use = table.known(k._replace(finite=taken), order)
    weight = lambda j, m: BASHFORTH[m][j] if j < m else 0.0
    return [sum(xp.where(exactly(use, m), weight(j, m), 0.0) for m in range(1, order + 1)) for j in range(order)]


def ipndm(process: Process, grid: Any, order: int = 4, *, inverse: bool = False) -> Solver:
    """PLMS with a low-order start (iPNDM) of order 1 to 4; one evaluation a step.

    x_s = (alpha_s / alpha_t) x_t + alpha_s (rho_s - rho_t) e',   order 4: e' = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24

    e_j is eps j steps back, with Adams-Bashforth's weights for equal steps on any grid: this is what limits the order to 2
    where the steps in rho = sigma / alpha are not equal (`lms` has the weights for the actual steps). Order 1 is `ddim`.

    Args: process: Gaussian.   grid: [n + 1].   order: 1 to 4.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order - 1` values.
    Raises: ValueError: bad grid or order.

    Example:
        >>> from diffjax import processes, times
        >>> ipndm(processes.vp(), times.uniform(10)).evaluations
        10

    Reference: Liu et al. 2022, arXiv:2202.09778; Zhang and Chen 2023, arXiv:2204.13902 (the low-order start).
    """
    check_integer("order", order, adams.ORDERS)
    k = table.nodes(process, grid, inverse)
    taken = adams.reachable(k)
    carry, d = transfer(k.xp, taken, (k.alpha_t, k.sigma_t), (k.alpha_s, k.sigma_s))
    b = _slopes(k, taken, order)
    return adams.or_ddim(f"ipndm({order})", k, taken, adams.EPS, (carry,), [d * bj for bj in b[1:]], d * b[0])


def pndm(process: Process, grid: Any, *, inverse: bool = False) -> Solver:
    """PLMS of order 4 after three pseudo Runge-Kutta steps: 4 evaluations in each of those, then one a step.

    phi(x, e, t, s) = (alpha_s / alpha_t) x + alpha_s (rho_s - rho_t) e,   m = (t + s) / 2
    e1 = eps(x, t);  e2 = eps(phi(x, e1, t, m), m);  e3 = eps(phi(x, e2, t, m), m);  e4 = eps(phi(x, e3, t, s), s)
    x_s = phi(x, (e1 + 2 e2 + 2 e3 + e4) / 6, t, s);   later x_s = phi(x, (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24, t, s)

    Only the slopes at grid points are kept; the second stage leaves 2 (alpha_s / alpha_t) x + d e2 as its state, from which
    both the third stage and the sum are read. A step with an infinite log-SNR at one end is `ddim` while warming up.

    Args: process: Gaussian.   grid: [n + 1].   inverse: the grid increases.
    Returns: a table of n + 9 rows (for n >= 3), two states, three values.
    Raises: ValueError: bad grid.

    Example:
        >>> from diffjax import processes, times
        >>> pndm(processes.vp(), times.uniform(10, start=0.99)).evaluations
        19

    Reference: Liu et al. 2022, arXiv:2202.09778.
    """
    k = table.nodes(process, grid, inverse)
    xp, n = k.xp, k.t.shape[0]
    warm = np.arange(n) < WARMUP
    step = np.repeat(np.arange(n), np.where(warm, 4, 1))  # [rows] the step that a row belongs to
    stage = np.concatenate([np.arange(4 if w else 1) for w in warm])
    taken = xp.where(xp.asarray(warm), k.finite, adams.reachable(k))
    runge = xp.asarray(warm) & taken  # the others are PLMS or DDIM, which have the first stage alone

    middle = (k.t + k.s) / 2
    start, end = (k.alpha_t, k.sigma_t), (k.alpha_s, k.sigma_s)
    carry, d = transfer(xp, taken, start, end)
    carry_m, d_m = transfer(xp, runge, start, (process.alpha(middle), process.sigma(middle)))
    ratio = d_m / xp.where(runge, d, 1.0)
    b = _slopes(k, taken, 4)
    one, zero = xp.ones_like(d), xp.zeros_like(d)
    pick = lambda on_runge, plms, ddim: xp.where(runge, on_runge, xp.where(taken, plms, ddim))
    live = lambda c: xp.where(runge, c, 0.0)
    copy = lambda c: xp.where(runge, c, 1.0)  # a stage that is not needed copies the newest state

    def rows(*stages: Any) -> Any:
        """A column of the table from those of its four stages, each [n]; the stages left out are zero."""
        return xp.stack([*stages, *(zero,) * (4 - len(stages))])[stage, step]

    return table.build(
        "pndm", k,
        t=rows(k.t, middle, middle, k.s),
        px=(rows(one, copy(carry_m), copy(ratio), one), rows(zero, zero, live(carry_m - 2 * carry * ratio))),
        pd=(rows(zero, live(d_m)), 0.0, 0.0),
        u=(rows(xp.where(taken, 0.0, k.alpha_s)), rows(xp.where(taken, 1.0, k.sigma_s), one, one, one)),
        qx=(
            rows(pick(1.0, carry, 0.0), copy(2 * carry), copy(zero), copy(one / 3)),
            rows(zero, zero, live(carry), live(one / 3)),
        ),
        qd=(
            rows(pick(0.0, d * b[1], 0.0), zero, zero, live(d / 6)),
            rows(pick(0.0, d * b[2], 0.0)),
            rows(pick(0.0, d * b[3], 0.0)),
        ),
        qn=rows(pick(0.0, d * b[0], 1.0), live(d), live(d), live(d / 6)),
        keep=stage == 0,
        accept=xp.where(runge[step], xp.asarray(stage == 3), xp.asarray(stage == 0)),
        skip=~np.asarray(runge)[step] & (stage > 0) if xp is np else None,
    )  # fmt: skip


CARDS = {"pndm": Card(pndm, "arXiv:2202.09778", "PLMS after three pseudo Runge-Kutta steps", 2, 1, exact=("eps",))} | {
    f"ipndm{order}": Card(
        table.options(ipndm, order=order),
        "arXiv:2202.09778",
        "PLMS with a low-order start",
        2,
        1,
        exact=("eps",),
    )
    for order in (2, 3, 4)
}
