"""One-step solvers: DDIM and the ancestral samplers of discrete diffusion, and Euler in time."""

from __future__ import annotations

from typing import Any

from diffjax import numerics as nu
from diffjax.solvers import table
from diffjax.solvers.checks import check_inverse, check_noise_fits, check_number, is_zero
from diffjax.types import Card, Process, Solver


def ddim(process: Process, grid: Any, eta: Any = 0.0, *, s_noise: Any = 1.0, inverse: bool = False) -> Solver:
    """First-order exponential step, exact for constant x0 and eps.   x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z

    v = eta^2 sigma_s^2 (1 - e^{2 (lam_t - lam_s)}); eta = 0 is deterministic, eta = 1 is DDPM's ancestral sampler.

    Args: process: Gaussian.   grid: [n + 1] from noise to data.   eta: >= 0, at most the value that keeps
    `sigma_s^2 >= v`.   s_noise: factor on the noise alone.   inverse: the grid increases, from data to noise.
    Returns: a table of n rows, one state, no values.
    Raises: ValueError: bad grid, negative eta, eta > 0 with inverse.

    Example:
        >>> from diffjax import processes, times
        >>> ddim(processes.vp(), times.uniform(10)).evaluations
        10

    Reference: Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16.
    """
    check_number("eta", eta)
    check_number("s_noise", s_noise)
    k = table.nodes(process, grid, inverse, (eta, s_noise))
    if is_zero(eta):  # a branch of its own: sqrt(0 * ...) has an infinite derivative
        return table.build("ddim", k, u=(k.alpha_s, k.sigma_s), qx=(0.0,), qn=1.0)
    check_inverse(inverse, "eta", eta)
    gain = -k.xp.expm1(2 * (k.lam_t - k.lam_s))  # in (0, 1]
    rest = 1 - eta**2 * gain
    check_noise_fits(eta, gain, rest)
    return table.build(
        "ddim", k, u=(k.alpha_s, k.sigma_s * nu.safe_sqrt(rest, k.xp)), qx=(0.0,), qn=1.0,
        noise=eta * s_noise * k.sigma_s * nu.safe_sqrt(gain, k.xp),
    )  # fmt: skip


def ancestral(process: Process, grid: Any, eta: Any = 1.0, *, s_noise: Any = 1.0) -> Solver:
    """Euler step to a lower noise level, then noise back up: the same update as `ddim(eta)`, with eta = 1 by default.

    r = sigma / alpha:   r_up = eta r_s sqrt(1 - r_s^2 / r_t^2),   r_down = sqrt(r_s^2 - r_up^2)

    Args: as `ddim`.
    Reference: Song et al. 2021, arXiv:2011.13456, Eq. 4 and Appendix F.
    """
    return ddim(process, grid, eta, s_noise=s_noise)


def ddpm(process: Process, grid: Any, variance: Any = 0.0) -> Solver:
    """The reverse Markov chain.   x_s = c_t x_t + c_0 x0 + sqrt(v) z, with the posterior's c_t and c_0

    log v is `variance` of the way from the posterior variance ("fixed small") to the transition variance ("fixed large");
    the last step to sigma = 0 draws nothing. `variance = 0` is `ddim(eta=1)`.

    Args: process: Gaussian.   grid: [n + 1].   variance: in [0, 1].
    Returns: a table of n rows, one state, no values.
    Raises: ValueError: bad grid, variance outside [0, 1].
    Reference: Ho et al. 2020, arXiv:2006.11239, Eq. 6-7 and 11.
    """
    check_number("variance", variance, high=1.0, hint="0 the posterior's and 1 the transition's")
    k = table.nodes(process, grid, options=variance)
    gap = k.lam_t - k.lam_s
    gain = -k.xp.expm1(2 * gap)
    ratio = k.sigma_s / k.sigma_t
    # transition variance over posterior variance is sigma_t^2 / sigma_s^2
    noisy = k.sigma_s > 0
    std = k.xp.where(noisy, ratio, 1.0) ** (1 - variance) * k.sigma_t * nu.safe_sqrt(gain, k.xp)
    std = k.xp.where(noisy, std, 0.0)
    return table.build(
        "ddpm", k, u=(1.0, 0.0), qx=(ratio * k.xp.exp(gap),), qn=k.alpha_s * gain, noise=std
    )  # fmt: skip


def euler(process: Process, grid: Any, *, inverse: bool = False) -> Solver:
    """Euler's method on the probability-flow ODE in t.   x_s = x_t + (s - t) (alpha'_t x0 + sigma'_t eps)

    For rectified flow this is `ddim`. Processes whose sigma' is infinite at t = 0 cannot be inverted from there.

    Args: process: Gaussian.   grid: [n + 1].   inverse: the grid increases.
    Returns: a table of n rows, one state, no values.
    Raises: ValueError: bad grid, or a derivative that is not finite on it.
    Reference: Lipman et al. 2023, arXiv:2210.02747, Section 3.
    """
    k = table.nodes(process, grid, inverse)
    h = k.s - k.t
    return table.build(
        "euler", k, u=(h * process.dalpha(k.t), h * process.dsigma(k.t)), qx=(1.0,), qn=1.0
    )  # fmt: skip


CARDS = {
    "ddim": Card(ddim, "arXiv:2010.02502#Eq.12", "DDIM(eta), deterministic by default", 1, 1, exact=("x0", "eps")),
    "ddpm": Card(
        ddpm, "arXiv:2006.11239#Eq.6", "reverse Markov chain, posterior to transition variance", 1, 1, noise=True
    ),
    "ancestral": Card(ancestral, "arXiv:2011.13456#Eq.4", "Euler ancestral", 1, 1, noise=True),
    "euler": Card(euler, "arXiv:2210.02747#Sec.3", "Euler in t on the probability flow", 1, 1),
}
