"""Small maps of adapters, as functions of their parameters: linear maps, convolutions, the encoder of a condition's picture.

Plain functions and not modules, because what is called inside a tapped network would be taken for a part of it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.networks.convolution import choose_form
from diffjax.networks.layers import fan_in_uniform
from diffjax.numerics import PyTree


def dense(p: PyTree, x: Any) -> jax.Array:
    """A linear map of the last axis, in the dtype of x.   x W + b

    Example:
        >>> dense({"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}, jnp.ones((3, 2))).ravel().tolist()
        [3.0, 3.0, 3.0]
    """
    y = jnp.asarray(x) @ p["kernel"].astype(x.dtype)
    return y + p["bias"].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def conv(p: PyTree, x: Any, stride: int = 1) -> jax.Array:
    """A convolution with zero padding, in the dtype of x.   [B, *n, c] -> [B, *ceil(n / stride), d]"""
    y = choose_form(jax.default_backend())(x, p["kernel"].astype(x.dtype), *(() if stride == 1 else (stride,)))
    return y + p["bias"].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def normalised(x: Any, eps: float = 1e-5) -> jax.Array:
    """Each item with mean zero and variance one over all its places and channels.   (x - mean) / sqrt(var + eps)

    Example:
        >>> normalised(jnp.array([[[1.0], [3.0]]]), 0.0).ravel().tolist()
        [-1.0, 1.0]
    """
    axes = tuple(range(1, x.ndim))
    far = x - x.mean(axes, keepdims=True)
    return far * jax.lax.rsqrt(jnp.square(far).mean(axes, keepdims=True) + eps)


def fresh(key: Any, *shape: int) -> PyTree:
    """Parameters of a map with a kernel of this shape, its outputs about as large as its inputs."""
    return {"kernel": fan_in_uniform()(key, shape, jnp.float32), "bias": jnp.zeros(shape[-1], jnp.float32)}


def zero(*shape: int) -> PyTree:
    """Parameters of a map that gives zero."""
    return {"kernel": jnp.zeros(shape, jnp.float32), "bias": jnp.zeros(shape[-1], jnp.float32)}


def fresh_hint(key: Any, widths: tuple[int, ...], axes: int, channels: int, out: int) -> PyTree:
    """Parameters of `hint`.   axes: of space.   channels: of the picture.   out: of the result, which starts at zero."""
    window = (3,) * axes
    keys = iter(jax.random.split(key, 2 * len(widths)))
    p = {"in": fresh(next(keys), *window, channels, widths[0])}
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        p[f"same_{i}"] = fresh(next(keys), *window, a, a)
        p[f"down_{i}"] = fresh(next(keys), *window, a, b)
    return p | {"out": zero(*window, widths[-1], out)}


def hint(p: PyTree, picture: Any, halvings: int) -> jax.Array:
    """The encoder of a picture: pairs of convolutions, the second of which widens and, in the first pairs, halves.

    Args: p: of `fresh_hint`.   picture: [B, *n, c].   halvings: how many pairs halve; for latents of pictures 8 times as
        large it is three, all of the published one.
    Returns: [B, *(n / 2^halvings), out], zero if fresh.

    Reference: Zhang et al. 2023, arXiv:2302.05543.
    """
    h = jax.nn.silu(conv(p["in"], picture))
    for i in range(sum(name.startswith("down_") for name in p)):
        h = jax.nn.silu(conv(p[f"same_{i}"], h))
        h = jax.nn.silu(conv(p[f"down_{i}"], h, 2 if i < halvings else 1))
    return conv(p["out"], h)


def picture_of(own: Any, x: Any, most: int, *, name: str, channels: int | None = None) -> tuple[jax.Array, int]:
    """A condition's picture in the dtype of the state, and how often it must be halved to get the axes of the state.

    Args: own: what the adapter was given, [B, *m, c].   x: [B, *n, C].   most: halvings that the adapter can do.   name: of
        the adapter, for messages.   channels: that it was made for.
    Raises: ValueError: none; other axes than n, 2 n, ... 2^most n; other channels.
    """
    shape = getattr(own, "shape", None)
    wanted = f"floats [{x.shape[0]}, {', '.join(map(str, x.shape[1:-1]))}, {channels or 'channels'}]"
    if shape is None or not jnp.issubdtype(own.dtype, jnp.floating):
        got = type(own).__name__ if shape is None else f"{own.dtype} {list(shape)}"
        raise ValueError(f"{name} reads a picture in the condition under the adapter's name: {wanted}; got {got}")
    ratios = {m / n for m, n in zip(shape[1:-1], x.shape[1:-1], strict=False)}
    halvings = round(math.log2(max(ratios.pop(), 1e-9))) if len(ratios) == 1 else -1
    fits = len(shape) == x.ndim and shape[0] == x.shape[0] and 0 <= halvings <= most
    if not fits or any(m != n * 2**halvings for m, n in zip(shape[1:-1], x.shape[1:-1], strict=True)):
        raise ValueError(
            f"{name} needs a picture of the state's batch and axes, or of axes 2, 4 .. {2**most} times as long: {wanted}; "
            f"got {list(shape)}"
        )
    if channels not in (None, shape[-1]):
        raise ValueError(
            f"{name} was made for pictures of {channels} channels: {wanted}; got {list(shape)}. Give such pictures, or make "
            "the adapter anew with `init` for these"
        )
    return jnp.asarray(own).astype(x.dtype), halvings
