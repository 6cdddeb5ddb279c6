"""DPM-Solver++: multistep Taylor expansions of the data prediction in lambda."""

from __future__ import annotations

from typing import Any

from diffjax.solvers import table
from diffjax.types import Card, Process, Solver


def dpmpp(process: Process, grid: Any, order: int = 2, *, inverse: bool = False) -> Solver:
    """DPM-Solver++ multistep of order 1, 2 or 3; one evaluation a step.

    x_s = (sigma_s / sigma_t) x + alpha_s (1 - e^{-h}) D,  h = lam_s - lam_t;   order 2: D = x0 + (x0 - x0_prev) h / (2 h_prev)

    Order 1 is `ddim`. The first steps build the order up; a step to sigma = 0 is first order. Order 3 is the published
    update, whose second-difference term is half of the exact one, so that it converges with order 2.

    Args: process: Gaussian.   grid: [n + 1].   order: 1, 2 or 3.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order - 1` values.
    Raises: ValueError: bad grid or order.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.vp()
        >>> dpmpp(p, times.log_snr(p, 20), order=2).evaluations
        20

    Reference: Lu et al. 2022, arXiv:2211.01095, Algorithm 2 and Appendix B.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3; got {order!r}")
    k = table.nodes(process, grid, inverse)
    xp = k.xp
    use = table.known(k, order)
    lam_t, lam_s = (xp.where(xp.isfinite(lam), lam, 0.0) for lam in (k.lam_t, k.lam_s))
    h = xp.where(k.finite, lam_s - lam_t, 1.0)
    gain = xp.where(k.finite, -xp.expm1(-h), 1.0)  # 1 - e^{-h}
    b = k.alpha_s * gain
    w = [b, xp.zeros_like(b), xp.zeros_like(b)]
    if order >= 2:
        h0 = xp.where(use[1], lam_t - table.past(k, lam_t, 1, 0.0), 1.0)
        r0 = h0 / h
        first = b / (2 * r0)  # weight of D1_0 = x0 - x0_prev at second order
    if order == 2:
        second = xp.where(use[1], first, 0.0)
        w = [b + second, -second, w[2]]
    if order == 3:
        h1 = xp.where(use[2], table.past(k, h0, 1, 1.0), 1.0)
        r1 = h1 / h
        phi2 = gain / h - 1  # (e^{-h} - 1)/h + 1, negated
        phi3 = -phi2 / h - 0.5
        d1, d2 = -k.alpha_s * phi2, -k.alpha_s * phi3
        total = r0 + r1
        # D1 = D1_0 + r0/(r0+r1) (D1_0 - D1_1),  D2 = (D1_0 - D1_1)/(r0+r1),  D1_0 = (m0-m1)/r0,  D1_1 = (m1-m2)/r1
        on10 = (d1 * (1 + r0 / total) + d2 / total) / r0
        on11 = -(d1 * r0 / total + d2 / total) / r1
        third = use[2]
        low = xp.where(use[1], first, 0.0)
        w = [
            b + xp.where(third, on10, low),
            xp.where(third, on11 - on10, -low),
            xp.where(third, -on11, 0.0),
        ]
    ratio = xp.where(k.sigma_t > 0, k.sigma_s / xp.where(k.sigma_t > 0, k.sigma_t, 1.0), 0.0)
    return table.build(
        f"dpmpp({order})", k, u=(1.0, 0.0), qx=(ratio,), qd=tuple(w[1:order]), qn=w[0]
    )  # fmt: skip


_MULTISTEP = "DPM-Solver++ multistep, data prediction"
CARDS = {
    "dpmpp_1": Card(table.options(dpmpp, order=1), "arXiv:2211.01095#Alg.2", _MULTISTEP, 1, 1, exact=("x0", "eps")),
    "dpmpp_2m": Card(table.options(dpmpp, order=2), "arXiv:2211.01095#Alg.2", _MULTISTEP, 2, 1, exact=("x0",)),
    "dpmpp_3m": Card(table.options(dpmpp, order=3), "arXiv:2211.01095#App.B", _MULTISTEP, 2, 1, exact=("x0",)),
}
