"""DEIS: exponential Adams-Bashforth on eps, with a polynomial in time or in sigma / alpha."""

from __future__ import annotations

from typing import Any

from diffjax.solvers import adams, table
from diffjax.types import Card, Process, Solver


def deis(
    process: Process, grid: Any, order: int = 4, variable: adams.Variable = adams.TIME, *, inverse: bool = False
) -> Solver:
    """Diffusion exponential integrator sampler (tAB, rhoAB) of order 1 to 4; one evaluation a step.

    x_s = (alpha_s / alpha_t) x_t + sum_j eps_j alpha_s integral_{rho_t}^{rho_s} L_j drho,   rho = sigma / alpha

    L_j is the Lagrange basis on past t (`TIME`) or past rho (`RHO`, which is `lms`); with `LAMBDA` this is `exp_ab` on eps.
    Order 1 is `ddim`; the first steps build the order up. In t and rho the step to sigma = 0 has the full order.

    Args: process: Gaussian.   grid: [n + 1].   order: 1 to 4, the paper's degree plus one.   variable: `TIME`, `RHO` or
    `LAMBDA`.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order - 1` values.
    Raises: ValueError: bad grid or order.

    Example:
        >>> from diffjax import processes, times
        >>> deis(processes.vp(), times.quadratic(10), order=3).rows.qd.shape
        (10, 2)

    Reference: Zhang and Chen 2023, arXiv:2204.13902, Eq. 14-15 (its rho-2Heun is `heun`).
    """
    return adams.exp_ab(process, grid, order, adams.EPS, variable, inverse=inverse)


CARDS = {
    f"deis_{name}{order}": Card(
        table.options(deis, order=order, variable=variable),
        "arXiv:2204.13902#Eq.14",
        f"DEIS {title}{order - 1}: polynomial in {variable.name}",
        2,
        1,
        exact=("eps",),
        flags=("startup",) if name == "rho" and order > 2 else (),
    )
    for name, title, variable in (("t", "tAB", adams.TIME), ("rho", "rhoAB", adams.RHO))
    for order in (2, 3, 4)
}
