"""Scores from nearest neighbours: precision and recall, density and coverage."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffjax.metrics.features import FeatureExtractor, pixels
from diffjax.metrics.pairwise import count_inside, nearest
from diffjax.metrics.streaming import over_reference
from diffjax.types import Metric


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1 neighbour; got {k}")


def precision_recall(
    reference: Any, extractor: FeatureExtractor | None = None, k: int = 3, *, chunk: int | None = None
) -> Metric:
    """Share of samples in the reference's manifold, and the reverse.   manifold = union of k-NN balls

    A ball reaches from an item to its k-th neighbour in its own set, surface included. Needs all samples: the state is
    the set of features, merge is concatenation. Both depend on the number of items: use equal numbers, and compare with
    a floor.

    Args: reference: [N, ...], N >= k + 1.   extractor: default `pixels()`.   k: neighbours.   chunk: rows of pairs at
        once.
    Returns: a metric whose score is `{'precision', 'recall'}`, each in [0, 1].
    Raises: ValueError: k < 1, fewer than k + 1 items on either side, bad samples.

    Example:
        >>> from diffjax import metrics
        >>> ref = np.array([[0.0], [1.0], [10.0], [11.0]])
        >>> metrics.score(metrics.precision_recall(ref, k=1), np.array([[0.2], [0.9], [1.2], [5.0]]))
        {'precision': 0.75, 'recall': 0.5}

    Reference: arXiv:1904.06991#Eq.2
    """
    _check_k(k)

    def finish(ref: np.ndarray, x: np.ndarray) -> dict[str, float]:
        radii = [nearest(s, s, k, same=True, chunk=chunk)[:, -1] for s in (ref, x)]
        inside = [count_inside(x, ref, radii[0], chunk=chunk), count_inside(ref, x, radii[1], chunk=chunk)]
        return {"precision": float((inside[0] > 0).mean()), "recall": float((inside[1] > 0).mean())}

    return over_reference(reference, extractor or pixels(), finish, least=k + 1)


def density_coverage(
    reference: Any, extractor: FeatureExtractor | None = None, k: int = 5, *, chunk: int | None = None
) -> Metric:
    """How many reference balls hold a sample, over k, and the share of reference balls that hold one.

    density = (1 / kM) sum_j sum_i 1[x_j in B_i]   coverage = (1 / N) sum_i 1[some x_j in B_i],  B_i = B(r_i, NN_k(r_i))

    An outlier in the reference weighs less than in `precision_recall`, and balls of the samples are not used. Needs all
    samples: the state is the set of features, merge is concatenation.

    Args: reference: [N, ...], N >= k + 1.   extractor: default `pixels()`.   k: neighbours.   chunk: rows of pairs at
        once.
    Returns: a metric whose score is `{'density', 'coverage'}`: density is about 1 for equal laws and not bounded by it,
        coverage is in [0, 1].
    Raises: ValueError: k < 1, fewer than k + 1 reference items, bad samples.
    Reference: arXiv:2002.09797#Sec.3
    """
    _check_k(k)

    def finish(ref: np.ndarray, x: np.ndarray) -> dict[str, float]:
        radii = nearest(ref, ref, k, same=True, chunk=chunk)[:, -1]
        inside = count_inside(x, ref, radii, chunk=chunk)
        covered = nearest(ref, x, 1, chunk=chunk)[:, 0] <= radii
        return {"density": float(inside.sum() / (k * len(x))), "coverage": float(covered.mean())}

    return over_reference(reference, extractor or pixels(), finish, least=k + 1)
