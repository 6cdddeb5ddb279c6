"""Linear solvers are tables: the rows, the one step that applies a row, and what can be done with tables.

row i:  y  = p_x . X + p_d . D + p_c . C + p_z z        where the network is evaluated, at t_i
        d  = u_x0 x0 + u_eps eps                         the value of this row
        x+ = q_x . X + q_d . D + q_c . C + q_z z + q_n d + noise z'
X: past states, D: past values (newest first), C: constants, z: one normal that y and x+ share, z': a second one.
x+ is pushed on X; d is pushed on D where `keep` says so. Coefficients are float64 NumPy when process and grid are.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.types import Process, Solver

FORMAT = 1  # version of a saved table
ABOUT = "about"  # the entry of a saved table that is text


class Rows(NamedTuple):
    """The coefficients of a linear solver; the leading axis of every leaf is the row, a second axis the register.

    Further axes broadcast from the left against the state: `[n, p, 1, d]` is one coefficient per dimension of a `[B, d]`.
    """

    t: Any  # [n, ...] time of evaluation
    px: Any  # [n, p, ...]
    pd: Any  # [n, q, ...]
    pc: Any  # [n, c, ...]
    u: Any  # [n, 2, ...]
    qx: Any
    qd: Any
    qc: Any
    qn: Any  # [n, ...]
    keep: Any  # [n] bool
    accept: Any  # [n] bool
    noise: Any = None  # [n, ...], or None in a table that draws no z'
    pz: Any = None  # [n, ...], or None in a table that draws no z
    qz: Any = None


class Registers(NamedTuple):
    """The state of a linear solver: past states, past values, constants; newest first."""

    x: tuple
    d: tuple
    c: tuple


@dataclasses.dataclass(frozen=True)
class Start:
    """Fill `p` state registers with the start and `q` value registers with zeros."""

    p: int
    q: int

    def __call__(self, x: PyTree, constants: tuple = ()) -> Registers:
        """The registers before the first row; constants take the dtype of the state."""
        fixed = tuple(jax.tree.map(lambda xi, c: jnp.asarray(c, xi.dtype), x, constant) for constant in constants)
        return Registers((x,) * self.p, (jax.tree.map(jnp.zeros_like, x),) * self.q, fixed)


def newest(state: Registers) -> PyTree:
    """The newest state."""
    return state.x[0]


def step(noise: Any, denoiser: Any, carry: Any, row: Rows) -> Any:
    """Apply one row; see the module docstring. `noise` is a `Noise`, or whatever has its `draw`."""
    z, d, model_state = value(noise, denoiser, carry, row)
    return push(noise, carry[0], row, z, d), model_state


def value(noise: Any, denoiser: Any, carry: Any, row: Rows) -> tuple[Any, PyTree, PyTree]:
    """The first two lines of a row: z, the value d, and the denoiser's next state."""
    (xs, ds, cs), model_state = carry
    like = xs[0]
    if row.pz is None:
        z = None
    else:
        shared = jnp.any(row.pz != 0) | jnp.any(row.qz != 0)
        z = jax.lax.cond(shared, lambda: noise.draw(like, 0), lambda: jax.tree.map(jnp.zeros_like, like))
    y = _combine((row.px, xs), (row.pd, ds), (row.pc, cs), z=(row.pz, z))
    prediction, model_state, _ = denoiser.evaluate(y, row.t, state=model_state)
    return z, nu.add(nu.scale(row.u[0], prediction.x0), nu.scale(row.u[1], prediction.eps)), model_state


def push(noise: Any, state: Registers, row: Rows, z: Any, d: PyTree) -> Registers:
    """The last line of a row: the new state and the value, pushed on their registers."""
    xs, ds, cs = state
    new = nu.add(_combine((row.qx, xs), (row.qd, ds), (row.qc, cs), z=(row.qz, z)), nu.scale(row.qn, d))
    if row.noise is not None:  # else not even the program that draws is compiled
        new = jax.lax.cond(
            jnp.any(row.noise != 0),  # a deterministic row draws nothing
            lambda x: nu.add(x, nu.scale(row.noise, noise.draw(x, 1))),
            lambda x: x,
            new,
        )
    pushed = tuple(nu.tree_where(row.keep, a, b) for a, b in zip((d, *ds[:-1]), ds, strict=True)) if ds else ()
    return Registers((new, *xs[:-1]), pushed, cs)


def _combine(*parts: tuple[Any, tuple], z: tuple[Any, Any]) -> PyTree:
    terms = [nu.scale(c[j], register) for c, registers in parts for j, register in enumerate(registers)]
    return nu.add(*terms, *([nu.scale(*z)] if z[1] is not None else []))


@dataclasses.dataclass(frozen=True)
class With:
    """A builder with some options fixed, for cards; prints and hashes by value."""

    f: Any
    options: tuple[tuple[str, Any], ...]

    def __call__(self, process: Process, grid: Any, **options: Any) -> Solver:
        """The solver."""
        return self.f(process, grid, **dict(self.options), **options)


def options(f: Any, **options: Any) -> With:
    """`f` with options fixed: the builder of a card."""
    return With(f, tuple(options.items()))


# ------------------------------------------------------------------------------------------------ building a table


class Nodes(NamedTuple):
    """A grid and the process on it, in one namespace; `t` is where a step starts, `s` where it goes.   all [n]"""

    xp: Any
    grid: Any
    t: Any
    s: Any
    alpha_t: Any
    alpha_s: Any
    sigma_t: Any
    sigma_s: Any
    lam_t: Any
    lam_s: Any
    finite: Any  # both ends of the step have finite log-SNR


def nodes(process: Process, grid: Any, inverse: bool = False, options: Any = ()) -> Nodes:
    """The process at both ends of every step of a grid; NumPy if it, the process and the `options` are host values.

    Raises: ValueError: the grid is not one axis of at least two times, is not finite, does not decrease (or, with
    `inverse`, does not increase), or leaves [0, 1].
    """
    xp, (grid, *_) = nu.host_float64(grid, process.params, options)
    if grid.ndim != 1 or grid.shape[0] < 2:
        raise ValueError(f"grid must be one axis of at least two times, [n + 1]; got shape {grid.shape}")
    if not isinstance(grid, jax.core.Tracer):
        _check_grid(np.asarray(grid, np.float64), inverse)
    alpha, sigma, lam = process.alpha(grid), process.sigma(grid), process.log_snr(grid)
    finite = xp.isfinite(lam)
    return Nodes(
        xp, grid, grid[:-1], grid[1:], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], lam[:-1], lam[1:],
        finite[:-1] & finite[1:],
    )  # fmt: skip


def _check_grid(grid: np.ndarray, inverse: bool) -> None:
    head = np.array2string(grid[:3], precision=4)
    if not np.all(np.isfinite(grid)) or grid.min() < 0 or grid.max() > 1:
        raise ValueError(f"grid must hold finite times in [0, 1], data at 0 and noise at 1; got {head} ...")
    if inverse and not np.all(np.diff(grid) > 0):
        raise ValueError(f"with inverse=True the grid must increase from data (0) to noise (1); got {head} ...")
    if not inverse and not np.all(np.diff(grid) < 0):
        raise ValueError(
            f"grid must decrease from noise (1) to data (0); got {head} .... Did you mean grid[::-1]? "
            "To run from data to noise pass inverse=True"
        )


def known(k: Nodes, order: int) -> list[Any]:
    """`known[j][i]`: whether step i may use the value j steps back: it exists and every lambda up to there is finite.

    A step that ends at infinite lambda is first order, because a polynomial cannot be extrapolated to there.
    """
    n = k.t.shape[0]
    ok, use = k.xp.isfinite(k.lam_t), [k.xp.asarray(np.ones(n, bool)), k.finite]
    for j in range(1, order):
        back = k.xp.concatenate([k.xp.asarray(np.zeros(min(j, n), bool)), ok[: max(n - j, 0)]])
        use.append(use[-1] & back)
    return [use[0], *use[2:]]


def past(k: Nodes, column: Any, j: int, fill: Any) -> Any:
    """`column[i - j]`, with `fill` before the first row."""
    n = column.shape[0]
    head = k.xp.broadcast_to(k.xp.asarray(fill, column.dtype), (min(j, n),))
    return k.xp.concatenate([head, column[: max(n - j, 0)]])


def interleave(xp: Any, *stages: Any) -> Any:
    """Rows a0 b0 ... a1 b1 ... of k arrays [n, ...]: the stages of every step.   [k n, ...]"""
    rows = xp.stack([xp.asarray(s) for s in stages], axis=1)
    return rows.reshape((-1, *rows.shape[2:]))


def build(
    name: str,
    nodes: Nodes,
    *,
    t: Any = None,
    px: Any = None,
    pd: Any = (),
    u: Any,
    qx: Any,
    qd: Any = (),
    qn: Any,
    noise: Any = None,
    keep: Any = True,
    accept: Any = True,
    pz: Any = None,
    qz: Any = None,
    skip: Any = None,
    pc: Any = (),
    qc: Any = (),
    constants: tuple = (),
) -> Solver:
    """A solver from columns; each is `[n]`, a number for all rows, or a tuple of such, one per register.

    A column may also be `[n, 1, *dims]`, one number per row and dimension. Columns that are left out are zero (noise
    columns: absent), `px` evaluates at the newest state, `t` at the start of each step. `skip` marks rows that only copy
    the newest state: they are removed when the table is concrete.
    Raises: ValueError: a coefficient is not finite, naming the method and the time.
    """
    xp = nodes.xp
    t = nodes.t if t is None else t
    n = t.shape[0]
    flag = lambda c: np.broadcast_to(c, (n,)) if isinstance(c, (bool, np.ndarray)) else c

    def registers(cs: Any) -> Any:
        """Columns side by side, [n, k, ...]; those of one number a row are repeated where others are per dimension."""
        cs = [xp.asarray(c, t.dtype) for c in cs]
        dims = np.broadcast_shapes(*(c.shape[1:] for c in cs))
        full = [xp.broadcast_to(nu.expand(c, np.empty((n, *dims))), (n, *dims)) for c in cs]
        return xp.stack(full, axis=1) if cs else xp.zeros((n, 0), t.dtype)

    column = lambda c: registers((c,))[:, 0]
    px = (1.0, *(0.0,) * (len(qx) - 1)) if px is None else px
    pd, pc, qc = pd or (0.0,) * len(qd), pc or (0.0,) * len(constants), qc or (0.0,) * len(constants)
    rows = Rows(
        t, registers(px), registers(pd), registers(pc), registers(u), registers(qx), registers(qd), registers(qc),
        column(qn), flag(keep), flag(accept), *(None if c is None else column(c) for c in (noise, pz, qz)),
    )  # fmt: skip
    if xp is np:
        if skip is not None:
            rows = jax.tree.map(lambda r: r[~skip], rows)
        for field, leaf in zip(Rows._fields, rows, strict=True):
            if leaf is not None and not np.all(np.isfinite(leaf)):
                bad = np.flatnonzero(~np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1))[0]
                raise ValueError(
                    f"{name} has a coefficient that is not finite ({field}) at t = {rows.t[bad]:.6g}: alpha, sigma or a "
                    "derivative of the process is zero or infinite there. Use a grid that stays off that end "
                    "(start= or stop= of times.*), or a method that keeps it finite, such as ddim"
                )
    init = Start(len(qx), len(qd))
    return Solver(rows=rows, grid=nodes.grid, constants=tuple(constants), init=init, step=step, read=newest)


# --------------------------------------------------------------------------------------------- tables as values


def compact(solver: Solver) -> Solver:
    """Drop the oldest registers that no row reads; for tables whose coefficients are concrete."""
    r = solver.rows
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
    Raises: ValueError: the table does not fit.
    """
    r = solver.rows
    n, p0, q0, drawn = r.t.shape[0], r.px.shape[1], r.pd.shape[1], draws(solver)
    p, q = p or p0, q0 if q is None else q
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
    count = n if solver.count is None else solver.count
    return dataclasses.replace(
        solver,
        rows=jax.tree.map(lambda a: extend(a, rows - n), r),
        grid=extend(solver.grid, rows + 1 - solver.grid.shape[0]),
        count=np.int32(count),
        init=Start(p, q),
    )


def stack(solvers: list[Solver]) -> Solver:
    """Solvers of any size as one, with a leading axis to `jax.vmap` over: `vmap(sample, (None, None, 0, None))`.

    All tables are run to the length of the longest (rows that copy fill the shorter ones), so reverse mode works.
    Tables without constants get the constants of the others, with coefficient zero.
    """
    constants = max((s.constants for s in solvers), key=len)
    solvers = [_with_constants(s, constants) for s in solvers]
    rows = max(s.evaluations for s in solvers)
    p = max(s.rows.px.shape[1] for s in solvers)
    q = max(s.rows.pd.shape[1] for s in solvers)
    noise = max(draws(s) for s in solvers)
    padded = [_idle(pad(s, rows, p, q, noise), s.evaluations) for s in solvers]
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


def _idle(solver: Solver, n: int) -> Solver:
    """Padding rows that copy the newest state, so that they may be run."""
    r = solver.rows
    xp = nu.namespace(r)
    real = np.arange(r.t.shape[0]) < n
    zero = lambda c: c * xp.asarray(expand_rows(real, c), c.dtype)
    first = np.zeros(r.qx.shape[1])
    first[0] = 1.0
    copies = xp.asarray(expand_rows(~real, r.qx) * expand_rows(first[None], r.qx), r.qx.dtype)
    silent = {name: None if (c := getattr(r, name)) is None else zero(c) for name in ("noise", "pz", "qz")}
    r = r._replace(
        qx=zero(r.qx) + copies, qd=zero(r.qd), qc=zero(r.qc), qn=zero(r.qn), keep=r.keep & real, accept=r.accept & real,
        **silent,
    )  # fmt: skip
    return dataclasses.replace(solver, rows=r, count=None)


def expand_rows(a: Any, like: Any) -> Any:
    """`a` with trailing axes of length one until it has the rank of `like`."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def save_table(path: str | pathlib.Path, solver: Solver, about: Mapping[str, Any] | None = None) -> None:
    """Write a table as `.npz`, float64: its format version, its constants, which must be single arrays, and what is to be
    known `about` it, as JSON.
    """
    arrays = {k: np.asarray(v) for k, v in solver.rows._asdict().items() if v is not None}
    arrays |= {f"constant_{i}": np.asarray(c) for i, c in enumerate(solver.constants)}
    text = {} if about is None else {ABOUT: np.asarray(json.dumps(dict(about)))}
    with open(path, "wb") as f:  # np.savez would add a suffix to a path without one
        np.savez(f, format=FORMAT, grid=np.asarray(solver.grid), **arrays, **text)


def load_about(path: str | pathlib.Path) -> dict[str, Any]:
    """What `save_table` was told about a table; empty if nothing.   Raises: ValueError: as `load_table`."""
    text = _read(path).get(ABOUT)
    return {} if text is None else json.loads(str(text))


def load_table(path: str | pathlib.Path) -> Solver:
    """Read a table written by `save_table`.

    Raises: ValueError: not a table, or written by a newer version of diffjax.
    """
    arrays = _read(path)
    arrays.pop(ABOUT, None)
    grid = arrays.pop("grid")
    constants = tuple(arrays.pop(f"constant_{i}") for i in range(arrays["pc"].shape[1]) if f"constant_{i}" in arrays)
    rows = Rows(**arrays)
    init = Start(rows.px.shape[1], rows.pd.shape[1])
    return Solver(rows=rows, grid=grid, constants=constants, init=init, step=step, read=newest)


def _read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a saved table, without its version."""
    try:
        with np.load(path, allow_pickle=False) as f:
            arrays = dict(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is not a solver table written by save_table: {e}") from e
    version = int(arrays.pop("format", -1))
    if version < 0 or "qn" not in arrays:
        raise ValueError(f"{path} is not a solver table written by save_table; it holds {sorted(arrays)}")
    if version > FORMAT:
        raise ValueError(f"{path} has table format {version}; this diffjax reads up to {FORMAT}. Upgrade diffjax")
    return arrays
