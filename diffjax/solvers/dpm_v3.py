"""DPM-Solver-v3: the probability flow in the affine parameterisation that suits a model best, measured on that model.

With f = (sigma eps - l x) / alpha, L = integral of l, S = integral of s and B = integral of e^{-S} b, from lam_t on,
x_s / alpha_s = e^{-L_s} (x_t / alpha_t - integral_{lam_t}^{lam_s} e^{L + S} (g + B) dlam),   g = e^{-S} f - B,
and a polynomial in lambda replaces g, which varies little where (l, s, b) fit the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.solvers import table
from diffjax.solvers.checks import check_integer, check_number
from diffjax.solvers.statistics import ModelStatistics, check_statistics
from diffjax.types import Card, Process, Solver

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(8)
# RUNNING[q, r]: the integral from -1 to POINTS[q] of the Lagrange polynomial of node r
RUNNING = np.stack(
    [np.polynomial.Polynomial.fit(POINTS, row, 7, domain=[-1, 1]).integ(lbnd=-1)(POINTS) for row in np.eye(8)], axis=1
)

DATA = ModelStatistics(np.array([0.0, 1.0]), np.ones(2), np.zeros(2), np.zeros(2))  # f = -x0: DPM-Solver++
NOISE = ModelStatistics(np.array([0.0, 1.0]), np.zeros(2), -np.ones(2), np.zeros(2))  # g = eps / e^lam_t: DPM-Solver


def dpm_v3(
    process: Process,
    grid: Any,
    order: int = 3,
    statistics: ModelStatistics | None = None,
    *,
    correct_above: float = 0.0,
    pseudo_predictor: bool = False,
    pseudo_corrector: bool = False,
    inverse: bool = False,
) -> Solver:
    """DPM-Solver-v3 multistep predictor-corrector; one evaluation a step, none of them for the corrector.

    x_s = alpha_s e^{-L_s} (x_t / alpha_t - integral e^{L + S} B dlam - sum_k g[k] integral e^{L + S} p_k dlam)
    with divided differences g[k] over the last values and p_k the Newton polynomials of their lambdas. A pseudo-order
    method takes p_k = (lam - lam_t)^k. The corrector repeats the step with the value at its end. The state that is kept
    and returned is the predicted one, and the correction enters the next step, so that the last step has none.

    The statistics are linear between their log-SNRs and constant beyond; integrals are float64 quadrature.

    Args: process: Gaussian.   grid: [n + 1].   order: of the predictor, 1 to 3; the corrector has the same order, one more
    with `pseudo_corrector`, so that it does nothing at real order 1.   statistics: from `model_statistics` of the very model,
    condition and guidance that is sampled; one number per dimension of the state, or one for all. Default `DATA`, which is
    DPM-Solver++ multistep with a corrector; `NOISE` is DPM-Solver's.   correct_above: steps that end at larger times are
    corrected: 0 all, 0.5 the paper's half-corrector for strong guidance, 1 none.   pseudo_predictor, pseudo_corrector: for 5
    to 8 evaluations.   inverse: the grid increases.
    Returns: a table of n rows, one state, `order` values (one less without a corrector), with statistics one constant.
    Raises: ValueError: bad grid, order, correct_above or statistics.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.vp()
        >>> dpm_v3(p, times.log_snr(p, 10)).rows.qd.shape
        (10, 3)

    Reference: Zheng et al. 2023, arXiv:2310.13268, Section 3.
    """
    check_integer("order", order, (1, 2, 3))
    check_number("correct_above", correct_above, high=1.0, hint="a time, 1 for no corrector")
    k = table.nodes(process, grid, inverse)
    xp = k.xp
    ours = check_statistics(DATA if statistics is None else statistics, ModelStatistics)
    dims = ours.l.shape[1:]
    flow = _flow(k, ModelStatistics(ours.log_snr, *(a.reshape(len(a), -1) for a in ours[1:])))

    use = table.known(k, order)
    nodes = [_Node(_past(xp, flow.lam_t, j), use[j], *_to_past(xp, flow, j)) for j in range(order)]
    predictor, constant = _weights(xp, flow, nodes, pseudo_predictor)

    corrects = correct_above < 1 and (order > 1 or pseudo_corrector)
    first = lambda a, b: xp.where(flow.finite, a, b)  # a step with an infinite end is DDIM
    column = lambda c, other: first(c, other).reshape((-1, 1, *dims) if dims else (-1,))
    q = order if corrects else order - 1
    qd, qn, qc = [*predictor[1:], 0.0][:q], predictor[0], constant
    if corrects:
        # the nodes of the repeated step: its start, its end, then older values; real order has one of those less
        ages = range(1, order if pseudo_corrector else order - 1)
        middle = _Node(flow.lam_s, use[0] if pseudo_corrector else use[1], *_to_end(flow))
        older = [nodes[j]._replace(use=use[j if pseudo_corrector else j + 1]) for j in ages]
        corrector, constant_c = _weights(xp, flow, [nodes[0], middle, *older], pseudo_corrector)
        on = flow.finite & (k.s > correct_above)[:, None] & middle.use[:, None]
        shift = lambda c: _shift(xp, xp.where(on, c, 0.0))
        aged = [corrector[0], *corrector[2:], *[0.0] * order]
        for j in range(order):
            qd[j] = qd[j] + flow.carry * shift(aged[j] - predictor[j])
        qn = qn + flow.carry * shift(corrector[1])
        qc = qc + flow.carry * shift(constant_c - constant)

    alpha_t, alpha_s, sigma_s = (c[:, None] for c in (k.alpha_t, k.alpha_s, k.sigma_s))
    noise = k.sigma_t[:, None] / xp.where(alpha_t > 0, alpha_t, 1.0)
    wide = xp.zeros_like(flow.carry)
    extra = {}
    if statistics is not None:
        extra = {"qc": (column(qc, 0.0),), "constants": (np.ones((1, *dims)) if dims else np.ones(()),)}
    return table.build(
        f"dpm_v3({order})", k,
        u=(column(-flow.l, alpha_s + wide), column((1 - flow.l) * noise, sigma_s + wide)),
        qx=(column(flow.carry, 0.0),),
        qd=tuple(column(c, 0.0) for c in qd),
        qn=column(qn, 1.0 + wide),
        **extra,
    )  # fmt: skip


class _Flow(NamedTuple):
    """The exact part of every step; all [n, E] with E dimensions, or for each of P panels of Q quadrature points."""

    finite: Any  # [n, 1]
    lam_t: Any  # [n], finite
    lam_s: Any
    l: Any  # at lam_t
    carry: Any  # x_s by x_t, where f = 0
    scale: Any  # x_s by the integral
    growth: Any  # e^{S_s - S_t}
    bias: Any  # integral over the step of e^{-(S - S_t)} b
    owner: Any  # [n, P] 1 where the panel is in the step
    step: Any  # [P] the step that a panel is in
    lam: Any  # [P, Q]
    measure: Any  # [P, Q, E] weight times e^{L + S - L_t - S_t}, signed
    inner: Any  # [P, Q, E] B


class _Node(NamedTuple):
    """A value g that the polynomial goes through: g = decay f - bias."""

    lam: Any  # [n]
    use: Any  # [n]
    decay: Any  # [n, E] e^{-(S - S_t)}
    bias: Any  # [n, E] B


def _flow(k: table.Nodes, m: ModelStatistics) -> _Flow:
    """Panels between all log-SNRs of grid and statistics, where the integrands are smooth, and their sums."""
    xp = k.xp
    m = jax.tree.map(lambda a: xp.asarray(a, k.lam_t.dtype), m)
    lam_t, lam_s = (xp.where(xp.isfinite(lam), lam, 0.0) for lam in (k.lam_t, k.lam_s))
    knots = xp.sort(xp.concatenate([m.log_snr, lam_t, lam_s]))
    half = (knots[1:] - knots[:-1]) / 2
    middle = knots[:-1] + half
    points, gauss, running = (xp.asarray(a, lam_t.dtype) for a in (POINTS, WEIGHTS, RUNNING))
    lam = middle[:, None] + half[:, None] * points[None]

    low, high = xp.minimum(lam_t, lam_s)[:, None], xp.maximum(lam_t, lam_s)[:, None]
    inside = (middle[None] > low) & (middle[None] < high) & k.finite[:, None]
    owner, step = inside.astype(lam.dtype), xp.argmax(inside, axis=0)
    owned = inside.any(axis=0)[:, None, None]
    share = owned.astype(lam.dtype)
    at_t, at_s = (_antiderivatives(xp, m, a) for a in (lam_t, lam_s))
    at_q = _antiderivatives(xp, m, lam)
    far = lambda i: xp.where(owned, at_q[i] - at_t[i][step][:, None], 0.0)
    to_l, to_s = far(0), far(1)

    b = _between(xp, m.log_snr, m.b, lam) * xp.exp(-to_s) * share
    panel = half[:, None] * (gauss[None, :, None] * b).sum(axis=1)  # [P, E]
    same = xp.tril((owner.T @ owner), -1)  # [P, P]: earlier panels of the same step
    bias = owner @ panel
    up = (lam_s > lam_t)[:, None]
    origin = xp.where(up, 0.0, bias)  # the integral from the lower end to lam_t
    inner = half[:, None, None] * xp.einsum("qr,pre->pqe", running, b)
    inner = (same @ panel)[:, None] + inner - origin[step][:, None]
    sign = xp.where(up, 1.0, -1.0)
    measure = (sign[step] * half[:, None])[..., None] * gauss[None, :, None] * xp.exp(to_l + to_s) * share
    shrink = xp.where(k.finite[:, None], xp.exp(at_t[0] - at_s[0]), 0.0)
    alpha_t = xp.where(k.alpha_t > 0, k.alpha_t, 1.0)
    return _Flow(
        k.finite[:, None], lam_t, lam_s, _between(xp, m.log_snr, m.l, lam_t),
        (k.alpha_s / alpha_t)[:, None] * shrink, -k.alpha_s[:, None] * shrink,
        xp.where(k.finite[:, None], xp.exp(at_s[1] - at_t[1]), 1.0), sign * bias,
        owner, step, lam, measure, inner,
    )  # fmt: skip


def _between(xp: Any, knots: Any, values: Any, lam: Any) -> Any:
    """`values` [K, E] at `lam` [...]: linear between the knots, constant outside.   [..., E]"""
    i = xp.clip(xp.searchsorted(knots, lam) - 1, 0, len(knots) - 2)
    w = xp.clip((lam - knots[i]) / (knots[i + 1] - knots[i]), 0.0, 1.0)[..., None]
    return (1 - w) * values[i] + w * values[i + 1]


def _antiderivatives(xp: Any, m: ModelStatistics, lam: Any) -> tuple[Any, Any]:
    """The integrals of l and s from the first knot to `lam`, exact for `_between`."""
    out = []
    gaps = (m.log_snr[1:] - m.log_snr[:-1])[:, None]
    i = xp.clip(xp.searchsorted(m.log_snr, lam) - 1, 0, len(m.log_snr) - 2)
    within = xp.clip(lam, m.log_snr[0], m.log_snr[-1])
    beyond = (lam - within)[..., None]
    d = (within - m.log_snr[i])[..., None]
    for values in (m.l, m.s):
        total = xp.concatenate([xp.zeros_like(values[:1]), xp.cumsum(gaps * (values[1:] + values[:-1]) / 2, axis=0)])
        there = _between(xp, m.log_snr, values, lam)
        out.append(total[i] + d * (values[i] + there) / 2 + beyond * there)
    return out[0], out[1]


def _shift(xp: Any, column: Any) -> Any:
    """The column of the step before; zero in the first row."""
    return xp.concatenate([xp.zeros_like(column[:1]), column[:-1]])


def _past(xp: Any, column: Any, j: int) -> Any:
    for _ in range(j):
        column = _shift(xp, column)
    return column


def _to_end(flow: _Flow) -> tuple[Any, Any]:
    """Decay and bias at the end of a step, measured from its start."""
    return 1 / flow.growth, flow.bias


def _to_past(xp: Any, flow: _Flow, j: int) -> tuple[Any, Any]:
    """Decay and bias at the start of the step j before, measured from the start of this one."""
    decay, bias = xp.ones_like(flow.growth), xp.zeros_like(flow.growth)
    for back in range(1, j + 1):
        decay = decay * _past(xp, flow.growth, back)
        bias = bias - decay * _past(xp, flow.bias, back)
    return decay, bias


def _weights(xp: Any, flow: _Flow, nodes: list[_Node], pseudo: bool) -> tuple[list[Any], Any]:
    """What f at every node and the constant one contribute to x_s.   n arrays [n, E], [n, E]"""
    total = lambda values: flow.owner @ (flow.measure * values).sum(axis=1)
    newton, moments = xp.ones_like(flow.lam), []
    for j, node in enumerate(nodes):
        moments.append(xp.where(node.use[:, None], total(newton[..., None]), 0.0))
        newton = newton * (flow.lam - (nodes[0] if pseudo else nodes[j]).lam[flow.step][:, None])
    weights, bias = [], total(flow.inner)
    for j, node in enumerate(nodes):
        w = xp.zeros_like(flow.carry)
        for top in range(j, len(nodes)):
            gap = xp.ones_like(node.lam)
            for m in range(top + 1):
                if m != j:
                    gap = gap * xp.where(nodes[top].use, node.lam - nodes[m].lam, 1.0)
            w = w + moments[top] / gap[:, None]
        weights.append(flow.scale * w * node.decay)
        bias = bias - w * node.bias
    return weights, flow.scale * bias


_SUMMARY = "DPM-Solver-v3 with the statistics of a model, by default those of data prediction"
CARDS = {
    "dpm_v3_2": Card(table.options(dpm_v3, order=2), "arXiv:2310.13268#Sec.3", _SUMMARY, 2, 1, exact=("x0",)),
    "dpm_v3_3": Card(table.options(dpm_v3, order=3), "arXiv:2310.13268#Sec.3", _SUMMARY, 2, 1, exact=("x0",)),
}
