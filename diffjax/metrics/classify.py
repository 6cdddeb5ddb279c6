"""Scores that ask a classifier: the two-sample test, and the accuracy of labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom

from diffjax.metrics.features import FeatureExtractor, check_samples, pixels
from diffjax.metrics.streaming import over_reference
from diffjax.types import Metric


def neighbour_votes(n: int) -> Any:
    """The default classifier of the two-sample test: votes of `sqrt(n)` nearest neighbours, an odd number."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(int(np.sqrt(n)) // 2 * 2 + 1)


def c2st(
    reference: Any,
    extractor: FeatureExtractor | None = None,
    *,
    estimator: Callable[[int], Any] = neighbour_votes,
    folds: int = 5,
    seed: int = 0,
) -> Metric:
    """Classifier two-sample test: how well real and fake are told apart.   accuracy = (1 / 2n) sum 1[f(z_i) = l_i]

    Features are standardised and the predictions cross-validated; the larger set is cut to the size of the smaller,
    items in the order given. The p-value is that of at least as many hits under a fair coin (folds are taken as
    independent). Needs all samples: the state is the set of features, merge is concatenation.

    Args: reference: [N, ...].   extractor: default `pixels()`.   estimator: `(training items) -> scikit-learn
        classifier`. folds: >= 2.   seed: of the folds.
    Returns: a metric whose score is `{'accuracy', 'p_value'}`: accuracy 0.5 for equal laws, 1 for separable ones.
    Raises: ValueError: fewer than 2 folds, fewer items than folds, bad samples.
    Reference: arXiv:1610.06545#Eq.2
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2; got {folds}")

    def finish(ref: np.ndarray, x: np.ndarray) -> dict[str, float]:
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        n = min(len(ref), len(x))
        z, labels = np.concatenate([ref[:n], x[:n]]), np.repeat([0, 1], n)
        model = make_pipeline(StandardScaler(), estimator(2 * n * (folds - 1) // folds))
        split = StratifiedKFold(folds, shuffle=True, random_state=seed)
        hits = int((cross_val_predict(model, z, labels, cv=split) == labels).sum())
        return {"accuracy": hits / (2 * n), "p_value": float(binom.sf(hits - 1, 2 * n, 0.5))}

    return over_reference(reference, extractor or pixels(), finish, least=folds)


class Hits(NamedTuple):
    """Counts of right answers and of all, int64 on the host."""

    right: Any
    total: Any


def accuracy(predict: Callable[[Any], Any]) -> Metric:
    """The share of samples whose asked-for label a classifier reads off them.   (1 / n) sum 1[predict(x_i) = y_i]

    Updates take a pair `(x [n, ...], labels [n])`; the state is two counts, merge adds them.

    Args: predict: `x -> labels [n]`, for example `classifier(...).predict`.
    Returns: a metric whose score is a float in [0, 1].
    Raises: ValueError: not a pair, labels that are not n integers, bad samples, no samples.

    Example:
        >>> from diffjax import metrics
        >>> metrics.score(accuracy(lambda x: x[:, 0] > 0), (np.array([[1.0], [-1.0]]), np.array([1, 1])))
        0.5
    """

    def init() -> Hits:
        return Hits(np.zeros((), np.int64), np.zeros((), np.int64))

    def update(state: Hits, batch: Any) -> Hits:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"accuracy takes batches (x, labels); got {type(batch).__name__}")
        x = check_samples("samples", batch[0])
        labels = check_labels(batch[1], len(x))
        found = np.asarray(predict(x)).reshape(-1)
        return Hits(state.right + np.int64((found == labels).sum()), state.total + np.int64(len(x)))

    def merge(a: Hits, b: Hits) -> Hits:
        return Hits(a.right + b.right, a.total + b.total)

    def compute(state: Hits) -> float:
        if state.total == 0:
            raise ValueError("samples: got none; accuracy needs at least 1")
        return float(state.right / state.total)

    return Metric(init, update, merge, compute)


def check_labels(labels: Any, n: int) -> np.ndarray:
    """`labels` as integers `[n]`, none negative.   Raises: ValueError: anything else."""
    labels = np.asarray(labels)
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise ValueError(
            f"labels must be {n} integers >= 0, one per item; got dtype {labels.dtype}, shape {labels.shape}"
            + (f", smallest {labels.min()}" if labels.size and np.issubdtype(labels.dtype, np.integer) else "")
        )
    return labels
