"""Exponential Adams-Bashforth: the linear part of the ODE is exact, the value is a polynomial in lambda."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax.solvers import table
from diffjax.types import Card, Process, Solver

QUADRATURE = np.polynomial.legendre.leggauss(24)


@dataclasses.dataclass(frozen=True)
class Value:
    """What a multistep method keeps, and the ODE in its terms.   x_s = carry x_t + integral_{lam_t}^{lam_s} kernel d dlam

    `read(alpha, sigma)` is `(u_x0, u_eps)` of the value d; `carry(k)` and `kernel(xp, k, lam)` (with lam [n, m]) are exact.
    """

    name: str
    read: Callable[[Any, Any, Any], tuple[Any, Any]]
    carry: Callable[[table.Nodes], Any]
    kernel: Callable[[table.Nodes, Any], Any]


def _norm(a: Any, s: Any) -> Any:
    return (a * a + s * s) ** 0.5


X0 = Value(
    "x0",
    read=lambda xp, a, s: (xp.ones_like(a), xp.zeros_like(a)),
    carry=lambda k: k.sigma_s / k.sigma_t,
    kernel=lambda k, lam: k.alpha_s[:, None] * k.xp.exp(lam - k.lam_s[:, None]),
)
EPS = Value(
    "eps",
    read=lambda xp, a, s: (xp.zeros_like(a), xp.ones_like(a)),
    carry=lambda k: k.alpha_s / k.alpha_t,
    kernel=lambda k, lam: -k.sigma_s[:, None] * k.xp.exp(k.lam_s[:, None] - lam),
)
# y = x / r turns with the angle theta = atan(sigma / alpha): dy/dtheta = v / r, and dtheta = -dlam / (2 cosh lam)
V = Value(
    "v",
    read=lambda xp, a, s: (-s / _norm(a, s), a / _norm(a, s)),
    carry=lambda k: _norm(k.alpha_s, k.sigma_s) / _norm(k.alpha_t, k.sigma_t),
    kernel=lambda k, lam: -_norm(k.alpha_s, k.sigma_s)[:, None] / (2 * k.xp.cosh(lam)),
)


def exp_ab(process: Process, grid: Any, order: int = 2, value: Value = X0, *, inverse: bool = False) -> Solver:
    """Exponential Adams-Bashforth of order 1 to 4 in x0, eps or v; one evaluation a step.

    x_s = carry x_t + sum_j d_j integral_{lam_t}^{lam_s} kernel(lam) L_j(lam) dlam,  L_j the Lagrange basis on past lambdas

    The integrals are computed by Gauss-Legendre quadrature in float64. The first steps build the order up; a step with an
    infinite lambda at one end is `ddim`.

    Args: process: Gaussian.   grid: [n + 1].   order: 1 to 4.   value: `X0`, `EPS` or `V`.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order - 1` values.
    Raises: ValueError: bad grid or order.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.cosine()
        >>> exp_ab(p, times.log_snr(p, 10), order=3, value=V).rows.qd.shape
        (10, 2)

    Reference: Zhang and Chen 2023, arXiv:2204.13902, Eq. 14-15; Hochbruck and Ostermann 2010, Section 2.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4; got {order!r}")
    k = table.nodes(process, grid, inverse)
    xp = k.xp
    safe = k._replace(
        lam_t=xp.where(k.finite, k.lam_t, 0.0),
        lam_s=xp.where(k.finite, k.lam_s, -1.0),
        alpha_t=xp.where(k.finite, k.alpha_t, 1.0),
        sigma_t=xp.where(k.finite, k.sigma_t, 1.0),
    )
    weights = _integrals(safe, k, table.known(k, order), order, value)
    u0, u1 = value.read(xp, k.alpha_t, k.sigma_t)
    first = lambda a, b: xp.where(k.finite, a, b)
    return table.build(
        f"exp_ab({order}, {value.name})", k,
        u=(first(u0, k.alpha_s), first(u1, k.sigma_s)),
        qx=(first(value.carry(safe), 0.0),),
        qd=tuple(first(w, 0.0) for w in weights[1:]),
        qn=first(weights[0], 1.0),
    )  # fmt: skip


def _integrals(safe: table.Nodes, k: table.Nodes, use: list[Any], order: int, value: Value) -> list[Any]:
    """`w[j][i]`: the integral over step i of kernel times the Lagrange basis of the node j steps back."""
    xp = k.xp
    points, gauss = (xp.asarray(a[None], safe.lam_t.dtype) for a in QUADRATURE)
    half = (safe.lam_s - safe.lam_t)[:, None] / 2
    lam = safe.lam_t[:, None] + half * (1 + points)
    measure = half * gauss * value.kernel(safe, lam)
    finite_lam = xp.where(xp.isfinite(k.lam_t), k.lam_t, 0.0)
    node = [table.past(k, finite_lam, j, 0.0) for j in range(order)]
    w = []
    for j in range(order):
        basis = xp.ones_like(lam)
        for m in range(order):
            if m != j:
                both = use[j] & use[m]
                gap = xp.where(both, node[j] - node[m], 1.0)[:, None]
                basis = basis * xp.where(both[:, None], (lam - node[m][:, None]) / gap, 1.0)
        w.append(xp.where(use[j], (measure * basis).sum(axis=1), 0.0))
    return w


_EXACT = {"x0": ("x0",), "eps": ("eps",), "v": ()}
CARDS = {
    f"exp_ab{order}_{value.name}": Card(
        table.options(exp_ab, order=order, value=value),
        "arXiv:2204.13902#Eq.14",
        f"exponential Adams-Bashforth on the kept {value.name}",
        min(order, 2),
        1,
        exact=("x0", "eps") if order == 1 and value is not V else _EXACT[value.name],
    )
    for value in (X0, EPS, V)
    for order in (1, 2, 3, 4)
}
