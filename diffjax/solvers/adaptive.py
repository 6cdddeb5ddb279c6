"""DPM-Solver with adaptive steps: two orders that share their evaluations, and a controller of the step in lambda."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.solvers import table
from diffjax.solvers.checks import check_integer, check_number
from diffjax.solvers.singlestep import stage_weights
from diffjax.types import Card, Noise, Process, Solver

FRACTIONS = {2: (1 / 2,), 3: (1 / 3, 2 / 3)}
BOUND = 10.0  # on the gains of the controller
JUMP = -1  # a row that is one first-order step to its time


class Attempts(NamedTuple):
    """Rows: every one is an evaluation, `stage` 0, 1, ... of an attempt, or a jump to time t."""

    t: Any  # [n]
    stage: Any  # [n] int
    accept: Any  # [n] bool: the last row only


class Settings(NamedTuple):
    """What a trajectory is run with; `along` is lambda times the direction of time, so that it always increases."""

    process: Process
    begin: Any  # time, after the first jump
    end: Any  # time, before the last jump
    along_begin: Any
    along_end: Any
    direction: Any  # 1 to data, -1 to noise
    rtol: Any
    atol: Any
    h_init: Any
    safety: Any
    gains: Any  # exponents of the last three errors


class Progress(NamedTuple):
    """The state: where the trajectory is, the values of the present attempt, and the controller."""

    x: PyTree
    values: tuple
    t: Any
    along: Any
    h: Any  # > 0, never past the end
    errors: tuple  # of the last two accepted attempts
    evaluations: Any
    accepted: Any
    rejected: Any
    settings: Settings


class Report(NamedTuple):
    """How a trajectory went; see `reported`."""

    reached: Any  # bool: the end was reached in steps that met the tolerance
    evaluations: Any
    accepted: Any
    rejected: Any
    log_snr: Any  # reached by these steps


def dpm_adaptive(
    process: Process,
    grid: Any,
    order: int = 3,
    *,
    rtol: Any = 0.05,
    atol: Any = 0.0078,
    h_init: Any = 0.05,
    safety: Any = 0.9,
    gains: tuple[Any, Any, Any] = (0.0, 1.0, 0.0),
    max_evaluations: int = 300,
    inverse: bool = False,
) -> Solver:
    """DPM-Solver-12 (order 2) or -23 (order 3), in steps whose length is adapted to an error.

    E = rms((x_high - x_low) / max(atol, rtol max(|x_low|, |x|))) over batch and entries; the step to x_high is accepted if
    E <= 1, and h <- h (1 + atan(f - 1)),  f = safety E_0^{-(P + I + D) / order} E_1^{(P + 2 D) / order} E_2^{-D / order}

    E_1 and E_2 are the errors of the accepted attempts before. All items take the same steps, so that the result depends
    on the batch (as far as the tolerance goes). The network is skipped once the end is reached. Where the
    evaluations run out, one first-order step goes to the end and `reported(solver)` says `reached = False`. A lambda that
    is infinite at an end is met by a first-order step from, or to, `process.ends()`. Gradients take the steps as given.

    Args: process: Gaussian.   grid: from noise to data; only its ends are used, and kept trajectories hold these two.
    order: 2 or 3.   rtol, atol: > 0.   h_init: > 0, first step in lambda.   safety: in (0, 1].   gains: P, I, D of the
    controller.   max_evaluations: at least order + 2.   inverse: the grid increases.
    Returns: a solver of at most `max_evaluations` rows that is no table.
    Raises: ValueError: bad grid, order, or an argument out of range.

    Example:
        >>> from diffjax import processes, sample, testing, times
        >>> p = processes.vp()
        >>> solver = reported(dpm_adaptive(p, times.uniform(1, stop=1e-3), max_evaluations=100))
        >>> d = testing.oracle(testing.gaussian([0.0], 0.5), p)
        >>> x, report = sample(jax.random.key(0), d, solver, jnp.ones((1, 1)))
        >>> bool(report.reached), int(report.evaluations) < 100
        (True, True)

    Reference: Lu et al. 2022, arXiv:2206.00927, adaptive step size (DPM-Solver-12 and DPM-Solver-23).
    """
    check_integer("order", order, (2, 3), "DPM-Solver-12 or -23")
    for name, value in {"rtol": rtol, "atol": atol, "h_init": h_init}.items():
        check_number(name, value, above=True)
    check_number("safety", safety, high=1.0, above=True)
    if len(gains) != 3:
        raise ValueError(f"gains are three numbers, P, I and D of the controller; got {gains!r}")
    for name, gain in zip("PID", gains, strict=True):
        check_number(f"gain {name}", gain, -BOUND, BOUND)
    if isinstance(max_evaluations, bool) or not isinstance(max_evaluations, (int, np.integer)):
        raise ValueError(f"max_evaluations must be an int; got {max_evaluations!r}")
    if max_evaluations < order + 2:
        raise ValueError(
            f"max_evaluations must be at least {order + 2}, one attempt of {order} and a step at either end; "
            f"got {max_evaluations}"
        )
    k = table.nodes(process, grid, inverse)
    direction = -1.0 if inverse else 1.0
    begin, end, along_begin, along_end = _interior(process, k, direction)
    p, i, d = gains
    settings = Settings(
        process, begin, end, along_begin, along_end, direction, rtol, atol, h_init, safety,
        ((p + i + d) / order, -(p + 2 * d) / order, d / order),
    )  # fmt: skip
    attempts = (max_evaluations - 2) // order
    stage = np.concatenate([[JUMP], np.tile(np.arange(order), attempts), [JUMP]]).astype(np.int32)
    t = k.xp.concatenate([begin[None], k.xp.broadcast_to(k.grid[-1], (len(stage) - 1,))])
    accept = np.arange(len(stage)) == len(stage) - 1
    return Solver(
        rows=Attempts(t, stage, accept),
        grid=k.grid[np.array([0, -1])],
        constants=(k.grid[0], settings),
        init=Begin(order),
        step=Attempt(order),
        read=newest,
    )


def reported(solver: Solver) -> Solver:
    """The same solver, whose result is a pair `(x, Report)`; not together with `keep` of `sample`."""
    return dataclasses.replace(solver, read=_with_report)


def _interior(process: Process, k: table.Nodes, direction: float) -> tuple[Any, Any, Any, Any]:
    """Times and directed log-SNRs between which steps are adapted: the grid's ends, or those of the process."""
    xp = k.xp
    low, high = direction * k.lam_t[0], direction * k.lam_s[-1]
    bounds = [direction * process.log_snr(xp.asarray(t)) for t in process.ends()]
    high_bound, low_bound = bounds if direction > 0 else bounds[::-1]
    begin = xp.where(xp.isfinite(low), low, xp.minimum(low_bound, xp.where(xp.isfinite(high), high, high_bound) - 1))
    end = xp.where(xp.isfinite(high), high, xp.maximum(high_bound, begin + 1))
    t_begin = xp.where(xp.isfinite(low), k.grid[0], process.time_of_log_snr(direction * begin))
    t_end = xp.where(xp.isfinite(high), k.grid[-1], process.time_of_log_snr(direction * end))
    return t_begin, t_end, begin, end


# -------------------------------------------------------------------------------------------------------- one attempt


@dataclasses.dataclass(frozen=True)
class Begin:
    """The state before the first row."""

    order: int

    def __call__(self, x: PyTree, constants: tuple[Any, Settings]) -> Progress:
        """Everything in the dtype of the state, since steps are computed as they are taken."""
        dtype = jnp.result_type(*jax.tree.leaves(x))
        t, settings = jax.tree.map(lambda a: jnp.asarray(a, dtype), constants)
        zero, count = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
        h = jnp.minimum(settings.h_init, settings.along_end - settings.along_begin)
        values = (jax.tree.map(jnp.zeros_like, x),) * (self.order - 1)
        return Progress(x, values, t, settings.along_begin, h, (zero, zero), count, count, count, settings)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One evaluation: a jump, a stage, or the last stage of an attempt and the verdict on it."""

    order: int

    def __call__(self, noise: Noise, denoiser: Any, carry: Any, row: Attempts) -> Any:
        """Apply one row; where there is nothing left to do the network is not called."""
        state, _ = carry
        jump = row.stage == JUMP
        busy = jnp.where(jump, state.t != row.t, state.along != state.settings.along_end)
        return jax.lax.cond(busy, self._evaluate, lambda d, c, r: c, denoiser, carry, row)

    def _evaluate(self, denoiser: Any, carry: Any, row: Attempts) -> Any:
        state, model_state = carry
        y, t = self._point(state, row.stage)
        pair, model_state, _ = denoiser.evaluate(y, t, state=model_state)
        state = state._replace(evaluations=state.evaluations + 1)
        kind = jnp.where(row.stage == JUMP, 2, (row.stage == self.order - 1).astype(jnp.int32))
        return jax.lax.switch(kind, (self._keep, self._judge, self._jump), state, pair, row), model_state

    def _point(self, state: Progress, stage: Any) -> tuple[PyTree, Any]:
        """Where a stage is evaluated: a combination of x and the values so far."""
        process, fractions = state.settings.process, FRACTIONS[self.order]
        alpha = process.alpha(state.t)
        carry, t = jnp.ones_like(alpha), state.t
        weights = [jnp.zeros_like(alpha) for _ in state.values]
        for j, r in enumerate(fractions):
            here = stage == j + 1
            t_j = process.time_of_log_snr(state.settings.direction * (state.along + r * state.h))
            h = state.settings.direction * r * state.h
            carry = jnp.where(here, process.alpha(t_j) / alpha, carry)
            t = jnp.where(here, t_j, t)
            for i, w in enumerate(stage_weights(jnp, self.order, fractions, j, process.sigma(t_j), h)):
                weights[i] = jnp.where(here, w, weights[i])
        parts = (nu.scale(w, d) for w, d in zip(weights, state.values, strict=True))
        return nu.add(nu.scale(carry, state.x), *parts), t

    def _keep(self, state: Progress, pair: Any, row: Attempts) -> Progress:
        values = [nu.tree_where(row.stage == j, pair.eps, d) for j, d in enumerate(state.values)]
        return state._replace(values=tuple(values))

    def _jump(self, state: Progress, pair: Any, row: Attempts) -> Progress:
        return state._replace(x=state.settings.process.add_noise(pair.x0, pair.eps, row.t), t=row.t)

    def _judge(self, state: Progress, pair: Any, row: Attempts) -> Progress:
        """Both ends of the step, its error, and the next length."""
        s, order, fractions = state.settings, self.order, FRACTIONS[self.order]
        left = s.along_end - state.along
        last = state.h >= left
        along = jnp.where(last, s.along_end, state.along + state.h)
        t = jnp.where(last, s.end, s.process.time_of_log_snr(s.direction * along))
        carry, sigma = s.process.alpha(t) / s.process.alpha(state.t), s.process.sigma(t)
        values = (*state.values, pair.eps)

        def end(order: int) -> PyTree:
            weights = stage_weights(jnp, order, fractions, order - 1, sigma, s.direction * state.h)
            parts = (nu.scale(w, d) for w, d in zip(weights, values[:order], strict=True))
            return nu.add(nu.scale(carry, state.x), *parts)

        low, high = end(order - 1), end(order)
        error = jax.lax.stop_gradient(_error(low, high, state.x, s))
        good = error <= 1  # never for one that is not a number
        first = state.accepted + state.rejected == 0
        e1, e2 = (jnp.where(first, error, e) for e in state.errors)
        factor = s.safety
        for e, gain in zip((error, e1, e2), s.gains, strict=True):
            factor = factor * (1 / (e + 1e-8)) ** gain
        factor = 1 + jnp.arctan(jnp.where(jnp.isfinite(factor), factor, 0.0) - 1)
        pick = lambda a, b: nu.tree_where(good, a, b)
        along = pick(along, state.along)
        return state._replace(
            x=pick(high, state.x),
            t=pick(t, state.t),
            along=along,
            h=jnp.minimum(state.h * factor, s.along_end - along),
            errors=(pick(error, e1), pick(e1, e2)),
            accepted=state.accepted + good.astype(jnp.int32),
            rejected=state.rejected + (~good).astype(jnp.int32),
        )


def _error(low: PyTree, high: PyTree, x: PyTree, s: Settings) -> Any:
    def square(a: Any, b: Any, c: Any) -> Any:
        size = jnp.maximum(jnp.abs(a), jnp.abs(c))
        return jnp.sum(((b - a) / jnp.maximum(s.atol, s.rtol * size)) ** 2)

    total = sum(jax.tree.leaves(jax.tree.map(square, low, high, x)))
    return jnp.sqrt(total / sum(leaf.size for leaf in jax.tree.leaves(x)))


def newest(state: Progress) -> PyTree:
    """The state."""
    return state.x


def _with_report(state: Progress) -> tuple[PyTree, Report]:
    s = state.settings
    reached = state.along == s.along_end
    return state.x, Report(reached, state.evaluations, state.accepted, state.rejected, s.direction * state.along)


CARDS = {
    "dpm_solver_12": Card(
        table.options(dpm_adaptive, order=2), "arXiv:2206.00927", "DPM-Solver with adaptive steps, orders 1 and 2",
        flags=("nonlinear",),
    ),
    "dpm_solver_23": Card(
        table.options(dpm_adaptive, order=3), "arXiv:2206.00927", "DPM-Solver with adaptive steps, orders 2 and 3",
        flags=("nonlinear",),
    ),
}  # fmt: skip
