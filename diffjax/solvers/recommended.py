"""The recommended solver: Adams predictor and corrector in the angle between noise and data, and a rule for order and grid.

With r^2 = c^2 alpha^2 + sigma^2, theta = atan2(sigma, c alpha) and c the standard deviation of the data,

    y = x / r,   dy / dtheta = -d = -sin(theta) D,   d = (sigma x0 / c - c alpha eps) / r

For data N(0, c^2 I) the value d is zero, so every step is exact. theta runs from pi / 2 (noise alone) to 0 (data alone) and
everything is finite at both ends. D is a smooth function of theta where the denoiser is smooth in sigma: polynomials in
s = sigma / (c alpha + sigma), the time of a rectified flow, are fitted to it.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import jax
import numpy as np

from diffjax.solvers import adams, table
from diffjax.solvers.checks import check_integer, check_number
from diffjax.times.grids import check, curvature
from diffjax.types import Card, Process, Scalar, Solver

NODES = (1, 2, 3, 4, 5, 6)
NEAR_DATA = 0.03  # angle; from below it a step to the data itself is x0: what the network does nearer to it is unknown


def angle_abm(
    process: Process,
    grid: Any,
    order: int = 3,
    corrector: int = 4,
    data_std: Scalar = 1.0,
    *,
    middle: tuple[float, float] = (0.0, math.inf),
    ends: tuple[int, int] | None = None,
    inverse: bool = False,
) -> Solver:
    """Adams-Bashforth along theta, and an Adams-Moulton corrector that costs no evaluation; see the module for theta, r, d.

    predict  x_s = (r_s / r_t) x_t + r_s sum_j d_j integral_{theta_s}^{theta_t} sin(theta) / sin(theta_j) L_j(theta) dtheta
    correct  the same with the new d, evaluated at the predicted x_s, among the nodes, when the next step begins

    L_j is the Lagrange basis on the nodes, in s. The last point is predicted; it is x0 if it is the data themselves and the step
    before it ends within 0.03 of them. The first steps build both orders up.

    Args: process: Gaussian.   grid: [n + 1].   order: 1 to 6 nodes of the predictor.   corrector: 0 (none) or 2 to 6 nodes,
    the new one among them.   data_std: > 0, c of the module.   middle, ends: steps that start at sigma / (c alpha) outside
    `middle` (low, high) have `ends` (predictor, corrector) nodes instead, at most as many.   inverse: the grid increases.
    Returns: a table of n rows, which are n evaluations; one state.
    Raises: ValueError: bad grid, order, corrector, data_std, middle or ends.

    Example:
        >>> from diffjax import processes, times
        >>> angle_abm(processes.cosine(), times.log_snr(processes.cosine(), 10)).rows.qd.shape
        (10, 3)

    Reference: a corrector without evaluations as in Zhao et al. 2023, arXiv:2302.04867; angle, value and weight are our own.
    """
    check_integer("order", order, NODES)
    check_integer("corrector", corrector, (0, *NODES[1:]), hint="0 for none")
    check_number("data_std", data_std, above=True, high=sys.float_info.max)
    ends = (order, corrector) if ends is None else ends
    if not (1 <= ends[0] <= order and min(2, corrector) <= ends[1] <= corrector):
        raise ValueError(f"ends must have at most the nodes of the middle, {(order, corrector)}; got {ends}")
    if not 0 <= middle[0] <= middle[1]:
        raise ValueError(f"middle must be (low, high) with 0 <= low <= high, ratios sigma / (c alpha); got {middle}")
    k = table.nodes(process, grid, inverse, data_std)
    xp, n = k.xp, k.t.shape[0]
    c = xp.asarray(data_std, k.alpha_t.dtype)
    radius = lambda alpha, sigma: xp.sqrt((c * alpha) ** 2 + sigma**2)
    rt, rs = radius(k.alpha_t, k.sigma_t), radius(k.alpha_s, k.sigma_s)
    start, end = xp.arctan2(k.sigma_t, c * k.alpha_t), xp.arctan2(k.sigma_s, c * k.alpha_s)
    theta = [table.past(k, start, j, 1.0) for j in range(max(order, corrector))]
    # An inversion may start at theta = 0, where D is infinite: that step takes d itself, and later ones skip that node.
    flat = start == 0
    exists = [
        table.past(k, xp.logical_not(flat), j, False) & xp.asarray(np.arange(n) >= j)
        for j in range(max(order, corrector))
    ]
    inside = (start >= math.atan(middle[0])) & (start <= math.atan(middle[1]))
    use = _consecutive(_at_most(exists[:order], ends[0], inside))
    predict = _weights(xp, start, end, theta[:order], [use[0] | flat, *use[1:]], flat)
    old = [xp.zeros_like(start)] * (max(order, corrector - 1) if corrector else order - 1)
    new = rs * predict[0]
    for j in range(1, order):
        old[j - 1] = rs * predict[j]
    if corrector:  # the step before once more, from theta[1] to start; its state is carried on, so r_t becomes r_s
        inside = table.past(k, inside, 1, False)
        use = _consecutive(_at_most([exists[0] & exists[1], *exists[1:corrector]], ends[1], inside))
        correct = _weights(xp, theta[1], start, theta[:corrector], [use[0], *use[1:]], xp.zeros_like(flat))
        new = new + rs * correct[0]
        before = [xp.where(use[0], table.past(k, w, 1, 0.0), 0.0) for w in predict]
        for j in range(len(old)):
            gain = (correct[j + 1] if j + 1 < corrector else 0.0) - (before[j] if j < order else 0.0)
            old[j] = old[j] + rs * gain
    last = (end == 0) & (start < NEAR_DATA)
    other = lambda a, b: xp.where(last, b, a)
    return table.build(
        f"angle_abm({order}, {corrector})", k,
        u=(other(k.sigma_t / (c * rt), k.alpha_s), other(-c * k.alpha_t / rt, 0.0)),
        qx=(other(rs / rt, 0.0),), qd=tuple(other(w, 0.0) for w in old), qn=other(new, 1.0),
    )  # fmt: skip


def _at_most(exists: list[Any], nodes: int, inside: Any) -> list[Any]:
    """The same, with no more than so many nodes outside."""
    return [*exists[:nodes], *(e & inside for e in exists[nodes:])]


def _consecutive(exists: list[Any]) -> list[Any]:
    """Whether each node and all newer ones exist."""
    out = exists[:1]
    for e in exists[1:]:
        out.append(out[-1] & e)
    return out


def _weights(xp: Any, start: Any, end: Any, nodes: list[Any], use: list[Any], flat: Any) -> list[Any]:
    """`[j][i]`: the integral from end_i to start_i of w(theta) / w(node_j) times the Lagrange basis of the nodes in use.

    w is the sine, and 1 in rows that are `flat`; the basis is in s = sin / (sin + cos).   all [n]
    """
    s = lambda angle: xp.sin(angle) / (xp.sin(angle) + xp.cos(angle))
    points, gauss = (xp.asarray(a[None], start.dtype) for a in adams.QUADRATURE)
    half = (start - end)[:, None] / 2
    theta = end[:, None] + half * (1 + points)
    measure = half * gauss * xp.where(flat[:, None], 1.0, xp.sin(theta))
    weights = adams.lagrange_weights(xp, s(theta), measure, [s(node) for node in nodes], use)
    scale = lambda node, use: xp.where(use & ~flat, xp.sin(node), 1.0)
    return [w / scale(node, u) for w, node, u in zip(weights, nodes, use, strict=True)]


# ------------------------------------------------------------------------------------------------------------ the rule

# Heights of the density of `times.curvature` at these numbers of evaluations, between them linear in log(evaluations).
# Chosen on random mixtures in 2 to 32 dimensions for the smallest errors over the best peer's of which four trained networks
# are nearer to their fine trajectory than with the best other method (CMA-ES; those of experiments/benchmarks are others).
# Networks are rough in log-SNR on a scale of about 1/8 everywhere, so that steps at the ends must not be long.
EVALUATIONS = (5, 8, 10, 15, 20, 30, 50, 100)
HEIGHTS = np.array([
    [-2.574, -0.339, 1.846, 0.178, 0.719, 0.983, -0.887, -0.296],
    [-0.208, 0.243, 0.257, 0.999, 0.693, 0.185, -0.083, -0.418],
    [-0.545, -0.26, 0.097, 0.755, 0.411, -0.129, -0.143, -0.995],
    [-0.058, 0.029, 0.656, 0.921, 0.806, -0.088, -0.004, -0.165],
    [0.292, -0.106, 1.03, 0.801, 1.28, -0.113, 0.336, -0.199],
    [1.127, 0.198, 0.969, 1.203, 1.176, 0.503, 0.406, 0.102],
    [0.847, -0.15, 0.974, 1.125, 0.881, 0.281, 0.365, 0.031],
    [0.7, 0.2, 0.8, 0.8, 0.7, 0.4, 0.5, 0.2],
])  # fmt: skip
GUIDED_EVALUATIONS = (5, 10, 20, 50)  # flatter with many: guidance amplifies what is rough at the ends
GUIDED_HEIGHTS = np.array([
    [-0.62, -0.45, 1.37, 0.4, 0.65, 0.9, -1.0, -0.8],
    [-0.5, 0.18, 0.5, 0.65, 1.0, -0.5, -0.05, -0.65],
    [0.3, 0.2, 1.0, 0.8, 1.2, 0.0, 0.3, -0.2],
    [0.4, 0.5, 1.0, 0.7, 0.9, 0.5, 0.6, 0.6],
])  # fmt: skip
# (order, corrector) below so many evaluations: without guidance, with it, and with a weight above STRONG
PLAIN = ((7, (3, 4)), (13, (4, 5)), (25, (5, 5)), (math.inf, (6, 6)))
GUIDED = ((12, (2, 3)), (40, (3, 4)), (math.inf, (4, 5)))
# With six nodes, steps that start at sigma / (c alpha) outside this range have fewer: six nodes there amplify the roughness
# of a network. Seven are not stable on networks anywhere.
MIDDLE, ENDS = (lambda n: (3 / n, 4.0)), (4, 5)
MANY = 10  # from here one evaluation is spent beside an end at infinite log-SNR, as other grids do
STRONG, STRONGLY = 5.0, ((8, (1, 2)), (50, (2, 3)), (math.inf, (3, 4)))


def orders(evaluations: int, guidance: Scalar = 1.0) -> tuple[int, int]:
    """`(order, corrector)` of the rule: both grow with the evaluations, later under guidance, which amplifies errors."""
    bounds = PLAIN if guidance <= 1 else GUIDED if guidance <= STRONG else STRONGLY
    return next(pair for bound, pair in bounds if evaluations < bound)


def heights(evaluations: int, guidance: Scalar = 1.0) -> np.ndarray:
    """The heights of the density that the rule spaces its grid by; others under guidance.   [8]"""
    at, rows = (EVALUATIONS, HEIGHTS) if guidance <= 1 else (GUIDED_EVALUATIONS, GUIDED_HEIGHTS)
    return np.array([np.interp(np.log(evaluations), np.log(at), column) for column in rows.T])


def on_grid(
    process: Process, grid: Any, data_std: Scalar = 1.0, guidance: Scalar = 1.0, *, inverse: bool = False
) -> Solver:
    """The method that `recommended` takes for as many steps, on a grid of your own; arguments as there and in `angle_abm`."""
    n = np.shape(grid)[0] - 1
    nodes = orders(n, _weight(guidance))
    fewer = {"middle": MIDDLE(n), "ends": ENDS} if nodes == PLAIN[-1][1] else {}
    return angle_abm(process, grid, *nodes, data_std, **fewer, inverse=inverse)


def _weight(guidance: Any) -> float:
    """The largest concrete weight, or a ValueError."""
    if isinstance(guidance, jax.core.Tracer):
        raise ValueError("guidance chooses the order and must be concrete; give its largest value as a float")
    weight = float(np.max(guidance))
    if not math.isfinite(weight):
        raise ValueError(f"guidance must be finite; got {guidance!r}")
    return weight


def recommended(
    process: Process,
    evaluations: int,
    *,
    data_std: Scalar = 1.0,
    guidance: Scalar = 1.0,
    start: Scalar = 1.0,
    stop: Scalar = 0.0,
) -> Solver:
    """The solver to take unless you know better: `angle_abm` with its order and its grid chosen by one fixed rule.

    The grid is `times.curvature` with `heights(evaluations, guidance)`, the orders are `orders(evaluations, guidance)`; with
    six nodes, the steps that start outside `MIDDLE(evaluations)` have those of `ENDS`.

    Args: process: Gaussian.   evaluations: >= 1, of the denoiser.   data_std: > 0, of the data that the denoiser was trained
    on, 1 for standardised data; a factor of two costs little.   guidance: the largest weight of classifier-free guidance;
    1 is none.   start, stop: times, 0 <= stop < start <= 1; infinite log-SNR at either is fine.
    Returns: a table of `evaluations` rows.
    Raises: ValueError: evaluations, data_std, guidance, start or stop out of range.

    Example:
        >>> from diffjax import processes
        >>> recommended(processes.cosine(), 10).evaluations
        10
    """
    check(evaluations, start, stop)
    grid = curvature(
        process, evaluations, data_std, start, stop,
        heights=heights(evaluations, _weight(guidance)), apart=(False, evaluations >= MANY),
    )  # fmt: skip
    return on_grid(process, grid, data_std, guidance)


CARDS = {
    f"angle_abm{order}_{corrector}": Card(
        table.options(angle_abm, order=order, corrector=corrector),
        "arXiv:2302.04867",
        f"Adams with {order} nodes in the angle, corrector with {corrector}",
        3,
        1,
        exact=("gaussian",),
    )
    for order, corrector in ((2, 3), (4, 5), (5, 5))
} | {
    "recommended": Card(
        on_grid, "arXiv:2302.04867", "the rule's orders for as many steps; `recommended` has its grid too", 3, 1,
        exact=("gaussian",),
    )
}  # fmt: skip
