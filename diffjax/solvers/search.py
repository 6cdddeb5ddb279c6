"""Search over solvers: many tables scored in one compiled call, evolution over encodings, a predictor that ranks.

A candidate is a pytree of NumPy arrays, drawn and varied by an `Encoding` (see `encodings`); what it means is decided by
the score alone: steps, decisions of `unified`, blocks that a network skips, or several of these at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.numerics import PyTree
from diffjax.solvers import table
from diffjax.solvers.encodings import Encoding
from diffjax.types import Denoiser, Key, Solver

ATTEMPTS = 50  # draws of a candidate that has not been seen, before a seen one is taken

# ------------------------------------------------------------------------------------------------------------- scores


def score_tables(
    solvers: Sequence[Solver],
    denoiser: Denoiser | Sequence[Denoiser],
    x: PyTree,
    score: Callable[[PyTree], Any],
    *,
    key: Key | None = None,
    chunk: int = 32,
    compiled: bool = True,
) -> np.ndarray:
    """Score of the samples that each table draws from the same start and noise.   score(sample(key, denoiser, solver_k, x))

    The tables are stacked and run by `vmap`, `chunk` at a time, in one compilation whatever their lengths.

    Args: solvers: K tables.   denoiser: one, or K of one structure; leaves that are one object in all of them are passed
    once.   x: the start.   score: `samples -> number`, smaller is better; keep one function, a new one compiles again.
    chunk: tables at once, for memory.   compiled: `score` is a JAX function and runs in the same call; False: it is called
    on the host with NumPy samples.
    Returns: [K] float64.
    Raises: ValueError: no tables, solvers that are not tables, another number or structure of denoisers, chunk below 1.

    Example:
        >>> from diffjax import processes, solvers, testing, times
        >>> p = processes.vp()
        >>> d = testing.oracle(testing.gaussian([0.0], 1.0), p)
        >>> tables = [solvers.ddim(p, times.uniform(n)) for n in (2, 4)]
        >>> score_tables(tables, d, jnp.ones((1, 1)), lambda x: jnp.mean((x - 1) ** 2)).shape
        (2,)
    """
    solvers = list(solvers)
    if not solvers or any(s.step is not table.step for s in solvers):
        raise ValueError("score_tables needs at least one solver, and all of them linear tables without own step")
    denoisers = [denoiser] * len(solvers) if isinstance(denoiser, Denoiser) else list(denoiser)
    _counts(chunk=chunk)
    structures = {jax.tree.structure(d) for d in denoisers}
    if len(denoisers) != len(solvers) or len(structures) != 1:
        raise ValueError(
            f"give one denoiser, or {len(solvers)} of one structure; got {len(denoisers)} of {len(structures)} structures"
        )
    columns = list(zip(*(jax.tree.leaves(d) for d in denoisers), strict=True))
    shared = tuple(all(leaf is c[0] for leaf in c) for c in columns)
    leaves = [
        c[0] if one else np.stack([np.asarray(leaf) for leaf in c]) for c, one in zip(columns, shared, strict=True)
    ]
    stacked = table.stack(solvers)
    key = jax.random.key(0) if key is None else key
    run = functools.partial(_run, structures.pop(), shared, score if compiled else None, key, x)
    size, parts = min(chunk, len(solvers)), []
    for begin in range(0, len(solvers), size):
        index = np.arange(begin, begin + size) % len(solvers)  # the last chunk wraps around: every call has one shape
        some = [leaf if one else leaf[index] for leaf, one in zip(leaves, shared, strict=True)]
        out = run(some, jax.tree.map(lambda r, i=index: r[i], stacked))
        if not compiled:
            out = [score(jax.tree.map(lambda a, i=i: np.asarray(a[i]), out)) for i in range(size)]
        parts.append(np.asarray(out, np.float64).reshape(size))
    return np.concatenate(parts)[: len(solvers)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(tree: Any, shared: tuple, score: Any, key: Key, x: PyTree, leaves: list, solvers: Solver) -> Any:
    import diffjax  # the driver stands above the solvers

    def one(leaves: list, solver: Solver) -> Any:
        end = diffjax.sample(key, jax.tree.unflatten(tree, leaves), solver, x)
        return end if score is None else jnp.asarray(score(end))

    return jax.vmap(one, in_axes=([None if s else 0 for s in shared], 0))(leaves, solvers)


# ------------------------------------------------------------------------------------------------------------- search


class Found(NamedTuple):
    """What a search evaluated, in the order in which it did, and the best of it."""

    best: PyTree
    score: float
    candidates: list
    scores: np.ndarray


Score = Callable[[list], Any]  # list of K candidates -> [K] numbers, smaller is better; NaN is worst


class _Record:
    """Candidates evaluated so far; the same candidate is never evaluated twice."""

    def __init__(self, score: Score) -> None:
        self.score, self.candidates, self.scores, self.seen = score, [], [], set()

    def add(self, batch: list) -> None:
        if not batch:
            return
        values = np.asarray(self.score(batch), np.float64)
        if values.shape != (len(batch),):
            raise ValueError(f"score must return one number for each of {len(batch)} candidates; got {values.shape}")
        self.candidates += batch
        self.scores += np.where(np.isnan(values), np.inf, values).tolist()
        self.seen |= {_identity(c) for c in batch}

    def best(self, n: int) -> list:
        return [self.candidates[i] for i in np.argsort(self.scores, kind="stable")[:n]]

    def found(self) -> Found:
        i = int(np.argmin(self.scores))
        return Found(self.candidates[i], self.scores[i], self.candidates, np.asarray(self.scores))

    def new(self, n: int, make: Callable[[], PyTree]) -> list:
        """Up to n candidates that have not been seen; fewer when the space seems exhausted."""
        batch: dict = {}
        for _ in range(ATTEMPTS * n):
            if len(batch) == n:
                break
            c = make()
            if (name := _identity(c)) not in self.seen:
                batch.setdefault(name, c)
        return list(batch.values())


def _identity(candidate: PyTree) -> tuple:
    return tuple((np.shape(a), np.asarray(a).tobytes()) for a in jax.tree.leaves(candidate))


def _child(rng: np.random.Generator, encoding: Encoding, parents: list, fresh: float) -> PyTree:
    """A new draw with probability `fresh`, else a mutated parent or a crossover of two."""
    pick = lambda: parents[rng.integers(len(parents))]
    kind = rng.random()
    if kind < fresh:
        return encoding.draw(rng)
    if kind < fresh + (1 - fresh) / 2 or len(parents) == 1:
        return encoding.mutate(rng, pick())
    return encoding.cross(rng, pick(), pick())


def evolve(
    encoding: Encoding,
    score: Score,
    *,
    seed: int = 0,
    population: int = 32,
    parents: int = 8,
    generations: int = 10,
    fresh: float = 0.2,
    start: Sequence[PyTree] = (),
    on_generation: Callable[[int, Found], None] | None = None,
) -> Found:
    """Evolution: every generation varies the best so far.   population x generations evaluations at most

    The published two stages are two calls: the first over steps; the second over `joint(steps, masks)`, whose `start`
    holds the steps found, each with a mask.

    Args: encoding: the space.   score: all candidates of a generation at once, see `Score`.   seed: of every draw.
    population: candidates a generation.   parents: the best of all so far that are varied.   fresh: share of new draws.
    start: candidates of the first generation, filled up with draws; all of them are evaluated, even if more than `population`.
    on_generation: `(index, found so far)`.
    Returns: the best candidate, its score and the record.
    Raises: ValueError: counts below 1, fresh outside [0, 1], a score of the wrong shape.

    Example:
        >>> from diffjax.solvers import encodings
        >>> evolve(encodings.choices([9, 9]), lambda cs: [c.sum() for c in cs], generations=8).score
        0.0

    Reference: Li et al. 2023, arXiv:2309.10438, Section 3.
    """
    _counts(population=population, parents=parents, generations=generations)
    if not 0 <= fresh <= 1:
        raise ValueError(f"fresh, the share of new draws, must be in [0, 1]; got {fresh}")
    rng, record = np.random.default_rng(seed), _Record(score)
    for g in range(generations):
        best = record.best(parents)
        first = {_identity(c): c for c in start} if g == 0 else {}
        make = lambda best=best: _child(rng, encoding, best, fresh) if best else encoding.draw(rng)
        batch = list(first.values())
        record.seen |= set(first)
        record.add(batch + record.new(max(population - len(batch), 0), make))
        if on_generation is not None:
            on_generation(g, record.found())
    return record.found()


def predict_and_search(
    encoding: Encoding,
    score: Score,
    features: Callable[[PyTree], np.ndarray],
    *,
    seed: int = 0,
    rounds: int = 6,
    batch: int = 32,
    pool: int = 512,
    parents: int = 16,
    start: Sequence[PyTree] = (),
    fit: Callable[[np.ndarray, np.ndarray, int], Callable[[np.ndarray], np.ndarray]] | None = None,
    on_round: Callable[[int, Found], None] | None = None,
) -> Found:
    """Search guided by a learned predictor, retrained on all that was evaluated.   rounds x batch evaluations at most

    Every round fits `features -> rank of the score`, breeds `pool` new candidates from the best evaluated ones, and
    evaluates the `batch` that the predictor ranks first. The first round is `start` and draws.

    Args: encoding, score, seed, parents, start: as `evolve`.   features: candidate -> [m] numbers.   batch: evaluations a
    round.   pool: candidates ranked a round.   fit: `(features [k, m], ranks in [0, 1] [k], seed) -> predict`, default
    `forest`.   on_round: `(index, found so far)`.
    Returns: as `evolve`.
    Raises: ValueError: counts below 1, a score of the wrong shape.
    Reference: Liu et al. 2023, arXiv:2312.07243, Section 4.
    """
    _counts(rounds=rounds, batch=batch, pool=pool, parents=parents)
    rng, record, fit = np.random.default_rng(seed), _Record(score), fit or forest
    table_of = lambda cs: np.stack([np.asarray(features(c), np.float64).ravel() for c in cs])
    for r in range(rounds):
        if r == 0:
            first = {_identity(c): c for c in start}
            record.seen |= set(first)
            new = list(first.values()) + record.new(max(batch - len(first), 0), lambda: encoding.draw(rng))
        else:
            best = record.best(parents)
            bred = record.new(pool, lambda best=best: _child(rng, encoding, best, 0.2))
            ranks = np.argsort(np.argsort(record.scores, kind="stable"), kind="stable") / max(len(record.scores) - 1, 1)
            predict = fit(table_of(record.candidates), ranks, seed + r)
            new = [bred[i] for i in np.argsort(predict(table_of(bred)), kind="stable")[:batch]] if bred else []
        record.add(new)
        if on_round is not None:
            on_round(r, record.found())
    return record.found()


def forest(features: np.ndarray, ranks: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A random forest: the default predictor."""
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(n_estimators=100, random_state=seed).fit(features, ranks).predict


def _counts(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
