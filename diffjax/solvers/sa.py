"""SA-Solver: stochastic Adams predictor and corrector for the reverse SDE with a chosen amount of noise."""

from __future__ import annotations

import math
from typing import Any

from diffjax import numerics as nu
from diffjax.solvers import adams, table
from diffjax.solvers.checks import check_integer, check_inverse, check_number, is_zero
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
    check_integer("predictor", predictor, (1, 2, 3, 4))
    check_integer("corrector", corrector, (0, 2, 3, 4), "which counts its values, the new one among them, 0 for none")
    for name, value in {"tau": tau, "low": low, "high": high}.items():
        check_number(name, value)
    silent = is_zero(tau)  # no noise column then: sqrt(0) has no derivative
    check_inverse(inverse, "tau", tau)
    k = table.nodes(process, grid, inverse, (tau, low, high))
    xp = k.xp
    r = xp.exp(-k.lam_t)
    rate = xp.where((r >= low) & (r <= high), tau**2, 0.0 * tau)  # tau^2 of every step
    ode = adams.steps(process, k, adams.X0)
    h = xp.where(k.finite, ode.end - ode.start, 1.0)
    decay = xp.where(rate > 0, xp.where(k.finite, xp.exp(-rate * h), 0.0), 1.0)  # e^{-tau^2 h}, h infinite at the ends
    growth = (1 + rate[:, None]) * xp.exp(
        rate[:, None] * xp.where(k.finite[:, None], ode.points - ode.end[:, None], 0.0)
    )
    s = ode._replace(carry=adams.ratio(k) * decay, measure=ode.measure * growth)

    use = adams.known(s, max(predictor, corrector))
    w = adams.predictor(s, use[:predictor])
    w[0] = xp.where(k.finite, w[0], k.alpha_s)
    qd, qn = adams.fold(s, w, adams.corrector(s, use[: corrector - 1])) if corrector else (w[1:], w[0])
    noise = None if silent else k.sigma_s * nu.safe_sqrt(1 - decay**2, xp)
    return adams.or_ddim(f"sa({predictor}, {corrector})", k, k.sigma_t > 0, adams.X0, (s.carry,), qd, qn, noise)


CARDS = {
    "sa": Card(sa, "arXiv:2309.05019#Eq.15", "SA-Solver: stochastic Adams predictor-corrector in x0", 3, 1, noise=True),
}
