"""Learned solvers: the grid and the entries of a table, by gradient descent on the ends of a teacher's trajectories."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.solvers import table
from diffjax.types import Card, Denoiser, Process, Solver

ENTRIES = ("t", "px", "pd", "qx", "qd", "qn")


class Problems(NamedTuple):
    """M problems that a solver is trained on: every leaf has a leading axis [M]."""

    denoiser: Denoiser
    x: PyTree  # [M, B, ...] states at the start of the grid
    target: PyTree  # [M, B, ...] the teacher's states at its end


class Learned(NamedTuple):
    """A learned table, what it is tied to, and the training loss of every step."""

    solver: Solver
    about: dict
    losses: np.ndarray


def learn(
    build: Callable[..., Solver],
    process: Process,
    grid: Any,
    problems: Problems,
    *,
    family: str,
    free: tuple[str, ...] = ("qx", "qd", "qn"),
    free_grid: bool = True,
    steps: int = 1000,
    rate: float = 1e-2,
    batch: int | None = None,
    seed: int = 0,
    optimizer: Any = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Learned:
    """Train grid and entries of a table.   min  mean over problems of rms(sample(x) - target) / that of the table at the start

    The grid is `lam_k = lam_0 + (lam_n - lam_0) cumsum(softmax(g))_k` between fixed ends, so that it decreases in time
    whatever g is (points beyond `process.ends()` are moved there); free entries are those of `build(process, grid)` plus a
    learned offset. With no free entries the table stays the method's own. The result is built on the host in float64.

    Args: build: `(process, grid) -> Solver`, a table without noise.   process: host values.   grid: [n + 1] to begin with,
    whose ends stay.   problems: see `Problems`; the ends of a fine solver or exact flows.   family: what they are, in
    words: kept with the table.   free: of 't' (offset in lambda), 'px', 'pd', 'qx', 'qd', 'qn'.   free_grid: learn the
    grid.   steps, rate: of Adam with cosine decay, unless an optax `optimizer` is given.   batch: problems a step, default
    all.   seed: of the batches.   on_step: `(step, loss)`, every 100 steps.
    Returns: the table, and what `from_table` needs to check a process.
    Raises: ValueError: nothing free, an entry that does not exist, problems of different numbers, a loss that is not finite.
    Reference: Wang et al. 2025, arXiv:2505.21114 (steps and coefficients learned by gradient).
    """
    import optax

    if not (free or free_grid) or set(free) - set(ENTRIES):
        raise ValueError(
            f"free must name entries of {ENTRIES}, or free_grid be True; got {free}, free_grid={free_grid}"
        )
    sizes = sorted({np.shape(a)[0] for a in jax.tree.leaves((problems.x, problems.target))})
    if len(sizes) != 1:
        raise ValueError(f"problems.x and problems.target need one leading axis of problems; got {sizes}")
    grid = np.asarray(grid, np.float64)
    base = build(process, grid)
    if table.draws(base):
        raise ValueError("learn needs a table that draws no noise; build it deterministic (eta = 0)")
    params = {name: np.zeros_like(getattr(base.rows, name)) for name in free}
    if free_grid:
        params["grid"] = _increments(process, grid)
    assemble = lambda p: _assemble(build, process, grid, p)

    @jax.jit
    def update(params: PyTree, state: PyTree, some: Problems, unit: Any) -> tuple[PyTree, PyTree, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean(_errors(assemble(p), some) / unit))(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, loss

    optimizer = optimizer or optax.adam(optax.cosine_decay_schedule(rate, steps))
    units = np.maximum(jax.jit(_errors)(base, problems), 1e-6)
    params = jax.tree.map(jnp.asarray, params)
    state, rng, losses = optimizer.init(params), np.random.default_rng(seed), []
    for i in range(steps):
        some = problems, units
        if batch is not None and batch < sizes[0]:
            index = np.sort(rng.choice(sizes[0], batch, replace=False))
            some = jax.tree.map(lambda a, index=index: a[index], some)
        params, state, loss = update(params, state, *some)
        losses.append(loss)
        if on_step is not None and (i + 1) % 100 == 0:
            on_step(i + 1, float(loss))
    losses = np.asarray(jax.device_get(losses))
    if not np.isfinite(losses).all():
        raise ValueError(
            f"the loss is not finite from step {int(np.argmin(np.isfinite(losses)))} on; use a smaller rate"
        )
    solver = table.compact(assemble(jax.tree.map(lambda a: np.asarray(a, np.float64), params)))
    return Learned(solver, _about(process, solver, family), losses)


def _increments(process: Process, grid: np.ndarray) -> np.ndarray:
    """The parameters of a grid."""
    low, high = _bounds(process, grid[[0, -1]])
    lam = np.clip(process.log_snr(grid), low, high)
    return np.log(np.maximum(np.diff(lam), 1e-2))


def _bounds(process: Process, ends: Any) -> tuple[Any, Any]:
    """Between which log-SNRs the inner points lie: those of the ends, or of `process.ends()` where these are infinite."""
    data, noise = (process.log_snr(np.asarray(t, np.float64)) for t in process.ends())
    low, high = process.log_snr(ends)
    return (low if np.isfinite(low) else noise), (high if np.isfinite(high) else data)


def _assemble(build: Callable[..., Solver], process: Process, grid: Any, params: dict) -> Solver:
    """The table of these parameters: NumPy float64 if they are. Without "grid" among them the grid stays what it is."""
    xp, ends = nu.namespace(params), grid[[0, -1]]
    low, high = _bounds(process, ends)
    if "grid" in params:
        gaps = xp.exp(params["grid"] - xp.max(params["grid"]))
        lam = low + (high - low) * xp.cumsum(gaps)[:-1] / xp.sum(gaps)
        cast = lambda a: xp.asarray(a, lam.dtype)
        grid = xp.concatenate([cast(ends[:1]), process.time_of_log_snr(lam), cast(ends[1:])])
    solver = build(process, grid)
    rows, change = solver.rows, {}
    for name in params.keys() - {"grid"}:
        now, offset = getattr(rows, name), params[name]
        if name == "t":
            lam_t = process.log_snr(now)
            inside = xp.isfinite(lam_t)
            moved = process.time_of_log_snr(xp.where(inside, lam_t, low) + offset)
            change[name] = xp.where(inside, xp.clip(moved, 0.0, 1.0), now)
        else:
            change[name] = now + offset * _scale(xp, rows, name)
    return dataclasses.replace(solver, rows=rows._replace(**change))


def _scale(xp: Any, rows: Any, name: str) -> Any:
    """The size of a row's entries, so that one learning rate serves all noise levels."""
    if name in ("px", "qx"):
        return xp.maximum(xp.max(xp.abs(getattr(rows, name)), axis=1, keepdims=True), 1e-3)
    size = xp.abs(rows.qn)
    return size if name == "qn" else size[:, None]


def _errors(solver: Solver, problems: Problems) -> jax.Array:
    """Root mean square distance from the target, of every problem.   [M]"""
    import diffjax  # the driver stands above the solvers

    run = lambda d, x: diffjax.sample(jax.random.key(0), d, solver, x)
    out = jax.vmap(run)(problems.denoiser, problems.x)
    square = lambda a, b: jnp.mean((a - b) ** 2, axis=tuple(range(1, a.ndim)))
    return nu.safe_sqrt(sum(jax.tree.leaves(jax.tree.map(square, out, problems.target))))


# ------------------------------------------------------------------------------------------------- learned tables as cards


def _about(process: Process, solver: Solver, family: str) -> dict:
    grid = np.asarray(solver.grid)
    return {
        "trained on": family,
        "process": process.family.name,
        "alpha": process.alpha(grid).tolist(),
        "sigma": process.sigma(grid).tolist(),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class FixedTable:
    """A builder that returns one table, for the process and the number of steps that it was learned for."""

    solver: Solver
    about: Mapping[str, Any]

    def __call__(self, process: Process, grid: Any = None) -> Solver:
        """The table.   `grid`: None, or a grid with the same number of steps and the same ends; the table has its own."""
        own = np.asarray(self.solver.grid)
        if grid is not None and (
            np.shape(grid) != own.shape or not np.allclose(np.asarray(grid)[[0, -1]], own[[0, -1]])
        ):
            raise ValueError(
                f"this table was learned for {len(own) - 1} steps from t = {own[0]:.6g} to {own[-1]:.6g}; got a grid of shape "
                f"{np.shape(grid)} from {np.asarray(grid)[0]:.6g} to {np.asarray(grid)[-1]:.6g}. Leave the grid out"
            )
        for name, f in (("alpha", process.alpha), ("sigma", process.sigma)):
            if not np.allclose(f(own), self.about[name], rtol=1e-5, atol=1e-7):
                raise ValueError(
                    f"this table was learned for the process {self.about['process']} and its {name} on the grid; got "
                    f"{process.family.name}, whose {name} is another there"
                )
        return self.solver


def save_learned(path: str | pathlib.Path, learned: Learned) -> None:
    """Write a learned table with what it was trained on; `from_table` and `load_table` read it."""
    table.save_table(path, learned.solver, about=dict(learned.about))


def from_table(source: str | pathlib.Path | Learned) -> Card:
    """A catalogue card of a learned table, tied to its process and its number of steps.

    `solvers.CATALOGUE["mine"] = from_table("mine.npz")` puts it beside the others: by name, for the command line too.

    Args: source: a file of `save_learned`, or what `learn` returned.
    Returns: a card whose `build(process, grid)` returns the table; `grid` may be left out.
    Raises: ValueError: a file without a record of its training; `build` with another process, ends or number of steps.
    """
    if isinstance(source, Learned):
        solver, about = source.solver, source.about
    else:
        solver, about = table.load_table(source), table.load_about(source)
        if not {"trained on", "process", "alpha", "sigma"} <= set(about):
            raise ValueError(f"{source} has no record of its training; write it with save_learned")
    steps = solver.steps
    return Card(
        FixedTable(solver, about), "", f"{steps} steps learned on {about['trained on']}",
        evals=solver.evaluations / steps, flags=("learned",),
    )  # fmt: skip
