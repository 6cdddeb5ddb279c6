"""Does the model give its training data back? Distances to the training set, and copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffjax.metrics.features import FeatureExtractor, check_samples, pixels
from diffjax.metrics.pairwise import nearest
from diffjax.metrics.streaming import over_set
from diffjax.types import Metric

EXACT = 1e-4  # of the median held-out distance: what encoding and decoding may move a copy


def memorisation(
    train: Any,
    held_out: Any,
    extractor: FeatureExtractor | None = None,
    *,
    quantile: float = 0.05,
    duplicates: float = 0.1,
    chunk: int | None = None,
) -> Metric:
    """Closeness to the training data, beside held-out data's.   nn = median d(x, train) / median d(held_out, train)

    `nn` below 1: samples lie closer to the training set than new real data do. `near`: the share of samples closer than
    the `quantile` of the held-out distances, which is `quantile` for a faithful model. A copy is nearer than
    `duplicates` times the median held-out distance, an exact one nearer than 1e-4 of it. Needs all samples: the state
    is the set of features, merge is concatenation.

    Args: train, held_out: [N, ...] real items, held_out not trained on.   extractor: default `pixels()`.   quantile: in
        (0, 1). duplicates: in (0, 1).   chunk: rows of pairs at once.
    Returns: a metric whose score is `{'nn', 'near', 'copies', 'near_copies', 'repeats', 'near_repeats'}`: copies of
        training items among the samples, and samples that repeat an earlier sample, counted.
    Raises: ValueError: numbers out of range, train and held_out of different shapes, every held-out item a training
        item.
    Reference: tests for data copying against held-out distances, arXiv:2004.05675
    """
    for name, value in (("quantile", quantile), ("duplicates", duplicates)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie in (0, 1); got {value}")
    extractor = extractor or pixels()
    train = check_samples("train", train)
    held_out = check_samples("held_out", held_out, shape=train.shape[1:])
    features = extractor(train, "train")
    real = nearest(extractor(held_out, "held_out"), features, chunk=chunk)[:, 0].astype(np.float64)
    median, close = np.median(real), np.quantile(real, quantile)
    if not median > 0:
        raise ValueError("held_out: most of its items are in train; give real items that the model was not trained on")

    def repeats(x: np.ndarray, radius: float) -> int:
        """Samples with an earlier one in reach: all in a group but its first."""
        d = nearest(x, x, 1, same=True, chunk=chunk)[:, 0]
        group = np.flatnonzero(d <= radius)
        found = 0
        for start in range(0, len(group), 1024):  # rare: only samples that have a neighbour in reach
            rows = group[start : start + 1024]
            d2 = np.stack([((x[i].astype(np.float64)[None] - x[group]) ** 2).sum(1) for i in rows])
            found += int(((d2 <= radius**2) & (group[None, :] < rows[:, None])).any(1).sum())
        return found

    def finish(x: np.ndarray) -> dict[str, float]:
        d = nearest(x, features, chunk=chunk)[:, 0].astype(np.float64)
        many = len(x) > 1
        return {
            "nn": float(np.median(d) / median),
            "near": float((d < close).mean()),
            "copies": int((d <= EXACT * median).sum()),
            "near_copies": int((d <= duplicates * median).sum()),
            "repeats": repeats(x, EXACT * median) if many else 0,
            "near_repeats": repeats(x, duplicates * median) if many else 0,
        }

    return over_set(extractor, train.shape[1:], finish)
