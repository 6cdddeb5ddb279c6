"""Exponential multistep with free decisions in every step: the space that solver searches look through."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.solvers import table
from diffjax.solvers.adams import EPS, QUADRATURE, X0, Value
from diffjax.types import Card, Process, Solver

WINDOW = 4  # past points, the current one included, that a predictor may use


class Decisions(NamedTuple):
    """What is decided for each step: every field is one value for all steps or an array `[n]`.

    A point that does not exist yet, or whose lambda is infinite, is left out, and with it an order.
    """

    order: Any = 2  # 1 to 4: how many points the polynomial goes through
    eps: Any = False  # expand eps instead of x0
    stride: Any = 1  # 1 to 3: use every stride-th point; those further than three back are left out
    spare: Any = 3  # derivative k comes from its k + 1 + spare newest points, at most all; 3: Lagrange, 0: lowest order
    mean: Any = False  # with two points, replace the kernel by its mean, as DPM-Solver++(2M) does
    base: Any = 0  # 0 to 2: start from the state so many points back; > 0 is a stage of a singlestep method
    corrector: Any = False  # once the new value is known, repeat the step with it, if the next step starts there


_RANGES = {"order": (1, 4), "eps": (0, 1), "stride": (1, 3), "spare": (0, 3), "mean": (0, 1), "base": (0, 2),
           "corrector": (0, 1)}  # fmt: skip


def unified(process: Process, grid: Any, decisions: Decisions = Decisions(), *, inverse: bool = False) -> Solver:  # noqa: B008
    """Exponential integration with order, prediction type, points, derivatives, start and corrector free in every step.

    x_s = carry x_base + sum_k D_k / k! integral_{lam_base}^{lam_s} kernel(lam) (lam - lam_base)^k dlam

    D_k is the k-th derivative at lam_base of the polynomial through the newest values of x0 or eps. The values kept are x0;
    eps of a past point is (x - alpha x0) / sigma of the past state, so that a step may expand the other prediction than
    the one before it. A correction is added to the state before the next step: no evaluation more. A step with an infinite
    lambda at one end is `ddim`. All decisions give tables of one shape, so that `stack` and `vmap` run thousands at once.

    Args: process: Gaussian.   grid: [n + 1].   decisions: host values or JAX.   inverse: the grid increases.
    Returns: a table of n rows, five states and four values; `compact` drops those that no row reads.
    Raises: ValueError: bad grid, a decision out of range or neither a number nor [n].

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.vp()
        >>> unified(p, times.log_snr(p, 5), Decisions(order=[1, 2, 3, 3, 2], eps=[1, 1, 0, 0, 0])).evaluations
        5

    Reference: Liu et al. 2023, arXiv:2312.07243, Section 3; correctors: Zhao et al. 2023, arXiv:2302.04867, Algorithm 1.
    """
    k = table.nodes(process, grid, inverse, decisions)
    xp, n = k.xp, k.t.shape[0]
    order, eps, stride, spare, mean, base, corrector = _columns(xp, n, decisions)
    eps, mean, corrector = eps > 0, mean > 0, corrector > 0

    exists = [xp.asarray(np.arange(n) >= j) & table.past(k, xp.isfinite(k.lam_t), j, False) for j in range(WINDOW)]
    lam = [table.past(k, xp.where(xp.isfinite(k.lam_t), k.lam_t, 0.0), j, 0.0) for j in range(WINDOW)]
    base = sum(xp.where(exists[j] & (base == j), j, 0) for j in (1, 2))
    at_base = lambda column, fill: xp.where(
        base == 2, table.past(k, column, 2, fill), xp.where(base == 1, table.past(k, column, 1, fill), column)
    )
    start = k._replace(
        lam_t=xp.where(k.finite, at_base(k.lam_t, 0.0), 0.0),
        lam_s=xp.where(k.finite, k.lam_s, -1.0),
        alpha_t=xp.where(k.finite, at_base(k.alpha_t, 1.0), 1.0),
        sigma_t=xp.where(k.finite, at_base(k.sigma_t, 1.0), 1.0),
    )
    h = start.lam_s - start.lam_t
    rank = [xp.where(stride == 1, j, xp.where(xp.asarray(j) % stride == 0, j // stride, WINDOW)) for j in range(WINDOW)]
    use = xp.stack([exists[j] & (rank[j] < order) & k.finite for j in range(WINDOW)], axis=1)  # [n, 4]
    rank = xp.stack([xp.broadcast_to(r, (n,)) for r in rank], axis=1)
    place = xp.stack([xp.where(use[:, j], (lam[j] - start.lam_t) / h, 0.0) for j in range(WINDOW)], axis=1)

    moments = [_moments(start, h, v) for v in (X0, EPS)]
    moments = xp.where(eps[:, None], moments[1], moments[0])
    degree = xp.asarray(np.arange(WINDOW), rank.dtype)[None, :, None]
    near = rank[:, None, :] <= degree + spare[:, None, None]
    near = near | xp.asarray(np.arange(WINDOW) == 0)[None, :, None]  # the value itself: through all points
    predict = _weights(xp, moments, place, use[:, None, :] & near, mean)
    one = xp.ones((n, 1), k.t.dtype)
    both = xp.concatenate([k.finite[:, None], use], axis=1)
    correct = _weights(
        xp, moments, xp.concatenate([one, place], axis=1),
        xp.broadcast_to(both[:, None], (n, WINDOW + 1, WINDOW + 1)), mean,
    )  # fmt: skip
    change = correct - xp.concatenate([0 * one, predict], axis=1)  # [n, 5]: of the new value, then of the past ones
    change = xp.where(corrector[:, None] & k.finite[:, None], change, 0.0)

    carry = xp.where(eps, EPS.carry(start), X0.carry(start))
    # the correction of step i - 1 is applied by step i, if that starts from its end
    back = lambda column, fill: table.past(k, column, 1, fill)
    corrected = xp.where(base == 0, carry, 0.0)
    own = [predict[:, j] for j in range(WINDOW)] + [xp.zeros_like(carry)]
    late = [corrected * back(change[:, j], 0.0) for j in range(WINDOW + 1)]
    late_eps = back(eps, False)
    qx, qd = [], []
    for j in range(WINDOW + 1):
        alpha, sigma = table.past(k, k.alpha_t, j, 0.0), table.past(k, k.sigma_t, j, 1.0)
        on_eps = xp.where(eps, own[j], 0.0) + xp.where(late_eps, late[j], 0.0)
        on_x0 = xp.where(eps, 0.0, own[j]) + xp.where(late_eps, 0.0, late[j])
        on_eps = on_eps / xp.where(sigma > 0, sigma, 1.0)  # zero there: its lambda is infinite
        qx.append(xp.where(k.finite, on_eps + xp.where(base == j, carry, 0.0), 0.0))
        qd.append(xp.where(k.finite, on_x0 - alpha * on_eps, 0.0))
    return table.build(
        "unified", k,
        u=(xp.where(k.finite, 1.0, k.alpha_s), xp.where(k.finite, 0.0, k.sigma_s)),
        qx=tuple(qx), qd=tuple(qd[1:]), qn=xp.where(k.finite, qd[0], 1.0),
    )  # fmt: skip


def _columns(xp: Any, n: int, decisions: Decisions) -> list[Any]:
    """Every field as an integer array [n]."""
    columns = []
    for name, value in zip(Decisions._fields, decisions, strict=True):
        low, high = _RANGES[name]
        value = xp.asarray(value)
        if value.shape not in ((), (n,)):
            raise ValueError(
                f"decisions.{name} must be one value or one for each of {n} steps; got shape {value.shape}"
            )
        if not isinstance(value, jax.core.Tracer):
            host = np.asarray(value)
            if np.any(host != np.round(host)) or host.min() < low or host.max() > high:
                raise ValueError(f"decisions.{name} must be integers from {low} to {high}; got {host}")
        columns.append(xp.broadcast_to(value.astype(np.int32), (n,)))
    return columns


def _moments(start: table.Nodes, h: Any, value: Value) -> Any:
    """`integral kernel(lam) u^k dlam`, u = (lam - lam_base) / h, k = 0 .. 4.   [n, 5]"""
    xp = start.xp
    points, gauss = (xp.asarray(a[None], h.dtype) for a in QUADRATURE)
    u = (1 + points) / 2
    measure = h[:, None] / 2 * gauss * value.kernel(start, start.lam_t[:, None] + h[:, None] * u)
    return xp.stack([(measure * u**j).sum(axis=1) for j in range(WINDOW + 1)], axis=1)


def _weights(xp: Any, moments: Any, place: Any, use: Any, mean: Any) -> Any:
    """The weight of every value.   w_j = sum_k moment_k [u^k] L_j^(k)(u), the Lagrange basis on the points `use[:, k]`.

    Args: moments: [n, 5].   place: [n, J] points in u.   use: [n, K, J].   Returns: [n, J].
    """
    n, degrees, count = use.shape
    linear = mean & (use[:, 0].sum(axis=1) == 2)
    moments = xp.stack(
        [xp.where(linear, moments[:, 0] / 2, moments[:, j]) if j == 1 else moments[:, j] for j in range(degrees)],
        axis=1,
    )
    unit = np.zeros((1, 1, 1, degrees))
    unit[..., 0] = 1.0
    basis = xp.broadcast_to(xp.asarray(unit, place.dtype), (n, degrees, count, degrees))
    for m in range(count):
        on = use & use[:, :, m : m + 1] & xp.asarray(np.arange(count) != m)[None, None]
        root = place[:, None, m : m + 1]
        gap = xp.where(on, place[:, None] - root, 1.0)
        shifted = xp.concatenate([xp.zeros_like(basis[..., :1]), basis[..., :-1]], axis=-1)
        basis = xp.where(on[..., None], (shifted - root[..., None] * basis) / gap[..., None], basis)
    diagonal = xp.stack([basis[:, j, :, j] for j in range(degrees)], axis=1)  # [n, K, J]
    return (moments[:, :, None] * xp.where(use, diagonal, 0.0)).sum(axis=1)


_EACH = "free decisions in every step; here two points and the corrector, on the kept "
CARDS = {
    f"unified_2c_{kept}": Card(
        table.options(unified, decisions=Decisions(order=2, eps=kept == "eps", corrector=True)),
        "arXiv:2312.07243#Sec.3",
        _EACH + kept,
        3,
        1,
        exact=(kept,),
    )
    for kept in ("x0", "eps")
}
