"""`sample`: the only loop over time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.solvers import dense
from diffjax.types import UNBOUND, Denoiser, Key, Noise, Solver, batched_cond

MEMORY = ("plain", "checkpoint", "nested", "reversible")


class Trajectory(NamedTuple):
    """The states at the points of the grid.   t: [steps + 1, ...]   x: leaves [steps + 1, B, ...]"""

    t: jax.Array
    x: PyTree


def sample(
    key: Key,
    denoiser: Denoiser,
    solver: Solver,
    x: PyTree,
    *,
    items: Any = None,
    keep: bool | Callable[[PyTree], PyTree] = False,
    on_step: Callable[..., None] | None = None,
    memory: str = "plain",
    return_state: bool = False,
) -> Any:
    """Run a solver from `x` at the first point of its grid to the last; pure, so jit, grad, vmap and shard it as you like.

    (state, model_state) <- step(noise_i, denoiser, (state, model_state), row_i)   for every row

    Args: key: one PRNG key.   denoiser: with its condition bound.   solver: rows and a rule; its rows are leaves, so
    another solver or grid of the same shape does not recompile a jitted caller.   x: state, a pytree of floating [B, ...]
    leaves (bfloat16 is raised to float32).   items: [B] global item indices that noise is drawn from, default arange(B).
    keep: True for the state at every grid point, or a function of the state that is kept instead.   on_step: host function
    `(row, rows, t)` called after every row, under jit too.   memory: for gradients; 'plain' stores every residual,
    'checkpoint' one state a step, 'nested' about 2 sqrt(n) states, 'reversible' none: the states of a reversible solver are
    computed back from the last one (not with keep, on_step or a stateful denoiser).   return_state: also return the
    denoiser's last state.
    Returns: x at the end of the grid; with `keep` a pair `(x, Trajectory)`; with `return_state` the state as last entry.
    Raises: ValueError: empty or ragged batch, integer state, condition or items of another batch size, unknown memory,
    gradients asked of a padded solver, keep with a solver that returns more than a state, memory='reversible' of a solver that
    cannot be undone in the dtype of x or with what it excludes.

    Example:
        >>> import diffjax
        >>> p = diffjax.processes.rectified()
        >>> d = diffjax.denoiser(lambda x, t: 0 * x, p, diffjax.from_x0)
        >>> solver = diffjax.solvers.ddim(p, diffjax.times.uniform(4))
        >>> float(abs(sample(jax.random.key(0), d, solver, jnp.ones((2, 3)))).max())
        0.0
    """
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {MEMORY}; got {memory!r}")
    x = jax.tree.map(nu.state_leaf, x)
    batch = nu.batch_size(x)
    items = nu.item_indices(items, batch)
    denoiser = dataclasses.replace(denoiser, cond=batched_cond(denoiser.cond, batch))
    dtype = jnp.result_type(*jax.tree.leaves(x))
    rows = cast_rows(solver.rows, dtype)
    n = solver.evaluations
    if memory == "reversible":
        _check_reversible(denoiser, solver, x, dtype, keep is not False or on_step is not None)
        end = solver.read(dense.run(denoiser, rows, solver.init(x, solver.constants)))
        return (end, ()) if return_state else end
    origin = Noise.at(nu.item_keys(key, items), jnp.zeros((), jnp.int32))

    def body(carry: Any, i: Any, row: Any) -> Any:
        solving, kept, at = carry
        solving = solver.step(dataclasses.replace(origin, step=i), denoiser, solving, row)
        if keep is not False:
            at = at + row.accept.astype(at.dtype)
            now = _kept(keep, solver.read(solving[0]))
            # a row that is not accepted writes at the next point too, where the accepted row then overwrites it
            slot = jnp.where(row.accept, at, at + 1)
            kept = jax.tree.map(lambda buffer, leaf: buffer.at[slot].set(leaf, mode="drop"), kept, now)
        if on_step is not None:
            jax.debug.callback(on_step, i + 1, n, row.t)
        return solving, kept, at

    begin, kept = solver.init(x, solver.constants), None
    if keep is not False:
        if jax.tree.structure(solver.read(begin)) != jax.tree.structure(x):
            raise ValueError(
                "this solver returns more than a state (a report), which keep cannot store at every point; sample with keep "
                "and the solver itself, without what adds to its result"
            )
        first = _kept(keep, x)
        kept = jax.tree.map(lambda leaf: jnp.zeros((solver.steps + 1, *leaf.shape), leaf.dtype).at[0].set(leaf), first)
    carry = ((begin, denoiser.init_state(x)), kept, jnp.zeros((), jnp.int32))

    if solver.count is not None:
        take = lambda i: jax.tree.map(lambda r: jax.lax.dynamic_index_in_dim(r, i, keepdims=False), rows)
        carry = jax.lax.fori_loop(0, solver.count, lambda i, c: body(c, i, take(i)), carry)
    else:
        carry = _scan(body, carry, (jnp.arange(n), rows), memory)

    (state, model_state), kept, _ = carry
    out = (solver.read(state),)
    if keep is not False:
        out += (Trajectory(cast_rows(solver.grid, dtype), kept),)
    if return_state:
        out += (model_state,)
    return out if len(out) > 1 else out[0]


def _scan(body: Callable[..., Any], carry: Any, xs: Any, memory: str) -> Any:
    """`lax.scan` of `body(carry, i, row)` that stacks nothing, under a memory policy for its reverse pass."""
    step = lambda c, ir: (body(c, *ir), None)
    if memory == "plain":
        return jax.lax.scan(step, carry, xs)[0]
    step = jax.checkpoint(step, prevent_cse=False)
    n = xs[0].shape[0]
    inner = math.isqrt(n) if memory == "nested" else n
    outer = n // inner
    if outer == 1:
        return jax.lax.scan(step, carry, xs)[0]
    head = jax.tree.map(lambda a: a[: outer * inner].reshape(outer, inner, *a.shape[1:]), xs)
    tail = jax.tree.map(lambda a: a[outer * inner :], xs)
    segment = jax.checkpoint(lambda c, part: (jax.lax.scan(step, c, part)[0], None), prevent_cse=False)
    carry = jax.lax.scan(segment, carry, head)[0]
    return jax.lax.scan(step, carry, tail)[0]


def _check_reversible(denoiser: Denoiser, solver: Solver, x: PyTree, dtype: Any, watched: bool) -> None:
    if watched:
        raise ValueError(
            "memory='reversible' stores no states: keep and on_step need another memory, such as 'checkpoint'"
        )
    if solver.count is not None:
        raise ValueError("a padded solver has no gradient; pass the table itself with memory='reversible'")
    dense.check_reversible(denoiser.process, solver, dtype)
    if denoiser.stateful(x):
        raise ValueError("the denoiser carries a state, which cannot be undone; use memory='checkpoint'")


def _kept(keep: Any, x: PyTree) -> PyTree:
    return x if keep is True else jax.tree.map(jnp.asarray, keep(x))


def cast_rows(rows: PyTree, dtype: Any) -> PyTree:
    """Rows in the state's dtype, once, before the loop; flags and integers stay what they are."""
    floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if floating(leaf) else None), rows)


def sample_chunks(
    key: Key,
    denoiser: Denoiser,
    solver: Solver,
    shape: tuple[int, ...],
    *,
    chunk: int = 256,
    on_chunk: Callable[[int, int], None] | None = None,
    run: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Draw `shape[0]` samples from the prior in chunks of one compiled size; the result does not depend on `chunk`.

    Args: shape: `(n, ...)` of all samples.   denoiser: its bound condition is None, a scalar, or has `n` items.
    chunk: items per call.   on_chunk: host function `(done, n)`.   run: compiled `(key, denoiser, solver, x, items) -> x`,
    default a jitted `sample`.
    Returns: NumPy array of `shape`.
    """
    n = shape[0]
    if n < 1 or chunk < 1:
        raise ValueError(f"n and chunk must be positive; got n={n}, chunk={chunk}")
    chunk = min(chunk, n)
    run = run or _jitted_sample
    cond = None if denoiser.cond is UNBOUND else batched_cond(denoiser.cond, n)
    parts = []
    for begin in range(0, n, chunk):
        items = np.arange(begin, begin + chunk) % n  # the last chunk wraps around, so that every call has one shape
        x = denoiser.process.prior(key, (chunk, *shape[1:]), items=jnp.asarray(items))
        bound = denoiser.bind(jax.tree.map(lambda c, items=items: c[items], cond))
        parts.append(np.asarray(run(key, bound, solver, x, jnp.asarray(items)))[: n - begin])
        if on_chunk is not None:
            on_chunk(min(begin + chunk, n), n)
    return np.concatenate(parts)


@jax.jit
def _jitted_sample(key: Key, denoiser: Denoiser, solver: Solver, x: PyTree, items: Any) -> PyTree:
    return sample(key, denoiser, solver, x, items=items)
