"""UniPC: a unified predictor and corrector of any order, in x0 or eps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax.solvers import adams, table
from diffjax.solvers.checks import check_integer
from diffjax.types import Card, Process, Solver


def b1(xp: Any, h: Any) -> Any:
    """B1(h) = h."""
    return h


def b2(xp: Any, h: Any) -> Any:
    """B2(h) = e^h - 1."""
    return xp.expm1(h)


def unipc(
    process: Process,
    grid: Any,
    order: int = 3,
    value: adams.Value = adams.X0,
    scale: Callable[[Any, Any], Any] = b2,
    *,
    correct: bool = True,
    lower_order_final: bool = False,
    inverse: bool = False,
) -> Solver:
    """UniP-p with UniC-p (or UniP-p alone) of order p = 1 to 4; one evaluation a step.

    x_s = (sigma_s / sigma_t) x - alpha_s (e^{-h} - 1) m_0 - alpha_s B(-h) sum_k (a_k / r_k) (m_k - m_0)    in x0
    x_s = (alpha_s / alpha_t) x - sigma_s (e^h - 1) m_0 - sigma_s B(h) sum_k (a_k / r_k) (m_k - m_0)        in eps

    h = lam_s - lam_t, r_k = (lam_k - lam_t) / h, and a makes the step exact for polynomials in lambda, which fixes a B
    whatever B is; only with a single difference, in UniP-2 and UniC-1, a = 1/2 and B matters. The corrector adds the node
    m at s, with r = 1, once it is evaluated for the next step. `scale=b2`: UniP-2 in x0 is DPM-Solver++(2M); without those
    two rules UniPC-p is `exp_abm(p)`.

    Args: process: Gaussian.   grid: [n + 1].   order: 1 to 4.   value: `X0` or `EPS`.   scale: B as `(xp, h) -> B`.
    correct: with UniC.   lower_order_final: the last steps have order ..., 2, 1.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order` values (`order - 1` without corrector).
    Raises: ValueError: bad grid, order or value.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.vp()
        >>> unipc(p, times.log_snr(p, 10), order=2).evaluations
        10

    Reference: Zhao et al. 2023, arXiv:2302.04867, Theorem 3.1 (UniPC) and Corollary 3.2 (UniP).
    """
    check_integer("order", order, adams.ORDERS)
    if value is not adams.X0 and value is not adams.EPS:
        raise ValueError(f"value must be X0 or EPS; got {value.name}. For others use exp_abm")
    k = table.nodes(process, grid, inverse)
    xp, s = k.xp, adams.steps(process, k, value)
    use = adams.known(s, order)
    if lower_order_final:
        left = np.arange(k.t.shape[0])[::-1]  # steps after this one
        use = [u & xp.asarray(left >= j) for j, u in enumerate(use)]
    h = s.end - s.start
    safe_h = xp.where(s.taken, h, 1.0)
    b = -k.alpha_s * scale(xp, -safe_h) if value is adams.X0 else -k.sigma_s * scale(xp, safe_h)
    total = s.measure.sum(axis=1)  # the weight of m_0 and all others together
    w = adams.predictor(s, use)
    if order > 1:
        pair = use[1] if order == 2 else use[1] & ~use[2]
        r = xp.where(pair, (table.past(k, s.start, 1, 0.0) - s.start) / safe_h, 1.0)
        w[0], w[1] = xp.where(pair, total - b / (2 * r), w[0]), xp.where(pair, b / (2 * r), w[1])
    name = f"unipc({order}, {value.name})"
    if not correct:
        return adams.assemble(name, s, w[1:], w[0])
    c = adams.corrector(s, use)
    pair = s.taken & (~use[1] if order > 1 else True)
    c[0], c[1] = xp.where(pair, b / 2, c[0]), xp.where(pair, total - b / 2, c[1])
    return adams.assemble(name, s, *adams.fold(s, w, c))


_EXACT = {"x0": ("x0",), "eps": ("eps",)}
_STARTUP = ("startup",)  # third order in the end, as its first step; its own error of order 4 is larger up to 160 steps
CARDS = (
    {
        f"unipc{order}_{value.name}": Card(
            table.options(unipc, order=order, value=value), "arXiv:2302.04867#Thm.3.1", f"UniPC on {value.name}, B2",
            min(order + 1, 3), 1, exact=_EXACT[value.name], flags=_STARTUP if (order, value.name) == (3, "x0") else (),
        )
        for value in (adams.X0, adams.EPS)
        for order in (1, 2, 3, 4)
    }
    | {
        "unipc2_b1": Card(
            table.options(unipc, order=2, scale=b1), "arXiv:2302.04867#Thm.3.1", "UniPC on x0, B1", 3, 1, exact=("x0",),
        )
    }
    | {
        f"unip{order}_{value.name}": Card(
            table.options(unipc, order=order, value=value, correct=False), "arXiv:2302.04867#Cor.3.2",
            f"UniP on {value.name}, B2: no corrector", 2, 1, exact=_EXACT[value.name],
        )
        for value in (adams.X0, adams.EPS)
        for order in (2, 3)
    }
)  # fmt: skip
