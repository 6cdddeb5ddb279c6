"""Noise from one Brownian path per item, so that a finer grid refines the same path."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.solvers import table
from diffjax.types import Noise, Solver

PATH_STEP = nu.PRIOR_STEP - 1  # the step index whose key is that of an item's path


class PathRows(NamedTuple):
    """Rows of a table, and the part of the path that each of them may draw, in units of 2^-depth of time."""

    base: table.Rows
    low: Any  # [n] int32
    high: Any  # [n] int32, the larger

    @property
    def t(self) -> Any:
        """[n, ...] time of evaluation."""
        return self.base.t

    @property
    def accept(self) -> Any:
        """[n] bool, whether the state after a row is at the next point of the grid."""
        return self.base.accept


def brownian(solver: Solver, depth: int = 20) -> Solver:
    """The same solver with the increments of one Brownian path W per item as its noise.   z_i = (W_t - W_s) / sqrt(t - s)

    W runs over t in [0, 1] with W_0 = 0, as in the reverse SDE dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dW, and depends
    on the key and the item alone: every grid and every one-noise table sees the same path, so that solutions converge to
    one limit, path by path, as the grid is refined. The law of the samples is what it was. W is found by bisection, each
    midpoint from its two ends, on 2^depth equal parts of [0, 1] to which the grid is rounded: exactly Brownian, in no memory,
    for 2 depth normals in place of one.

    Args: solver: a table that draws at most z' (`noise`) and that once a step; padded tables too, stacked ones not.   depth:
    1 to 30.
    Returns: a solver that is not a table any more.
    Raises: ValueError: another kind of solver, a table with shared noise (one increment a step is not enough for it), a depth
    out of range, points of a concrete grid that are closer than 2^-depth.

    Example:
        >>> from diffjax import processes, solvers, times
        >>> brownian(solvers.ddim(processes.vp(), times.uniform(4), eta=1.0)).rows.high.tolist()
        [1048576, 786432, 524288, 262144]

    Reference: Li et al. 2020, arXiv:2001.01328, Section 4; Gaines and Lyons 1997.
    """
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or not 1 <= depth <= 30:
        raise ValueError(f"depth must be an int from 1 to 30; got {depth!r}")
    if not isinstance(solver.rows, table.Rows) or np.ndim(solver.rows.accept) != 1:
        raise ValueError("brownian takes one linear table, before it is stacked; got another kind of solver")
    if table.draws(solver) > 1:
        raise ValueError(
            "this table draws two normals a step, and an increment of a Brownian path is one; use a table with one, such "
            "as ddim(eta=1), reverse_diffusion or euler_maruyama"
        )
    xp, (grid,) = nu.host_float64(solver.grid)
    parts = xp.round(grid * 2**depth).astype(np.int32)
    interval = np.minimum(np.cumsum(np.append(0, table.ends_of_steps(solver)[:-1])), solver.steps - 1)
    ends = parts[interval], parts[interval + 1]
    low, high = xp.minimum(*ends), xp.maximum(*ends)
    used = np.arange(len(interval)) < (len(interval) if solver.count is None else solver.count)
    if xp is np and np.any((low == high) & used):
        t = grid[interval[np.argmax((low == high) & used)]]
        raise ValueError(f"the grid has steps shorter than 2^-{depth} at t = {t:.6g}; raise depth, at most 30")
    return dataclasses.replace(solver, rows=PathRows(solver.rows, low, high), step=PathStep(solver.step, depth))


@dataclasses.dataclass(frozen=True)
class PathStep:
    """A rule whose noise is read off a path of this depth."""

    step: Any
    depth: int

    def __call__(self, noise: Noise, denoiser: Any, carry: Any, row: PathRows) -> Any:
        """The step."""
        return self.step(PathNoise(noise, row.low, row.high, self.depth), denoiser, carry, row.base)


@pytree_dataclass
class PathNoise:
    """Noise whose one draw is the normalised increment of the path between two times."""

    noise: Noise
    low: Any
    high: Any
    depth: int = static(default=20)

    def draw(self, like: PyTree, stream: int = 1) -> PyTree:
        """`(W_high - W_low) / sqrt(high - low)`, a standard normal shaped like the state."""
        words = jax.random.wrap_key_data(self.noise.words, impl=self.noise.impl)
        keys = jax.vmap(jax.random.fold_in, (0, None))(words, PATH_STEP)
        ends = jax.vmap(lambda k: path(keys, k, like, self.depth))(jnp.stack([self.low, self.high]))
        parts = (self.high - self.low).astype(jnp.float32)
        norm = 1 / jnp.sqrt(jnp.maximum(parts, 1.0) / 2.0**self.depth)
        return jax.tree.map(lambda w: (w[1] - w[0]) * norm.astype(w.dtype), ends)


def path(keys: Any, k: Any, like: PyTree, depth: int) -> PyTree:
    """`W(k / 2^depth)` of every item, shaped like the state; W(0) = 0.   keys: [B].   k: int in [0, 2^depth].

    The interval that holds k is halved `depth` times; the normal of a midpoint is indexed by its node in the binary tree.
    """
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def halve(level: Any, found: Any) -> Any:
        left, right, node, low = found
        half = (1 << (depth - 1)) >> level  # of the interval, in parts
        # given both ends, the midpoint is normal around their mean with variance a quarter of the interval's length
        sd = jnp.exp2(-(level + 2).astype(jnp.float32) / 2)
        z = nu.item_normal(keys, node, like)
        mid = jax.tree.map(lambda a, b, e: (a + b) / 2 + sd.astype(e.dtype) * e, left, right, z)
        up = k >= low + half
        return (
            nu.tree_where(up, mid, left), nu.tree_where(up, right, mid), 2 * node + up.astype(node.dtype),
            low + jnp.where(up, half, 0),
        )  # fmt: skip

    one = nu.item_normal(keys, 0, like)
    start = (zero, one, jnp.uint32(1), jnp.int32(0))
    left, right, _, low = jax.lax.fori_loop(0, depth, halve, start)
    return nu.tree_where(k > low, right, left)  # k = 2^depth is the right end of the last part
