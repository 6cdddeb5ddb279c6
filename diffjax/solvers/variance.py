"""The reverse variance of the ancestral samplers: learned by the network, or the optimal one of Analytic-DPM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.solvers import table
from diffjax.solvers.checks import check_number
from diffjax.solvers.statistics import NoiseMoment, check_statistics
from diffjax.types import Card, Noise, Process, Solver

# ------------------------------------------------------------------------------------------------ learned variance


class ChainRows(NamedTuple):
    """One step of a reverse chain whose variance is read from the network; all [n]."""

    t: Any
    c_t: Any  # the posterior mean by x_t
    c_0: Any  # and by x0
    log_small: Any  # log of the posterior variance
    log_large: Any  # log of the transition variance
    noisy: Any  # bool: the last step to sigma = 0 draws nothing
    accept: Any


def fraction_of_aux(aux: Any, log_small: Any, log_large: Any) -> Any:
    """log v = f log_large + (1 - f) log_small,  f = aux['fraction'] in [0, 1], a tree like the state or [B, ...]."""
    mix = lambda f: f * log_large.astype(f.dtype) + (1 - f) * log_small.astype(f.dtype)
    return jax.tree.map(mix, _entry(aux, "fraction"))


def log_variance_of_aux(aux: Any, log_small: Any, log_large: Any) -> Any:
    """log v = aux['log_variance'], the log of the variance itself, shaped like the state or [B, ...]."""
    return _entry(aux, "log_variance")


def _entry(aux: Any, name: str) -> Any:
    if not isinstance(aux, dict) or name not in aux:
        raise ValueError(
            f"the denoiser returned no auxiliary output {name!r} (got {sorted(aux) if isinstance(aux, dict) else aux!r}); "
            "build it as denoiser(fn, ..., aux=True) with fn returning (out, {...}), or give another read="
        )
    return aux[name]


@dataclasses.dataclass(frozen=True)
class _ChainStep:
    """x_s = c_t x_t + c_0 x0 + sqrt(v) z, with log v read from the auxiliary output."""

    read: Callable[[Any, Any, Any], Any]

    def __call__(self, noise: Noise, denoiser: Any, carry: Any, row: ChainRows) -> Any:
        x, state = carry
        prediction, state, aux = denoiser.evaluate(x, row.t, state=state)
        mean = nu.add(nu.scale(row.c_t, x), nu.scale(row.c_0, prediction.x0))
        std = jax.tree.map(lambda log_v: jnp.exp(0.5 * log_v), self.read(aux, row.log_small, row.log_large))
        drawn = jax.lax.cond(row.noisy, lambda y: nu.add(y, nu.scale(std, noise.draw(x, 1))), lambda y: y, mean)
        return drawn, state


def _start(x: Any, constants: tuple) -> Any:
    return x


def _end(x: Any) -> Any:
    return x


def ddpm_learned(process: Process, grid: Any, read: Callable[[Any, Any, Any], Any] = fraction_of_aux) -> Solver:
    """The reverse Markov chain with the variance that the network returns beside its prediction.

    x_s = c_t x_t + c_0 x0 + sqrt(v) z,   log v = f log v_transition + (1 - f) log v_posterior
    A constant f is `ddpm(variance=f)`. The step is not linear, so the solver is not a table.

    Args: process: Gaussian.   grid: [n + 1].   read: `(aux, log_small, log_large) -> log v`, a module-level function or a
    frozen dataclass; default `fraction_of_aux`, which reads f from `aux['fraction']`, `log_variance_of_aux` reads log v
    itself from `aux['log_variance']`. What it returns broadcasts from the left against the state.
    Returns: a solver of n rows. Its denoiser must return the auxiliary output: `denoiser(fn, ..., aux=True)`.
    Raises: ValueError: bad grid; when sampling, a denoiser without that output.
    Reference: Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 15.

    Example:
        >>> from diffjax import prediction, processes, sampling, times
        >>> p = processes.vp()
        >>> net = lambda x, t: (0.5 * x, {"fraction": 0 * x})
        >>> d = prediction.denoiser(net, p, prediction.from_eps, aux=True)
        >>> sampling.sample(jax.random.key(0), d, ddpm_learned(p, times.uniform(4)), jnp.ones((2, 3))).shape
        (2, 3)
    """
    k = table.nodes(process, grid)
    xp = k.xp
    gap = k.lam_t - k.lam_s
    gain = -xp.expm1(2 * gap)
    noisy = k.sigma_s > 0
    log_gain = xp.log(gain)
    rows = ChainRows(
        k.t, k.sigma_s / k.sigma_t * xp.exp(gap), k.alpha_s * gain,
        2 * xp.log(xp.where(noisy, k.sigma_s, 1.0)) + log_gain, 2 * xp.log(k.sigma_t) + log_gain,
        noisy, np.ones(k.t.shape[0], bool),
    )  # fmt: skip
    return Solver(rows=rows, grid=k.grid, init=_start, step=_ChainStep(read), read=_end)


# ------------------------------------------------------------------------------------------------ optimal variance


def analytic(
    process: Process,
    grid: Any,
    moment: NoiseMoment | None = None,
    eta: Any = 1.0,
    *,
    data_range: float | None = None,
) -> Solver:
    """DDIM(eta) with the variance that minimises the KL divergence to the true chain.   eta = 1 is the chain of `ddpm`.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v*) z,   v = eta^2 sigma_s^2 (1 - e^{2 (lam_t - lam_s)})
    v* = v + (alpha_s - alpha_t sqrt(sigma_s^2 - v) / sigma_t)^2 kappa_t,   kappa_t = (sigma_t / alpha_t)^2 (1 - E |eps|^2 / dims)

    kappa_t is the mean variance of the data given x_t, so that 0 <= kappa_t <= (sigma_t / alpha_t)^2, and at most
    (data_range / 2)^2 for data in an interval of that length: the estimate is clipped to these bounds. The moment is linear
    in log-SNR between where it was measured; beyond, kappa_t is constant towards noise and the moment towards data.

    Args: process: Gaussian.   grid: [n + 1].   moment: from `noise_moment`, of the same model and condition; None for
    v* = v, which is `ddim(eta)`.   eta: in [0, 1]; 0 still draws the noise that kappa_t asks for.   data_range: > 0, 2 for data
    in [-1, 1]; None for data that are not bounded.
    Returns: a table of n rows, one state, no values; the last step to sigma = 0 draws nothing.
    Raises: ValueError: bad grid, eta, data_range or moment.
    Reference: Bao et al. 2022, arXiv:2201.06503, Theorems 1 and 2.

    Example:
        >>> from diffjax import processes, times
        >>> p = processes.rectified()
        >>> moment = NoiseMoment([-1.0, 1.0], [0.9, 0.2])
        >>> s = analytic(p, times.uniform(4), moment)
        >>> s.rows.noise[1:3].round(3).tolist(), analytic(p, times.uniform(4)).rows.noise[1:3].round(3).tolist()
        ([0.607, 0.506], [0.471, 0.236])
    """
    check_number("eta", eta, high=1.0, hint="0 DDIM's chain and 1 DDPM's")
    if data_range is not None:
        check_number("data_range, the length of the interval that holds the data,", data_range, above=True)
    k = table.nodes(process, grid, options=eta)
    xp = k.xp
    gain = -xp.expm1(2 * (k.lam_t - k.lam_s))
    v = eta**2 * k.sigma_s**2 * gain
    rest = nu.safe_sqrt(k.sigma_s**2 - v, xp)
    extra = xp.zeros_like(v)
    if moment is not None:
        kappa = _data_variance(xp, k.lam_t, check_statistics(moment, NoiseMoment))
        if data_range is not None:
            kappa = xp.minimum(kappa, (float(data_range) / 2) ** 2)
        extra = xp.where(k.sigma_s > 0, (k.alpha_s - k.alpha_t * rest / k.sigma_t) ** 2 * kappa, 0.0)
    return table.build(
        "analytic", k, u=(k.alpha_s, rest), qx=(0.0,), qn=1.0, noise=nu.safe_sqrt(v + extra, xp)
    )  # fmt: skip


def _data_variance(xp: Any, lam: Any, moment: NoiseMoment) -> Any:
    """The mean variance of the data given x_t, between 0 and e^{-2 lam}."""
    knots, square = (xp.asarray(a, lam.dtype) for a in moment)
    share = xp.clip(1 - xp.interp(lam, knots, square), 0.0, 1.0)
    return share * xp.exp(-2 * xp.maximum(lam, knots[0]))


CARDS = {
    "ddpm_learned": Card(
        ddpm_learned, "arXiv:2102.09672#Eq.15", "reverse Markov chain with the network's variance", 1, 1, noise=True,
        flags=("nonlinear",),
    ),
    "analytic_ddpm": Card(
        analytic, "arXiv:2201.06503#Thm.1", "reverse chain with the optimal variance of a model", 1, 1, noise=True
    ),
}  # fmt: skip
