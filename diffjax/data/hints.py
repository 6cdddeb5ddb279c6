"""Conditions made from the pictures themselves: what is drawn, at what coarseness, and where.

Pictures are [B, H, W, C], about [-1, 1] (standardised data reach further); hints are [B, H, W, c]. All are plain JAX functions,
so that hints are made of samples as of data, inside `jit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SOBEL = np.outer([1, 2, 1], [-1, 0, 1]) / 8  # the derivative along the second axis


def grey(x: Any) -> jax.Array:
    """The mean of the channels, [-1, 1] taken to [0, 1].   [B, H, W, C] -> [B, H, W, 1]

    Example:
        >>> grey(jnp.array([[[[-1.0, 1.0]]]])).item()
        0.5
    """
    return (jnp.asarray(x).mean(-1, keepdims=True) + 1) / 2


def windows(x: Any, n: int) -> jax.Array:
    """Every n x n neighbourhood, beyond the border the border itself.   [B, H, W, 1] -> [B, H, W, n, n]

    Example:
        >>> windows(jnp.arange(2.0).reshape(1, 1, 2, 1), 3)[0, 0, 0, 1].tolist()
        [0.0, 0.0, 1.0]
    """
    h, w = x.shape[1:3]
    wide = jnp.pad(x[..., 0], ((0, 0), (n // 2,) * 2, (n // 2,) * 2), mode="edge")
    rows = [jnp.stack([wide[:, i : i + h, j : j + w] for j in range(n)], -1) for i in range(n)]
    return jnp.stack(rows, -2)


def edges(x: Any, threshold: float | None = None) -> jax.Array:
    """The length of the Sobel gradient of the grey picture.   [B, H, W, C] -> [B, H, W, 1], in [0, 1] or so

    Args: threshold: with one the result is one where the gradient is longer, else zero.

    Example:
        >>> edges(jnp.array([-1.0, 1.0, 1.0]).reshape(1, 1, 3, 1))[0, 0, :, 0].round(2).tolist()
        [0.5, 0.5, 0.0]
    """
    near = windows(grey(x), 3)
    along = lambda kernel: (near * jnp.asarray(kernel, near.dtype).reshape(1, 1, 1, 3, 3)).sum((-1, -2))
    dx, dy = along(SOBEL), along(SOBEL.T)
    length = jnp.sqrt(dx**2 + dy**2 + 1e-12)[..., None]
    return length if threshold is None else (length > threshold).astype(x.dtype)


def blur(x: Any, sigma: float = 1.0) -> jax.Array:
    """Gaussian blur of each channel, weights over the border left out.   The same shape and range as x.

    Example:
        >>> blur(jnp.ones((1, 3, 3, 1))).round(4).min().item()
        1.0
    """

    def matrix(n: int) -> jax.Array:
        at = jnp.arange(n, dtype=x.dtype)
        far = at[:, None] - at[None]
        weights = jnp.exp(-0.5 * (far / sigma) ** 2)
        return (weights / weights.sum(1, keepdims=True)).astype(x.dtype)

    return jnp.einsum("ih,jw,bhwc->bijc", matrix(x.shape[1]), matrix(x.shape[2]), x)


def low_resolution(x: Any, factor: int = 4) -> jax.Array:
    """Means of squares, each enlarged again to its square.   The same shape and range as x.

    Raises: ValueError: sides that are no multiples of the factor.

    Example:
        >>> low_resolution(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).ravel().tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    b, h, w, c = x.shape
    if h % factor or w % factor:
        raise ValueError(
            f"low_resolution takes means of {factor} x {factor} pixels, so sides must be multiples of {factor}; got {h} x {w}"
        )
    small = x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))
    return jnp.repeat(jnp.repeat(small, factor, axis=1), factor, axis=2)


def mask(x: Any, threshold: float = 0.5) -> jax.Array:
    """One where the grey picture is brighter than the threshold.   [B, H, W, C] -> [B, H, W, 1]

    Example:
        >>> mask(jnp.array([-1.0, 1.0]).reshape(1, 1, 2, 1)).ravel().tolist()
        [0.0, 1.0]
    """
    return (grey(x) > threshold).astype(x.dtype)


HINTS: dict[str, Callable[[Any], jax.Array]] = {
    "edges": edges,
    "blur": blur,
    "low_resolution": low_resolution,
    "mask": mask,
}
