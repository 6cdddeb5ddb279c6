"""Exactly reversible tables: dense rows on a few state registers, their inverse, and gradients that store no states.

row i:  y  = P_i R                  where the network is evaluated, at t_i
        d  = u_x0 x0 + u_eps eps    the value of this row
        R+ = A_i R + b_i d          R: r state registers
A row can be undone without solving an equation if and only if A is invertible and P A^-1 b = 0: then y = P A^-1 R+ is known
from the state after the row, so R = A^-1 (R+ - b d). The undone rows are a table again. In floating point an undone run
multiplies rounding errors by its `amplification`; where a table is to be undone, one that would lose all digits is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.types import Process, Solver

LIMIT = 1e-3  # the largest relative error of an undone run: amplification times the rounding unit


class DenseRows(NamedTuple):
    """The coefficients of a reversible solver; the leading axis of every leaf is the row."""

    t: Any  # [n] time of evaluation
    p: Any  # [n, r]
    u: Any  # [n, 2]
    a: Any  # [n, r, r]
    b: Any  # [n, r]
    accept: Any  # [n] bool


@dataclasses.dataclass(frozen=True)
class Copies:
    """Fill r registers with the start."""

    r: int

    def __call__(self, x: PyTree, constants: tuple = ()) -> tuple:
        """The registers before the first row."""
        return (x,) * self.r


def first(registers: tuple) -> PyTree:
    """The register that is read: the newest state, or the first of a coupled pair."""
    return registers[0]


def given(registers: tuple, constants: tuple = ()) -> tuple:
    """The registers themselves as the start, see `exposed`."""
    return tuple(registers)


def combine(coefficients: Any, registers: tuple) -> PyTree:
    """`sum_j c_j R_j`."""
    return nu.add(*(nu.scale(coefficients[j], register) for j, register in enumerate(registers)))


def update(a: Any, b: Any, registers: tuple, d: PyTree) -> tuple:
    """`A R + b d`."""
    return tuple(nu.add(combine(a[j], registers), nu.scale(b[j], d)) for j in range(len(registers)))


def value(u: Any, prediction: Any) -> PyTree:
    """`u_x0 x0 + u_eps eps`."""
    return nu.add(nu.scale(u[0], prediction.x0), nu.scale(u[1], prediction.eps))


def step(noise: Any, denoiser: Any, carry: Any, row: DenseRows) -> Any:
    """Apply one row; see the module docstring."""
    registers, model_state = carry
    prediction, model_state, _ = denoiser.evaluate(combine(row.p, registers), row.t, state=model_state)
    return update(row.a, row.b, registers, value(row.u, prediction)), model_state


# ----------------------------------------------------------------------------------------------- checks and inverse


def is_reversible(solver: Solver) -> bool:
    """Whether a solver is a table of this file; the property is static, so it holds under jit too."""
    return solver.step is step


def amplification(process: Process, solver: Solver) -> float:
    """The largest factor by which undoing a stretch of rows multiplies an error, for standard normal data.

    max over i <= j of | A_i^-1 ... A_j^-1 |, with A the matrix of a whole row: d is linear in y for standard normal data,
    x0 = alpha y / (alpha^2 + sigma^2), eps = sigma y / (alpha^2 + sigma^2), and states are measured in units of
    sqrt(alpha^2 + sigma^2). EDICT with mixing p has about p^{-2N} alpha_start / alpha_end. Data with sharp modes add to it.
    """
    rows = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), solver.rows)
    alpha, sigma = (np.asarray(f(rows.t), np.float64) for f in (process.alpha, process.sigma))
    power = alpha**2 + sigma**2
    gain = (rows.u[:, 0] * alpha + rows.u[:, 1] * sigma) / power
    whole = rows.a + gain[:, None, None] * rows.b[:, :, None] * rows.p[:, None, :]
    end = float(np.asarray(solver.grid)[-1])
    unit = np.append(np.sqrt(power), np.hypot(process.alpha(end), process.sigma(end)))
    undo = np.linalg.inv(whole) * (unit[1:] / unit[:-1])[:, None, None]
    worst, products = 1.0, np.zeros((0, *undo.shape[1:]))
    with np.errstate(over="ignore", invalid="ignore"):
        for matrix in undo[::-1]:
            products = matrix @ np.concatenate([products, np.eye(len(matrix))[None]])
            worst = max(worst, float(np.nan_to_num(np.abs(products).sum(-1).max(), nan=np.inf)))
    return worst


def check_reversible(process: Process, solver: Solver, dtype: Any = None) -> None:
    """Refuse a solver that cannot be undone exactly.   A invertible,  P A^-1 b = 0,  amplification * eps(dtype) <= 1e-3

    The amplification is no fault of the table: it may be sampled with, and only what undoes it (`sample(memory='reversible')`,
    the builders with inverse=True) calls this. Call it before sampling with `invert(solver)`.

    Args: process: of the denoiser.   solver: any; the coefficients are checked where they are concrete.   dtype: of the
    state, default the default float.
    Raises: ValueError: not a reversible table, a row that cannot be undone, or an amplification too large for the dtype.
    """
    check_algebra(solver)
    if nu.namespace(solver, process) is not np:
        return
    dtype = jnp.result_type(float) if dtype is None else dtype
    grown, unit = amplification(process, solver), float(jnp.finfo(dtype).eps)
    if not grown * unit <= LIMIT:
        raise ValueError(
            f"undoing this table multiplies rounding errors by {grown:.2g}, which {np.dtype(dtype).name} with {unit:.1g} "
            f"cannot hold (limit {LIMIT / unit:.1g}). Take mixing or gamma closer to 1 or fewer steps (mixing^(-2 steps), "
            "gamma^(-steps)), o_belm(value=V) on a grid of nearly equal angles, or float64"
        )


def check_algebra(solver: Solver) -> None:
    """The exact part of `check_reversible`, which needs neither process nor dtype."""
    if not is_reversible(solver):
        raise ValueError(
            "the solver is not exactly reversible: its state before a row cannot be computed from the one after it. Use "
            "solvers.edict, solvers.bdia or solvers.o_belm, or memory='checkpoint', which works for every solver"
        )
    if nu.namespace(solver) is not np:
        return
    rows = solver.rows
    scale = np.abs(rows.a).max(axis=(1, 2))
    singular = ~(np.abs(np.linalg.det(rows.a)) > 1e-12 * scale ** rows.a.shape[-1])
    if singular.any():
        i = int(np.flatnonzero(singular)[0])
        raise ValueError(
            f"row {i} of the table cannot be undone: its matrix A = {rows.a[i].tolist()} is singular. Keep the oldest state "
            "in every row: gamma or mixing > 0, no step from alpha = 0 to sigma = 0"
        )
    leak = np.einsum("ni,nij,nj->n", rows.p, np.linalg.inv(rows.a), rows.b)
    if not np.all(np.abs(leak) <= 1e-10 * (1 + np.abs(rows.b).max(axis=1))):
        i = int(np.argmax(np.abs(leak)))
        raise ValueError(
            f"row {i} of the table cannot be undone explicitly: P A^-1 b = {leak[i]:.3g}, not 0, so the network would have to "
            "be evaluated at the state that is sought"
        )


def invert(solver: Solver) -> Solver:
    """The table that undoes a reversible run, from its end to its start.   P' = P A^-1,  A' = A^-1,  b' = -A^-1 b

    All registers of the end must be given for the exact start, see `exposed`; from one state, such as an image, every
    register starts as its copy. `invert(invert(solver))` is `solver` up to rounding. A run of the inverse multiplies rounding
    errors by the `amplification` of `solver`, which is checked by `check_reversible` and not here.

    Args: solver: from `edict`, `bdia` or `o_belm`.
    Returns: a table of as many rows on the reversed grid.
    Raises: ValueError: the solver is no reversible table.

    Example:
        >>> from diffjax import processes, solvers, times
        >>> s = solvers.edict(processes.vp(), times.uniform(10))
        >>> bool(np.allclose(invert(invert(s)).rows.a, s.rows.a))
        True
    """
    if not is_reversible(solver):
        raise ValueError(
            "only a reversible table can be inverted; got another solver. Use solvers.edict, bdia or o_belm"
        )
    r, xp = solver.rows, nu.namespace(solver.rows)
    back = xp.linalg.inv(r.a)
    # a row is undone up to the state before it, which is at a grid point if the row before it was accepted
    accept = xp.concatenate([xp.ones_like(r.accept[:1]), r.accept[:-1]])
    rows = DenseRows(
        r.t, xp.einsum("ni,nij->nj", r.p, back), r.u, back, -xp.einsum("nij,nj->ni", back, r.b), accept
    )  # fmt: skip
    return dataclasses.replace(solver, rows=jax.tree.map(lambda leaf: leaf[::-1], rows), grid=solver.grid[::-1])


def exposed(solver: Solver) -> Solver:
    """The same table, started from and read as the tuple of its registers, which is what an exact round trip needs.

    Example:
        >>> import diffjax
        >>> from diffjax import processes, solvers, testing, times
        >>> p, key = processes.cosine(), jax.random.key(0)
        >>> d = testing.oracle(testing.gaussian([0.0, 1.0], 0.5), p)
        >>> inverse = solvers.bdia(p, times.uniform(20, stop=0.01)[::-1], inverse=True)
        >>> image = jnp.ones((1, 2))
        >>> pair = diffjax.sample(key, d, exposed(inverse), (image, image))
        >>> back, _ = diffjax.sample(key, d, exposed(invert(inverse)), pair)
        >>> bool(abs(back - image).max() < 1e-5)
        True
    """
    return dataclasses.replace(solver, init=given, read=tuple)


# ---------------------------------------------------------------------------------------------------------- gradients


def run(denoiser: Any, rows: DenseRows, registers: tuple) -> tuple:
    """All rows in turn; the reverse pass computes the states back from the last one, so that its memory does not grow with n.

    With c the cotangent of R+ and y = P A^-1 R+ evaluated once more:   c_d = b . c,   c_R = A^T c + P^T (dd/dy)^T c_d

    Args: denoiser: stateless, its condition bound.   rows: in the dtype of the state.   registers: the start.
    Returns: the registers at the end; differentiable in the denoiser's arrays, the rows and the registers.
    """
    leaves, tree = jax.tree.flatten(denoiser)
    # host numbers stay host numbers; only JAX arrays can be asked for a gradient
    held = {i: jnp.issubdtype(leaf.dtype, jnp.inexact) for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def rebuild(moving: dict, fixed: dict) -> Any:
        return jax.tree.unflatten(tree, [{**moving, **fixed}.get(i, leaf) for i, leaf in enumerate(leaves)])

    @jax.custom_vjp
    def solve(moving: dict, fixed: dict, rows: DenseRows, registers: tuple) -> tuple:
        d = rebuild(moving, fixed)
        return jax.lax.scan(lambda r, row: (step(None, d, (r, ()), row)[0], None), registers, rows)[0]

    def forward(moving: dict, fixed: dict, rows: DenseRows, registers: tuple) -> tuple:
        end = solve(moving, fixed, rows, registers)
        return end, (moving, fixed, rows, end)

    def backward(kept: tuple, cotangent: tuple) -> tuple:
        moving, fixed, rows, end = kept

        def evaluate(moving: dict, t: Any, u: Any, y: PyTree) -> PyTree:
            return value(u, rebuild(moving, fixed).evaluate(y, t, state=()).prediction)

        def body(carry: tuple, at: tuple) -> tuple:
            after, c_after, total = carry
            row, inverse = at
            d, pull = jax.vjp(evaluate, moving, row.t, row.u, combine(row.p @ inverse, after))
            before = update(inverse, -(inverse @ row.b), after, d)
            c_a, c_b, c_before, c_d = jax.vjp(update, row.a, row.b, before, d)[1](c_after)
            c_moving, c_t, c_u, c_y = pull(c_d)
            c_p, through = jax.vjp(combine, row.p, before)[1](c_y)
            carry = before, nu.add(c_before, through), nu.add(total, c_moving)
            return carry, DenseRows(c_t, c_p, c_u, c_a, c_b, None)

        start = end, cotangent, jax.tree.map(jnp.zeros_like, moving)
        carry, c_rows = jax.lax.scan(body, start, (rows, jnp.linalg.inv(rows.a)), reverse=True)
        return carry[2], None, c_rows, carry[1]

    solve.defvjp(forward, backward)
    moving, fixed = ({i: leaves[i] for i, inexact in held.items() if inexact is kind} for kind in (True, False))
    return solve(moving, fixed, rows._replace(accept=None), registers)
