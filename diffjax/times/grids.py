"""Sampling grids: decreasing times `[n+1]` whose first and last entries are exactly `start` and `stop`.

Grids are NumPy float64 (JAX where the parameters of the process, or `start` or `stop`, are). A grid in log-SNR cannot
be spaced up to an end where log-SNR is infinite: there it is spaced up to `process.ends()`, and the exact end is
one more point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffjax import numerics as nu
from diffjax.processes.betas import number_of_steps
from diffjax.types import Process, Scalar


def check(n: Any, start: Scalar, stop: Scalar) -> None:
    """Refuse a count that is not a positive int and ends that are not 0 <= stop < start <= 1."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"n, the number of steps, must be an int >= 1; got {n!r}")
    if any(isinstance(v, jax.core.Tracer) for v in (start, stop)):
        return
    if not 0 <= stop < start <= 1:
        raise ValueError(f"a grid runs from start down to stop, 0 <= stop < start <= 1; got {start=}, {stop=}")


def exact_ends(xp: Any, t: Any, start: Any, stop: Any) -> Any:
    """`t` [n+1] with its first and last entries replaced, and nothing outside them."""
    inner = xp.clip(t[1:-1], stop, start)
    return xp.concatenate([xp.reshape(start, (1,)).astype(t.dtype), inner, xp.reshape(stop, (1,)).astype(t.dtype)])


def _shape(n: Any, start: Scalar, stop: Scalar, fraction: Callable[[np.ndarray], np.ndarray]) -> Any:
    """`stop + (start - stop) fraction(k / n)`, with the ends set exactly."""
    check(n, start, stop)
    xp, (start, stop) = nu.host_float64(start, stop)
    return exact_ends(xp, stop + (start - stop) * xp.asarray(fraction(np.arange(n + 1) / n)), start, stop)


def uniform(n: Any, start: Scalar = 1.0, stop: Scalar = 0.0) -> Any:
    """Equal steps in time.   t_k = start + (k / n) (stop - start)

    Example:
        >>> uniform(4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return _shape(n, start, stop, lambda x: 1 - x)


def quadratic(n: Any, start: Scalar = 1.0, stop: Scalar = 0.0) -> Any:
    """Steps that shrink linearly towards data.   t_k = stop + (start - stop) (1 - k / n)^2
    Reference: arXiv:2010.02502, Appendix D.2.

    Example:
        >>> quadratic(4).tolist()
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    return _shape(n, start, stop, lambda x: (1 - x) ** 2)


def power(n: Any, rho: Scalar = 1.2, start: Scalar = 1.0, stop: Scalar = 0.0) -> Any:
    """Equal steps in t^(1/rho).   t_k = (start^{1/rho} + (k / n) (stop^{1/rho} - start^{1/rho}))^rho

    rho = 1 is `uniform`, and rho = 2 with stop = 0 is `quadratic`.
    Args: n: >= 1 steps.   rho: > 0, larger is denser near data.   start, stop: as `uniform`.
    Raises: ValueError: a concrete `rho` that is not positive and finite.
    Reference: Li 2025, arXiv:2510.02390 (rho = 1.2, between ends taken from a grid of `karras`).

    Example:
        >>> power(4, 2.0).tolist()
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    if not isinstance(rho, jax.core.Tracer) and not 0 < rho < math.inf:
        raise ValueError(f"rho must be a finite number > 0; got {rho!r}")
    check(n, start, stop)
    xp, (start, stop, rho) = nu.host_float64(start, stop, rho)
    high, low = start ** (1 / rho), stop ** (1 / rho)
    return exact_ends(xp, (high + xp.asarray(np.arange(n + 1) / n) * (low - high)) ** rho, start, stop)


def cosine(n: Any, start: Scalar = 1.0, stop: Scalar = 0.0) -> Any:
    """Steps that shrink at both ends (Chebyshev points).   t_k = stop + (start - stop) (1 + cos(pi k / n)) / 2

    Example:
        >>> cosine(2).round(12).tolist()
        [1.0, 0.5, 0.0]
    """
    return _shape(n, start, stop, lambda x: 0.5 * (1 + np.cos(math.pi * x)))


def spaced_in_log_snr(
    process: Process,
    n: Any,
    start: Scalar,
    stop: Scalar,
    place: Callable[[Any, Any, Any, Any], Any],
    apart: tuple[bool, bool] = (True, True),
) -> Any:
    """A grid whose log-SNR is `place(xp, low, high, x)` for `x` equally spaced in [0, 1], from `low` (noise) to `high`.

    Infinite ends are replaced by those of `process.ends()` and, where `apart` (noise, data), added as points of their own;
    else the first or last point moves there.
    """
    check(n, start, stop)
    xp, (start, stop, _) = nu.host_float64(start, stop, process.params)
    low, high = process.log_snr(start), process.log_snr(stop)
    noise, data = xp.isinf(low), xp.isinf(high)
    before, after = (c.astype(low.dtype) * float(own) for c, own in zip((noise, data), apart, strict=True))
    data_bound, noise_bound = (process.log_snr(xp.asarray(t)) for t in process.ends())
    # The other end may lie outside the bound: keep one unit of log-SNR between them.
    low = xp.where(noise, xp.minimum(noise_bound, xp.where(data, data_bound, high) - 1), low)
    high = xp.where(data, xp.maximum(data_bound, low + 1), high)
    spaced = n - before - after  # intervals between finite points
    x = xp.where(spaced > 0, (xp.asarray(np.arange(n + 1.0), low.dtype) - before) / xp.maximum(spaced, 1), 0.5)
    return exact_ends(xp, process.time_of_log_snr(place(xp, low, high, xp.clip(x, 0.0, 1.0))), start, stop)


def _linear(xp: Any, low: Any, high: Any, x: Any) -> Any:
    return low + x * (high - low)


def log_snr(process: Process, n: Any, start: Scalar = 1.0, stop: Scalar = 0.0) -> Any:
    """Equal steps in log-SNR.   lambda_k = lambda_start + (k / n) (lambda_stop - lambda_start)

    Args: process: any process.   n: >= 1 steps.   start, stop: 0 <= stop < start <= 1.
    Reference: arXiv:2206.00927, Section 3.3.

    Example:
        >>> from diffjax import processes
        >>> log_snr(processes.ve(0.01, 100.0), 4).round(12).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return spaced_in_log_snr(process, n, start, stop, _linear)


def karras(process: Process, n: Any, rho: Scalar = 7.0, start: Scalar = 1.0, stop: Scalar = 0.0) -> Any:
    """EDM's steps in `s = sigma / alpha`.   s_k = (s_0^{1/rho} + x_k (s_1^{1/rho} - s_0^{1/rho}))^rho

    Args: process: any process.   n: >= 1 steps.   rho: > 0, larger is denser near data.   start, stop: as `log_snr`.
    Raises: ValueError: a concrete `rho` that is not positive.
    Reference: arXiv:2206.00364, Eq. 5.

    Example:
        >>> from diffjax import processes
        >>> (80 * karras(processes.edm(), 3)).round(4).tolist()
        [80.0, 2.5152, 0.002, 0.0]
    """
    if not isinstance(rho, jax.core.Tracer) and not rho > 0:
        raise ValueError(f"rho must be > 0; got {rho!r}")

    def place(xp: Any, low: Any, high: Any, x: Any) -> Any:
        noise, data = xp.exp(-low / rho), xp.exp(-high / rho)
        return -rho * xp.log(noise + x * (data - noise))

    return spaced_in_log_snr(process, n, start, stop, place)


# log rho(l) = sum_j HEIGHTS_j exp(-(l - log c - CENTRES_j)^2 / (2 WIDTH^2)); from random mixtures, c = 1.
CENTRES = np.linspace(-4.0, 4.6, 8)
HEIGHTS = np.array([-0.1, 0.0, 0.4, 0.7, 0.4, 0.1, -0.5, -0.9])
WIDTH = 1.1


def curvature(
    process: Process,
    n: Any,
    data_std: Scalar = 1.0,
    start: Scalar = 1.0,
    stop: Scalar = 0.0,
    *,
    heights: Any = HEIGHTS,
    apart: tuple[bool, bool] = (True, True),
) -> Any:
    """A grid in log-SNR that is denser where trajectories bend: equal-mass quantiles of a density rho.

    log rho(l) = sum_j h_j exp(-(l - log c - m_j)^2 / (2 1.1^2)),  l = log(sigma / alpha),  c = data_std
    Args: process: any.   n: >= 1 steps.   data_std: > 0, of the data.   start, stop: as `log_snr`.   heights: [8], h_j; rho
    is constant beyond the outer centres m_j = -4 and 4.6.   apart: whether an end (noise, data) at infinite log-SNR is a
    point beside the finite bound that `log_snr` uses there, or replaces it.
    Raises: ValueError: a concrete `data_std` that is not positive.

    Example:
        >>> from diffjax import processes
        >>> steps = -np.diff(np.log(curvature(processes.edm(), 12)[:-1]))
        >>> bool(steps.min() < 0.6 * steps.max())
        True
    """
    if not isinstance(data_std, jax.core.Tracer) and not (data_std > 0 and np.isfinite(data_std)):
        raise ValueError(f"data_std must be a finite number > 0; got {data_std!r}")

    def place(xp: Any, low: Any, high: Any, x: Any) -> Any:
        lam = low + xp.asarray(np.linspace(0, 1, 1025), low.dtype) * (high - low)
        centres, peaks = (xp.asarray(a, low.dtype)[:, None] for a in (CENTRES, heights))
        l = xp.clip(-lam - xp.log(data_std), CENTRES[0], CENTRES[-1])
        bumps = xp.exp(-((l[None] - centres) ** 2) / (2 * WIDTH**2))
        density = xp.exp(xp.sum(peaks * bumps, 0))
        mass = xp.cumsum(0.5 * (density[1:] + density[:-1]))
        mass = xp.concatenate([xp.zeros_like(mass[:1]), mass / mass[-1]])
        return xp.interp(x, mass, lam)

    return spaced_in_log_snr(process, n, start, stop, place, apart)


def discrete(process: Any, n: Any, spacing: str = "leading", start: Scalar = 1.0, stop: Scalar = 0.0) -> np.ndarray:
    """A grid on the K integer steps of a discrete schedule.   t_i = (k_i + 1) / K, then `stop`

    leading: k = i (K // n);  linspace: k = round(linspace(0, K - 1, n));  trailing: k = round(K - i K / n) - 1.
    Only linspace and trailing begin at `start`: leading misses the noisiest steps, as published samplers do.
    Args: process: from `from_betas`, or K.   n: 1 <= n <= K.   spacing: 'leading', 'linspace' or 'trailing'.
        start, stop: multiples of 1 / K; the steps between them are spaced.
    Raises: ValueError: no integer steps, n too large, unknown spacing, ends that are not on steps.
    Reference: arXiv:2305.08891, Table 2.

    Example:
        >>> (1000 * discrete(1000, 4, "trailing")).round(6).tolist()
        [1000.0, 750.0, 500.0, 250.0, 0.0]
    """
    check(n, start, stop)
    steps = number_of_steps(process) if isinstance(process, Process) else process
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"give a process from `from_betas` or its number of steps, an int >= 1; got {steps!r}")
    first, last = start * steps, stop * steps
    if abs(first - round(first)) > 1e-6 or abs(last - round(last)) > 1e-6:
        raise ValueError(f"start and stop must be multiples of 1/{steps}; got {start=}, {stop=}")
    k = _integer_steps(round(first) - round(last), n, spacing)
    return np.append((round(last) + k + 1) / steps, float(stop))


def _integer_steps(steps: int, n: int, spacing: str) -> np.ndarray:
    """`n` of the integers `0 .. steps - 1`, decreasing."""
    if n > steps:
        raise ValueError(f"n must be at most the number of integer steps, {steps}; got {n}")
    if spacing == "leading":
        return np.arange(n)[::-1] * (steps // n)
    if spacing == "linspace":
        return np.linspace(steps - 1, 0, n).round()
    if spacing == "trailing":
        return np.round(steps - np.arange(n) * (steps / n)) - 1
    raise ValueError(f"spacing must be 'leading', 'linspace' or 'trailing'; got {spacing!r}")
