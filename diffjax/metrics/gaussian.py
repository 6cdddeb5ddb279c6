"""Scores of Gaussians fitted to features: the Frechet distance."""

from __future__ import annotations

from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from diffjax.metrics.features import FeatureExtractor, check_samples, pixels
from diffjax.metrics.streaming import Moments, merge_moments, moments_of, no_moments
from diffjax.types import Metric

ONE_THREAD = 512  # features up to which the linear algebra stays on one thread


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root; directions below rounding count as empty."""
    values, vectors = np.linalg.eigh(covariance)
    floor = max(values.max(initial=0.0), 0.0) * len(values) * np.finfo(np.float64).eps
    return (vectors * np.sqrt(np.where(values > floor, values, 0.0))[None]) @ vectors.T


def frechet_distance(mean_a: Any, cov_a: Any, mean_b: Any, cov_b: Any) -> float:
    """The squared 2-Wasserstein distance of two Gaussians.   |m_a - m_b|^2 + tr(A + B) - 2 |A^{1/2} B^{1/2}|_*

    `tr (A B)^{1/2}` is the nuclear norm of the product of the symmetric roots, which stays real and accurate where the
    covariances are singular.

    Args: means: [d].   covariances: [d, d], positive semi-definite.

    Example:
        >>> round(frechet_distance([0.0], [[1.0]], [3.0], [[4.0]]), 12)
        10.0

    Reference: Dowson, Landau 1982 (J. Multivariate Analysis 12); arXiv:1706.08500#Eq.6
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(v, np.float64) for v in (mean_a, cov_a, mean_b, cov_b))
    # at this size a second BLAS thread gains nothing, and on a busy machine waiting for it cost 80 times the work
    with threadpool_limits(1 if len(mean_a) <= ONE_THREAD else None, user_api="blas"):
        cross = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def frechet(reference: Any, extractor: FeatureExtractor | None = None) -> Metric:
    """Frechet distance of Gaussians fitted to features.   |m - m_r|^2 + tr(C + C_r - 2 (C^{1/2} C_r C^{1/2})^{1/2})

    The state is count, mean and scatter in float64 on the host, merged after Chan; covariances are unbiased. The value
    depends on the number of samples: compare only with a real-against-real floor at the same number. It is FID only if
    the features are those of Inception.

    Args: reference: [N, ...] real items in the range of the samples, N >= 2, or their `Moments`.   extractor: default
        `pixels()`.
    Returns: a metric; updates take [n, ...], the score is a float >= 0 (needs 2 samples).
    Raises: ValueError: fewer than 2 items, integers, NaN, items of another shape than the reference.

    Example:
        >>> from diffjax import metrics
        >>> metrics.score(metrics.frechet(np.array([[0.0], [2.0]])), np.array([[3.0], [5.0]]))
        9.0

    Reference: arXiv:1706.08500#Eq.6
    """
    extractor = extractor or pixels()
    if isinstance(reference, Moments):
        shape, ref = None, reference
        if ref.count < 2:
            raise ValueError(f"reference has {int(ref.count)} items; the Frechet distance needs at least 2")
    else:
        reference = check_samples("reference", reference, 2)
        shape, ref = reference.shape[1:], moments_of(extractor(reference, "reference"))

    def update(state: Moments, batch: Any) -> Moments:
        return merge_moments(state, moments_of(extractor(check_samples("samples", batch, shape=shape))))

    def compute(state: Moments) -> float:
        if state.count < 2:
            raise ValueError(
                f"samples: got {int(state.count)}; the Frechet distance needs at least 2. Give more samples"
            )
        if state.mean.shape != ref.mean.shape:
            raise ValueError(f"samples have {state.mean.shape[0]} features, the reference has {ref.mean.shape[0]}")
        covariances = [m.scatter / (m.count - 1) for m in (ref, state)]
        return frechet_distance(ref.mean, covariances[0], state.mean, covariances[1])

    return Metric(no_moments, update, merge_moments, compute)
