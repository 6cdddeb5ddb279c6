"""Heavy-ball momentum for multistep methods, on the ODE `d(x / alpha) = eps d(sigma / alpha)`.

The velocity is never stored. With y = x / alpha, rho = sigma / alpha and the mean slope S_n = (y_{n+1} - y_n) / (rho_{n+1} - rho_n)
of a step, both methods are the recursion  S_n = (1 - b) S_{n-1} + sum_j c_j eps_{n-j},  and S_{n-1} is read from two states.
"""

from __future__ import annotations

import math
from typing import Any

from diffjax.solvers import adams, table
from diffjax.solvers.checks import check_integer, check_number
from diffjax.solvers.pndm import BASHFORTH, exactly, transfer
from diffjax.types import Card, Process, Solver

# integrals over the previous step of the Lagrange basis that BASHFORTH integrates over the next one
PREVIOUS = {
    1: (1.0,),
    2: (1 / 2, 1 / 2),
    3: (5 / 12, 8 / 12, -1 / 12),
    4: (9 / 24, 19 / 24, -5 / 24, 1 / 24),
}


def heavy_ball(
    process: Process, grid: Any, order: int = 2, momentum: Any = 0.8, *, seed: Any = 1.0, inverse: bool = False
) -> Solver:
    """Heavy ball on Adams-Bashforth (HB); one evaluation a step, first order for b < 1.

    v_{n+1} = (1 - b) v_n + b sum_j a_j eps_{n-j},   y_{n+1} = y_n + (rho_{n+1} - rho_n) v_{n+1}

    a are the weights for equal steps (`ipndm`, the case b = 1).

    Args: process: Gaussian.   grid: [n + 1].   order: 1 to 4, of Adams-Bashforth.   momentum: b in (0, 1].   seed: the first
    velocity is `v_0 = seed eps_0`; 1 is consistent, 0 is a cold start.   inverse: the grid increases.
    Returns: a table of n rows, two states, `order - 1` values.
    Raises: ValueError: bad grid or order, momentum outside (0, 1].
    Reference: Wizadwongsa et al. 2024, arXiv:2307.11118.
    """
    check_integer("order", order, adams.ORDERS)
    check_number("momentum", momentum, high=1.0, above=True, hint="1 for none")
    check_number("seed", seed, -math.inf)
    b = momentum
    ramp = {1: [(1 - b) * seed + b]}
    slopes = {m: [b * a for a in BASHFORTH[m]] for m in range(1, order + 1)}
    return _solver(f"heavy_ball({order})", process, grid, order, b, ramp, slopes, inverse, (b, seed))


def ghvb(
    process: Process, grid: Any, order: int | float = 2, momentum: Any = None, *, seed: Any = 1.0, inverse: bool = False
) -> Solver:
    """Generalised heavy ball (GHVB) of order p; one evaluation a step.

    v_{n+1} = (1 - b) v_n + b eps_n,   y_{n+1} = y_n + (rho_{n+1} - rho_n) sum_j a_j v_{n+1-j},
    p = 2: a = ((2 + b), -(2 - b)) / 2b;   S_n - (1 - b) S_{n-1} = sum_j b a_j eps_{n-j} is exact for degree < p in equal steps

    b = 1 is Adams-Bashforth (`ipndm(p)`), b -> 0 that of order p - 1: order p with momentum b is named by the fractional order
    p - 1 + b. On y' = -L y its steps stay stable at larger L h than those of Adams-Bashforth of order p, at a larger error
    constant. In unequal steps of rho the order is at most 2, as that of `ipndm`.

    Args: process: Gaussian.   grid: [n + 1].   order: p = 1 to 4, or in (0, 4) the fractional order.   momentum: b in (0, 1];
    default 1, or the fraction of the order.   seed: the first velocity is `v_0 = seed eps_0`; 1 is consistent, 0 is a cold start.
    inverse: the grid increases.
    Returns: a table of n rows, two states, `p - 1` values.
    Raises: ValueError: bad grid or order, momentum outside (0, 1] or beside a fractional order.

    Example:
        >>> from diffjax import processes, times
        >>> ghvb(processes.vp(), times.uniform(10), order=2.5).rows.qx.shape
        (10, 2)

    Reference: Wizadwongsa et al. 2024, arXiv:2307.11118.
    """
    check_number("order", order, high=4.0, above=True)
    p = math.ceil(order)
    if p != order and momentum is not None:
        raise ValueError(
            f"a fractional order fixes the momentum: order={order} is order={p}, momentum={order - p + 1:.6g}"
        )
    b = order - p + 1 if momentum is None else momentum
    check_number("momentum", b, high=1.0, above=True, hint="1 for none")
    check_number("seed", seed, -math.inf)
    c = {m: [x - (1 - b) * y for x, y in zip(BASHFORTH[m], PREVIOUS[m], strict=True)] for m in range(1, p + 1)}
    ramp = {m: _unrolled(m, b, seed, c[m]) for m in range(1, p + 1)}
    return _solver(f"ghvb({order})", process, grid, p, b, ramp, {p: c[p]}, inverse, (b, seed))


def _unrolled(m: int, b: Any, seed: Any, c: list[Any]) -> list[Any]:
    """The slope of step m - 1 in terms of eps_{m-1}, ..., eps_0: sum_k (c_k / b) v_{m-k} with the velocities written out."""
    velocity = [[(1 - b) ** i * seed if j == 0 else 0.0 for j in range(m)] for i in range(m + 1)]
    for i in range(1, m + 1):
        for j in range(i):
            velocity[i][j] = velocity[i][j] + b * (1 - b) ** (i - 1 - j)
    return [sum(c[k] / b * velocity[m - k][j] for k in range(m)) for j in reversed(range(m))]


def _solver(
    name: str, process: Process, grid: Any, p: int, b: Any, ramp: dict, slopes: dict, inverse: bool, options: Any
) -> Solver:
    """`ramp[m]` are the weights of a row that knows exactly m values and no past slope, `slopes[m]` those beside (1 - b) S."""
    k = table.nodes(process, grid, inverse, options)
    xp = k.xp
    taken = adams.reachable(k)
    carry, d = transfer(xp, taken, (k.alpha_t, k.sigma_t), (k.alpha_s, k.sigma_s))
    use = table.known(k._replace(finite=taken), p + 1)
    w, recursive = [xp.zeros_like(d)] * p, xp.zeros_like(taken)
    for m in range(1, p + 2):
        weights = ramp.get(m) or slopes[min(m, p)]
        recursive = recursive | (exactly(use, m) & (m not in ramp))
        w = [xp.where(exactly(use, m), weights[j], w[j]) if j < len(weights) else w[j] for j in range(p)]
    # S_{n-1} = (x / alpha_t - x_prev / alpha_p) / (rho_t - rho_p); `d` of the previous row is alpha_t (rho_t - rho_p)
    before = xp.where(recursive, table.past(k, d, 1, 1.0), 1.0)
    pull = xp.where(recursive, (1 - b) * d / before, 0.0)
    qx = (carry + pull, -pull * table.past(k, carry, 1, 0.0))
    return adams.or_ddim(name, k, taken, adams.EPS, qx, [d * c for c in w[1:]], d * w[0])


CARDS = {
    "heavy_ball": Card(heavy_ball, "arXiv:2307.11118", "heavy ball on Adams-Bashforth 2", 1, 1, exact=("eps",))
} | {
    f"ghvb{order}": Card(
        table.options(ghvb, order=order, momentum=0.8),
        "arXiv:2307.11118",
        f"generalised heavy ball, order {order - 0.2:.1f}",
        min(order, 2),
        1,
        exact=("eps",),
    )
    for order in (1, 2, 3, 4)
}
