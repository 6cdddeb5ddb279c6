"""Halving and doubling of the spatial axes of [B, *n, c]: by means and repeats, or by a filter.

A factor of two can be given for all axes or by axis, 1 for one that stays: `(1, 2, 2)` keeps the frames of a video.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Factor = int | tuple[int, ...]
BINOMIAL = (1.0, 3.0, 3.0, 1.0)


def per_axis(value: int | tuple[int, ...], x: Any, name: str) -> tuple[int, ...]:
    """One number for each spatial axis of x, [B, *n, c].

    Raises: ValueError: there are more or fewer.

    Example:
        >>> per_axis(3, jnp.zeros((1, 8, 8, 4)), "kernel")
        (3, 3)
    """
    values = (value,) * (x.ndim - 2) if isinstance(value, int) else tuple(value)
    if len(values) != x.ndim - 2:
        raise ValueError(
            f"{name}={value} must have one number for each axis of x between batch and channels: {x.shape}"
        )
    return values


def halve(x: Any, factor: Factor = 2) -> jax.Array:
    """The mean of each pair, square or cube.   [B, *n, c] -> [B, *(n / factor), c]"""
    shape, means = [x.shape[0]], []
    for n, f in zip(x.shape[1:-1], per_axis(factor, x, "factor"), strict=True):
        shape += [n // f, f]
        means.append(len(shape) - 1)
    return x.reshape(*shape, x.shape[-1]).mean(means)


def double(x: Any, factor: Factor = 2) -> jax.Array:
    """Each entry as a pair, square or cube.   [B, *n, c] -> [B, *(n factor), c]"""
    between, wide, out = [x.shape[0]], [x.shape[0]], [x.shape[0]]
    for n, f in zip(x.shape[1:-1], per_axis(factor, x, "factor"), strict=True):
        between += [n, 1]
        wide += [n, f]
        out.append(n * f)
    c = x.shape[-1]
    return jnp.broadcast_to(x.reshape(*between, c), (*wide, c)).reshape(*out, c)


def fir_halve(x: Any, factor: Factor = 2, taps: tuple[float, ...] = BINOMIAL) -> jax.Array:
    """Every second entry of the filtered signal, zeros outside.   y_i = sum_k f_k x_{2i + k - p},  p = len(f) / 2 - 1

    Args: x: [B, *n, c], even n.   taps: of the filter along each axis, an even number; scaled to sum to one.
    Returns: [B, *(n / factor), c].

    Example:
        >>> fir_halve(jnp.arange(4.0).reshape(1, 4, 1), taps=(1.0, 1.0)).ravel().tolist()
        [0.5, 2.5]

    Reference: Zhang 2019, arXiv:1904.11486, section 3; Song et al. 2021, arXiv:2011.13456, appendix H.
    """
    p = len(taps) // 2 - 1
    for axis in _halved(x, factor):
        x = _filtered(x, axis, taps, p, p, stride=2)
    return x


def fir_double(x: Any, factor: Factor = 2, taps: tuple[float, ...] = BINOMIAL) -> jax.Array:
    """The filtered signal with a zero after every entry, zeros outside: twice the transpose of `fir_halve`.

    With (1, 3, 3, 1) linear interpolation: y_2i = (x_{i-1} + 3 x_i) / 4,  y_{2i+1} = (3 x_i + x_{i+1}) / 4.
    Args: x: [B, *n, c].   taps: as for `fir_halve`.   Returns: [B, *(n factor), c].

    Example:
        >>> fir_double(jnp.full((1, 3, 1), 4.0)).ravel().tolist()
        [3.0, 4.0, 4.0, 4.0, 4.0, 3.0]
    """
    p = len(taps) // 2
    gain = tuple(2 * t for t in reversed(taps))
    for axis in _halved(x, factor):
        shape = list(x.shape)
        shape[axis] *= 2
        x = jnp.stack([x, jnp.zeros_like(x)], axis=axis + 1).reshape(shape)
        x = _filtered(x, axis, gain, p, p - 1, total=sum(taps))
    return x


def fir_blur(x: Any, factor: Factor = 2, taps: tuple[float, ...] = BINOMIAL) -> jax.Array:
    """The filtered signal, one entry longer: what a convolution of length three and stride two halves.

    Args: x: [B, *n, c].   Returns: [B, *(n + 1), c] along the axes of factor two.
    """
    p = len(taps) // 2
    for axis in _halved(x, factor):
        x = _filtered(x, axis, taps, p, p)
    return x


def _halved(x: Any, factor: Factor) -> list[int]:
    factors = per_axis(factor, x, "factor")
    if any(f not in (1, 2) for f in factors):
        raise ValueError(f"a filter resamples by factors of 1 or 2; got factor={factor}. Take halve and double")
    return [axis for axis, f in enumerate(factors, 1) if f == 2]


def _filtered(x: Any, axis: int, taps: Any, low: int, high: int, stride: int = 1, total: float | None = None) -> Any:
    """sum_k f_k x[stride i + k - low] along one axis, for all windows that fit into x with zeros around it."""
    f = np.asarray(taps) / (sum(taps) if total is None else total)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (low, high)
    x = jnp.pad(x, pads)
    n = (x.shape[axis] - len(f)) // stride + 1
    return sum(float(w) * lax.slice_in_dim(x, k, k + (n - 1) * stride + 1, stride, axis) for k, w in enumerate(f))
