"""Scores from optimal transport: sliced in many dimensions, exact for small sets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from diffjax.metrics.features import FeatureExtractor, philox_normal, pixels
from diffjax.metrics.streaming import over_reference
from diffjax.types import Metric

ASSIGNMENT_LIMIT = 2000  # items: the assignment costs n^3
SLICE_ENTRIES = 2**23  # projections held at once


def _quantile_pieces(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces where the quantile functions of n and m sorted values are constant: indices into each, and lengths."""
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # integers: in units of 1 / nm
    return edges[:-1] // m, edges[:-1] // n, np.diff(edges) / (n * m)


@jax.jit
def _project(directions: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.matmul(directions, x.T, precision=jax.lax.Precision.HIGHEST)


def sliced_wasserstein(
    reference: Any,
    extractor: FeatureExtractor | None = None,
    *,
    projections: int = 128,
    seed: int = 0,
    chunk: int | None = None,
) -> Metric:
    """Sliced 2-Wasserstein distance.   sqrt(mean_l W_2^2(theta_l . x, theta_l . r)),  |theta_l| = 1

    The directions depend on `seed` and the dimension alone. Needs all samples: the state is the set of features, merge
    is concatenation.

    Args: reference: [N, ...].   extractor: default `pixels()`.   projections: directions, >= 1.   seed: of the
        directions.   chunk: directions at once.
    Returns: a metric whose score is a float >= 0; sets of different sizes are compared by their exact quantile
        functions.
    Raises: ValueError: no projections, bad samples.

    Example:
        >>> from diffjax import metrics
        >>> metrics.score(metrics.sliced_wasserstein(np.array([[0.0], [1.0]])), np.array([[2.0], [3.0]]))
        2.0

    Reference: Bonneel et al. 2015 (J. Mathematical Imaging and Vision 51); arXiv:1804.01947
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1; got {projections}")

    def finish(ref: np.ndarray, x: np.ndarray) -> float:
        centre = ref.mean(0, dtype=np.float64)[None]
        a, b = (jnp.asarray(s - centre, jnp.float32) for s in (ref, x))
        theta = philox_normal(seed, 0, (projections, ref.shape[1]))
        theta = jnp.asarray(theta / np.linalg.norm(theta, axis=1, keepdims=True), jnp.float32)
        i, j, w = _quantile_pieces(len(ref), len(x))
        size = min(projections, chunk or max(1, SLICE_ENTRIES // len(i)))
        costs = []
        for start in range(0, projections, size):
            # sorted on the host: XLA sorts a hundred times slower on a CPU, and the projections are small
            pa, pb = (np.sort(np.asarray(_project(theta[start : start + size], s)), axis=1) for s in (a, b))
            costs.append(((pa[:, i] - pb[:, j]).astype(np.float64) ** 2) @ w)
        return float(np.sqrt(np.concatenate(costs).mean()))

    return over_reference(reference, extractor or pixels(), finish)


def exact_w2(reference: Any, extractor: FeatureExtractor | None = None) -> Metric:
    """Exact 2-Wasserstein distance of two sets of one size.   sqrt(min_pi (1/n) sum_i |r_i - x_pi(i)|^2)

    Needs all samples: the state is the set of features, merge is concatenation.

    Args: reference: [N, ...], N <= 2000.   extractor: default `pixels()`.
    Returns: a metric whose score is a float >= 0.
    Raises: ValueError: more than 2000 items, sets of different sizes, bad samples.
    Reference: Villani 2003, Topics in Optimal Transportation; assignment by SciPy.
    """

    def check(name: str, n: int) -> None:
        if n > ASSIGNMENT_LIMIT:
            raise ValueError(
                f"{name} has {n} items; exact_w2 takes at most {ASSIGNMENT_LIMIT}. Take fewer, or sliced_wasserstein"
            )

    def finish(ref: np.ndarray, x: np.ndarray) -> float:
        check("samples", len(x))
        if len(ref) != len(x):
            raise ValueError(
                f"exact_w2 pairs sets of one size; got {len(ref)} reference items and {len(x)} samples. Cut the larger"
            )
        a, b = np.asarray(ref, np.float64), np.asarray(x, np.float64)
        centre = a.mean(0)[None]
        a, b = a - centre, b - centre
        cost = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        i, j = linear_sum_assignment(cost)
        return float(np.sqrt(((a[i] - b[j]) ** 2).sum(1).mean()))  # differences again: equal sets are at exactly zero

    check("reference", len(reference))
    return over_reference(reference, extractor or pixels(), finish)
