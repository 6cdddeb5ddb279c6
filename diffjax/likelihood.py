"""The exact log-density of the probability flow: `log_density`, and `bits_per_dim` of data with levels.

With r = sqrt(alpha^2 + sigma^2), y = x / r turns with the angle theta = atan(sigma / alpha):  dy/dtheta = v(x, t) / r,
v = alpha eps - sigma x0, which is bounded from theta = 0 (data) to theta = pi / 2 (pure noise). The change of variables is
log p(x) = log p_noise(x') + d log(r' / r) + integral of tr(dv/dx) dtheta,  with x' where the flow takes x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.losses import LevelDecoder
from diffjax.numerics import PyTree
from diffjax.types import UNBOUND, Denoiser, Key, PerExample, Process, batched_cond


class Density(NamedTuple):
    """What `log_density` knows beside the log-density."""

    latent: jax.Array  # [B, ...] where the flow takes x at the noise end
    standard_error: jax.Array  # [B] of log p over the probes; 0 for the exact trace, NaN for a single probe
    evaluations: Any  # of the denoiser for each item; [B] with an adaptive step


# ------------------------------------------------------------------------------------------------------------- traces


@dataclasses.dataclass(frozen=True)
class Exact:
    """tr J = sum_i e_i . J e_i: one directional derivative for each of the d dimensions."""

    def directions(self, keys: Any, x: jax.Array) -> jax.Array:
        """The unit vectors, [d, B, ...]."""
        d = math.prod(x.shape[1:])
        return jnp.broadcast_to(jnp.eye(d, dtype=x.dtype).reshape(d, 1, *x.shape[1:]), (d, *x.shape))

    def estimates(self, q: jax.Array) -> jax.Array:
        """The trace [1, B] from the quadratic forms [d, B]."""
        return q.sum(0, keepdims=True)


def rademacher(keys: Any, i: Any, like: Any) -> Any:
    """Random signs shaped like the state, per item: the probe of least variance with independent entries."""
    return jax.tree.map(lambda z: jnp.where(z < 0, -1, 1).astype(z.dtype), nu.item_normal(keys, i, like))


@dataclasses.dataclass(frozen=True)
class Hutchinson:
    """tr J = E[z . J z]: the mean over `probes` random directions, the same along the whole path and drawn per item.

    Args: probes: >= 1.   draw: `(item keys, index, like) -> z` with E[z z^T] = I: `rademacher` or `numerics.item_normal`.
    Raises: ValueError: probes not an int >= 1.
    Reference: arXiv:1810.01367 (one probe for the whole path).
    """

    probes: Any = 1
    draw: Callable[..., Any] = rademacher

    def __post_init__(self) -> None:
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            raise ValueError(f"probes must be an int >= 1; got {self.probes!r}. For the exact trace use trace=Exact()")

    def directions(self, keys: Any, x: jax.Array) -> jax.Array:
        """The probes, [probes, B, ...]."""
        return jax.vmap(lambda i: self.draw(keys, i, x))(jnp.arange(self.probes))

    def estimates(self, q: jax.Array) -> jax.Array:
        """One unbiased trace for each probe, [probes, B]."""
        return q


# --------------------------------------------------------------------------------------------------------------- flow


class Nodes(NamedTuple):
    """The stages of the classical Runge-Kutta method in theta; every leaf [4 n]."""

    t: Any
    alpha: Any
    sigma: Any
    reach: Any  # how far from y the stage looks along the last slope
    weight: Any  # of its slope in the step
    last: Any  # whether the step ends here


def _angles(process: Process, t: Any) -> Any:
    alpha, sigma = process.alpha(t), process.sigma(t)
    return nu.namespace(alpha, sigma).arctan2(sigma, alpha)


def _inside(process: Process, theta: Any) -> tuple[Any, Any, Any]:
    """Time, alpha and sigma at angles strictly between 0 and pi / 2."""
    xp = nu.namespace(theta, process.params)
    t = process.time_of_log_snr(xp.log(xp.cos(theta) / xp.sin(theta)))
    return t, process.alpha(t), process.sigma(t)


def _nodes(process: Process, grid: Any) -> Nodes:
    """Four stages a step on the increasing times `grid` [n + 1]; float64 on the host if the process is there."""
    xp, (grid, *_) = nu.host_float64(grid, process.params)
    theta = _angles(process, grid)
    h = theta[1:] - theta[:-1]
    ends = (grid, process.alpha(grid), process.sigma(grid))  # exact there, where log-SNR may be infinite
    middle = _inside(process, theta[:-1] + 0.5 * h)
    stages = lambda begin, mid, end: xp.stack([begin, mid, mid, end], axis=1).reshape(-1)
    place = [stages(e[:-1], m, e[1:]) for e, m in zip(ends, middle, strict=True)]
    step = lambda *c: xp.stack([ci * h for ci in c], axis=1).reshape(-1)
    last = np.tile([False, False, False, True], h.shape[0])
    return Nodes(*place, step(0.0, 0.5, 0.5, 1.0), step(1 / 6, 1 / 3, 1 / 3, 1 / 6), last)


def _even(process: Process, steps: int, start: Any, stop: Any) -> Any:
    """Times that increase from `stop` to `start` in equal angles."""
    xp, (start, stop, *_) = nu.host_float64(start, stop, process.params)
    first, last = _angles(process, stop), _angles(process, start)
    inner = first + (last - first) * xp.asarray(np.linspace(0, 1, steps + 1)[1:-1], first.dtype)
    times = _inside(process, inner)[0]
    return xp.concatenate([xp.reshape(stop, (1,)), times, xp.reshape(start, (1,))])


def _slope(denoiser: Denoiser, trace: Any, directions: Any, y: Any, t: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """`(v / r, estimates of tr dv/dx)`: [B, ...] and [estimates, B]."""
    r = (alpha * alpha + sigma * sigma) ** 0.5

    def v(x: jax.Array) -> jax.Array:
        p = denoiser.evaluate(x, t).prediction
        return nu.sub(nu.scale(alpha, p.eps), nu.scale(sigma, p.x0))

    value, derivative = jax.linearize(v, r * y)
    axes = tuple(range(1, y.ndim))
    q = jax.vmap(lambda z: (z * derivative(z)).sum(axes))(directions)
    return value / r, trace.estimates(q)


def _fixed(denoiser: Denoiser, trace: Any, directions: Any, nodes: Nodes, y: Any) -> tuple[Any, Any, Any]:
    nodes = jax.tree.map(lambda c: jnp.asarray(c, None if c.dtype == bool else y.dtype), nodes)

    def stage(carry: Any, row: Nodes) -> tuple[Any, None]:
        y, ahead, slope, total = carry
        slope, q = _slope(denoiser, trace, directions, y + row.reach * slope, row.t, row.alpha, row.sigma)
        ahead = ahead + row.weight * slope
        return (jnp.where(row.last, ahead, y), ahead, slope, total + row.weight * q), None

    total = jax.eval_shape(lambda y: trace.estimates(jnp.zeros((directions.shape[0], y.shape[0]), y.dtype)), y)
    start = (y, y, jnp.zeros_like(y), jnp.zeros(total.shape, y.dtype))
    (y, *_, total), _ = jax.lax.scan(stage, start, nodes)
    return y, total, nodes.t.shape[0]


def _adaptive(
    denoiser: Denoiser, trace: Any, directions: Any, ends: tuple[Any, Any], y: Any, tolerance: tuple[float, float]
) -> tuple[Any, Any, Any]:
    """Dormand-Prince 5(4) of diffrax, every item with steps of its own."""
    import diffrax

    process, (rtol, atol) = denoiser.process, tolerance
    (first, last), (stop, start) = ends

    def solve(y: Any, directions: Any, cond: PyTree) -> tuple[Any, Any, Any]:
        one = denoiser.bind(jax.tree.map(lambda c: c[None], cond))

        def field(theta: Any, state: Any, args: Any) -> Any:
            # the ends themselves, where log-SNR may be infinite, have exact times
            inner = (theta > first) & (theta < last)
            t = _inside(process, jnp.where(inner, theta, 0.5 * (first + last)))[0]
            t = jnp.where(inner, t, jnp.where(theta > first, start, stop)).astype(y.dtype)
            alpha, sigma = (c.astype(y.dtype) for c in (process.alpha(t), process.sigma(t)))
            slope, q = _slope(one, trace, directions[:, None], state[0][None], t, alpha, sigma)
            return slope[0], q[:, 0]

        q0 = jnp.zeros((trace.estimates(jnp.zeros((directions.shape[0], 1), y.dtype)).shape[0],), y.dtype)
        out = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Dopri5(), first, last, None, (y, q0), max_steps=4096,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        )  # fmt: skip
        return jax.tree.map(lambda a: a[0], out.ys) + (6 * out.stats["num_steps"] + 1,)

    cond = None if denoiser.cond is UNBOUND else denoiser.cond
    # mapped, not vmapped: a batched diffeqsolve is not reproducible on CPU (see solvers.integrate)
    y, total, evaluations = jax.lax.map(lambda item: solve(*item), (y, jnp.moveaxis(directions, 1, 0), cond))
    return y, total.T, evaluations


# ------------------------------------------------------------------------------------------------------------ density


def normal_log_prob(x: jax.Array, std: Any) -> jax.Array:
    """`log N(x; 0, std^2 I)` of every item, [B]."""
    d = math.prod(x.shape[1:])
    squares = jnp.square(x.reshape(x.shape[0], -1) / std).sum(1)
    return -0.5 * squares - d * (jnp.log(std) + 0.5 * math.log(2 * math.pi))


def log_density(
    key: Key,
    denoiser: Denoiser,
    x: Any,
    *,
    steps: Any = 64,
    trace: Any = None,
    prior: Any = None,
    start: Any = 1.0,
    stop: Any = 0.0,
    tolerance: Any = None,
    items: Any = None,
) -> tuple[PerExample, Density]:
    """The log-density of data under the model: that of the law which the probability flow makes of the prior.

    log p(x) = log p_prior(x') + d log(r_start / r_stop) + integral_{theta_stop}^{theta_start} tr(dv/dx) dtheta

    Args: key: of the probes; the exact trace draws nothing.   denoiser: with its condition bound.   x: [B, ...] at time
    `stop`; its dtype is that of the computation.   steps: n >= 1 fourth-order steps in equal angles, of 4 evaluations each,
    or increasing times [n + 1] from `stop` to `start`.   trace: `Exact()` (default), d derivatives an evaluation, or
    `Hutchinson(probes)`.   prior: what samples start from, with `log_prob(x) -> [B]`, default N(0, sigma(start)^2 I), which
    is what `process.prior` draws: on a process with alpha(1) > 0 it is not the marginal of the data, and the model's density
    differs from the data's by that much.   start, stop: times of the prior and of x; stop > 0 for a denoiser that is
    singular at sigma = 0.   tolerance: `(rtol, atol)` of adaptive steps (diffrax) in place of `steps`.   items: [B] global
    indices that probes are drawn from, default arange(B).
    Returns: `(log p [B] in nats, Density)`. An item's value does not depend on the others. In float32 log p is within 1e-6
    relative of float64 (64 dimensions, VP and VE to sigma_max 1e4), below that the error is that of the steps.
    A stateful denoiser begins anew at every evaluation.
    Raises: ValueError: an x that is not [B, ...] floating, a condition or items of another batch size, no steps, times that do not
    increase or leave [0, 1], a bad tolerance. RuntimeError: adaptive steps that do not get to the end.

    Example:
        >>> from diffjax import processes, testing
        >>> d = testing.oracle(testing.gaussian([0.0, 0.0], 1.0), processes.rectified())
        >>> log_p, _ = log_density(jax.random.key(0), d, jnp.zeros((1, 2)), steps=4)
        >>> round(float(log_p[0]), 4)  # -log(2 pi)
        -1.8379

    Reference: Song et al. 2021, arXiv:2011.13456, Appendix D.2.
    """
    x = jnp.asarray(x)
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, of shape [B, ...]; got {x.dtype} {x.shape}")
    x = nu.state_leaf(x)
    denoiser = dataclasses.replace(denoiser, cond=batched_cond(denoiser.cond, nu.batch_size(x)))
    process, trace = denoiser.process, Exact() if trace is None else trace
    keys = nu.item_keys(key, nu.item_indices(items, nu.batch_size(x)))
    directions = trace.directions(keys, x)
    grid = _grid(process, steps, start, stop)
    at = lambda t: (process.alpha(t), process.sigma(t))
    (a0, s0), (a1, s1) = at(grid[0]), at(grid[-1])
    r0, r1 = (a0 * a0 + s0 * s0) ** 0.5, (a1 * a1 + s1 * s1) ** 0.5
    y = x / jnp.asarray(r0, x.dtype)
    if tolerance is None:
        y, total, evaluations = _fixed(denoiser, trace, directions, _nodes(process, grid), y)
    else:
        numbers = lambda *v: tuple(jnp.asarray(c, x.dtype) for c in v)
        ends = numbers(*_angles(process, grid[np.array([0, -1])])), numbers(grid[0], grid[-1])
        y, total, evaluations = _adaptive(denoiser, trace, directions, ends, y, _tolerance(tolerance))
    latent = jnp.asarray(r1, x.dtype) * y
    log_prior = normal_log_prob(latent, jnp.asarray(s1, x.dtype)) if prior is None else prior.log_prob(latent)
    log_p = log_prior + math.prod(x.shape[1:]) * jnp.asarray(nu.namespace(r1).log(r1 / r0), x.dtype) + total.mean(0)
    return log_p, Density(latent, _standard_error(trace, total), evaluations)


def _standard_error(trace: Any, estimates: jax.Array) -> jax.Array:
    if isinstance(trace, Exact):
        return jnp.zeros_like(estimates[0])
    n = estimates.shape[0]
    return jnp.std(estimates, 0, ddof=1) / n**0.5 if n > 1 else jnp.full_like(estimates[0], jnp.nan)


def _grid(process: Process, steps: Any, start: Any, stop: Any) -> Any:
    if np.ndim(steps) == 0:
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise ValueError(f"steps must be an int >= 1, or increasing times [n + 1]; got {steps!r}")
        if nu.namespace(start, stop) is np and not 0 <= stop < start <= 1:
            raise ValueError(f"x is at time stop and the prior at start, 0 <= stop < start <= 1; got {start=}, {stop=}")
        return _even(process, int(steps), start, stop)
    xp, (grid,) = nu.host_float64(steps)
    if xp is np and not (
        grid.ndim == 1 and len(grid) > 1 and np.all(np.diff(grid) > 0) and 0 <= grid[0] and grid[-1] <= 1
    ):
        raise ValueError(
            "the times in steps must increase from data to noise within [0, 1], [n + 1]; got "
            f"{np.array2string(grid[:3], precision=4)} "
            "... Did you mean grid[::-1]?"
        )
    return grid


def _tolerance(tolerance: Any) -> tuple[float, float]:
    if np.shape(tolerance) != (2,) or not all(float(v) > 0 for v in tolerance):
        raise ValueError(
            f"tolerance must be two positive numbers (rtol, atol), for example (1e-5, 1e-5); got {tolerance!r}"
        )
    return float(tolerance[0]), float(tolerance[1])


def bits_per_dim(
    key: Key, denoiser: Denoiser, x: Any, levels: LevelDecoder | None = None, *, samples: Any = 1, **options: Any
) -> tuple[PerExample, dict[str, Any]]:
    """Bits per dimension of data with equally spaced levels, by uniform dequantisation: an upper bound on -log2 P(x) / d.

    -log2 P(x) / d <= -(E_u log p(x + u) + sum log w) / (d log 2),  u uniform over the bin of width w = (high - low) / (levels - 1)

    Args: x: [B, ..., C] in model coordinates, on the levels.   levels: `LevelDecoder(levels, low, high)` with the first and
    the last level in model coordinates, as the variational bound takes them: the widths then hold the Jacobian of the data
    transform. For a `DataTransform` these are `(low - mean) / std` and `(high - mean) / std`, channel by channel.   samples:
    draws of u for each item, >= 1.   options: of `log_density`.
    Returns: `(bits [B], aux)`; aux holds `log_p` [samples, B] in nats and `standard_error` [B] over the draws in bits (NaN
    for one draw).
    Raises: ValueError: samples not an int >= 1, and whatever `log_density` raises.
    Reference: Theis et al. 2016, arXiv:1511.01844.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an int >= 1; got {samples!r}")
    levels = LevelDecoder() if levels is None else levels
    x = nu.state_leaf(x)
    items = nu.item_indices(options.pop("items", None), nu.batch_size(x))
    k_u, k_trace = jax.random.split(key)
    low, high = (np.asarray(b, np.float64) for b in (levels.low, levels.high))
    width = jnp.broadcast_to(jnp.asarray((high - low) / (levels.levels - 1), x.dtype), x.shape[1:])

    def draw(i: Any) -> jax.Array:
        keys = nu.item_keys(jax.random.fold_in(k_u, i), items)
        u = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -0.5, 0.5))(keys)
        probes = jax.random.fold_in(k_trace, i)
        return log_density(probes, denoiser, x + width[None] * u, items=items, **options)[0]

    log_p = jax.lax.map(draw, jnp.arange(samples))
    d = math.prod(x.shape[1:])
    bits = -(log_p + jnp.log(width).sum()) / (d * math.log(2))
    error = jnp.std(bits, 0, ddof=1) / samples**0.5 if samples > 1 else jnp.full_like(bits[0], jnp.nan)
    return bits.mean(0), {"log_p": log_p, "standard_error": error}
