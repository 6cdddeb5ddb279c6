"""Samplers of the reverse SDE as tables: reverse diffusion, Euler-Maruyama, SRA1, and annealed Langevin dynamics.

dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dW: eta = 1 is the reverse SDE, eta = 0 the probability flow. Because g
depends on t alone the noise is additive, so Milstein's correction vanishes: Milstein's method is Euler-Maruyama, and the
next order is SRA1. The exponential step of this SDE for eta = 1 is `ddim(eta=1)`. In every method here a step that begins
at alpha = 0 or ends at sigma = 0 is `ddim(eta)`: there g or the clock is infinite, and the last step draws no noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffjax import numerics as nu
from diffjax.processes.gaussian import number
from diffjax.solvers import table
from diffjax.solvers.checks import check_number, is_zero
from diffjax.types import Card, Process, Solver


def reverse_diffusion(process: Process, grid: Any, eta: Any = 1.0) -> Solver:
    """The forward chain on the grid, reversed step by step.   x_s = (2 - a) x_t + (1 + eta^2)/2 v score + eta sqrt(v) z

    `x_t = a x_s + sqrt(v) z` is the process's transition; `score = -eps / sigma_t`. eta = 0 is the reverse diffusion form of
    the probability flow.

    Args: process: Gaussian.   grid: [n + 1] from noise to data.   eta: >= 0.
    Returns: a table of n rows, one state, no values.
    Raises: ValueError: bad grid, negative eta.

    Example:
        >>> from diffjax import processes, times
        >>> reverse_diffusion(processes.ve(), times.uniform(10)).evaluations
        10

    Reference: Song et al. 2021, arXiv:2011.13456, Appendix E.
    """
    k, finite = _start(process, grid, eta)
    gain = -k.xp.expm1(2 * (k.lam_t - k.lam_s))  # v / sigma_t^2
    a = k.alpha_t / k.alpha_s
    return _one_step(
        "reverse_diffusion", k, eta,
        u=(0.0, -(1 + eta**2) / 2 * k.sigma_t * gain), carry=finite(2 - a), std=k.sigma_t * nu.safe_sqrt(gain, k.xp),
    )  # fmt: skip


def euler_maruyama(process: Process, grid: Any, eta: Any = 1.0) -> Solver:
    """Euler-Maruyama on the reverse SDE in t.   x_s = x_t + (s - t) [alpha' x0 + (sigma' + eta^2 k) eps] + eta g sqrt(t - s) z

    k = g^2 / (2 sigma) = sigma' - sigma alpha' / alpha, so nothing is divided by sigma. Weak and strong order 1, because
    the noise is additive (it is Milstein's method too).

    Args: process: Gaussian, its sigma' finite at the starts of steps.   grid: [n + 1].   eta: >= 0.
    Returns: a table of n rows, one state, no values.
    Raises: ValueError: bad grid, negative eta, a derivative that is not finite inside the grid.
    Reference: Song et al. 2021, arXiv:2011.13456, Eq. 6 and Section 3.3.
    """
    k, finite = _start(process, grid, eta)
    da, ds, h = finite(process.dalpha(k.t)), finite(process.dsigma(k.t)), k.s - k.t
    rate = ds - k.sigma_t * da / finite(k.alpha_t, 1.0)
    std = nu.safe_sqrt(2 * k.sigma_t * rate * -h, k.xp)
    return _one_step("euler_maruyama", k, eta, u=(h * da, h * (ds + eta**2 * rate)), carry=1.0, std=std)


def sra1(process: Process, grid: Any, eta: Any = 1.0) -> Solver:
    """Roessler's SRA1, strong order 1.5 for additive noise, on the reverse SDE of y = x / alpha in r = sigma / alpha.

    dy = (1 + eta^2) eps dr + eta dM,  Var M = change of r^2;   h = r_t - r_s,  J = integral over the step of M - M_t
    y' = y - 3/4 h (1 + eta^2) eps_t + 3/2 eta J / h,   y_s = y - h (1 + eta^2) (eps_t / 3 + 2/3 eps') + eta (M_s - M_t)

    eps' is evaluated at y' and r_t - 3/4 h, which is positive. M's increment and J are jointly Gaussian; their covariance
    for the clock r^2 is exact here. Weak order 2; eta = 0 is Ralston's second-order method.

    Args: process: Gaussian.   grid: [n + 1].   eta: >= 0.
    Returns: a table of at most 2 n rows, one state, one value, shared noise.
    Raises: ValueError: bad grid, negative eta.

    Example:
        >>> from diffjax import processes, times
        >>> sra1(processes.vp(), times.uniform(10)).evaluations
        19

    Reference: Roessler 2010, doi:10.1137/09076636X, method SRA1.
    """
    k, finite = _start(process, grid, eta)
    xp = k.xp
    r_t, r_s = finite(k.sigma_t / finite(k.alpha_t, 1.0), 1.0), finite(k.sigma_s / k.alpha_s)
    h = finite(r_t - r_s, 1.0)
    mid = xp.where(k.finite, process.time_of_log_snr(-xp.log(r_t - 0.75 * h)), k.t)
    alpha_mid, over = process.alpha(mid), 1 / finite(k.alpha_t, 1.0)
    slope = 1 + eta**2
    both = lambda a, b: table.interleave(xp, a, b)
    zero = xp.zeros_like(h)
    column = lambda c: xp.broadcast_to(xp.asarray(c, h.dtype), h.shape)
    u0, u1, std = _exact_step(k, eta)
    noise = {}
    if not is_zero(eta):
        # covariance of (M_s - M_t, J) when dVar M = d(r^2)
        vm, mj, vj = h * (2 * r_t - h), h**2 * (r_t - h / 3), h**3 * (2 * r_t / 3 - h / 6)
        sd = xp.sqrt(vj)
        rest = nu.safe_sqrt(vm - mj**2 / vj, xp)
        noise = {
            "pz": both(zero, finite(1.5 * eta * alpha_mid * sd / h)),
            "qz": both(zero, finite(eta * k.alpha_s * mj / sd)),
            "noise": both(xp.where(k.finite, 0.0, std), finite(eta * k.alpha_s * rest)),
        }
    return table.build(
        "sra1", k,
        t=both(k.t, mid),
        px=(both(zero + 1, finite(alpha_mid * over, 1.0)),),
        pd=(both(zero, finite(-0.75 * slope * alpha_mid * h)),),
        u=(both(xp.where(k.finite, 0.0, u0), zero), both(xp.where(k.finite, 1.0, u1), zero + 1)),
        qx=(both(column(xp.where(k.finite, 1.0, 0.0)), finite(k.alpha_s * over, 1.0)),),
        qd=(both(zero, finite(-slope / 3 * k.alpha_s * h)),),
        qn=both(xp.where(k.finite, 0.0, 1.0), finite(-2 * slope / 3 * k.alpha_s * h)),
        accept=both(~k.finite, k.finite),
        skip=both(~k.finite & False, ~k.finite),
        **noise,
    )  # fmt: skip


def annealed_langevin(process: Process, grid: Any, snr: Any = 0.2, steps: int = 5) -> Solver:
    """Langevin dynamics at every level of the grid, from noise to data.   x <- x + e score + sqrt(2 e) z,  e = 2 (snr sigma)^2

    Moving to the next level multiplies x by alpha_s / alpha_t (by 1 for VE) and costs nothing. NCSN's step
    `epsilon sigma_i^2 / sigma_L^2` is snr = sqrt(epsilon) / (2 sigma_L). The last step to sigma = 0 is one denoising step.
    A finite step is biased and `steps` are few, so the samples only approach the data as levels and steps increase.

    Args: process: Gaussian.   grid: [n + 1]; its first level is the start and is not run.   snr: > 0.   steps: per level.
    Returns: a table of n * steps rows, one state, no values.
    Raises: ValueError: bad grid, snr or steps not positive.

    Example:
        >>> from diffjax import processes, times
        >>> annealed_langevin(processes.ve(), times.uniform(10), steps=3).evaluations
        30

    Reference: Song and Ermon 2019, arXiv:1907.05600, Algorithm 1.
    """
    check_corrector(snr, steps)
    k, finite = _start(process, grid, snr)
    xp, n = k.xp, k.t.shape[0]
    every = lambda first, other: xp.stack([xp.broadcast_to(xp.asarray(c, k.t.dtype), (n,)) for c in
                                           (first, *(other,) * (steps - 1))], axis=1).reshape(-1)  # fmt: skip
    noisy = k.sigma_s > 0
    later = lambda c: xp.where(noisy, c, 0.0)
    pull, push = -2 * snr**2 * k.sigma_s, 2 * snr * k.sigma_s
    ratio = finite(k.alpha_s / finite(k.alpha_t, 1.0), 1.0)
    return table.build(
        "annealed_langevin", k,
        t=every(xp.where(k.finite, k.s, k.t), k.s),
        px=(every(ratio, 1.0),),
        u=(every(xp.where(k.finite, 0.0, k.alpha_s), 0.0), every(xp.where(k.finite, 1.0, k.sigma_s), 1.0)),
        qx=(every(finite(ratio), 1.0),),
        qn=every(xp.where(k.finite, pull, 1.0), later(pull)),
        noise=every(finite(push), later(push)),
        accept=np.tile(np.arange(steps) == steps - 1, n) if xp is not np else _last(noisy, steps),
        skip=np.repeat(~noisy, steps) & np.tile(np.arange(steps) > 0, n) if xp is np else None,
    )  # fmt: skip


def langevin(process: Process, t: Any, steps: int, snr: Any = 0.2) -> Solver:
    """Unadjusted Langevin dynamics at one level.   x <- x + e score(x, t) + sqrt(2 e) z,  e = 2 (snr sigma_t)^2

    Samples the marginal at time t, with a bias of first order in e.

    Args: process: Gaussian.   t: time in [0, 1] with sigma_t > 0.   steps: >= 1.   snr: > 0.
    Returns: a table of `steps` rows; its grid is t throughout.
    Raises: ValueError: t outside [0, 1], sigma_t = 0, snr or steps not positive.
    Reference: Song and Ermon 2019, arXiv:1907.05600, Eq. 4.
    """
    check_corrector(snr, steps)
    xp, (t, *_) = nu.host_float64(t, process.params, snr)
    grid = xp.broadcast_to(t, (steps + 1,))
    alpha, sigma, lam = (f(grid) for f in (process.alpha, process.sigma, process.log_snr))
    if xp is np and not 0 <= t <= 1:
        raise ValueError(f"t, the level, must be one time in [0, 1]; got {t}")
    if xp is np and not sigma[0] > 0:
        raise ValueError(
            f"Langevin dynamics needs a level with noise: sigma(t) is 0 at t = {float(t)}; give a larger t"
        )
    cut = lambda c: (c[:-1], c[1:])
    k = table.Nodes(xp, grid, *cut(grid), *cut(alpha), *cut(sigma), *cut(lam), xp.isfinite(lam)[1:])
    return table.build(
        "langevin", k, u=(0.0, 1.0), qx=(1.0,), qn=-2 * snr**2 * k.sigma_t, noise=2 * snr * k.sigma_t
    )  # fmt: skip


def check_corrector(snr: Any, steps: Any) -> None:
    """Refuse a signal-to-noise ratio that is not positive and a count of Langevin steps that is not an int >= 1."""
    number("snr", snr, 0)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"the number of Langevin steps must be an int >= 1; got {steps!r}")


def _start(process: Process, grid: Any, eta: Any) -> tuple[table.Nodes, Any]:
    """The nodes, and `finite(c, other)`: c on steps whose both ends have finite log-SNR, else a safe number."""
    check_number("eta", eta)
    k = table.nodes(process, grid, options=eta)
    return k, lambda c, other=0.0: k.xp.where(k.finite, c, other)


def _exact_step(k: table.Nodes, eta: Any) -> tuple[Any, Any, Any]:
    """`ddim(eta)` of a step with an infinite end: u_x0, u_eps and the standard deviation of the noise."""
    std = eta * k.sigma_s  # e^{2 (lam_t - lam_s)} = 0; more than sigma_s cannot be asked for
    std = k.xp.minimum(std, k.sigma_s)
    return k.alpha_s, nu.safe_sqrt(k.sigma_s**2 - std**2, k.xp), std


def _one_step(name: str, k: table.Nodes, eta: Any, u: tuple[Any, Any], carry: Any, std: Any) -> Solver:
    """x_s = carry x + u_0 x0 + u_1 eps + eta std z on steps with two finite ends, else `ddim(eta)`."""
    u0, u1, exact = _exact_step(k, eta)
    pick = lambda a, b: k.xp.where(k.finite, a, b)
    noise = None if is_zero(eta) else pick(eta * std, exact)
    return table.build(name, k, u=(pick(u[0], u0), pick(u[1], u1)), qx=(pick(carry, 0.0),), qn=1.0, noise=noise)


def _last(noisy: np.ndarray, steps: int) -> np.ndarray:
    """Which Langevin row ends a level; a level without noise has its first row alone."""
    flags = np.zeros((len(noisy), steps), bool)
    flags[np.arange(len(noisy)), np.where(noisy, steps - 1, 0)] = True
    return flags.reshape(-1)


CARDS = {
    "reverse_diffusion": Card(
        reverse_diffusion, "arXiv:2011.13456#App.E", "the forward chain reversed, eta = 0 the flow", 1, 1, noise=True
    ),
    "euler_maruyama": Card(
        euler_maruyama,
        "arXiv:2011.13456#Eq.6",
        "Euler-Maruyama (and Milstein) in t, eta = 0 the flow",
        1,
        1,
        noise=True,
    ),
    "sra1": Card(
        sra1, "doi:10.1137/09076636X", "stochastic Runge-Kutta for additive noise, strong 1.5", 2, 2, noise=True
    ),
    "annealed_langevin": Card(
        annealed_langevin, "arXiv:1907.05600#Alg.1", "Langevin steps at every noise level", None, 5, noise=True
    ),
}
