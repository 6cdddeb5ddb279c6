"""Densities of the plane with exact log-density and score: mixtures, moons, swiss roll, pinwheel, and a checkerboard.

Every named density is shifted and scaled by its exact moments to zero mean and unit deviation (the root mean square
over both axes), so that raw values, model coordinates and the formulas here are the same thing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from diffjax.data.dataset import DataError, Dataset, DataTransform, split_indices


class Density(NamedTuple):
    """A density by its exact functions; `x` is [..., d].

    log_density(x) -> [...]   score(x) -> [..., d], gradient of log_density   sample(key, n) -> (x [n, d], label [n])
    """

    log_density: Callable[[Any], Any]
    score: Callable[[Any], Any]
    sample: Callable[..., Any]
    classes: int


def mixture(
    means: np.ndarray,
    factors: Any,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    standardise: bool = True,
) -> Density:
    """A mixture of Gaussians.   p(x) = sum_k w_k N(x; m_k, F_k F_k^T)

    Args: means: [K, d].   factors: [K, d, d] square roots of the covariances (any invertible matrix), or deviations,
        [K] or one number.   weights: [K], default equal.   groups: [K] labels of the components, default 0..K-1.
        standardise: shift and scale to zero mean and unit deviation.
    Raises: ValueError: shapes that do not fit, weights that are not positive, or a factor that is singular.

    Example:
        >>> two = mixture(np.array([[-1.0, 0.0], [1.0, 0.0]]), 0.5, standardise=False)
        >>> jnp.round(two.score(jnp.array([1.0, 0.5])), 3)
        Array([-0.003, -2.   ], dtype=float32)
    """
    means = np.asarray(means, np.float64)
    if means.ndim != 2 or not means.size:
        raise ValueError(f"means must be [K, d] with K >= 1; got shape {means.shape}")
    count, dim = means.shape
    factors = np.asarray(factors, np.float64)
    if factors.ndim < 2:
        factors = np.broadcast_to(factors, (count,))[:, None, None] * np.eye(dim)
    weights = np.full(count, 1 / count) if weights is None else np.asarray(weights, np.float64)
    groups = np.arange(count) if groups is None else np.asarray(groups)
    if factors.shape != (count, dim, dim) or weights.shape != (count,) or groups.shape != (count,):
        raise ValueError(
            f"{count} means of dimension {dim} need factors [{count}, {dim}, {dim}], weights [{count}] and groups "
            f"[{count}]; got {factors.shape}, {weights.shape} and {groups.shape}"
        )
    if not (weights > 0).all():
        raise ValueError(f"weights must be positive; got {weights.tolist()}")
    if not (np.abs(np.linalg.det(factors)) > 0).all():
        raise ValueError("a factor is singular: every component needs a positive deviation along each axis")
    weights = weights / weights.sum()
    if standardise:
        centred = means - weights @ means
        std = math.sqrt((weights @ (centred**2 + (factors**2).sum(2))).mean())
        means, factors = centred / std, factors / std
    inverses = np.linalg.inv(factors)
    constants = np.log(weights) + np.linalg.slogdet(inverses)[1] - 0.5 * dim * math.log(2 * math.pi)

    def components(x: Any) -> tuple[Any, Any]:
        """Whitened offsets [K, d] and joint log-densities [K] at one point."""
        z = jnp.einsum("kij,kj->ki", jnp.asarray(inverses, x.dtype), x[None] - jnp.asarray(means, x.dtype))
        return z, jnp.asarray(constants, x.dtype) - 0.5 * jnp.sum(z**2, -1)

    def log_density(x: Any) -> Any:
        return jax.nn.logsumexp(components(x)[1])

    def score(x: Any) -> Any:
        z, joint = components(x)
        return -jnp.einsum("k,kij,ki->j", jax.nn.softmax(joint), jnp.asarray(inverses, x.dtype), z)

    def sample(key: Any, n: int) -> tuple[Any, Any]:
        pick, noise = jax.random.split(key)
        k = jax.random.categorical(pick, jnp.log(jnp.asarray(weights, jnp.result_type(float))), shape=(n,))
        z = jax.random.normal(noise, (n, dim))
        x = jnp.asarray(means, z.dtype)[k] + jnp.einsum("nij,nj->ni", jnp.asarray(factors, z.dtype)[k], z)
        return x, jnp.asarray(groups, jnp.int32)[k]

    return Density(_points(log_density, "(d)->()"), _points(score, "(d)->(d)"), sample, int(groups.max()) + 1)


def _points(f: Callable[[Any], Any], signature: str) -> Callable[[Any], Any]:
    """`f` of one point, over any batch axes, for NumPy and JAX arrays."""
    over_axes = jnp.vectorize(f, signature=signature)
    return lambda x: over_axes(jnp.asarray(x))


def _along(curve: np.ndarray, across: float) -> tuple[np.ndarray, np.ndarray]:
    """Factors [K, 2, 2] of Gaussians on a curve [K, 2]: `across` wide, long enough to merge with their neighbours."""
    tangent = np.gradient(curve, axis=0)
    step = np.linalg.norm(tangent, axis=1, keepdims=True)
    tangent = tangent / step
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    return curve, np.stack([tangent * np.maximum(across, 0.6 * step), normal * across], 2)


@functools.cache
def gaussians_density(modes: int = 8, width: float = 0.1) -> Density:
    """Equal Gaussians on a circle, of deviation `width` times its radius; the label is the mode."""
    angle = 2 * np.pi * np.arange(modes) / modes
    return mixture(np.stack([np.cos(angle), np.sin(angle)], 1), width)


@functools.cache
def moons_density(width: float = 0.1, count: int = 32) -> Density:
    """Two interleaved half circles, each a chain of `count` Gaussians; the label is the half circle."""
    angle = np.linspace(0, np.pi, count)
    upper = np.stack([np.cos(angle), np.sin(angle)], 1)
    lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1)
    chains = [_along(c, width) for c in (upper, lower)]
    return mixture(*map(np.concatenate, zip(*chains, strict=True)), groups=np.repeat([0, 1], count))


@functools.cache
def swiss_roll_density(width: float = 0.6, count: int = 128) -> Density:
    """The spiral (a cos a, a sin a), a in [1.5 pi, 4.5 pi], as a chain of `count` Gaussians; one class."""
    angle = np.linspace(1.5 * np.pi, 4.5 * np.pi, count)
    curve = np.stack([angle * np.cos(angle), angle * np.sin(angle)], 1)
    return mixture(*_along(curve, width), groups=np.zeros(count, int))


@functools.cache
def pinwheel_density(arms: int = 5, width: float = 0.08, count: int = 24) -> Density:
    """Arms whose angle grows with the exponential of the radius, each a chain of Gaussians; the label is the arm."""
    radius = np.linspace(0.25, 1.75, count)
    weight = np.exp(-0.5 * ((radius - 1) / 0.3) ** 2)
    chains = []
    for arm in range(arms):
        angle = 2 * np.pi * arm / arms + 0.25 * np.exp(radius)
        chains.append(_along(radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1), width))
    means, factors = map(np.concatenate, zip(*chains, strict=True))
    return mixture(means, factors, np.tile(weight, arms), np.repeat(np.arange(arms), count))


@functools.cache
def checkerboard_density(width: float = 0.05, cells: int = 4) -> Density:
    """Uniform on every other square of a board, blurred by a Gaussian of `width` squares, so that the score exists.

    p(x) = mean_k prod_i [Phi((b_ki - x_i) / w) - Phi((a_ki - x_i) / w)] / (b_ki - a_ki);  the label is the square
    """
    squares = np.array([(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0], np.float64)
    std = math.sqrt(cells**2 / 12 + width**2)  # of either axis: all columns hold the same number of squares
    lower = (squares - cells / 2) / std
    side, blur = 1 / std, width / std
    count = len(squares)

    def components(x: Any) -> tuple[Any, Any]:
        """For one point: joint log-densities [K] and the scores of the squares, [K, 2]."""
        a = (jnp.asarray(lower, x.dtype) - x[None]) / blur
        b = a + side / blur
        # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): flipped so that both are lower tails, where log_ndtr does not cancel.
        flip = a + b > 0
        low, high = jnp.where(flip, -b, a), jnp.where(flip, -a, b)
        mass = log_ndtr(high) + jnp.log1p(-jnp.exp(log_ndtr(low) - log_ndtr(high)))
        constant = 0.5 * math.log(2 * math.pi)
        slope = (jnp.exp(-0.5 * a**2 - constant - mass) - jnp.exp(-0.5 * b**2 - constant - mass)) / blur
        return jnp.sum(mass, -1) - math.log(count) - 2 * math.log(side), slope

    def log_density(x: Any) -> Any:
        return jax.nn.logsumexp(components(x)[0])

    def score(x: Any) -> Any:
        joint, slope = components(x)
        return jax.nn.softmax(joint) @ slope

    def sample(key: Any, n: int) -> tuple[Any, Any]:
        pick, place, noise = jax.random.split(key, 3)
        k = jax.random.randint(pick, (n,), 0, count)
        x = jax.random.uniform(place, (n, 2)) * side
        return x + jnp.asarray(lower, x.dtype)[k] + blur * jax.random.normal(noise, (n, 2)), k.astype(jnp.int32)

    return Density(_points(log_density, "(d)->()"), _points(score, "(d)->(d)"), sample, count)


def dataset(name: str, density: Density, *, seed: int = 0, size: int | None = None) -> Dataset:
    """A data set of `size` draws (default 10000) from a density, with its exact functions and the identity transform.

    Raises: ValueError: `size` below 4.
    """
    size = 10_000 if size is None else size
    if size < 4:
        raise DataError(f"size must be at least 4, one point per split; got {size}")
    x, label = jax.device_get(density.sample(jax.random.key(seed), size))
    arrays = {"x": x.astype(np.float32)} | ({"label": label.astype(np.int32)} if density.classes > 1 else {})
    return Dataset(
        name,
        arrays,
        split_indices(size, seed=seed),
        DataTransform(shape=x.shape[1:]),
        num_classes=density.classes if density.classes > 1 else None,
        licence="none needed: drawn from a formula",
        log_density=density.log_density,
        score=density.score,
        sample=density.sample,
    )


def gaussians(*, seed: int = 0, size: int | None = None) -> Dataset:
    """Eight Gaussians on a ring, with exact score; classes are the modes."""
    return dataset("gaussians", gaussians_density(), seed=seed, size=size)


def moons(*, seed: int = 0, size: int | None = None) -> Dataset:
    """Two interleaved half circles, with exact score; two classes."""
    return dataset("moons", moons_density(), seed=seed, size=size)


def swiss_roll(*, seed: int = 0, size: int | None = None) -> Dataset:
    """A spiral in the plane, with exact score; no classes."""
    return dataset("swiss_roll", swiss_roll_density(), seed=seed, size=size)


def pinwheel(*, seed: int = 0, size: int | None = None) -> Dataset:
    """Five curved arms, with exact score; classes are the arms."""
    return dataset("pinwheel", pinwheel_density(), seed=seed, size=size)


def checkerboard(*, seed: int = 0, size: int | None = None) -> Dataset:
    """Eight blurred squares of a board, with exact score; classes are the squares."""
    return dataset("checkerboard", checkerboard_density(), seed=seed, size=size)
