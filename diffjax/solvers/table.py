"""Linear solvers are tables: how the methods build them; `rows`, `stacking` and `table_files` say what a table is."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax import numerics as nu
from diffjax.solvers.rows import Registers, Rows, Start, newest, push, step, value
from diffjax.solvers.stacking import compact, draws, ends_of_steps, pad, stack
from diffjax.solvers.table_files import load_about, load_table, save_table
from diffjax.types import Process, Solver

__all__ = [
    "Nodes",
    "Registers",
    "Rows",
    "Start",
    "With",
    "build",
    "compact",
    "draws",
    "ends_of_steps",
    "interleave",
    "known",
    "load_about",
    "load_table",
    "newest",
    "nodes",
    "options",
    "pad",
    "past",
    "push",
    "save_table",
    "stack",
    "step",
    "value",
]


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
    if isinstance(grid, (list, tuple)):
        grid = nu.namespace(grid).asarray(grid)
    xp, (grid, *_) = nu.host_float64(grid, process.params, options)
    if np.ndim(grid) != 1 or grid.shape[0] < 2:
        raise ValueError(f"grid must be one axis of at least two times, [n + 1]; got shape {np.shape(grid)}")
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
                    f"{name} has a coefficient that is not finite ({field}) at t = {np.max(rows.t[bad]):.6g}: alpha, sigma or a "
                    "derivative of the process is zero or infinite there. Use a grid that stays off that end "
                    "(start= or stop= of times.*), or a method that keeps it finite, such as ddim"
                )
    init = Start(len(qx), len(qd))
    return Solver(rows=rows, grid=nodes.grid, constants=tuple(constants), init=init, step=step, read=newest)
