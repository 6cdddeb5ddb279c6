"""`sample_parallel`: the steps of a sampler at once, by Picard iteration over a window that slides to the end.

A table is linear in all but the slope v / r of the denoiser, v = alpha eps - sigma x0, r^2 = alpha^2 + sigma^2. So guess the
points where the network is evaluated, evaluate it at all of them in one batch, run the table with these slopes held fixed,
and repeat from the new points: what is found is what `sample` finds, in fewer calls one after the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.prediction import from_v, to_v
from diffjax.sampling import cast_rows
from diffjax.solvers import table
from diffjax.types import Cond, Denoiser, Evaluation, Key, Noise, Process, Solver, batched_cond


def _slope(d: Denoiser, x: PyTree, t: PyTree) -> PyTree:
    """`v / r = dy / dtheta` of a denoiser, bounded at both ends (see `likelihood`)."""
    return nu.divide(to_v(d.evaluate(x, t).prediction, d.process, t), d.process.radius(t))


def _held(d: Denoiser, state: Any, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    """A denoiser that returns the slope it holds; its new state is the point where it was asked."""
    return Evaluation(from_v(nu.scale(d.process.radius(t), d.leaves), x, d.process, t), x)


def sample_parallel(
    key: Key,
    denoiser: Denoiser,
    solver: Solver,
    x: PyTree,
    *,
    window: int,
    tolerance: Any = 0.1,
    items: Any = None,
    sharding: Any = None,
) -> tuple[PyTree, jax.Array]:
    """`sample` with `window` evaluations at a time; any table, stochastic ones too, whose noise is fixed beforehand.

    d_j <- slope(y_j) for all j in the window;   y' <- points of the table with these d;   the window moves up to the first j
    whose point moved too far:   mean |y'_j - y_j|^2 > tolerance^2 sigma_j^2 (1 - e^{2 (lam_before - lam_j)})

    The bound is the variance that the ancestral sampler draws there. The first point of the window never moves, so that at
    most as many iterations are made as the table has rows, and with `tolerance = 0` the result is that of `sample`.

    Args: key, denoiser, x, items: as `sample`, the denoiser without state of its own.   solver: a table.   window: rows in
    flight, >= 1; the denoiser is mapped over them.   tolerance: >= 0, the worst item of the batch decides.   sharding: of the
    states [window, B, ...] that the denoiser gets, to spread the window over devices.
    Returns: `(x at the end of the grid, iterations)`: the calls of the denoiser one after the other. Not differentiable in
    reverse mode.
    Raises: ValueError: a solver that is not a table, a denoiser with state, a window that is not an int >= 1, a negative
    tolerance, and what `sample` raises.

    Example:
        >>> from diffjax import processes, solvers, testing, times
        >>> p = processes.cosine()
        >>> d = testing.oracle(testing.gaussian([1.0, 1.0], 1.0), p)
        >>> x, calls = sample_parallel(
        ...     jax.random.key(0), d, solvers.ddim(p, times.uniform(64)), jnp.ones((1, 2)), window=64
        ... )
        >>> bool(calls < 16)
        True

    Reference: Shih et al. 2023, arXiv:2305.16317, Algorithm 1 (for one-step tables on a variance-preserving process).
    """
    _check(solver, window, tolerance)
    x = jax.tree.map(nu.state_leaf, x)
    batch = nu.batch_size(x)
    items = nu.item_indices(items, batch)
    denoiser = dataclasses.replace(denoiser, cond=batched_cond(denoiser.cond, batch))
    if denoiser.stateful(x):
        raise ValueError(
            "the denoiser carries state from step to step (a cache, a momentum), and steps are taken at once here; use sample"
        )
    dtype, process = jnp.result_type(*jax.tree.leaves(x)), denoiser.process
    n = solver.evaluations
    window = min(window, n)
    # idle rows behind the last one, so that every window has the same size
    behind = lambda a: jnp.concatenate([a, jnp.broadcast_to(a[-1:], (window, *a.shape[1:]))])
    rows, bound = jax.tree.map(
        lambda a: behind(cast_rows(a, dtype)), (solver.rows, tolerance * _spread(process, solver))
    )
    cut = lambda tree, i: jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, window), tree)
    place = jnp.arange(window)
    last = n if solver.count is None else solver.count
    origin = Noise.at(nu.item_keys(key, items), jnp.zeros((), jnp.int32))

    def evaluate(y: PyTree, t: Any) -> PyTree:
        """The slopes at all points [window, B, ...], in one call."""
        if sharding is not None:
            y = jax.lax.with_sharding_constraint(y, sharding)
        return jax.vmap(lambda y, t: _slope(denoiser, y, t))(y, t)

    def run(registers: Any, slopes: PyTree, base: Any) -> tuple[PyTree, PyTree]:
        """The table from row `base` with the slopes held.   Returns: its points, and the registers after every row."""

        def step(state: Any, args: Any) -> tuple[Any, Any]:
            i, slope, row = args
            held = Denoiser(leaves=slope, process=process, apply=_held)
            noise = dataclasses.replace(origin, step=jnp.minimum(i, n - 1))
            new, y = solver.step(noise, held, (state, state.x[0]), row)
            new = nu.tree_where(i < last, new, state)
            return new, (y, new)

        return jax.lax.scan(step, registers, (base + place, slopes, cut(rows, base)))[1]

    def iterate(carry: Any) -> Any:
        base, registers, y, count = carry
        slopes = evaluate(y, cut(rows.t, base))
        points, after = run(registers, slopes, base)
        moved = jax.tree.leaves(jax.tree.map(lambda a, b: _mean_square(a - b), points, y))
        moved = jnp.max(jnp.stack(moved), axis=(0, 2))  # [window]: the worst leaf and item
        stuck = (moved > cut(bound, base) ** 2) & (place > 0) & (base + place < last)
        stride = jnp.where(jnp.any(stuck), jnp.argmax(stuck), window)
        # what was found is kept; rows that enter the window go on with the last slope
        registers = jax.tree.map(lambda a: a[stride - 1], after)
        slopes = jax.tree.map(lambda a: a[jnp.minimum(place + stride, window - 1)], slopes)
        y, _ = run(registers, slopes, base + stride)
        return base + stride, registers, y, count + 1

    registers = solver.init(x, solver.constants)
    y, _ = run(registers, jax.tree.map(lambda a: jnp.zeros((window, *a.shape), a.dtype), x), 0)
    zero = jnp.zeros((), jnp.int32)
    _, registers, _, count = jax.lax.while_loop(lambda c: c[0] < last, iterate, (zero, registers, y, zero))
    return solver.read(registers), count


def _mean_square(a: jax.Array) -> jax.Array:
    return jnp.square(a).reshape(*a.shape[:2], -1).mean(-1)


def _spread(process: Process, solver: Solver) -> Any:
    """The deviation that the ancestral sampler draws when it enters the step of a row, [n]."""
    xp, (grid, *_) = nu.host_float64(solver.grid, process.params)
    lam = process.log_snr(grid)
    gap = xp.abs(lam[1:] - lam[:-1])
    enters = process.sigma(grid[1:]) * nu.safe_sqrt(-xp.expm1(-2 * gap), xp)
    accept = solver.rows.accept
    step = accept.astype(int).cumsum() - accept.astype(int)  # accepted rows before this one
    return enters[(step - 1).clip(0, enters.shape[0] - 1)]


def _check(solver: Solver, window: Any, tolerance: Any) -> None:
    if solver.step is not table.step:
        raise ValueError(
            "only a table can be run in parallel: its steps are linear in what the denoiser returns. This solver has a step "
            "of its own; use sample"
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be an int >= 1, the rows that are evaluated at once; got {window!r}")
    if nu.namespace(tolerance) is np and not float(tolerance) >= 0:
        raise ValueError(f"tolerance must be >= 0; got {tolerance}")
