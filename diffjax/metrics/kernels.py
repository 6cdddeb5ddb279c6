"""Scores from means over pairs: kernel distances and the energy distance, unbiased: zero on average for equal laws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.metrics import pairwise
from diffjax.metrics.features import FeatureExtractor, pixels
from diffjax.metrics.streaming import over_reference
from diffjax.types import Metric

MEDIAN_ITEMS = 1000  # of the reference, for the median of pair distances


def _unbiased(f: Any, ref: np.ndarray, x: np.ndarray, *args: Any, chunk: int | None) -> float:
    """mean k(x, x') + mean k(r, r') - 2 mean k(r, x), without the diagonals."""
    within = [pairwise.mean_pair(f, s, None, *args, chunk=chunk) for s in (ref, x)]
    return sum(within) - 2 * pairwise.mean_pair(f, ref, x, *args, chunk=chunk)


@partial(jax.jit, static_argnames="degree")
def _subset_kids(ref: jax.Array, x: jax.Array, index_r: jax.Array, index_x: jax.Array, degree: int) -> jax.Array:
    """The estimate on every subset, one after the other."""

    def one(index: tuple[jax.Array, jax.Array]) -> jax.Array:
        a, b = ref[index[0]], x[index[1]]
        rows = jnp.arange(len(a))
        within = [pairwise._polynomial(s, s, rows, degree).mean() / (len(a) - 1) for s in (a, b)]
        cross = pairwise._polynomial(a, b, jnp.full_like(rows, -1), degree).mean() / len(a)
        return within[0] + within[1] - 2 * cross

    return jax.lax.map(one, (index_r, index_x))


def kid(
    reference: Any,
    extractor: FeatureExtractor | None = None,
    *,
    degree: int = 3,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    chunk: int | None = None,
) -> Metric:
    """Kernel distance, unbiased MMD^2.   E k(x,x') + E k(r,r') - 2 E k(x,r),  k = (a.b / d + 1)^3

    The value is the estimate over all pairs; its standard error comes from subsets drawn without replacement, their
    standard deviation times sqrt(subset size / n). Needs all samples: the state is the set of features, merge is
    concatenation.

    Args: reference: [N, ...], N >= 4.   extractor: default `pixels()`.   subsets: >= 2.   subset_size: at most; half of
        the smaller set is never exceeded.   seed: of the subsets.   chunk: rows of pairs at once.
    Returns: a metric whose score is `{'kid', 'standard_error'}`; about zero, and as often negative, for equal laws.
    Raises: ValueError: fewer than 4 items, fewer than 2 subsets or a subset of fewer than 2, bad samples.
    Reference: arXiv:1801.01401#Sec.4
    """
    if subsets < 2 or subset_size < 2:
        raise ValueError(f"subsets and subset_size must be at least 2; got {subsets} and {subset_size}")

    def finish(ref: np.ndarray, x: np.ndarray) -> dict[str, float]:
        value = _unbiased(pairwise.polynomial(degree), ref, x, chunk=chunk)
        n = min(len(ref), len(x))
        m = min(subset_size, n // 2)
        rng = np.random.default_rng(seed)
        index = [np.stack([rng.permutation(len(s))[:m] for _ in range(subsets)]) for s in (ref, x)]
        drawn = np.asarray(
            _subset_kids(*(jnp.asarray(s, jnp.float32) for s in (ref, x)), *map(jnp.asarray, index), degree)
        )
        return {"kid": value, "standard_error": float(drawn.astype(np.float64).std(ddof=1) * np.sqrt(m / n))}

    return over_reference(reference, extractor or pixels(), finish, least=4)


def median_distance(features: Any) -> float:
    """The median distance of two items, over the first 1000.

    Example:
        >>> median_distance(np.array([[0.0], [1.0], [3.0]]))
        2.0
    """
    x = np.asarray(features[:MEDIAN_ITEMS], np.float64)
    square = (x * x).sum(1)
    d2 = square[:, None] + square[None, :] - 2 * x @ x.T
    return float(np.median(np.sqrt(np.maximum(d2[np.triu_indices(len(x), 1)], 0.0))))


def mmd(
    reference: Any,
    extractor: FeatureExtractor | None = None,
    *,
    bandwidth: float | None = None,
    chunk: int | None = None,
) -> Metric:
    """Unbiased MMD^2 of the Gaussian kernel.   E k(x,x') + E k(r,r') - 2 E k(x,r),  k = exp(-|a - b|^2 / (2 h^2))

    The default bandwidth `h` is the median distance within the reference. Needs all samples: the state is the set of
    features, merge is concatenation.

    Args: reference: [N, ...], N >= 2.   extractor: default `pixels()`.   bandwidth: > 0.   chunk: rows of pairs at
        once.
    Returns: a metric whose score is a float; about zero, and as often negative, for equal laws.
    Raises: ValueError: bandwidth not positive (the median is zero if most reference items are equal), bad samples.
    Reference: Gretton et al. 2012 (JMLR 13), Eq. 3
    """
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive; got {bandwidth}")

    def finish(ref: np.ndarray, x: np.ndarray) -> float:
        ref, x = pairwise.centred(ref, x)
        h = bandwidth or median_distance(ref)
        if not h > 0:
            raise ValueError("the median distance within the reference is zero; give a bandwidth")
        return _unbiased(pairwise.RBF, ref, x, jnp.float32(1 / (2 * h * h)), chunk=chunk)

    return over_reference(reference, extractor or pixels(), finish, least=2)


def mmd_to(reference: Any, bandwidth: float | None = None) -> Callable[[Any], jax.Array]:
    """`mmd` on raw values as a JAX function `x [n, d] -> MMD^2`, to be compiled, mapped and searched with.

    Holds all pairs at once: for a few thousand items. The value of `mmd`, less precise: one sum in the dtype of x.

    Args: reference: [N, d], N >= 2.   bandwidth: > 0, default the median distance within the reference.
    Reference: Gretton et al. 2012 (JMLR 13), Eq. 3

    Example:
        >>> x = jnp.array([[0.0], [1.0], [2.0]])
        >>> bool(mmd_to(x)(x + 5) > mmd_to(x)(x + 1) > mmd_to(x)(x))
        True
    """
    h = median_distance(reference) if bandwidth is None else bandwidth
    if not h > 0:
        raise ValueError(f"bandwidth, by default the median distance within the reference, must be positive; got {h}")
    reference = jnp.asarray(reference)
    kernel = lambda a, b: jnp.exp(-jnp.sum((a[:, None] - b[None]) ** 2, -1) / (2 * h * h))
    pairs = lambda k: (k.sum() - len(k)) / (len(k) * (len(k) - 1))
    inside = pairs(kernel(reference, reference))
    return lambda x: pairs(kernel(x, x)) + inside - 2 * kernel(x, reference).mean()


def energy(reference: Any, extractor: FeatureExtractor | None = None, *, chunk: int | None = None) -> Metric:
    """Unbiased squared energy distance.   2 E|x - r| - E|x - x'| - E|r - r'|

    Needs all samples: the state is the set of features, merge is concatenation.

    Args: reference: [N, ...], N >= 2.   extractor: default `pixels()`.   chunk: rows of pairs at once.
    Returns: a metric whose score is a float; about zero, and as often negative, for equal laws.
    Raises: ValueError: fewer than 2 items, bad samples.
    Reference: Szekely, Rizzo 2013 (J. Statistical Planning and Inference 143)
    """

    def finish(ref: np.ndarray, x: np.ndarray) -> float:
        return -_unbiased(pairwise.EUCLIDEAN, *pairwise.centred(ref, x), chunk=chunk)

    return over_reference(reference, extractor or pixels(), finish, least=2)
