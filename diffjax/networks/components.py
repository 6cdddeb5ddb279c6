"""Squares of pixels as channels, and the linear path of an autoencoder, which can start at the principal components."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.networks.layers import Dense
from diffjax.numerics import PyTree

NOISE = -8.0  # log-variance of the posterior at the start: a deviation of 0.018 of that of the latent

LEAST = 1e-8  # of the largest variance along a direction of the data, below which it counts as this


def fold(x: Any, patch: int) -> Any:
    """Squares of pixels as channels.   [B, H, W, c] -> [B, H / p, W / p, p p c]

    Example:
        >>> fold(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).ravel().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, -1)


def unfold(x: Any, patch: int) -> Any:
    """The inverse of `fold`.   [B, h, w, p p c] -> [B, p h, p w, c]"""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, -1)


class Squares(nn.Module):
    """A linear map of squares of pixels to a latent, or back.   [B, H, W, c] -> [B, H / f, W / f, features], or the inverse sizes

    The networks have norms on every path, so that a picture's brightness and contrast must be learned through them; beside a
    linear path, which is a block transform such as principal components, they only learn what it leaves.
    """

    features: int
    factor: int
    back: bool

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """The map of x."""
        if self.back:
            return unfold(Dense(self.features * self.factor**2, dtype=x.dtype, name="map")(x), self.factor)
        return Dense(self.features, dtype=x.dtype, name="map")(fold(x, self.factor))


def linear_paths(net: Any) -> tuple[Any, Any]:
    """The linear paths of an autoencoder with `linear`; else zeros."""
    if not net.linear:
        return (lambda x: jnp.zeros((), x.dtype),) * 2
    factor = net.patch * 2 ** (len(net.widths) - 1)
    return Squares(net.latent_channels, factor, False), Squares(net.out_channels, factor, True)


def start_linear(module: Any, params: PyTree, x: Any) -> PyTree:
    """Parameters of an autoencoder with `linear` that begins as the principal components of squares of the data.

    The latent has mean zero and deviation one; the networks beside the linear path add nothing at first, and training goes on
    from the best linear map. What they learn shows in the error against that of the start.
    Args: module: KLAutoencoder or VQAutoencoder with linear=True.   params: fresh ones.   x: [N, H, W, C], some data in model
    coordinates.
    Raises: ValueError: a module without linear path or `quant`, fewer numbers in a square than in the latent, or data that do
    not vary. Directions in which they do not vary get a small share of the latent.
    """
    if not getattr(module, "linear", False) or not module.quant_conv:
        raise ValueError("start_linear needs an autoencoder with linear=True and quant_conv=True")
    c, factor = module.latent_channels, module.patch * 2 ** (len(module.widths) - 1)
    squares = np.asarray(fold(np.asarray(x, np.float64), factor))
    squares = squares.reshape(-1, squares.shape[-1])
    if squares.shape[1] < c:
        raise ValueError(f"a square of {factor} x {factor} pixels has {squares.shape[1]} numbers; the latent needs {c}")
    mean = squares.mean(0)
    variance, axes = np.linalg.eigh(np.atleast_2d(np.cov(squares.T)))
    if not variance[-1] > 0:
        raise ValueError(f"start_linear needs data that vary; got {len(squares)} squares of variance {variance[-1]}")
    variance = np.maximum(variance, LEAST * variance[-1])  # which may be zero, or less by rounding
    std, axes = np.sqrt(variance[::-1][:c]), axes[:, ::-1][:, :c]
    single = lambda a: jnp.asarray(a, jnp.float32)
    into = {"kernel": single(axes / std), "bias": single(-mean @ axes / std)}
    back = {"kernel": single((axes * std).T), "bias": single(mean)}
    bias = jnp.zeros_like(params["quant"]["bias"]).at[c:].set(NOISE)
    quant = {"kernel": jnp.zeros_like(params["quant"]["kernel"]), "bias": bias}
    decoder = {**params["decoder"], "out": jax.tree.map(jnp.zeros_like, params["decoder"]["out"])}
    paths = {"linear_in": {"map": into}, "linear_out": {"map": back}}
    return {**params, **paths, "quant": quant, "decoder": decoder}
