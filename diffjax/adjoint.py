"""Gradients by the adjoint equation: a second ODE, solved from data back to noise, in place of stored states."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.sampling import cast_rows, sample
from diffjax.solvers import heun
from diffjax.types import Denoiser, Evaluation, Key, Noise, Prediction, Solver, batched_cond


def adjoint_sample(
    key: Key, denoiser: Denoiser, solver: Solver, x: PyTree, *, backward: Solver | None = None
) -> PyTree:
    """`sample` whose reverse pass solves the adjoint ODE, with memory that does not depend on the number of steps.

    y = x / alpha,  rho = sigma / alpha:   dy/drho = eps,   da/drho = -a^T deps/dy,   dg/drho = -a^T deps/dparameters

    from a = dL/dy at the data to the noise, where a is the gradient of the start and g those of the denoiser's leaves and of the
    conditions, bound and null. In these coordinates the augmented ODE is a probability flow like any other, so that any
    deterministic table solves it. The gradient is that of the exact flow: it differs from the one of the discrete solver by
    the error of both, and is zero for the rows of the solver and for the parameters of the process.

    Args: key: not used, in the place where `sample` has it.   denoiser: stateless, its condition bound.   solver:
    deterministic, on a grid with alpha > 0 and sigma > 0.   x: [B, ...].   backward: on the reversed grid (built with
    inverse=True), default `heun`: two evaluations a step, and far closer at 50 steps than tables of one.
    Returns: x at the end of the grid.
    Raises: ValueError: a solver that draws noise, a stateful denoiser, a grid that reaches alpha = 0 or sigma = 0, or a backward
    grid with other ends.

    Example:
        >>> from diffjax import processes, solvers, testing, times
        >>> p = processes.cosine()
        >>> d, x = testing.oracle(testing.gaussian([0.0], 0.25), p), jnp.ones((1, 1))
        >>> s = solvers.heun(p, times.log_snr(p, 100, start=0.9, stop=0.05))
        >>> f = lambda x, run: run(jax.random.key(0), d, s, x).sum()
        >>> a, b = (jax.grad(f)(x, run)[0, 0] for run in (adjoint_sample, sample))
        >>> bool(abs(a / b - 1) < 1e-3)
        True

    Reference: Pan et al. 2024, arXiv:2307.10711.
    """
    if backward is None:
        backward = heun(denoiser.process, solver.grid[::-1], inverse=True)
    x = jax.tree.map(nu.state_leaf, x)
    denoiser = dataclasses.replace(denoiser, cond=batched_cond(denoiser.cond, nu.batch_size(x)))
    _check(denoiser, solver, backward, x)
    asked = jax.tree.leaves((denoiser.leaves, denoiser.cond, denoiser.null))
    parts = denoiser.leaves, denoiser.cond, denoiser.null, denoiser.process, solver, backward
    leaves, tree = jax.tree.flatten(parts)
    # host numbers stay host numbers; only JAX arrays can be asked for a gradient
    held = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    moves = {i for i, leaf in held.items() if i < len(asked) and jnp.issubdtype(leaf.dtype, jnp.inexact)}
    moving, fixed = ({i: leaf for i, leaf in held.items() if (i in moves) is kind} for kind in (True, False))

    def rebuild(moving: dict, fixed: dict) -> tuple[Denoiser, Solver, Solver]:
        """The arguments of these arrays: a custom derivative may not close over a traced one."""
        own, cond, null, process, *both = jax.tree.unflatten(
            tree, [{**moving, **fixed}.get(i, leaf) for i, leaf in enumerate(leaves)]
        )
        return Denoiser(own, process, cond, null, denoiser.init, denoiser.apply), *both

    @jax.custom_vjp
    def solve(moving: dict, fixed: dict, x: PyTree) -> PyTree:
        d, solver, _ = rebuild(moving, fixed)
        return sample(jax.random.key(0), d, solver, x)  # nothing is drawn

    def forward(moving: dict, fixed: dict, x: PyTree) -> Any:
        end = solve(moving, fixed, x)
        return end, (moving, fixed, end)

    def reverse(kept: Any, cotangent: PyTree) -> Any:
        moving, fixed, end = kept
        d, _, backward = rebuild(moving, fixed)
        process = d.process

        def augmented(outer: Any, state: Any, z: Any, t: Any, cond: Any, key: Any) -> Evaluation:
            x, a, _ = z  # a and g in units of alpha, as x is: every table multiplies all three alike
            alpha, sigma = process.alpha(t), process.sigma(t)
            eps = lambda moving, x: rebuild(moving, fixed)[0](x, t).eps
            value, pull = jax.vjp(eps, moving, x)
            g_moving, g_x = pull(nu.scale(-1 / alpha, a))
            eps = value, nu.scale(alpha, g_x), g_moving
            return Evaluation(Prediction(nu.scale(1 / alpha, nu.sub(z, nu.scale(sigma, eps))), eps), state)

        grid = jnp.asarray(backward.grid, jnp.result_type(*jax.tree.leaves(end)))
        first, last = process.alpha(grid[0]), process.alpha(grid[-1])
        start = end, nu.scale(first**2, cotangent), jax.tree.map(jnp.zeros_like, moving)
        rows = cast_rows(backward.rows, grid.dtype)
        flow = Denoiser(leaves=(), process=process, apply=augmented)
        body = lambda state, row: (backward.step(Noise(None, None), flow, (state, ()), row)[0], None)
        state = jax.lax.scan(body, backward.init(start), rows)[0]
        _, a, g = backward.read(state)
        return nu.scale(1 / last, g), None, nu.scale(1 / last**2, a)

    solve.defvjp(forward, reverse)
    return solve(moving, fixed, x)


def _check(denoiser: Denoiser, solver: Solver, backward: Solver, x: PyTree) -> None:
    if denoiser.stateful(x):
        raise ValueError("the denoiser carries a state, which no ODE describes; use sample(memory='checkpoint')")
    if any(getattr(s.rows, name, None) is not None for s in (solver, backward) for name in ("noise", "pz")):
        raise ValueError(
            "the adjoint equation is that of an ODE, and the solver draws noise; use sample(memory='checkpoint')"
        )
    if nu.namespace(denoiser.process, solver.grid, backward.grid) is not np:
        return
    ends = np.asarray(solver.grid)[[0, -1]]
    alpha, sigma = denoiser.process.alpha(ends), denoiser.process.sigma(ends)
    if not (np.all(alpha > 0) and np.all(sigma > 0)):
        raise ValueError(
            f"the adjoint equation needs alpha > 0 and sigma > 0; the grid runs from t = {ends[0]:g} to {ends[1]:g}, where "
            f"alpha = {alpha.tolist()}, sigma = {sigma.tolist()}. Use start= and stop= of times.*, or memory='checkpoint'"
        )
    if not np.allclose(np.asarray(backward.grid)[[-1, 0]], ends):
        raise ValueError(
            f"backward must run from {ends[1]:g} to {ends[0]:g}, the solver's grid reversed; got {backward.grid[0]:g} to "
            f"{backward.grid[-1]:g}"
        )
