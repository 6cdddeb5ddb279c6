"""Exponential Adams methods: the linear part of the ODE is exact, the value is a polynomial through past evaluations.

x_s = carry x_t + sum_j w_j d_j,   w_j = integral_{lam_t}^{lam_s} kernel(lam) L_j dlam,   L_j the Lagrange basis on the nodes
The polynomial runs in lambda, in rho = sigma / alpha or in t; the integrals are Gauss-Legendre sums in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffjax.solvers import table
from diffjax.solvers.checks import check_integer, check_number
from diffjax.types import Card, Process, Solver

QUADRATURE = np.polynomial.legendre.leggauss(24)
ORDERS = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Value:
    """What a multistep method keeps, and the ODE in its terms.   x_s = carry x_t + integral_{lam_t}^{lam_s} kernel d dlam

    `read(alpha, sigma)` is `(u_x0, u_eps)` of the value d; `carry(k)` and `kernel(k, lam)` (with lam [n, m]) are exact.
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
    kernel=lambda k, lam: -k.alpha_s[:, None] * k.xp.exp(-lam),  # finite for a step to sigma = 0
)
# y = x / r turns with the angle theta = atan(sigma / alpha): dy/dtheta = v / r, and dtheta = -dlam / (2 cosh lam)
V = Value(
    "v",
    read=lambda xp, a, s: (-s / _norm(a, s), a / _norm(a, s)),
    carry=lambda k: _norm(k.alpha_s, k.sigma_s) / _norm(k.alpha_t, k.sigma_t),
    kernel=lambda k, lam: -_norm(k.alpha_s, k.sigma_s)[:, None] / (2 * k.xp.cosh(lam)),
)


@dataclasses.dataclass(frozen=True)
class Variable:
    """The variable that the polynomial runs in, as a function of `(xp, process, lam)`.

    `data_end`: it is finite at sigma = 0, so that a step to there is like any other (with the value `EPS`).
    """

    name: str
    at: Callable[[Any, Process, Any], Any]
    data_end: bool = True


LAMBDA = Variable("lambda", lambda xp, process, lam: lam, data_end=False)
RHO = Variable("rho", lambda xp, process, lam: xp.exp(-lam))
TIME = Variable("t", lambda xp, process, lam: process.time_of_log_snr(lam))


# ------------------------------------------------------------------------------------------- integrals over the steps


class Steps(NamedTuple):
    """Every step of a grid as an integral over m points of the variable."""

    k: table.Nodes
    value: Value
    taken: Any  # [n] the method takes this step; the others have an infinite end and are `ddim`
    carry: Any  # [n]
    start: Any  # [n] the variable where a step starts
    end: Any  # [n] and where it ends
    points: Any  # [n, m]
    measure: Any  # [n, m] kernel dlam


def steps(process: Process, k: table.Nodes, value: Value, variable: Variable = LAMBDA) -> Steps:
    """The quadrature of every step; equally accurate in rho at sigma = 0, where lambda is infinite."""
    xp = k.xp
    taken = reachable(k) if variable.data_end else k.finite
    pick = lambda a, other: xp.where(taken, a, other)
    safe = k._replace(
        lam_t=pick(k.lam_t, 0.0), lam_s=xp.where(k.finite, k.lam_s, -1.0), alpha_t=pick(k.alpha_t, 1.0),
        sigma_t=pick(k.sigma_t, 1.0), alpha_s=pick(k.alpha_s, 1.0),
    )  # fmt: skip
    points, gauss = (xp.asarray(a[None], safe.lam_t.dtype) for a in QUADRATURE)
    half = (safe.lam_s - safe.lam_t)[:, None] / 2
    lam, measure = safe.lam_t[:, None] + half * (1 + points), half * gauss
    if variable.data_end:
        rho_t = safe.sigma_t / safe.alpha_t
        half = (pick(k.sigma_s / safe.alpha_s, rho_t / 2) - rho_t)[:, None] / 2
        rho = rho_t[:, None] + half * (1 + points)
        in_rho = True if variable is RHO else (taken & ~k.finite)[:, None]
        lam, measure = xp.where(in_rho, -xp.log(rho), lam), xp.where(in_rho, -half * gauss / rho, measure)
    node = lambda lam: variable.at(xp, process, xp.where(xp.isfinite(lam), lam, 0.0))
    return Steps(
        k, value, taken, value.carry(safe), node(k.lam_t), node(k.lam_s), variable.at(xp, process, lam),
        measure * value.kernel(safe, lam),
    )  # fmt: skip


def reachable(k: table.Nodes) -> Any:
    """The steps that start at finite lambda and do not end at alpha = 0; they may end at sigma = 0.   [n] bool"""
    return k.xp.isfinite(k.lam_t) & (k.lam_s > -np.inf)


def ratio(k: table.Nodes) -> Any:
    """`sigma_s / sigma_t`, and 0 where `sigma_t = 0`.   [n]"""
    noisy = k.sigma_t > 0
    return k.xp.where(noisy, k.sigma_s / k.xp.where(noisy, k.sigma_t, 1.0), 0.0)


def known(s: Steps, order: int) -> list[Any]:
    """`known[j][i]`: whether step i may use the value j steps back."""
    return table.known(s.k._replace(finite=s.taken), order)


def predictor(s: Steps, use: list[Any]) -> list[Any]:
    """`w[j][i]`: the weight in step i of the value j steps back, from the nodes in `use`."""
    return _weights(s, [table.past(s.k, s.start, j, 0.0) for j in range(len(use))], use)


def corrector(s: Steps, use: list[Any]) -> list[Any]:
    """As `predictor`, with the node at the end of the step before the others: weights of new, newest, next ..."""
    past = [table.past(s.k, s.start, j, 0.0) for j in range(len(use))]
    return _weights(s, [s.end, *past], [s.taken, *use])


def _weights(s: Steps, nodes: list[Any], use: list[Any]) -> list[Any]:
    return lagrange_weights(s.k.xp, s.points, s.measure, nodes, use)


def lagrange_weights(xp: Any, points: Any, measure: Any, nodes: list[Any], use: list[Any]) -> list[Any]:
    """`w[j][i]`: the sum over the quadrature points of step i of measure times the Lagrange basis of node j.

    Args: points, measure: [n, m].   nodes: of [n].   use: of [n] bool; nodes not in use have weight 0 and shape no basis.
    """
    w = []
    for j in range(len(nodes)):
        basis = xp.ones_like(points)
        for m in range(len(nodes)):
            if m != j:
                both = use[j] & use[m]
                gap = xp.where(both, nodes[j] - nodes[m], 1.0)[:, None]
                basis = basis * xp.where(both[:, None], (points - nodes[m][:, None]) / gap, 1.0)
        w.append(xp.where(use[j], (measure * basis).sum(axis=1), 0.0))
    return w


def fold(s: Steps, predict: list[Any], correct: list[Any], blend: Any = 1.0) -> tuple[list[Any], Any]:
    """A corrector that costs no evaluation: row i corrects the state that step i - 1 predicted, then predicts on.

    x_c = x_p + g (c_new d + sum_j (c_j - w_j) d_{-1-j}),  x_s = carry x_c + w_0 d + sum_j w_{1+j} d_{-1-j}

    The state that a row leaves is the prediction, the last one included: there is no evaluation to correct it with.
    Args: predict: `w`, newest first.   correct: `c`, the new node first.   blend: g, in [0, 1].
    Returns: the weights of the past values and that of the new one.
    """
    xp, (new, *old) = s.k.xp, correct
    q = max(len(predict), len(old))
    entry = lambda w, j: w[j] if j < len(w) else xp.zeros_like(new)
    last = lambda c: s.carry * table.past(s.k, blend * xp.where(s.taken, c, 0.0), 1, 0.0)
    qd = [last(entry(old, j) - entry(predict, j)) + entry(predict, j + 1) for j in range(q)]
    return qd, last(new) + predict[0]


def assemble(name: str, s: Steps, qd: list[Any], qn: Any) -> Solver:
    """The table of a multistep method with one state; steps that are not `taken` are `ddim`."""
    return or_ddim(name, s.k, s.taken, s.value, (s.carry,), qd, qn)


def or_ddim(
    name: str, k: table.Nodes, taken: Any, value: Value, qx: Any, qd: Any, qn: Any, noise: Any = None
) -> Solver:
    """One row a step: the columns given where the step is `taken`, else `ddim` (and whatever `noise`)."""
    first = lambda a, b: k.xp.where(taken, a, b)
    u = value.read(k.xp, k.alpha_t, k.sigma_t)
    return table.build(
        name, k,
        u=(first(u[0], k.alpha_s), first(u[1], k.sigma_s)),
        qx=tuple(first(c, 0.0) for c in qx), qd=tuple(first(c, 0.0) for c in qd), qn=first(qn, 1.0),
        noise=noise,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ methods


def exp_ab(
    process: Process,
    grid: Any,
    order: int = 2,
    value: Value = X0,
    variable: Variable = LAMBDA,
    *,
    inverse: bool = False,
) -> Solver:
    """Exponential Adams-Bashforth of order 1 to 4 in x0, eps or v; one evaluation a step.

    x_s = carry x_t + sum_j d_j integral_{lam_t}^{lam_s} kernel(lam) L_j(lam) dlam,  L_j the Lagrange basis on past lambdas

    The integrals are computed by Gauss-Legendre quadrature in float64. The first steps build the order up; a step with an
    infinite lambda at one end is `ddim`.

    Args: process: Gaussian.   grid: [n + 1].   order: 1 to 4.   value: `X0`, `EPS` or `V`.   variable: of the polynomial,
    `LAMBDA`, or with `EPS` also `RHO` or `TIME`.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order - 1` values.
    Raises: ValueError: bad grid or order, a variable that needs `EPS`.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.cosine()
        >>> exp_ab(p, times.log_snr(p, 10), order=3, value=V).rows.qd.shape
        (10, 2)

    Reference: Zhang and Chen 2023, arXiv:2204.13902, Eq. 14-15; Hochbruck and Ostermann 2010, Section 2.
    """
    check_integer("order", order, ORDERS)
    if variable.data_end and value is not EPS:
        raise ValueError(f"a polynomial in {variable.name} needs value=EPS; got {value.name}. Use variable=LAMBDA")
    s = steps(process, table.nodes(process, grid, inverse), value, variable)
    w = predictor(s, known(s, order))
    return assemble(f"exp_ab({order}, {value.name}, {variable.name})", s, w[1:], w[0])


def exp_abm(
    process: Process,
    grid: Any,
    order: int = 2,
    corrector_order: int | None = None,
    value: Value = X0,
    blend: Any = 1.0,
    *,
    inverse: bool = False,
) -> Solver:
    """Exponential Adams-Bashforth-Moulton: `exp_ab` and a corrector that costs no evaluation; one evaluation a step.

    x_p = carry x_t + sum_j w_j d_j,   x_c = x_p + g (carry x_t + c_new d(x_p) + sum_j c_j d_j - x_p)

    d is evaluated at x_p, and the next step starts from x_c (predict, evaluate, correct). The last point is predicted only.

    Args: process: Gaussian.   grid: [n + 1].   order: 1 to 4, past nodes of the predictor.   corrector_order: 1 to 5,
    nodes of the corrector, the new one included; default `order + 1`.   value: `X0`, `EPS` or `V`.   blend: g in [0, 1];
    0 is `exp_ab`.   inverse: the grid increases.
    Returns: a table of n rows, one state, `max(order, corrector_order - 1)` values; a kept trajectory holds predictions.
    Raises: ValueError: bad grid or order, blend outside [0, 1].

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.cosine()
        >>> exp_abm(p, times.log_snr(p, 10), order=2, value=V).evaluations
        10

    Reference: Zhao et al. 2023, arXiv:2302.04867, Theorem 3.1; Hairer, Norsett and Wanner 1993, Section III.1.
    """
    check_integer("order", order, ORDERS)
    nodes = order + 1 if corrector_order is None else corrector_order
    check_integer("corrector_order", nodes, (1, 2, 3, 4, 5))
    check_number("blend", blend, high=1.0, hint="0 the predictor's state and 1 the corrector's")
    s = steps(process, table.nodes(process, grid, inverse, blend), value)
    old = known(s, nodes)[: nodes - 1]
    columns = fold(s, predictor(s, known(s, order)), corrector(s, old), blend)
    return assemble(f"exp_abm({order}, {nodes}, {value.name})", s, *columns)


# flag "startup": the first steps set the card's order in the end, but up to 160 steps the method's own error is larger
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
} | {
    f"exp_abm{order}_{value.name}": Card(
        table.options(exp_abm, order=order, value=value),
        "arXiv:2302.04867#Thm.3.1",
        f"exponential Adams-Bashforth-Moulton on the kept {value.name}",
        3,
        1,
        exact=_EXACT[value.name],
        flags=("startup",) if order == 3 and value is not EPS else (),
    )
    for value in (X0, EPS, V)
    for order in (2, 3, 4)
}
