"""Tables of one shape, so that solvers of different sizes share a compilation: compact, pad and stack."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from diffjax import numerics as nu
from diffjax.solvers.rows import Rows, Start
from diffjax.types import Solver


def check_table(solver: Any, name: str) -> Solver:
    """The solver itself, if it is a table.   Raises: ValueError: it is not; `name` is what was asked of it."""
    if not isinstance(getattr(solver, "rows", None), Rows):
        kind = type(getattr(solver, "rows", solver)).__name__
        raise ValueError(f"{name} takes linear tables, whose rows are `Rows`; got a solver with rows of type {kind}")
    return solver


def real_rows(solver: Solver) -> Any:
    """How many rows of a solver are no padding."""
    return solver.evaluations if solver.count is None else solver.count


def compact(solver: Solver) -> Solver:
    """Drop the oldest registers that no row reads; for tables whose coefficients are concrete."""
    r = check_table(solver, "compact").rows
    used = lambda *cs: max((j + 1 for c in cs for j in range(c.shape[1]) if np.any(np.asarray(c[:, j]))), default=0)
    p, q = max(used(r.px, r.qx), 1), used(r.pd, r.qd)
    rows = r._replace(px=r.px[:, :p], qx=r.qx[:, :p], pd=r.pd[:, :q], qd=r.qd[:, :q])
    if rows.pz is not None and not (np.any(np.asarray(rows.pz)) or np.any(np.asarray(rows.qz))):
        rows = rows._replace(pz=None, qz=None)
    if rows.noise is not None and not np.any(np.asarray(rows.noise)):
        rows = rows._replace(noise=None)
    return dataclasses.replace(solver, rows=rows, init=Start(p, q))


def draws(solver: Solver) -> int:
    """The normals that a row of a table may draw: 0, 1 (z') or 2 (z and z')."""
    return 2 if solver.rows.pz is not None else int(solver.rows.noise is not None)


def ends_of_steps(solver: Solver) -> np.ndarray:
    """Which rows are the last of their step, on the host, [n] bool: `accept`, or if that is traced each step's last row."""
    accept = solver.rows.accept
    if not isinstance(accept, jax.core.Tracer):
        return np.asarray(accept)
    n = accept.shape[0] // solver.steps  # no row of a traced table is left out
    return np.tile(np.arange(n) == n - 1, solver.steps)


def pad(solver: Solver, rows: int, p: int | None = None, q: int | None = None, noise: int | None = None) -> Solver:
    """The same solver in a table of another shape, so that solvers of different sizes share one compilation.

    The padding rows are never run: `count` says where to stop, and the loop is a `fori_loop` without reverse mode.

    Args: rows: total rows.   p, q: state and value registers.   noise: normals that a row may draw, 0, 1 or 2 (see `draws`);
    tables with the columns for 2 share a compilation whatever they draw. Defaults are the table's own.
    Raises: ValueError: the solver is no table, or does not fit.
    """
    r = check_table(solver, "pad").rows
    n, p0, q0, drawn = r.t.shape[0], r.px.shape[1], r.pd.shape[1], draws(solver)
    p, q = p0 if p is None else p, q0 if q is None else q
    if noise not in (None, 0, 1, 2):
        raise ValueError(f"noise counts the normals that a row may draw: 0, 1 or 2; got {noise!r}")
    if rows < n or p < p0 or q < q0 or (noise is not None and noise < drawn):
        raise ValueError(
            f"a table of {n} rows, p={p0}, q={q0}, noise={drawn} does not fit into rows={rows}, p={p}, q={q}, "
            f"noise={noise}; give sizes at least as large"
        )
    xp = nu.namespace(r)
    wide = lambda c, k: xp.concatenate([c, xp.zeros((n, k - c.shape[1], *c.shape[2:]), c.dtype)], axis=1)
    zero = xp.zeros_like(r.qn)
    r = r._replace(px=wide(r.px, p), qx=wide(r.qx, p), pd=wide(r.pd, q), qd=wide(r.qd, q))
    if noise and r.noise is None:
        r = r._replace(noise=zero)
    if noise == 2 and r.pz is None:
        r = r._replace(pz=zero, qz=zero)
    extend = lambda a, m: xp.concatenate([a, xp.broadcast_to(a[-1:], (m, *a.shape[1:]))])
    return dataclasses.replace(
        solver,
        rows=jax.tree.map(lambda a: extend(a, rows - n), r),
        grid=extend(solver.grid, rows + 1 - solver.grid.shape[0]),
        count=np.int32(n) if solver.count is None else solver.count,
        init=Start(p, q),
    )


def stack(solvers: list[Solver]) -> Solver:
    """Solvers of any size as one, with a leading axis to `jax.vmap` over: `vmap(sample, (None, None, 0, None))`.

    All tables are run to the length of the longest (rows that copy fill the shorter ones), so reverse mode works.
    Tables without constants get the constants of the others, with coefficient zero.
    Raises: ValueError: no tables, or a solver that is none.
    """
    if not solvers:
        raise ValueError("stack takes at least one table; got none")
    solvers = [check_table(s, "stack") for s in solvers]
    constants = max((s.constants for s in solvers), key=len)
    solvers = [_with_constants(s, constants) for s in solvers]
    rows = max(s.evaluations for s in solvers)
    p = max(s.rows.px.shape[1] for s in solvers)
    q = max(s.rows.pd.shape[1] for s in solvers)
    noise = max(draws(s) for s in solvers)
    padded = [_idle(pad(s, rows, p, q, noise)) for s in solvers]
    xp = nu.namespace([s.rows for s in padded])

    def side_by_side(*leaves: Any) -> Any:
        rank = max(np.ndim(leaf) for leaf in leaves)
        like = np.empty((1,) * rank)
        leaves = [nu.expand(leaf, like) for leaf in leaves]  # one number a row beside one per dimension
        return xp.stack([xp.broadcast_to(leaf, np.broadcast_shapes(*(np.shape(a) for a in leaves))) for leaf in leaves])

    return jax.tree.map(side_by_side, *padded)


def _with_constants(solver: Solver, constants: tuple) -> Solver:
    """The solver with these constants after its own, which no row reads."""
    r, k = solver.rows, len(constants) - len(solver.constants)
    xp = nu.namespace(r)
    wide = lambda c: xp.concatenate([c, xp.zeros((c.shape[0], k, *c.shape[2:]), c.dtype)], axis=1)
    extra = constants[len(solver.constants) :]
    return dataclasses.replace(
        solver, rows=r._replace(pc=wide(r.pc), qc=wide(r.qc)), constants=(*solver.constants, *extra)
    )


def _idle(solver: Solver) -> Solver:
    """A padded table whose padding rows copy the newest state, so that they may be run."""
    r = solver.rows
    xp = nu.namespace(r)
    real = np.arange(r.t.shape[0]) < solver.count
    zero = lambda c: c * xp.asarray(nu.expand(real, c), c.dtype)
    first = np.arange(r.qx.shape[1]) == 0
    copies = xp.asarray(nu.expand(~real, r.qx) & nu.expand(first[None], r.qx), r.qx.dtype)
    silent = {name: None if (c := getattr(r, name)) is None else zero(c) for name in ("noise", "pz", "qz")}
    r = r._replace(
        qx=zero(r.qx) + copies, qd=zero(r.qd), qc=zero(r.qc), qn=zero(r.qn), keep=r.keep & real, accept=r.accept & real,
        **silent,
    )  # fmt: skip
    return dataclasses.replace(solver, rows=r, count=None)
