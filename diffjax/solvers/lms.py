"""Linear multistep methods in sigma / alpha: Adams-Bashforth on `d(x / alpha) = eps d(sigma / alpha)`."""

from __future__ import annotations

from typing import Any

from diffjax.solvers import adams, table
from diffjax.types import Card, Process, Solver


def lms(process: Process, grid: Any, order: int = 4, *, inverse: bool = False) -> Solver:
    """Adams-Bashforth of order 1 to 4 with weights for the actual steps; one evaluation a step.

    x_s / alpha_s = x_t / alpha_t + sum_j eps_j integral_{rho_t}^{rho_s} L_j drho,   rho = sigma / alpha

    Order 1 is `ddim`, Euler in rho; the first steps build the order up. The last step, to sigma = 0, has the full order;
    a step from alpha = 0 is `ddim`.

    Args: process: Gaussian; VE and EDM are the case alpha = 1.   grid: [n + 1].   order: 1 to 4.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order - 1` values.
    Raises: ValueError: bad grid or order.

    Example:
        >>> from diffjax import processes, times
        >>> lms(processes.edm(), times.karras(processes.edm(), 10)).evaluations
        10

    Reference: Hairer, Norsett and Wanner 1993, Section III.5; Zhang and Chen 2023, arXiv:2204.13902 (rhoAB).
    """
    return adams.exp_ab(process, grid, order, adams.EPS, adams.RHO, inverse=inverse)


CARDS = {
    f"lms{order}": Card(
        table.options(lms, order=order),
        "hairer1993#Sec.III.5",
        "linear multistep in sigma / alpha, weights for the actual steps",
        2,
        1,
        exact=("eps",),
        flags=("startup",) if order > 2 else (),
    )
    for order in (2, 3, 4)
}
