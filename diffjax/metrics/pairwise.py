"""Sums, counts and neighbours over all pairs of two feature sets, by chunks of rows, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PAIRS = 2**23  # pairs held at once: 32 MiB of float32 per temporary
BLOCK = 512  # a float32 row is summed in blocks, so that rounding does not grow with its length
ROUNDING = 2e-6  # float32 error of |a|^2 + |b|^2 - 2 a.b over its terms: closer distances count as ties


def map_rows(f: Callable[..., Any], a: Any, b: Any, *args: Any, same: bool = False, chunk: int | None = None) -> Any:
    """`f(rows of a, b, row numbers, *args)` for every chunk of rows, gathered on the host.

    Args: f: jitted, returns a pytree of `[rows, ...]`.   a: [N, d].   b: [M, d].   same: `a` is `b`; the row numbers
        are then their indices, so that `f` can leave out the diagonal, else -1.   chunk: rows at once; default from a
        memory budget.
    Returns: a pytree of NumPy arrays `[N, ...]`, equal up to rounding for every `chunk`.
    Raises: ValueError: `chunk` below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row; got {chunk}. Leave it out for a size that fits in memory")
    n = len(a)
    size = min(n, chunk or max(1, PAIRS // max(len(b), 8 * a.shape[1])))
    b = jnp.asarray(b, jnp.float32)
    parts = []
    for start in range(0, n, size):
        part = np.asarray(a[start : start + size], np.float32)
        real = len(part)
        rows = start + np.arange(size, dtype=np.int32) if same else np.full(size, -1, np.int32)
        part = np.concatenate([part, np.repeat(part[-1:], size - real, 0)])  # one shape, so one compilation
        parts.append(
            jax.tree.map(lambda v, k=real: np.asarray(v)[:k], f(jnp.asarray(part), b, jnp.asarray(rows), *args))
        )
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def centred(reference: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Every set minus the mean of the reference, in float32: distances do not change and lose fewer digits."""
    mean = reference.mean(0, dtype=np.float64, keepdims=True)
    return tuple((x - mean).astype(np.float32) for x in (reference, *others))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a b^T` in full float32 on every backend."""
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def squared_distances(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`|a_i - b_j|^2` [N, M] and the size of its rounding error."""
    size = jnp.sum(a * a, 1)[:, None] + jnp.sum(b * b, 1)[None, :]
    return jnp.maximum(size - 2 * dot(a, b), 0), ROUNDING * size


def off_diagonal(values: jax.Array, rows: jax.Array, other: float) -> jax.Array:
    """`values` with `other` where a row meets itself."""
    return jnp.where(rows[:, None] == jnp.arange(values.shape[1])[None, :], other, values)


def row_sums(values: jax.Array) -> jax.Array:
    """Sum over the last axis in blocks."""
    n = values.shape[1] // BLOCK * BLOCK
    blocks = values[:, :n].reshape(values.shape[0], -1, BLOCK)
    return blocks.sum(2).sum(1) + values[:, n:].sum(1)


@partial(jax.jit, static_argnames="k")
def _nearest(a: jax.Array, b: jax.Array, rows: jax.Array, k: int) -> jax.Array:
    index = jax.lax.top_k(-off_diagonal(squared_distances(a, b)[0], rows, jnp.inf), k)[1]
    # the distances of the k chosen are taken again from differences: an exact copy is at exactly zero
    return jnp.sort(jnp.sqrt(jnp.sum((a[:, None] - b[index]) ** 2, -1)), axis=1)


def nearest(a: np.ndarray, b: np.ndarray, k: int = 1, *, same: bool = False, chunk: int | None = None) -> np.ndarray:
    """The distances of every row of `a` to its `k` nearest rows of `b`, ascending, [N, k]; with `same` not to itself.

    Example:
        >>> nearest(np.zeros((1, 2)), np.array([[3.0, 4.0], [0.0, 1.0]]), 2).tolist()
        [[1.0, 5.0]]
    """
    b, a = centred(b, a)
    return map_rows(partial(_nearest, k=k), a, b, same=same, chunk=chunk)


@jax.jit
def _count_inside(a: jax.Array, b: jax.Array, rows: jax.Array, radii: jax.Array) -> jax.Array:
    d2, rounding = squared_distances(a, b)
    return jnp.sum(d2 <= (radii * radii)[None, :] + rounding, 1, dtype=jnp.int32)


def count_inside(a: np.ndarray, b: np.ndarray, radii: np.ndarray, *, chunk: int | None = None) -> np.ndarray:
    """How many balls of centre `b_j` and radius `radii[j]` hold a row of `a`, [N]; a surface belongs to its ball."""
    b, a = centred(b, a)
    return map_rows(_count_inside, a, b, jnp.asarray(radii, jnp.float32), chunk=chunk)


@jax.jit
def _euclidean(a: jax.Array, b: jax.Array, rows: jax.Array) -> jax.Array:
    return row_sums(off_diagonal(jnp.sqrt(squared_distances(a, b)[0]), rows, 0.0))


@jax.jit
def _rbf(a: jax.Array, b: jax.Array, rows: jax.Array, rate: jax.Array) -> jax.Array:
    return row_sums(off_diagonal(jnp.exp(-rate * squared_distances(a, b)[0]), rows, 0.0))


@partial(jax.jit, static_argnames="degree")
def _polynomial(a: jax.Array, b: jax.Array, rows: jax.Array, degree: int) -> jax.Array:
    return row_sums(off_diagonal((dot(a, b) / a.shape[1] + 1) ** degree, rows, 0.0))


def mean_pair(
    f: Callable[..., Any], a: np.ndarray, b: np.ndarray | None, *args: Any, chunk: int | None = None
) -> float:
    """The mean of a pair function over `a x b`, or over the pairs of two different rows of `a` where `b` is None."""
    sums = map_rows(f, a, a if b is None else b, *args, same=b is None, chunk=chunk)
    return float(sums.astype(np.float64).sum() / (len(a) * (len(a) - 1 if b is None else len(b))))


EUCLIDEAN, RBF = _euclidean, _rbf


def polynomial(degree: int) -> Callable[..., Any]:
    """Row sums of `(a . b / d + 1)^degree`."""
    return partial(_polynomial, degree=degree)
