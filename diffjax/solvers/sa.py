"""SA-Solver: stochastic Adams predictor and corrector for the reverse SDE with a chosen amount of noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffjax import numerics as nu
from diffjax.solvers import table
from diffjax.solvers.adams import QUADRATURE
from diffjax.types import Card, Process, Solver


def sa(
    process: Process,
    grid: Any,
    predictor: int = 3,
    corrector: int = 3,
    tau: Any = 1.0,
    *,
    low: Any = 0.0,
    high: Any = math.inf,
    inverse: bool = False,
) -> Solver:
    """Stochastic Adams predictor-corrector in x0; one evaluation a step, none of them for the corrector.

    x_s = (sigma_s / sigma_t) e^{-tau^2 h} x_t + sum_j w_j x0_j + sigma_s sqrt(1 - e^{-2 tau^2 h}) z,  h = lam_s - lam_t
    w_j = alpha_s integral_{lam_t}^{lam_s} (1 + tau^2) e^{-(1 + tau^2)(lam_s - lam)} L_j(lam) dlam,  L_j the Lagrange basis

    tau = 0 is the probability flow, tau = 1 the reverse SDE: with one value and no corrector they are `ddim` and `ddpm`.
    The corrector repeats a step with the value at its end and the noise of that step. The state that is kept and returned is
    the predicted one, and the correction enters the next step, so that the last step has none.

    Args: process: Gaussian.   grid: [n + 1].   predictor: values that its polynomial goes through, 1 to 4.   corrector:
    values of the corrector, the new one among them, 2 to 4, or 0 for none.   tau: >= 0, the noise of steps that begin at
    low <= sigma / alpha <= high; other steps are deterministic.   inverse: the grid increases; needs tau = 0.
    Returns: a table of n rows, one state, `max(predictor, corrector - 1)` values (`predictor - 1` without a corrector).
    Raises: ValueError: bad grid, counts, tau or range; tau > 0 with inverse.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.edm()
        >>> s = sa(p, times.karras(p, 10), tau=1.0, low=0.05, high=1.0)
        >>> s.rows.qd.shape, bool(s.rows.noise[0] == 0)
        ((10, 3), True)

    Reference: Xue et al. 2023, arXiv:2309.05019, Eq. 15 and 18.
    """
    if predictor not in (1, 2, 3, 4):
        raise ValueError(f"predictor must be 1, 2, 3 or 4; got {predictor!r}")
    if corrector not in (0, 2, 3, 4):
        raise ValueError(
            f"corrector counts its values, the new one among them: 2, 3 or 4, or 0 for none; got {corrector!r}"
        )
    for name, value in {"tau": tau, "low": low, "high": high}.items():
        if nu.namespace(value) is np and not float(value) >= 0:
            raise ValueError(f"{name} must be >= 0; got {value}")
    silent = nu.namespace(tau) is np and float(tau) == 0.0  # no noise column then: sqrt(0) has no derivative
    if inverse and not silent:
        raise ValueError(f"inversion is deterministic: tau must be 0 with inverse=True; got {tau}")
    k = table.nodes(process, grid, inverse, (tau, low, high))
    xp = k.xp
    r = xp.exp(-k.lam_t)
    rate = xp.where((r >= low) & (r <= high), tau**2, 0.0 * tau)  # tau^2 of every step
    lam_t, lam_s = (xp.where(k.finite, lam, other) for lam, other in ((k.lam_t, 0.0), (k.lam_s, 1.0)))
    h = lam_s - lam_t

    use = table.known(k, max(predictor, corrector))
    age = [table.past(k, xp.where(xp.isfinite(k.lam_t), k.lam_t, 0.0), j, 0.0) for j in range(len(use))]
    predicts = _integrals(k, lam_t, h, rate, age[:predictor], use[:predictor])
    decayed = xp.where(
        rate > 0, xp.where(k.finite, xp.exp(-rate * h), 0.0), 1.0
    )  # e^{-tau^2 h} with h = inf at the ends
    carry = xp.where(k.sigma_t > 0, k.sigma_s / xp.where(k.sigma_t > 0, k.sigma_t, 1.0), 0.0) * decayed

    q = max(predictor, corrector - 1) if corrector else predictor - 1
    qd, qn = [*predicts[1:], *[0.0] * q][:q], predicts[0]
    if corrector:
        nodes, known = [lam_s, *age[: corrector - 1]], [k.finite, k.finite, *use[1 : corrector - 1]]
        end, *corrects = [*_integrals(k, lam_t, h, rate, nodes, known), *[0.0] * q]
        before = lambda c: carry * table.past(k, xp.where(k.finite, c, 0.0), 1, 0.0)
        for j in range(q):  # the value of age j when the step is repeated
            change = corrects[j] - (predicts[j] if j < predictor else 0.0)
            qd[j] = qd[j] + before(change)
        qn = qn + before(end)
    noise = None if silent else k.sigma_s * nu.safe_sqrt(1 - decayed**2, xp)
    return table.build(
        f"sa({predictor}, {corrector})", k, u=(1.0, 0.0), qx=(carry,), qd=tuple(qd), qn=qn, noise=noise
    )  # fmt: skip


def _integrals(k: table.Nodes, lam_t: Any, h: Any, rate: Any, nodes: list[Any], known: list[Any]) -> list[Any]:
    """The weight of the value at every node, [n] each; a step with an infinite end has all of it on the first at its start.

    `known[j]` says whether step i may use node j; the value at the start of the step must be known.
    """
    xp = k.xp
    points, gauss = (xp.asarray(a[None], h.dtype) for a in QUADRATURE)
    half, growth = h[:, None] / 2, 1 + rate[:, None]
    lam = lam_t[:, None] + half * (1 + points)
    measure = half * gauss * growth * xp.exp(growth * (half * (points - 1))) * k.alpha_s[:, None]
    out = []
    for j, node in enumerate(nodes):
        basis = xp.ones_like(lam)
        for m, other in enumerate(nodes):
            if m != j:
                both = known[j] & known[m]
                gap = xp.where(both, node - other, 1.0)[:, None]
                basis = basis * xp.where(both[:, None], (lam - other[:, None]) / gap, 1.0)
        whole = k.alpha_s if j == 0 else xp.zeros_like(k.alpha_s)
        out.append(xp.where(k.finite, xp.where(known[j], (measure * basis).sum(axis=1), 0.0), whole))
    return out


CARDS = {
    "sa": Card(sa, "arXiv:2309.05019#Eq.15", "SA-Solver: stochastic Adams predictor-corrector in x0", 3, 1, noise=True),
}
