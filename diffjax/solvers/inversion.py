"""Stochastic solvers as decoders: the noise that makes a stochastic solver pass through given data, and its replay.

A one-step stochastic table is x_s = m(x_t, t) + noise z. Along any path x_{t_0}, ..., x_{t_n} = x0 the residuals
r_i = x_{t_{i+1}} - m(x_{t_i}, t_i) are a code of x0: replayed, they return x0 whatever the network is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.solvers import table
from diffjax.types import Denoiser, Key, Noise, Solver, batched_cond

PATHS = ("independent", "markov")


class NoiseMap(NamedTuple):
    """The code of data under a stochastic solver.   x_s = mean + residual,  residual = noise z

    The residual is kept in place of z, because the step to sigma = 0 adds no noise and still misses the data.
    """

    start: PyTree  # [B, ...] the state at the first time of the grid
    residual: PyTree  # leaves [n, B, ...]
    z: PyTree  # leaves [n, B, ...]; zero where a row draws nothing


class ReplayRows(NamedTuple):
    """The rows of a table without its noise, and what is added instead."""

    t: Any
    accept: Any
    row: table.Rows
    residual: PyTree  # leaves [n, B, ...]


def encode(
    key: Key, denoiser: Denoiser, solver: Solver, x0: PyTree, path: str = "independent", *, items: Any = None
) -> NoiseMap:
    """The noise with which a stochastic solver returns the data `x0`.   r_i = x_{t_{i+1}} - m(x_{t_i}, t_i)

    The path is drawn around the data. 'independent': x_t = alpha_t x0 + sigma_t e_t with a fresh e_t at every time, whose z
    are large and anticorrelated and hold the layout of x0 (edit friendly). 'markov': the solver itself, run with the true
    x0 in place of the prediction, so that z is standard normal if the network is right (DPM-Encoder). After every residual
    the state is set to what the replay will have, so that rounding does not add up.

    Args: denoiser: with its condition bound.   solver: a table with one state, no kept values and one noise: `ddpm`,
    `ancestral`, `ddim` with eta > 0. A grid that begins at t < 1 keeps more of the data (the papers' T_skip).
    x0: [B, ...].   path: 'independent' or 'markov'.   items: [B] global item indices of the noise, default arange(B).
    Returns: start, residuals and z.
    Raises: ValueError: another kind of solver, unknown path, a stateful denoiser, an integer or empty x0, a condition or items of
    another batch size.

    Example:
        >>> import diffjax
        >>> from diffjax import processes, solvers, testing, times
        >>> p, key = processes.cosine(), jax.random.key(0)
        >>> d = testing.oracle(testing.gaussian([0.0, 1.0], 0.5), p)
        >>> solver, data = solvers.ddpm(p, times.uniform(20)), jnp.full((1, 2), 7.0)
        >>> code = encode(key, d, solver, data)
        >>> bool(abs(diffjax.sample(key, d, replay(solver, code), code.start) - data).max() < 1e-5)
        True

    Reference: Huberman-Spiegelglas et al. 2024, arXiv:2304.06140 (independent); Wu and De la Torre 2022, arXiv:2210.05559
    (markov).
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}; got {path!r}")
    _check(solver)
    x0 = jax.tree.map(nu.state_leaf, x0)
    dtype, batch = jnp.result_type(*jax.tree.leaves(x0)), nu.batch_size(x0)
    denoiser = dataclasses.replace(denoiser, cond=batched_cond(denoiser.cond, batch))
    if denoiser.stateful(x0):
        raise ValueError(
            "the denoiser carries a state from step to step, which a code does not hold; encode without it"
        )
    cast = lambda leaf: jnp.asarray(leaf, dtype if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else None)
    rows, grid = jax.tree.map(cast, (solver.rows, solver.grid))
    keys = nu.item_keys(key, nu.item_indices(items, batch))
    process, n = denoiser.process, solver.evaluations
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    around = lambda i, eps: nu.add(nu.scale(alpha[i], x0), nu.scale(sigma[i], eps))
    start = around(0, nu.item_normal(keys, nu.PRIOR_STEP, x0))
    silent = rows._replace(noise=None)

    def body(carry: Any, at: Any) -> Any:
        (path_state, state), (i, row, noise) = carry, at
        z = nu.item_normal(keys, i, x0)
        if path == "independent":
            target = around(i + 1, z)
        else:
            eps = nu.divide(nu.sub(path_state, nu.scale(alpha[i], x0)), sigma[i])
            d = nu.add(nu.scale(row.u[0], x0), nu.scale(row.u[1], eps))
            target = nu.add(nu.scale(row.qx[0], path_state), nu.scale(row.qn, d), nu.scale(noise, z))
        target = nu.tree_where(i == n - 1, x0, target)
        mean = _mean(denoiser, row, state)
        residual = nu.sub(target, mean)
        drawn = nu.divide(residual, noise)
        return (target, nu.add(mean, residual)), (residual, drawn)

    carry = start, start
    _, (residual, z) = jax.lax.scan(body, carry, (jnp.arange(n), silent, rows.noise))
    return NoiseMap(start, residual, z)


def replay(solver: Solver, code: NoiseMap) -> Solver:
    """The solver that adds the residuals of a code where it would have drawn noise; `sample` it from `code.start`.

    Args: solver: the one of `encode`.   code: from `encode`, or changed (shifted, flipped, rescaled).
    Returns: a solver of the same rows, for the batch of the code.
    Raises: ValueError: another kind of solver, or another number of rows.
    """
    _check(solver)
    kept = {np.shape(leaf)[0] for leaf in jax.tree.leaves(code.residual)}
    if kept != {solver.evaluations}:
        raise ValueError(f"the code has {kept} rows and the solver {solver.evaluations}; use the grid of encode")
    rows = ReplayRows(solver.rows.t, solver.rows.accept, solver.rows._replace(noise=None), code.residual)
    return dataclasses.replace(solver, rows=rows, step=step)


def step(noise: Noise, denoiser: Denoiser, carry: Any, row: ReplayRows) -> Any:
    """One row of the table without noise, plus its residual."""
    (xs, ds, cs), model_state = table.step(noise, denoiser, carry, row.row)
    return table.Registers((nu.add(xs[0], row.residual), *xs[1:]), ds, cs), model_state


def _mean(denoiser: Denoiser, row: table.Rows, x: PyTree) -> PyTree:
    return table.newest(table.step(Noise(None, None), denoiser, (table.Registers((x,), (), ()), ()), row)[0])


def _check(solver: Solver) -> None:
    r = solver.rows
    if solver.count is not None:
        raise ValueError(
            "encode and replay run every row, and a padded table has rows that are none; pass the table itself"
        )
    if solver.step is not table.step or r.noise is None or r.pz is not None or (r.px.shape[1], r.pd.shape[1]) != (1, 0):
        raise ValueError(
            "encode and replay need a stochastic one-step table (one state, no kept values, one noise): solvers.ddpm, "
            "solvers.ancestral, or solvers.ddim with eta > 0"
        )
