"""How a metric is fed: whole sets, batches, parts made elsewhere; and the two kinds of state, moments and sets."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from diffjax.metrics.features import FeatureExtractor, check_samples
from diffjax.types import Metric, PyTree


def evaluate(metric: Metric, batches: Iterable[Any]) -> Any:
    """`compute(update(... update(init(), b_1) ..., b_n))`.

    Args: metric: any metric.   batches: what its `update` takes, at least one.
    Returns: a float, or a dict of floats.
    Raises: ValueError: no batches; bad samples, as the metric says.

    Example:
        >>> import numpy as np
        >>> from diffjax import metrics
        >>> metrics.evaluate(metrics.exact_w2(np.array([[0.0], [2.0]])), [np.array([[1.0]]), np.array([[3.0]])])
        1.0
    """
    state, empty = metric.init(), True
    for batch in batches:
        state, empty = metric.update(state, batch), False
    if empty:
        raise ValueError("batches is empty; give at least one batch of samples")
    return metric.compute(state)


def score(metric: Metric, samples: Any) -> Any:
    """The metric of one set that is at hand as a whole: `evaluate(metric, [samples])`.

    Example:
        >>> import numpy as np
        >>> from diffjax import metrics
        >>> metrics.score(metrics.exact_w2(np.array([[0.0], [1.0]])), np.array([[1.0], [2.0]]))
        1.0
    """
    return evaluate(metric, [samples])


def merge_all(metric: Metric, states: Iterable[PyTree]) -> PyTree:
    """One state of many, for example of every device or host."""
    return functools.reduce(metric.merge, states, metric.init())


# ----------------------------------------------------------------------------------------------------------- moments


class Moments(NamedTuple):
    """Count, mean and sum of centred outer products of a set, float64 on the host; `mean` has shape [0] while empty."""

    count: Any
    mean: Any
    scatter: Any


def no_moments() -> Moments:
    """The moments of the empty set."""
    return Moments(np.zeros((), np.int64), np.zeros(0), np.zeros((0, 0)))


def moments_of(features: np.ndarray) -> Moments:
    """The moments of features [N, d]."""
    x = np.asarray(features, np.float64)
    mean = x.mean(0)
    return Moments(np.asarray(len(x), np.int64), mean, (x - mean[None]).T @ (x - mean[None]))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of the union.   scatter = scatter_a + scatter_b + (n_a n_b / n) (mean_b - mean_a)(mean_b - mean_a)^T

    Nothing is ever a difference of large sums, so a mean far from zero costs no digits.

    Reference: Chan, Golub, LeVeque 1979 (Stanford STAN-CS-79-773).
    """
    if b.count == 0:
        return a
    if a.count == 0:
        return b
    n, gap = a.count + b.count, b.mean - a.mean
    return Moments(
        n, a.mean + gap * (b.count / n), a.scatter + b.scatter + np.outer(gap, gap) * (a.count * (b.count / n))
    )


# -------------------------------------------------------------------------------------------------------------- sets


def over_set(
    extractor: FeatureExtractor, shape: tuple[int, ...], finish: Callable[[np.ndarray], Any], least: int = 1
) -> Metric:
    """A metric that needs all samples: the state is a tuple of feature arrays `[n_i, d]`, merge is concatenation.

    Args: shape: of one item.   finish: `features [N, d] -> score`.   least: samples that it needs.
    """

    def update(state: PyTree, batch: Any) -> PyTree:
        return (*state, extractor(check_samples("samples", batch, shape=shape)))

    def compute(state: PyTree) -> Any:
        total = sum(len(part) for part in state)
        if total < max(least, 1):
            raise ValueError(f"samples: got {total}; this score needs at least {max(least, 1)}. Give more samples")
        return finish(np.concatenate(state))

    return Metric(tuple, update, operator.add, compute)


def over_reference(
    reference: Any,
    extractor: FeatureExtractor,
    finish: Callable[[np.ndarray, np.ndarray], Any],
    least: int = 1,
) -> Metric:
    """`over_set` against a reference of the same kind of items: `finish(reference features, features) -> score`."""
    reference = check_samples("reference", reference, least)
    features = extractor(reference, "reference")
    return over_set(extractor, reference.shape[1:], lambda x: finish(features, x), least)
