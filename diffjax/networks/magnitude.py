"""Magnitude-preserving layers: on inputs of independent entries with mean square one, outputs have mean square one.

There are no biases and no learned norms; weights enter as `w / |w|` per output, so that what they compute depends on their
direction alone. `dynamics.normalise_weights` keeps them at norm one while training.

Reference: Karras et al. 2024, arXiv:2312.02696, Sections 2.3 to 2.5 and Appendix B.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffjax.networks.attention import logits_of, softmax, weighted
from diffjax.networks.conditions import Condition
from diffjax.networks.convolution import choose_form
from diffjax.networks.embeddings import rows_of
from diffjax.networks.layers import at_least_float32, fan_in_uniform, product
from diffjax.networks.taps import Tap
from diffjax.numerics import safe_sqrt

SILU_RMS = 0.596  # root mean square of silu(x) for x ~ N(0, 1)


def mp_silu(x: Any) -> jax.Array:
    """SiLU of unit magnitude.   silu(x) / 0.596

    Reference: arXiv:2312.02696, Eq. 81.
    """
    return nn.silu(x) / SILU_RMS


def mp_sum(a: Any, b: Any, t: float = 0.5) -> Any:
    """Weighted sum of unit magnitude.   ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)

    Args: t: share of b, in [0, 1].

    Example:
        >>> round(float(mp_sum(jnp.array(1.0), jnp.array(1.0), 0.0)), 3)
        1.0

    Reference: arXiv:2312.02696, Eq. 88.
    """
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Any, b: Any, t: float = 0.5) -> jax.Array:
    """Channels side by side, so that each part contributes by its share and not by its number of channels.

    sqrt((Na + Nb) / ((1 - t)^2 + t^2)) [(1 - t) / sqrt(Na) a, t / sqrt(Nb) b]

    Args: a, b: [..., Na], [..., Nb].   t: share of b, in [0, 1].   Returns: [..., Na + Nb].

    Example:
        >>> mp_cat(jnp.ones(2), jnp.ones(2)).tolist()
        [1.0, 1.0, 1.0, 1.0]

    Reference: arXiv:2312.02696, Eq. 103.
    """
    na, nb = a.shape[-1], b.shape[-1]
    c = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return jnp.concatenate([c * (1 - t) / math.sqrt(na) * a, c * t / math.sqrt(nb) * b], axis=-1)


def pixel_norm(x: Any, eps: float = 0.0) -> jax.Array:
    """Division by the root mean square over the channels, in float32.   x / sqrt(mean(x^2) + 1e-8)

    Args: eps: if not zero, it is x / (sqrt(mean(x^2)) + eps); published weights were trained with 1e-4.

    Example:
        >>> pixel_norm(jnp.array([3.0, -3.0])).round(4).tolist()
        [1.0, -1.0]

    Reference: arXiv:2312.02696, Appendix B.
    """
    h = x.astype(at_least_float32(x.dtype))
    mean = jnp.square(h).mean(-1, keepdims=True)
    if eps:
        return (h / (safe_sqrt(mean) + eps)).astype(x.dtype)
    return (h * lax.rsqrt(mean + 1e-8)).astype(x.dtype)


def with_ones(x: Any) -> jax.Array:
    """One more channel, of ones: what a bias would be for."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def _directions(kernel: Any, eps: float = 0.0) -> jax.Array:
    """`w / |w|` per output, the last axis; with eps `w / (|w| + eps sqrt(n))` for n weights of an output."""
    size = jnp.square(kernel).sum(tuple(range(kernel.ndim - 1)), keepdims=True)
    if eps:
        return kernel / (safe_sqrt(size) + eps * math.sqrt(kernel.size // kernel.shape[-1]))
    return kernel * lax.rsqrt(size + 1e-12)


class Gain(nn.Module):
    """One learned number that starts at zero."""

    @nn.compact
    def __call__(self) -> Any:
        """The number."""
        return self.param("gain", nn.initializers.zeros, (), jnp.float32)


class MPDense(nn.Module):
    """A dense layer of unit magnitude.   y_j = x . w_j / |w_j|

    Tap: `out`.
    Args: x: [..., c].   Returns: [..., features].

    Example:
        >>> v = MPDense(4).init(jax.random.key(0), jnp.ones((1, 3)))
        >>> v["params"]["kernel"].shape
        (3, 4)

    Reference: arXiv:2312.02696, Eq. 47.
    """

    features: int
    dtype: Any = jnp.float32
    eps: float = 0.0  # see `pixel_norm`

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Apply the layer."""
        kernel = self.param("kernel", fan_in_uniform(fan_in=1), (x.shape[-1], self.features), jnp.float32)
        return Tap(name="out")(product(x.astype(self.dtype), _directions(kernel, self.eps).astype(self.dtype)))


class MPConv(nn.Module):
    """A convolution of unit magnitude away from the border, where zeros are added.   y_j = x * w_j / |w_j|

    Tap: `out`.
    Args: x: [B, H, W, c].   Returns: [B, H, W, features].

    Example:
        >>> v = jax.eval_shape(MPConv(4).init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
        >>> v["params"]["kernel"].shape
        (3, 3, 3, 4)

    Reference: arXiv:2312.02696, Eq. 47.
    """

    features: int
    kernel: tuple[int, int] = (3, 3)
    dtype: Any = jnp.float32
    eps: float = 0.0  # see `pixel_norm`

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Convolve x."""
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", fan_in_uniform(fan_in=1), shape, jnp.float32)
        form = choose_form(jax.default_backend())
        return Tap(name="out")(form(x.astype(self.dtype), _directions(kernel, self.eps).astype(self.dtype)))


def mp_fourier(t: Any, features: int, seed: int = 0) -> jax.Array:
    """Random Fourier features of unit magnitude.   sqrt(2) cos(2 pi (f_i t + phi_i)),  f_i ~ N(0, 1), phi_i ~ U(0, 1)

    Args: t: any shape.   features: how many.   seed: of the frequencies, which are fixed.
    Returns: [*t.shape, features] float32.

    Example:
        >>> mp_fourier(jnp.zeros(2), 8).shape
        (2, 8)

    Reference: arXiv:2312.02696, Eq. 75.
    """
    rng = np.random.default_rng(seed)
    t = jnp.asarray(t, jnp.float32)[..., None]
    lift = lambda a: jnp.asarray(a, jnp.float32).reshape((1,) * (t.ndim - 1) + (-1,))
    frequency, phase = rng.standard_normal(features), rng.uniform(size=features)
    return math.sqrt(2) * jnp.cos(2 * math.pi * (t * lift(frequency) + lift(phase)))


class KeptFourier(nn.Module):
    """The features of `mp_fourier` with frequencies and phases that are kept with the parameters, and not trained.

    sqrt(2) cos(w_i t + p_i).   Args: t: any shape.   Returns: [*t.shape, features] float32.
    """

    features: int

    @nn.compact
    def __call__(self, t: Any) -> jax.Array:
        """The features at t."""
        n = (self.features,)
        w = self.param("frequencies", nn.initializers.normal(2 * math.pi), n, jnp.float32)
        p = self.param("phases", nn.initializers.uniform(2 * math.pi), n, jnp.float32)
        t = jnp.asarray(t, jnp.float32)[..., None]
        lift = lambda a: lax.stop_gradient(a).reshape((1,) * (t.ndim - 1) + (-1,))
        return math.sqrt(2) * jnp.cos(t * lift(w) + lift(p))


class MPEmbedding(nn.Module):
    """A table of `num_classes + 1` vectors whose features have unit magnitude over the classes; the last is "no label".

    With `zero` there are `num_classes`, and "no label" is zero.
    Args: label: [B] integers in [0, num_classes].   Returns: [B, features].

    Example:
        >>> v = MPEmbedding(10, 4).init(jax.random.key(0), jnp.zeros(3, jnp.int32))
        >>> v["params"]["kernel"].shape
        (11, 4)
    """

    num_classes: int
    features: int
    dtype: Any = jnp.float32
    zero: bool = False
    eps: float = 0.0  # see `pixel_norm`

    @nn.compact
    def __call__(self, label: Any) -> jax.Array:
        """Look the labels up."""
        shape = (self.num_classes + (not self.zero), self.features)
        table = self.param("kernel", fan_in_uniform(fan_in=1), shape, jnp.float32)
        rows = math.sqrt(shape[0]) * _directions(table, self.eps)
        rows = jnp.concatenate([rows, jnp.zeros_like(rows[:1])]) if self.zero else rows
        return Tap(name="out")(rows_of(rows, label).astype(self.dtype))


class MPCode(nn.Module):
    """Time, label and vector as one code of unit magnitude.   mp_silu(mp_sum(W f(t), label, vector))

    Args: t: [B, ...] from `read_time`.   condition: from `read_condition`.   Returns: [B, ..., features].
    """

    features: int
    fourier: int
    num_classes: int = 0
    vector_size: int = 0
    dtype: Any = jnp.float32
    kept: bool = False  # `KeptFourier`
    zero_label: bool = False  # see `MPEmbedding`
    share: float = 0.5  # of the label, and of the vector
    eps: float = 0.0  # see `pixel_norm`

    @nn.compact
    def __call__(self, t: Any, condition: Condition) -> jax.Array:
        """The code of time and condition."""
        h = KeptFourier(self.fourier, name="fourier")(t) if self.kept else mp_fourier(t, self.fourier)
        c = MPDense(self.features, self.dtype, self.eps, name="time")(h)
        items = []
        if self.num_classes:
            label = MPEmbedding(self.num_classes, self.features, self.dtype, self.zero_label, self.eps, name="label")
            items.append(label(condition.label))
        if self.vector_size:  # of unknown size, and often zero: its direction, with a one beside it
            v = pixel_norm(with_ones(jnp.asarray(condition.vector).astype(self.dtype)), self.eps)
            items.append(MPDense(self.features, self.dtype, self.eps, name="vector")(v))
        for item in items:
            c = mp_sum(c, item.reshape(item.shape[:1] + (1,) * (c.ndim - 2) + item.shape[1:]), self.share)
        return mp_silu(c)


class CosineAttention(nn.Module):
    """Self-attention of normalised queries, keys and values.   softmax(sqrt(D) cos(q, k)) v / rms(v) W / |W|

    The logits are bounded by sqrt(D) whatever the weights are. A mean of values is smaller than the values: the result has
    at most unit magnitude. Taps: `logits`, `weights`, `qkv/out`, `out/out`.
    Args: x: [B, T, d].   Returns: [B, T, d].
    Raises: ValueError: d not divisible by heads.

    Example:
        >>> v = jax.eval_shape(CosineAttention(2).init, jax.random.key(0), jnp.zeros((1, 4, 8)))
        >>> v["params"]["qkv"]["kernel"].shape
        (8, 24)

    Reference: arXiv:2312.02696, Appendix B.
    """

    heads: int
    dtype: Any = jnp.float32
    eps: float = 0.0  # see `pixel_norm`

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Mix x with itself."""
        d = x.shape[-1]
        if d % self.heads:
            raise ValueError(f"attention needs a width divisible by heads; got width {d} and heads={self.heads}")
        qkv = MPDense(3 * d, self.dtype, self.eps, name="qkv")(x)
        parts = jnp.split(qkv.reshape(*x.shape[:2], 3 * self.heads, d // self.heads), 3, axis=2)
        q, k, v = (pixel_norm(a, self.eps) for a in parts)
        logits = Tap(name="logits")(logits_of(q * (d // self.heads) ** -0.5, k))
        weights = Tap(name="weights")(softmax(logits))
        return MPDense(d, self.dtype, self.eps, name="out")(weighted(weights, v).reshape(x.shape))
