"""The contract of every type, as checks that run on anyone's method; each raises `ContractError` with the figures.

Run them on your own method as diffjax runs them on its catalogues: `check_solver(my_solver, order=2)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.sampling import sample
from diffjax.solvers import stack
from diffjax.testing import oracles
from diffjax.types import Cond, Denoiser, Loss, Metric, Process, Solver


class ContractError(AssertionError):
    """A method does not keep the contract of its type."""


def _demand(ok: Any, message: str) -> None:
    if not bool(ok):
        raise ContractError(message)


def _worst(error: Any) -> float:
    return float(np.max(np.abs(np.asarray(error))))


# ---------------------------------------------------------------------------------------------------------- processes


def check_process(process: Process, n: int = 201) -> None:
    """alpha, sigma > 0 inside, SNR strictly decreasing, derivatives equal autodiff, the inverse inverts, float32 agrees.

    float32: at the same float32 t in [1e-6, 1 - 1e-6] alpha and sigma to 1e-5 relative, log-SNR to 1e-5 absolute + relative.
    """
    t = np.linspace(0, 1, n)[1:-1]
    edge = np.geomspace(1e-6, 1e-2, 40)
    with jax.enable_x64(True):
        tj = jnp.asarray(t)
        alpha, sigma, lam = (np.asarray(f(tj)) for f in (process.alpha, process.sigma, process.log_snr))
        _demand(
            np.all(alpha > 0) and np.all(sigma > 0),
            f"alpha and sigma must be positive; minima {alpha.min()}, {sigma.min()}",
        )
        _demand(np.all(np.diff(lam) < 0), "log_snr must decrease strictly in t")
        _demand(np.allclose(lam, np.log(alpha / sigma), rtol=1e-9, atol=1e-9), "log_snr must equal log(alpha / sigma)")
        for name, f, df in (("alpha", process.alpha, process.dalpha), ("sigma", process.sigma, process.dsigma)):
            auto = np.asarray(nu.derivative(f, tj))
            gap = _worst((np.asarray(df(tj)) - auto) / (1 + np.abs(auto)))
            _demand(gap < 1e-7, f"d{name} differs from autodiff by {gap:.2g}")
        back = np.asarray(process.time_of_log_snr(process.log_snr(tj)))
        _demand(_worst(back - t) < 1e-6, f"time_of_log_snr misses the time by {_worst(back - t):.2g}")
    t32 = np.unique(np.concatenate([edge, t, 1 - edge]).astype(np.float32))
    with jax.enable_x64(True):
        exact = [np.asarray(f(jnp.asarray(t32, jnp.float64))) for f in (process.alpha, process.sigma, process.log_snr)]
    single = jax.tree.map(lambda p: np.float32(p) if isinstance(p, (float, np.ndarray)) else p, process)
    for name, f, ref in zip(("alpha", "sigma", "log_snr"), ("alpha", "sigma", "log_snr"), exact, strict=True):
        got = np.asarray(jax.jit(lambda q, t, f=f: getattr(q, f)(t))(single, jnp.asarray(t32)), np.float64)
        scale = np.abs(ref) + (1.0 if name == "log_snr" else 0.0)
        gap = np.abs(got - ref) / scale
        _demand(gap.max() < 1e-5, f"float32 {name} is off by {gap.max():.2g} relative at t = {t32[gap.argmax()]:.8f}")


# ------------------------------------------------------------------------------------------------------------ solvers


def smooth_mixture(dim: int = 2) -> oracles.Mixture:
    """The smooth problem of the order tests: three components of standard deviation 0.8 to 1."""
    rng = np.random.RandomState(0)
    return oracles.mixture([0.3, 0.3, 0.4], rng.randn(3, dim), stds=[0.9, 1.0, 0.8])


def measured_order(
    build: Callable[..., Solver],
    process: Process,
    grid: Callable[[int], Any],
    steps: Sequence[int] = (80, 160),
    batch: int = 16,
    mixture: oracles.Mixture | None = None,
) -> tuple[float, list[float]]:
    """The last slope of log error against log steps on an exact mixture flow, in float64.

    Args: build: `(process, grid) -> Solver`, deterministic.   grid: `n -> [n + 1]` between two interior times.
    Returns: `(slope, errors)`, errors as root mean square over the batch.
    """
    m = smooth_mixture() if mixture is None else mixture
    with jax.enable_x64(True):
        start, stop = float(grid(1)[0]), float(grid(1)[-1])
        x, _ = oracles.draw(jax.random.key(1), m, batch, process, start)
        exact = oracles.flow(m, process, x, start, stop)
        run = jax.jit(jax.vmap(lambda s: sample(jax.random.key(0), oracles.oracle(m, process), s, x)))
        errors = []
        for n in steps:
            out = run(stack([build(process, grid(n))]))[0]
            errors.append(float(np.sqrt(((np.asarray(out) - exact) ** 2).sum(-1).mean())))
    slope = np.log(errors[-2] / errors[-1]) / np.log(steps[-1] / steps[-2])
    return float(slope), errors


def check_solver(
    build: Callable[..., Solver], order: int, process: Process, grid: Callable[[int], Any], **options: Any
) -> None:
    """The measured order is at least the claimed one less 0.15, on an exact mixture flow in float64."""
    slope, errors = measured_order(build, process, grid, **options)
    _demand(slope > order - 0.15, f"claimed order {order}, measured slope {slope:.2f} (errors {errors})")


# ------------------------------------------------------------------------------------------ denoisers and transforms


def check_denoiser(denoiser: Denoiser, x: Any, t: Any, tolerance: float = 1e-5) -> None:
    """The pair is finite, has the shape of x, keeps `alpha x0 + sigma eps = x`, and treats items independently."""
    p = denoiser(x, t)
    shapes = jax.tree.map(lambda a, b, c: a.shape == b.shape == c.shape, p.x0, p.eps, x)
    _demand(all(jax.tree.leaves(shapes)), "x0 and eps must have the shape of x")
    again = denoiser.process.add_noise(p.x0, p.eps, t)
    gap = max(
        _worst((a - b) / (1 + jnp.abs(b))) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(x), strict=True)
    )
    _demand(gap < tolerance, f"alpha x0 + sigma eps differs from x by {gap:.2g}")
    other = jax.tree.map(lambda a: a.at[1:].add(1.0), x)
    moved = max(
        _worst(a[0] - b[0]) for a, b in zip(jax.tree.leaves(denoiser(other, t)), jax.tree.leaves(p), strict=True)
    )
    _demand(moved < tolerance, f"item 0 changes by {moved:.2g} when the other items change")


# ------------------------------------------------------------------------------------------------- losses and metrics


def check_loss(loss: Loss, denoiser: Denoiser, x0: Any, cond: Cond = None) -> None:
    """The loss is `[B]` and finite, and every auxiliary output has the batch axis."""
    key = jax.random.key(3)
    n = nu.batch_size(x0)
    value, aux = loss(key, denoiser, x0, cond)
    _demand(value.shape == (n,), f"a loss is never reduced: expected shape ({n},), got {value.shape}")
    _demand(np.all(np.isfinite(np.asarray(value))), "the loss is not finite")
    _demand(all(np.shape(a)[:1] == (n,) for a in jax.tree.leaves(aux)), "every auxiliary output needs the batch axis")


def check_metric(metric: Metric, batches: Sequence[Any], tolerance: float = 1e-5) -> None:
    """Merging the states of parts equals updating with the whole, in any order."""
    whole = metric.init()
    for batch in batches:
        whole = metric.update(whole, batch)
    half = len(batches) // 2
    parts = []
    for some in (batches[half:], batches[:half]):
        state = metric.init()
        for batch in some:
            state = metric.update(state, batch)
        parts.append(state)
    a, b = metric.compute(whole), metric.compute(metric.merge(*parts))
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        _demand(np.allclose(u, v, rtol=tolerance, atol=tolerance), f"the whole gives {u}, merged parts {v}")
