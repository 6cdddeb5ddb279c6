"""Augmentations as pure functions of item keys: each item's change depends on its own key alone.

`keys` is [B] item keys (`numerics.item_keys(key, batch["index"])`), or one key that is split over the positions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from diffjax import numerics as nu
from diffjax.types import Scalar

AFFINE_PARAMETERS = ("rotation", "log_scale", "shear", "shift_x", "shift_y")


def flip(keys: Any, x: Any, probability: Scalar = 0.5) -> jax.Array:
    """Mirror each picture left to right with a probability.   x [B, H, W, C]

    Example:
        >>> flip(jax.random.key(0), jnp.arange(2.0).reshape(1, 1, 2, 1), 1.0).ravel().tolist()
        [1.0, 0.0]
    """
    x = _pictures(x)
    return nu.tree_where(jax.vmap(lambda k: jax.random.bernoulli(k, probability))(_items(keys, x)), x[:, :, ::-1], x)


def shift(keys: Any, x: Any, pixels: int = 1) -> jax.Array:
    """Move each picture by up to `pixels` whole pixels along both axes; the border is repeated.   x [B, H, W, C]"""
    x = _pictures(x)
    padded = jnp.pad(x, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")

    def one(key: Any, picture: Any) -> Any:
        top, left = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
        return jax.lax.dynamic_slice(picture, (top, left, 0), x.shape[1:])

    return jax.vmap(one)(_items(keys, x), padded)


def affine(
    keys: Any,
    x: Any,
    probability: Scalar = 0.7,
    rotation: Scalar = 0.12,
    log_scale: Scalar = 0.07,
    shear: Scalar = 0.12,
    shift: Scalar = 0.3,
) -> tuple[jax.Array, jax.Array]:
    """A random affine map of each picture, with the vector that tells a network what was done to it.

    x'(p) = x(c + R(theta) e^s [[1, h], [0, 1]] (p - c) - d), bilinear, the border repeated
    Args: x: [B, H, W, C].   probability: of a change.   rotation (radians), log_scale, shear, shift (pixels): their
        standard deviations.
    Returns: `(x', parameters [B, 5])`: the draws (theta, s, h, dx, dy) in units of their deviations, so of unit
        variance, and exactly zero where nothing was changed. Sample with the zero vector for unchanged pictures.
    Reference: arXiv:2206.00364, appendix F.2 (augmentation conditioning).
    """
    x = _pictures(x)
    deviations = jnp.stack([jnp.asarray(d, x.dtype) for d in (rotation, log_scale, shear, shift, shift)])

    def one(key: Any, picture: Any) -> tuple[Any, Any]:
        decide, draw = jax.random.split(key)
        z = jax.random.normal(draw, (5,), x.dtype)
        z = jnp.where(jax.random.bernoulli(decide, probability) & (deviations > 0), z, 0)
        return _warp(picture, z * deviations), z

    return jax.vmap(one)(_items(keys, x), x)


def _warp(picture: Any, parameters: Any) -> Any:
    """One picture [H, W, C] under an affine map, read back at the transformed coordinates."""
    theta, s, h, dx, dy = parameters
    height, width, _ = picture.shape
    v, u = jnp.meshgrid(
        jnp.arange(height, dtype=picture.dtype) - (height - 1) / 2,
        jnp.arange(width, dtype=picture.dtype) - (width - 1) / 2,
        indexing="ij",
    )
    a, b = jnp.cos(theta) * jnp.exp(s), jnp.sin(theta) * jnp.exp(s)
    sheared = u + h * v
    columns = a * sheared - b * v - dx + (width - 1) / 2
    rows = b * sheared + a * v - dy + (height - 1) / 2
    read = lambda channel: map_coordinates(channel, [rows, columns], order=1, mode="nearest")
    return jax.vmap(read, -1, -1)(picture)


def _items(keys: Any, x: Any) -> Any:
    return keys if keys.ndim else nu.item_keys(keys, jnp.arange(x.shape[0]))


def _pictures(x: Any) -> Any:
    if jnp.ndim(x) != 4:
        raise ValueError(f"augmentations take pictures [B, H, W, C]; got shape {jnp.shape(x)}")
    return nu.as_float(x)
