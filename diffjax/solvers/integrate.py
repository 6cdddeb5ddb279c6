"""Adaptive integration by diffrax: the probability flow in its angle, and the reverse SDE in log-SNR.

diffrax is imported on the first call.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.solvers.checks import check_number, is_zero
from diffjax.types import UNBOUND, Denoiser, Key, batched_cond

LEAST_STEP = 2.0**-14  # of the interval: what an adaptive step on a Brownian path may shrink to


class Stats(NamedTuple):
    """What an integration did; scalars, or [B] with `per_item`."""

    steps: Any  # tried
    rejected: Any
    evaluations: Any  # of the denoiser; -1 for implicit solvers, whose Newton iterations are not counted
    reached: Any  # time of the state returned: `stop`, unless throw=False and it failed


def integrate(
    key: Key | None,
    denoiser: Denoiser,
    x: PyTree,
    start: Any = 1.0,
    stop: Any = 0.0,
    *,
    solver: Any = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int | None = None,
    max_steps: int = 4096,
    adjoint: Any = None,
    eta: Any = 0.0,
    per_item: bool = False,
    items: Any = None,
    throw: bool = True,
) -> tuple[PyTree, Stats]:
    """Integrate from time start to stop with any diffrax solver; an end at data or noise is reached exactly.

    eta = 0:  dy/dtheta = (alpha eps - sigma x0) / r,  y = x / r,  r = |(alpha, sigma)|,  theta = atan(sigma / alpha)
    eta > 0:  dy = [-sin cos dy/dtheta - eta^2 sin eps] dlam + eta sqrt(2) sin dW(lam),  sin and cos of theta

    Both are free of singularities: the first is finite on the whole of [0, 1], the second, the reverse SDE with its additive
    noise, needs finite log-SNR at its ends. Encoding is `start=0.0, stop=1.0`. A stateful denoiser begins anew at every
    evaluation.

    Args: key: for eta > 0, else None will do.   x: state at `start`, a pytree of [B, ...] leaves.   solver: of diffrax, default
    `Tsit5()`, or `SRA1()` for eta > 0; `Dopri8()`, `Kvaerno5()` (implicit), `ShARK()`, `Euler()` (with `steps`).   rtol, atol: of
    the step size control.   steps: so many equal steps in place of it.   max_steps: at most so many.   adjoint: of diffrax, default
    `RecursiveCheckpointAdjoint()`.   eta: >= 0, concrete where 0 is meant.   per_item: every item alone with step sizes of its
    own, one after the other, so that nothing depends on the batch; else adaptive steps are shared by the batch.   items: [B]
    global indices that the paths are drawn from, default arange(B).   throw: raise if `stop` is not reached, else see
    `Stats.reached`.
    Returns: `(x at stop, Stats)`.
    Raises: ValueError: times outside [0, 1] or equal, integer state, condition or items of another batch size, steps that are no
    int >= 1; eta > 0 without a key, with infinite log-SNR at an end, or going up in time.
    RuntimeError, also from compiled code: max_steps exhausted, or the solver failed.

    Example:
        >>> from diffjax import processes
        >>> from diffjax.testing import gaussian, oracle
        >>> d = oracle(gaussian([0.0, 0.0], 0.25), processes.rectified())
        >>> x, stats = integrate(None, d, jnp.ones((1, 2)))
        >>> bool(abs(x - 0.5).max() < 1e-4), float(stats.reached)
        (True, 0.0)

    Reference: Song et al. 2021, arXiv:2011.13456, Eq. 6 and 13; Kidger 2021, arXiv:2202.02435.
    """
    import diffrax

    noisy = not is_zero(eta)
    _check(denoiser.process, start, stop, eta, noisy)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1):
        raise ValueError(f"steps, of equal length, must be an int >= 1, or None for adaptive steps; got {steps!r}")
    if noisy and key is None:
        raise ValueError("with eta > 0 give a key: the noise of every item is drawn from it")
    x = jax.tree.map(nu.state_leaf, x)
    solver = (diffrax.SRA1() if noisy else diffrax.Tsit5()) if solver is None else solver
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    batch, dtype, process = nu.batch_size(x), jnp.result_type(*jax.tree.leaves(x)), denoiser.process
    clock = process.log_snr if noisy else lambda t: jnp.arctan2(process.sigma(t), process.alpha(t))
    t0, t1 = (clock(jnp.asarray(t, dtype)).astype(dtype) for t in (start, stop))
    first = (t1 - t0) / steps if steps else (t1 - t0) / 100 if noisy else None
    if steps:
        control = diffrax.ConstantStepSize()
    else:  # on a path no step is shorter than what the path resolves
        least = {"dtmin": (t1 - t0) * LEAST_STEP, "force_dtmin": True} if noisy else {}
        control = diffrax.PIDController(rtol=rtol, atol=atol, **least)

    def solve(y: PyTree, cond: PyTree, keys: Any) -> tuple[Any, ...]:
        """State, time reached, steps, rejected steps and success, of one [B, ...] state."""
        terms = diffrax.ODETerm(_drift if noisy else _flow)
        if noisy:
            tolerance = (t1 - t0) / (2 * steps) if steps else (t1 - t0) * LEAST_STEP / 2
            terms = diffrax.MultiTerm(
                terms, diffrax.ControlTerm(_diffusion, _paths(solver, y, t0, t1, tolerance, keys))
            )
        sol = diffrax.diffeqsolve(
            terms, solver, t0, t1, first, y, (denoiser.bind(cond), jnp.asarray(eta, dtype)), stepsize_controller=control,
            adjoint=adjoint, max_steps=max_steps, throw=False,
        )  # fmt: skip
        counts = sol.stats["num_steps"], sol.stats["num_rejected_steps"]
        end = jax.tree.map(lambda leaf: leaf[-1], sol.ys)
        return end, sol.ts[-1], *counts, sol.result == diffrax.RESULTS.successful

    cond = None if denoiser.cond is UNBOUND else denoiser.cond
    cond = batched_cond(cond, batch)
    y = nu.scale(1 / process.radius(jnp.asarray(start, dtype)), x)
    items = nu.item_indices(items, batch)
    keys = nu.item_keys(key, items) if noisy else items  # a flow uses none
    if per_item:
        # lax.map and not vmap: under vmap every item runs as long as the slowest, and on CPUs (jaxlib 0.10.2) batches of
        # some thousand items came out differently from run to run
        alone = lambda item: solve(*jax.tree.map(lambda a: a[None], item))
        y, reached, tried, rejected, ok = jax.lax.map(alone, (y, cond, keys))
        y = jax.tree.map(lambda a: a[:, 0], y)
    else:
        y, reached, tried, rejected, ok = solve(y, cond, keys)
    back = process.time_of_log_snr if noisy else lambda theta: _time(process, theta)
    reached = jnp.where(ok, jnp.asarray(stop, dtype), back(reached).astype(dtype))
    end = nu.scale(process.radius(reached), y)
    if throw:
        end = _or_raise(end, ok, max_steps)
    return end, Stats(tried, rejected, _evaluations(solver, tried), reached)


# ------------------------------------------------------------------------------------------------- the right-hand sides


def _flow(theta: Any, y: PyTree, args: tuple[Denoiser, Any]) -> PyTree:
    """`dy/dtheta = (alpha eps - sigma x0) / r`."""
    denoiser, _ = args
    return _turn(denoiser, _time(denoiser.process, theta), y)[0]


def _drift(lam: Any, y: PyTree, args: tuple[Denoiser, Any]) -> PyTree:
    """`dy/dlam = -sin cos dy/dtheta - eta^2 sin eps`."""
    denoiser, eta = args
    v, eps = _turn(denoiser, denoiser.process.time_of_log_snr(lam).astype(lam.dtype), y)
    cosine, sine = (jnp.sqrt(jax.nn.sigmoid(side * 2 * lam)) for side in (1, -1))
    return nu.add(nu.scale(-sine * cosine, v), nu.scale(-(eta**2) * sine, eps))


def _diffusion(lam: Any, y: PyTree, args: tuple[Denoiser, Any]) -> Any:
    """`eta sqrt(2) sin(theta)` on the diagonal."""
    import lineax

    size = args[1] * jnp.sqrt(2 * jax.nn.sigmoid(-2 * lam))
    return lineax.DiagonalLinearOperator(jax.tree.map(lambda leaf: jnp.full_like(leaf, size), y))


def _turn(denoiser: Denoiser, t: Any, y: PyTree) -> tuple[PyTree, PyTree]:
    """`((alpha eps - sigma x0) / r, eps)` at time t, of the state x = r y."""
    r = denoiser.process.radius(t)
    x0, eps = denoiser(nu.scale(r, y), t)
    alpha, sigma = denoiser.process.alpha(t) / r, denoiser.process.sigma(t) / r
    return nu.sub(nu.scale(alpha, eps), nu.scale(sigma, x0)), eps


def _time(process: Any, theta: Any) -> Any:
    """The time of an angle; within rounding of an end, that end itself, where the half of the pair that an x0- or
    eps-network leaves undetermined is zero and not noise over zero.
    """
    sine, cosine = jnp.sin(theta), jnp.cos(theta)
    least = 16 * jnp.finfo(theta.dtype).eps
    data, noise = sine < least, cosine < least
    safe = lambda c: jnp.log(jnp.where(data | noise, 0.5, c))
    inside = jnp.clip(process.time_of_log_snr(safe(cosine) - safe(sine)), 0.0, 1.0).astype(theta.dtype)
    return jnp.where(data, 0.0, jnp.where(noise, 1.0, inside))


# ------------------------------------------------------------------------------------------------------------- diffrax


def _paths(solver: Any, y: PyTree, t0: Any, t1: Any, tolerance: Any, keys: Any) -> Any:
    """A Brownian path for every item, with the Levy areas that the solver asks for."""
    import diffrax

    from diffjax.solvers.item_paths import ItemPaths

    least = getattr(solver, "minimal_levy_area", diffrax.BrownianIncrement)
    kinds = (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea)
    area = next(kind for kind in kinds if issubclass(kind, least))
    shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), y)
    size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape  # of a raw key
    words = jax.vmap(lambda k: jax.random.bits(k, size, jnp.uint32))(keys)
    return ItemPaths(t0, t1, tolerance, shape, words, area)


def _evaluations(solver: Any, tried: Any) -> Any:
    """Denoiser evaluations of an explicit solver that tried so many steps."""
    import diffrax

    if isinstance(solver, diffrax.AbstractERK):
        stages, reuses = solver.tableau.num_stages, int(solver.tableau.fsal)
        return tried * (stages - reuses) + reuses  # first same as last
    if isinstance(solver, diffrax.AbstractSRK):
        return tried * (len(solver.tableau.c) + 1)
    return tried if isinstance(solver, diffrax.Euler) else jnp.full_like(tried, -1)


def _or_raise(end: PyTree, ok: Any, max_steps: int) -> PyTree:
    """The state, unless the integration failed."""
    import equinox

    return equinox.error_if(
        end, ~jnp.all(ok),
        f"integrate did not reach `stop` within max_steps={max_steps}, or the diffrax solver failed. Raise max_steps, raise rtol "
        "and atol, check the denoiser for NaN, or pass throw=False and read Stats.reached",
    )  # fmt: skip


def _check(process: Any, start: Any, stop: Any, eta: Any, noisy: bool) -> None:
    check_number("eta", eta)
    if nu.namespace(start, stop) is not np:
        return
    if not (0 <= start <= 1 and 0 <= stop <= 1 and start != stop):
        raise ValueError(f"start and stop must be two different times in [0, 1]; got {start=}, {stop=}")
    if not noisy:
        return
    if start < stop:
        raise ValueError(
            f"the reverse SDE runs from noise to data, start > stop; got {start=}, {stop=}. Encode with eta=0"
        )
    for name, t in (("start", start), ("stop", stop)):
        lam = process.log_snr(t)
        if nu.namespace(lam) is np and not math.isfinite(lam):
            low, high = (float(e) for e in process.ends())
            raise ValueError(
                f"log-SNR is infinite at {name}={t}, and with eta > 0 so is the clock of the noise; stay inside, for example "
                f"start={high:.6g}, stop={low:.6g} (process.ends()), and finish with denoiser(x, stop).x0"
            )
