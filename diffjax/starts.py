"""Where sampling starts, other than in pure noise: laws of x_t at a time t < 1, and one more step before a schedule's first.

A start is drawn per item as noise is: `x = start.sample(key, (B, ...))`, then `sample` on a grid with `start=t`. Its
`log_prob` makes it a `prior` of `likelihood.log_density`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree, pytree_dataclass
from diffjax.types import Denoiser, Key, Process

MIXTURE_STEP = nu.PRIOR_STEP - 1  # the draw that picks a component


@pytree_dataclass
class MixtureStart:
    """The law sum_k w_k N(m_k, S_k S_k^T) of x_t at `time`; its arrays are leaves.

    `scales` are standard deviations [K, d], or lower-triangular factors [K, d, d]; an item of any shape is flattened to d.
    """

    time: Any
    log_weights: Any  # [K]
    means: Any  # [K, d]
    scales: Any  # [K, d] or [K, d, d]

    def sample(self, key: Key, shape: tuple[int, ...], items: Any = None, dtype: Any = None) -> jax.Array:
        """Draw states [B, ...], per item.   items: [B] global indices, default arange(B).

        Raises: ValueError: an item of another size than d.
        """
        dtype = jnp.result_type(float) if dtype is None else dtype
        _check_size(self.means, shape)
        log_weights, means, scales = (jnp.asarray(a, dtype) for a in (self.log_weights, self.means, self.scales))
        keys = nu.item_keys(key, nu.item_indices(items, shape[0]))
        z = nu.item_normal(keys, nu.PRIOR_STEP, jax.ShapeDtypeStruct((shape[0], means.shape[1]), dtype))
        pick = jax.vmap(lambda k: jax.random.categorical(jax.random.fold_in(k, MIXTURE_STEP), log_weights))(keys)
        return (means[pick] + _turn(scales[pick], z)).reshape(shape)

    def log_prob(self, x: jax.Array) -> jax.Array:
        """The log-density of states [B, ...], [B].   Raises: ValueError: an item of another size than d."""
        _check_size(self.means, x.shape)
        log_weights, means, scales = (jnp.asarray(a, x.dtype) for a in (self.log_weights, self.means, self.scales))
        gap = x.reshape(x.shape[0], 1, -1) - means[None]
        if scales.ndim == 2:
            z, log_det = gap / scales[None], jnp.log(scales).sum(-1)
        else:
            solve = lambda s, g: jax.scipy.linalg.solve_triangular(s, g.T, lower=True).T
            z = jax.vmap(solve, (0, 1), 1)(scales, gap)
            log_det = jnp.log(jnp.diagonal(scales, axis1=1, axis2=2)).sum(-1)
        each = -0.5 * jnp.square(z).sum(-1) - (log_det + 0.5 * means.shape[1] * math.log(2 * math.pi))[None]
        return jax.scipy.special.logsumexp(log_weights[None] + each, axis=1)


def _turn(scales: jax.Array, z: jax.Array) -> jax.Array:
    return scales * z if scales.ndim == 2 else jnp.einsum("bij,bj->bi", scales, z)


def _check_size(means: Any, shape: tuple[int, ...]) -> None:
    size, d = math.prod(shape[1:]), np.shape(means)[1]
    if size != d:
        raise ValueError(f"this start is a law of items of {d} numbers; got a shape {tuple(shape)} with {size} an item")


def _data(x0: Any, time: Any) -> np.ndarray:
    x0 = np.asarray(x0, np.float64)
    if x0.ndim < 2 or len(x0) < 2:
        raise ValueError(f"x0 must hold at least two items, [N, ...]; got shape {x0.shape}")
    if not 0 < float(time) <= 1:
        raise ValueError(f"time, where sampling starts, must be in (0, 1]; got {time}")
    return x0.reshape(len(x0), -1)


def analytic_start(process: Process, x0: Any, time: float) -> MixtureStart:
    """The isotropic Gaussian nearest to the marginal at `time` in KL(q_t || N).

    m = alpha E[x0],   s^2 = alpha^2 tr(Cov[x0]) / d + sigma^2

    Args: process: Gaussian.   x0: [N, ...] data.   time: in (0, 1].
    Raises: ValueError: fewer than two items, a time outside (0, 1].
    Reference: Zhao et al. 2024, arXiv:2406.15735 (Analytic-Init).

    Example:
        >>> from diffjax import processes
        >>> start = analytic_start(processes.rectified(), np.array([[1.0, 3.0], [3.0, 1.0]]), 0.5)
        >>> start.means.tolist(), (start.scales ** 2).round(12).tolist()
        ([[1.0, 1.0]], [[0.5, 0.5]])
    """
    x0 = _data(x0, time)
    alpha, sigma = float(process.alpha(time)), float(process.sigma(time))
    std = np.full((1, x0.shape[1]), (alpha**2 * x0.var(0).mean() + sigma**2) ** 0.5)
    return MixtureStart(float(time), np.zeros(1), alpha * x0.mean(0)[None], std)


def gaussian_start(process: Process, x0: Any, time: float, *, diagonal: bool = False) -> MixtureStart:
    """The Gaussian with the mean and covariance of the marginal.   N(alpha E[x0], alpha^2 Cov[x0] + sigma^2 I)

    Args: as `analytic_start`.   diagonal: keep the variances alone, for items of many dimensions.
    Reference: Franzese et al. 2022, arXiv:2206.05173 (the auxiliary density, as a Gaussian).
    """
    x0 = _data(x0, time)
    alpha, sigma = float(process.alpha(time)), float(process.sigma(time))
    if diagonal:
        scales = np.sqrt(alpha**2 * x0.var(0) + sigma**2)
    else:
        covariance = np.cov(x0.T, bias=True).reshape(x0.shape[1], -1)
        scales = np.linalg.cholesky(alpha**2 * covariance + sigma**2 * np.eye(x0.shape[1]))
    return MixtureStart(float(time), np.zeros(1), alpha * x0.mean(0)[None], scales[None])


def fitted_start(
    process: Process, x0: Any, time: float, components: int, *, diagonal: bool = False, seed: int = 0, draws: int = 1
) -> MixtureStart:
    """A Gaussian mixture fitted to noised data by maximum likelihood.   min KL(q_t || nu),  x_t = alpha x0 + sigma eps

    A shorter diffusion time asks less of the denoiser and needs fewer steps, if what it starts from is close to q_t.

    Args: as `gaussian_start`.   components: >= 1.   seed: of the noise and of the fit (scikit-learn's).   draws: of noise
    for each item.
    Reference: Franzese et al. 2022, arXiv:2206.05173 (the auxiliary density, as a mixture).
    """
    from sklearn.mixture import GaussianMixture

    x0 = np.tile(_data(x0, time), (draws, 1))
    eps = np.random.default_rng(seed).standard_normal(x0.shape)
    x = float(process.alpha(time)) * x0 + float(process.sigma(time)) * eps
    fit = GaussianMixture(components, covariance_type="diag" if diagonal else "full", random_state=seed).fit(x)
    scales = np.sqrt(fit.covariances_) if diagonal else np.linalg.cholesky(fit.covariances_)
    return MixtureStart(float(time), np.log(fit.weights_), fit.means_, scales)


def one_more_step(
    key: Key, psi: Denoiser, process: Process, shape: PyTree, *, time: Any = 1.0, eta: float = 1.0, items: Any = None
) -> PyTree:
    """The step from pure noise to the first time of a schedule that does not begin there.

    x_S ~ N(0, I),   x0 = -psi(x_S),   x_T = alpha_T x0 + sigma_T (eta z + sqrt(1 - eta^2) x_S)

    psi is a denoiser on a process with alpha(1) = 0, such as `zero_terminal_snr(process)`: its v there is -x0. It is
    trained by any loss at t = 1 (`losses.v_prediction`), and serves every model of the same data, whose own sampler then
    runs from `time`. Its own condition and guidance steer what pure noise leaves open, the mean of the data above all.

    Args: psi: with its condition bound.   process: of the model, with alpha(time) > 0.   shape: `(B, ...)`, or a pytree.
    time: where the model's sampler starts.   eta: in [0, 1]; 1 draws new noise, 0 keeps x_S.   items: as `process.prior`.
    Returns: the state at `time`.
    Raises: ValueError: a psi whose process does not end in pure noise, eta outside [0, 1].
    Reference: Hu et al. 2024, arXiv:2311.15744.
    """
    end = psi.process.alpha(1.0)
    if nu.namespace(end) is np and float(end) > 1e-6:
        raise ValueError(
            f"psi must live on a process that ends in pure noise, alpha(1) = 0; got alpha(1) = {float(end):.4g}. "
            "Use processes.zero_terminal_snr(process)"
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"eta, the share of new noise, must be in [0, 1]; got {eta}")
    k_start, k_noise = (jax.random.fold_in(key, i) for i in range(2))
    x = psi.process.prior(k_start, shape, items=items)
    x0 = psi(x, 1.0).x0
    z = nu.item_normal(nu.item_keys(k_noise, nu.item_indices(items, nu.batch_size(x))), nu.PRIOR_STEP, x)
    unit = nu.scale(1 / psi.process.sigma(1.0), x)
    return process.add_noise(x0, nu.add(nu.scale(eta, z), nu.scale(math.sqrt(1 - eta**2), unit)), time)
