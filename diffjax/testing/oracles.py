"""Exact oracles: Gaussian mixtures, whose denoiser, score, posterior, density and flow are closed forms.

With p(x0) = sum_k w_k N(mu_k, Q_k diag(L_k) Q_k^T), the marginal at t is a mixture with means alpha mu_k and spectra
alpha^2 L_k + sigma^2, so everything is exact for every process, at t = 0 and t = 1 too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from diffjax.numerics import pytree_dataclass, static
from diffjax.types import Denoiser, Evaluation, Prediction, Process

ALL = -1  # the label that means "every component", the null condition of a mixture denoiser


@pytree_dataclass
class Mixture:
    """A mixture of K Gaussians in d dimensions; its arrays are leaves. Build it with `mixture` or `gaussian`."""

    log_weights: Any  # [K]
    means: Any  # [K, d]
    spectra: Any  # [K, d] eigenvalues of the covariances
    bases: Any  # [K, d, d] eigenvectors in columns
    labels: Any  # [K] int, the class of each component


def mixture(weights: Any, means: Any, stds: Any = None, covariances: Any = None, labels: Any = None) -> Mixture:
    """A Gaussian mixture from standard deviations or full covariances.

    Args: weights: [K], positive, normalised here.   means: [K, d].   stds: [K] or [K, d].   covariances: [K, d, d].
    labels: [K] ints for conditional models, default the index of the component.
    Raises: ValueError: shapes that do not fit, weights that are not positive, covariances that are not positive definite.

    Example:
        >>> mixture([1, 1], [[-1.0, 0.0], [1.0, 0.0]], stds=[0.5, 0.5]).means.shape
        (2, 2)
    """
    weights, means = np.asarray(weights, np.float64), np.asarray(means, np.float64)
    if means.ndim != 2 or weights.shape != means.shape[:1]:
        raise ValueError(f"weights must be [K] and means [K, d]; got {weights.shape} and {means.shape}")
    if not np.all(weights > 0):
        raise ValueError(f"weights must be positive; got {weights}")
    k, d = means.shape
    if (stds is None) == (covariances is None):
        raise ValueError("give either stds [K] or [K, d], or covariances [K, d, d]")
    if covariances is None:
        stds = np.asarray(stds, np.float64)
        spectra = np.broadcast_to(stds.reshape(k, -1) ** 2, (k, d))
        bases = np.broadcast_to(np.eye(d), (k, d, d))
    else:
        spectra, bases = np.linalg.eigh(np.asarray(covariances, np.float64).reshape(k, d, d))
    if not np.all(spectra > 0):
        raise ValueError(f"covariances must be positive definite; the smallest eigenvalue is {spectra.min():.3g}")
    labels = np.arange(k) if labels is None else np.asarray(labels, np.int32)
    return Mixture(np.log(weights / weights.sum()), means, spectra.copy(), bases.copy(), labels.astype(np.int32))


def gaussian(mean: Any, covariance: Any) -> Mixture:
    """The Gaussian N(mean, covariance): [d] and [d, d], or a scalar variance."""
    mean = np.asarray(mean, np.float64)
    covariance = np.asarray(covariance, np.float64)
    if covariance.ndim == 0:
        covariance = covariance * np.eye(len(mean))
    return mixture([1.0], mean[None], covariances=covariance[None])


def _project(m: Mixture, process: Process, x: Any, t: Any, label: Any) -> Any:
    """alpha, sigma, spectra of the marginal [B|1, K, d], coordinates q [B, K, d], log joint [B, K]."""
    dtype = x.dtype
    m = jax.tree.map(lambda a: jnp.asarray(a, dtype) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a, m)
    t = jnp.asarray(t, dtype)
    alpha, sigma = (jnp.asarray(c, dtype).reshape(-1, 1, 1) for c in (process.alpha(t), process.sigma(t)))
    spread = alpha**2 * m.spectra[None] + sigma**2
    q = jnp.einsum("kij,bki->bkj", m.bases, x[:, None] - alpha * m.means[None])
    log_joint = m.log_weights[None] - 0.5 * (q**2 / spread + jnp.log(2 * jnp.pi * spread)).sum(-1)
    if label is not None:
        label = jnp.broadcast_to(jnp.asarray(label), x.shape[:1])[:, None]
        chosen = (label == ALL) | (label == jnp.asarray(m.labels)[None])
        prior = jax.scipy.special.logsumexp(jnp.where(chosen, m.log_weights[None], -jnp.inf), axis=-1, keepdims=True)
        log_joint = jnp.where(chosen, log_joint - prior, -jnp.inf)
    return m, alpha, sigma, spread, q, log_joint


def log_density(m: Mixture, process: Process, x: Any, t: Any = 0.0, label: Any = None) -> jax.Array:
    """`log p_t(x)`, [B], of the marginal at time t; with `label` [B] of the chosen components only."""
    return jax.scipy.special.logsumexp(_project(m, process, x, t, label)[-1], axis=-1)


def predict(m: Mixture, process: Process, x: Any, t: Any, label: Any = None) -> Prediction:
    """The exact pair.   x0 = E[x0 | x_t],  eps = E[eps | x_t],  with no division by alpha or sigma.   x: [B, d]"""
    m, alpha, sigma, spread, q, log_joint = _project(m, process, x, t, label)
    r = jax.nn.softmax(log_joint, axis=-1)[..., None]
    turn = lambda c: jnp.einsum("kij,bkj->bki", m.bases, c)
    x0 = (r * (m.means[None] + turn(alpha * m.spectra[None] / spread * q))).sum(1)
    eps = (r * turn(sigma / spread * q)).sum(1)
    return Prediction(x0, eps)


def score(m: Mixture, process: Process, x: Any, t: Any, label: Any = None) -> jax.Array:
    """`grad_x log p_t(x)`, [B, d]."""
    m, _, _, spread, q, log_joint = _project(m, process, x, t, label)
    r = jax.nn.softmax(log_joint, axis=-1)[..., None]
    return -(r * jnp.einsum("kij,bkj->bki", m.bases, q / spread)).sum(1)


def posterior(m: Mixture, process: Process, x: Any, t: Any, label: Any = None) -> tuple[Any, Any, Any]:
    """`p(x0 | x_t)`, a mixture again.   Returns: weights [B, K], means [B, K, d], covariances [B|1, K, d, d]."""
    m, alpha, sigma, spread, q, log_joint = _project(m, process, x, t, label)
    means = m.means[None] + jnp.einsum("kij,bkj->bki", m.bases, alpha * m.spectra[None] / spread * q)
    inner = m.spectra[None] * sigma**2 / spread
    covariances = jnp.einsum("kij,bkj,klj->bkil", m.bases, inner, m.bases)
    return jax.nn.softmax(log_joint, axis=-1), means, covariances


def draw(key: Any, m: Mixture, n: int, process: Process | None = None, t: float = 0.0) -> tuple[Any, Any]:
    """n samples of the data, or of the marginal at time t.   Returns: x [n, d], component [n]."""
    k_component, k_x, k_noise = jax.random.split(key, 3)
    component = jax.random.categorical(k_component, jnp.asarray(m.log_weights), shape=(n,))
    means, spectra, bases = (jnp.asarray(a, jnp.result_type(float)) for a in (m.means, m.spectra, m.bases))
    z = jax.random.normal(k_x, (n, means.shape[1]))
    x = means[component] + jnp.einsum("bij,bj->bi", bases[component], jnp.sqrt(spectra)[component] * z)
    if process is not None:
        x = process.add_noise(x, jax.random.normal(k_noise, x.shape), t)
    return x, component


def flow(m: Mixture, process: Process, x: Any, t: float, s: float, tolerance: float = 1e-12) -> np.ndarray:
    """The exact probability flow of the states x [B, d] from time t to s; a closed form for one Gaussian.

    x_s = alpha_s mu + Q sqrt((alpha_s^2 L + sigma_s^2) / (alpha_t^2 L + sigma_t^2)) Q^T (x_t - alpha_t mu)

    For more components DOP853 integrates dy/dtheta = (alpha eps - sigma x0) / r, y = x / r, theta = atan(sigma / alpha),
    on the host in float64: the right-hand side is bounded on the whole of [0, 1].
    """
    x = np.asarray(x, np.float64)
    m = jax.tree.map(np.asarray, m)
    a_t, s_t, a_s, s_s = (float(c) for c in (process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)))
    if m.means.shape[0] == 1:
        mean, spectrum, basis = m.means[0], m.spectra[0], m.bases[0]
        gain = np.sqrt((a_s**2 * spectrum + s_s**2) / (a_t**2 * spectrum + s_t**2))
        return a_s * mean + ((x - a_t * mean) @ basis * gain) @ basis.T
    shape = x.shape

    def velocity(theta: float, y: np.ndarray) -> np.ndarray:
        a, s = np.cos(theta), np.sin(theta)  # the flow depends on the ratio alone: use the process with r = 1
        y = y.reshape(shape)
        spread = a * a * m.spectra + s * s
        q = np.einsum("kij,bki->bkj", m.bases, y[:, None] - a * m.means)
        logit = m.log_weights - 0.5 * (q**2 / spread + np.log(spread)).sum(-1)
        r = np.exp(logit - logit.max(1, keepdims=True))
        r = (r / r.sum(1, keepdims=True))[..., None]
        turned = np.einsum("kij,bkj->bki", m.bases, (a * s - s * a * m.spectra) / spread * q)
        return (r * (turned - s * m.means)).sum(1).ravel()

    ends = np.arctan2(s_t, a_t), np.arctan2(s_s, a_s)
    y = solve_ivp(velocity, ends, (x / np.hypot(a_t, s_t)).ravel(), method="DOP853", rtol=tolerance, atol=tolerance)
    return y.y[:, -1].reshape(shape) * np.hypot(a_s, s_s)


def _apply(d: Any, state: Any, x: Any, t: Any, cond: Any, key: Any) -> Evaluation:
    return Evaluation(predict(d.leaves, d.process, x, t, cond), state)


def oracle(m: Mixture, process: Process) -> Denoiser:
    """The exact denoiser of a mixture; its condition is a label [B], `ALL` (the null condition) for every component.

    Example:
        >>> from diffjax import processes
        >>> d = oracle(gaussian([0.0, 0.0], 1.0), processes.rectified())
        >>> d(jnp.ones((1, 2)), 0.5).x0.tolist()
        [[1.0, 1.0]]
    """
    m = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), m)
    return Denoiser(leaves=m, process=process, null=ALL, apply=_apply)


@pytree_dataclass
class MixtureRouter:
    """The posterior of the labels of a mixture as a router; see `exact_router`."""

    mixture: Mixture
    process: Any
    count: int = static()

    def __call__(self, x: Any, t: Any, cond: Any = None) -> jax.Array:
        """`log p_t(label, x)`, [B, K]."""
        log_joint = _project(self.mixture, self.process, x, t, None)[-1]
        labels = jnp.asarray(self.mixture.labels)
        mine = labels[None] == jnp.arange(self.count, dtype=labels.dtype)[:, None]  # [K, components]
        return jax.scipy.special.logsumexp(jnp.where(mine[None], log_joint[:, None], -jnp.inf), axis=-1)


def exact_router(m: Mixture, process: Process) -> MixtureRouter:
    """The exact router of the clusters that the labels 0..K-1 of a mixture make.   softmax of log p_t(k, x_t), [B, K]

    Its expert k is `oracle(m, process).bind(k)`. K, the largest label + 1, is static.

    Example:
        >>> from diffjax import processes
        >>> r = exact_router(mixture([1, 3], [[-1.0], [1.0]], stds=[0.5, 0.5]), processes.rectified())
        >>> jnp.round(jax.nn.softmax(r(jnp.zeros((1, 1)), 1.0)), 4).tolist()
        [[0.25, 0.75]]
    """
    return MixtureRouter(m, process, int(np.max(m.labels)) + 1)


__all__ = [
    "ALL",
    "Mixture",
    "MixtureRouter",
    "draw",
    "exact_router",
    "flow",
    "gaussian",
    "log_density",
    "mixture",
    "oracle",
    "posterior",
    "predict",
    "score",
]
