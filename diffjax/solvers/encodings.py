"""Encodings: spaces of candidates that a search draws from, varies and crosses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffjax.numerics import PyTree


class Encoding(NamedTuple):
    """A space of candidates, which are pytrees of NumPy arrays; `rng` is a `numpy.random.Generator`."""

    draw: Callable[[np.random.Generator], PyTree]
    mutate: Callable[[np.random.Generator, PyTree], PyTree]
    cross: Callable[[np.random.Generator, PyTree, PyTree], PyTree]


def subsets(pool: int, size: int, rate: float = 0.3) -> Encoding:
    """`size` of the integers 0 .. pool - 1, increasing: which steps of a fine grid a solver makes.

    Mutation replaces each entry with probability `rate`, one at least; crossover draws from the union of both parents.
    Raises: ValueError: not 1 <= size < pool, or a rate outside (0, 1].

    Example:
        >>> subsets(10, 3).draw(np.random.default_rng(0)).shape
        (3,)
    """
    if not 1 <= size < pool or not 0 < rate <= 1:
        raise ValueError(f"subsets need 1 <= size < pool and 0 < rate <= 1; got {size=}, {pool=}, {rate=}")

    def mutate(rng: np.random.Generator, c: np.ndarray) -> np.ndarray:
        out = _some(rng, size, rate)
        rest = np.setdiff1d(np.arange(pool), c)
        new = rng.choice(rest, min(out.sum(), len(rest)), replace=False)
        kept = np.concatenate([c[~out], c[out][len(new) :]])
        return np.sort(np.concatenate([kept, new]))

    return Encoding(
        lambda rng: np.sort(rng.choice(pool, size, replace=False)),
        mutate,
        lambda rng, a, b: np.sort(rng.choice(np.union1d(a, b), size, replace=False)),
    )


def masks(shape: tuple[int, ...], keep: int, rate: float = 0.15) -> Encoding:
    """Boolean arrays with exactly `keep` entries True: which blocks of which steps are evaluated, under a budget.

    Mutation moves each True entry with probability `rate`; crossover keeps what both parents keep and draws the rest.
    Raises: ValueError: `keep` outside 1 .. number of entries, or a rate outside (0, 1].
    """
    total = int(np.prod(shape))
    if not 1 <= keep <= total or not 0 < rate <= 1:
        raise ValueError(f"masks need 1 <= keep <= {total} and 0 < rate <= 1; got {keep=}, {rate=}")
    whole = keep == total
    which = None if whole else subsets(total, keep, rate)

    def full(index: np.ndarray) -> np.ndarray:
        flat = np.zeros(total, bool)
        flat[index] = True
        return flat.reshape(shape)

    def cross(rng: np.random.Generator, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both, either = np.flatnonzero(a & b), np.flatnonzero(a ^ b)
        return full(np.concatenate([both, rng.choice(either, keep - len(both), replace=False)]))

    if whole:
        return Encoding(lambda rng: np.ones(shape, bool), lambda rng, c: c, lambda rng, a, b: a)
    return Encoding(lambda rng: full(which.draw(rng)), lambda rng, c: full(which.mutate(rng, np.flatnonzero(c))), cross)


def choices(counts: Any, rate: float = 0.2) -> Encoding:
    """Integers with entry i in 0 .. counts[i] - 1: categorical decisions, such as those of `unified`.

    Mutation draws each entry anew with probability `rate`, one at least; crossover takes each from either parent.
    Raises: ValueError: a count below 1, or a rate outside (0, 1].
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or counts.size == 0 or counts.min() < 1 or not 0 < rate <= 1:
        raise ValueError(f"choices need positive counts [m] and 0 < rate <= 1; got {counts}, {rate=}")
    return Encoding(
        lambda rng: rng.integers(counts),
        lambda rng, c: np.where(_some(rng, len(counts), rate), rng.integers(counts), c),
        lambda rng, a, b: np.where(rng.random(len(counts)) < 0.5, a, b),
    )


def joint(*encodings: Encoding) -> Encoding:
    """Tuples of candidates, one of each encoding; mutation and crossover act on every part."""
    parts = lambda name, rng, *cs: tuple(
        getattr(e, name)(rng, *c) for e, *c in zip(encodings, *cs, strict=True)
    )  # fmt: skip
    return Encoding(*(functools.partial(parts, name) for name in Encoding._fields))


def _some(rng: np.random.Generator, n: int, rate: float) -> np.ndarray:
    """Each of n with probability `rate`, one at least."""
    chosen = rng.random(n) < rate
    chosen[rng.integers(n)] |= not chosen.any()
    return chosen
