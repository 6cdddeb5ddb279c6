"""Embeddings: sinusoidal features of time, labels with a learned null, two-dimensional positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.networks.layers import Dense, fan_in_uniform
from diffjax.networks.partition import constrain

Frequencies = tuple[float, float]
UNIT: Frequencies = (1.0, 256.0)


def sinusoids(t: Any, size: int, frequencies: Frequencies = UNIT) -> jax.Array:
    """Sinusoidal features of a time code.   [cos(w_i t), sin(w_i t)],  w_i = low (high / low)^(i / (n - 1))

    The default range suits codes whose range is about one: `t` in [0, 1] and `log(sigma) / 4`. For `1000 t` give
    `(1e-3, 1)`. The lowest frequency should turn by about one radian over the whole range of `t`, the highest should
    resolve the smallest difference that matters: `1 / high` of a time unit.
    Args: t: any shape.   size: even, >= 2.   frequencies: `(low, high)` in radians per unit of `t`, 0 < low <= high.
    Returns: [*t.shape, size] float32, whatever the dtype of computation, because bfloat16 cannot hold the phase.
    Raises: ValueError: size odd or < 2; frequencies not positive or not increasing.

    Example:
        >>> sinusoids(0.0, 4).tolist()
        [1.0, 1.0, 0.0, 0.0]

    Reference: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    low, high = frequencies
    if size < 2 or size % 2:
        raise ValueError(f"size of time features must be even and at least 2; got {size}")
    if not 0 < low <= high:
        raise ValueError(f"frequencies must be (low, high) with 0 < low <= high; got {frequencies}")
    w = np.geomspace(low, high, size // 2).astype(np.float32)
    t = jnp.asarray(t, jnp.float32)[..., None]
    phase = t * w.reshape((1,) * (t.ndim - 1) + (-1,))
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


@dataclasses.dataclass(frozen=True)
class fourier:  # noqa: N801  (reads as a function: frequencies=fourier(16.0))
    """Random Fourier features of a time code, fixed by a seed.   [sin(2 pi w t), cos(2 pi w t)],  w ~ N(0, scale^2)

    Args: scale: of the frequencies.   seed: of the draw.
    Args of a call: t: any shape.   size: even.   Returns: [*t.shape, size] float32.

    Example:
        >>> fourier(16.0)(jnp.zeros(3), 4)[0, 2:].tolist()
        [1.0, 1.0]

    Reference: Tancik et al. 2020, arXiv:2006.10739; Song et al. 2021, arXiv:2011.13456, appendix H.
    """

    scale: float = 16.0
    seed: int = 0

    def __call__(self, t: Any, size: int) -> jax.Array:
        """The features at t."""
        w = self.scale * np.random.default_rng(self.seed).standard_normal(size // 2)
        t = jnp.asarray(t, jnp.float32)[..., None]
        phase = t * (2 * np.pi * w).astype(np.float32).reshape((1,) * (t.ndim - 1) + (-1,))
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


@dataclasses.dataclass(frozen=True)
class falling:  # noqa: N801  (reads as a function: frequencies=falling(shift=1))
    """Sinusoidal features in the order of weights that were trained on t = 0 ... 999.   w_i = period^(-i / (n - shift))

    The frequencies fall from one; the same set rises in `sinusoids`.
    Args: shift: 0 or 1 in what is published.   cosines_first: [cos(w t), sin(w t)], else [sin, cos].   period: the longest.
    Args of a call: t: any shape.   size: even, 2 n.   Returns: [*t.shape, size] float32.
    Raises: ValueError: size odd, or n = shift.

    Example:
        >>> falling()(jnp.zeros(1), 4).tolist()
        [[1.0, 1.0, 0.0, 0.0]]

    Reference: Ho et al. 2020, arXiv:2006.11239, appendix B (the embedding of arXiv:1706.03762, section 3.5).
    """

    shift: int = 0
    cosines_first: bool = True
    period: float = 10000.0

    def __call__(self, t: Any, size: int) -> jax.Array:
        """The features at t."""
        n = size // 2
        if size < 2 or size % 2 or n == self.shift:
            raise ValueError(
                f"size of time features must be even, at least 2, and not twice shift={self.shift}; got {size}"
            )
        w = (self.period ** (-np.arange(n) / (n - self.shift))).astype(np.float32)
        t = jnp.asarray(t, jnp.float32)[..., None]
        phase = t * w.reshape((1,) * (t.ndim - 1) + (-1,))
        parts = [jnp.cos(phase), jnp.sin(phase)]
        return jnp.concatenate(parts if self.cosines_first else parts[::-1], axis=-1)


@dataclasses.dataclass(frozen=True)
class kept_fourier:  # noqa: N801  (reads as a function: frequencies=kept_fourier(16.0))
    """As `fourier`, with frequencies that are kept with the parameters, `time/frequencies`, and not trained."""

    scale: float = 16.0

    def features(self, t: Any, w: Any) -> jax.Array:
        """The features at t for frequencies w.   [sin(2 pi w t), cos(2 pi w t)]"""
        t = jnp.asarray(t, jnp.float32)[..., None]
        phase = 2 * np.pi * t * jax.lax.stop_gradient(w).reshape((1,) * (t.ndim - 1) + (-1,))
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


# of the time: a range of sinusoids, (t, size) -> [*t.shape, size], or frequencies that are parameters
Features = Frequencies | Callable[[Any, int], Any] | kept_fourier


def grid_positions(height: int, width: int, size: int, max_period: float = 10000.0) -> np.ndarray:
    """Two-dimensional sine-cosine positions: half of the features tell the row, half the column.   [height * width,
    size]

    Args: height, width: of the grid of patches.   size: a multiple of 4.
    Raises: ValueError: size not a multiple of 4.

    Example:
        >>> grid_positions(2, 3, 8).shape
        (6, 8)

    Reference: Peebles & Xie 2022, arXiv:2212.09748, section 3.2.
    """
    return sincos_features(*np.mgrid[:height, :width].astype(np.float64), size, max_period)


def sincos_features(row: Any, column: Any, size: int, max_period: float = 10000.0) -> np.ndarray:
    """Sines and cosines of both coordinates.   [sin(w_i r), cos(w_i r), sin(w_i c), cos(w_i c)],  w_i = period^(-4 i / size)

    Args: row, column: of n places, any shape.   size: a multiple of 4.   Returns: [n, size] float32.
    Raises: ValueError: size not a multiple of 4.

    Example:
        >>> sincos_features(np.zeros(2), np.zeros(2), 4).tolist()
        [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]
    """
    if size % 4:
        raise ValueError(f"the width of a network with 2-D positions must be a multiple of 4; got {size}")
    w = max_period ** (-np.arange(size // 4) / (size // 4))
    row, column = (axis.reshape(-1, 1) * w for axis in (row, column))
    return np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1).astype(np.float32)


class TimeCode(nn.Module):
    """An embedding of the time code.   Dense(act(Dense(sinusoids(t) + W v)))

    Args: t: any shape, float.   more: added to the features, [*t.shape, size].   Returns: [*t.shape, features].

    Example:
        >>> v = jax.eval_shape(TimeCode(8).init, jax.random.key(0), jnp.zeros(3))
        >>> v["params"]["out"]["kernel"].shape
        (8, 8)
    """

    features: int
    size: int | None = None  # of the sinusoidal features; default as `features`
    frequencies: Features = UNIT
    act: Callable[[Any], Any] = nn.silu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Any, *more: Any) -> jax.Array:
        """Embed the time code."""
        size = self.size or self.features
        h = sum(more, self._features(t, size))
        h = Dense(self.features, dtype=self.dtype, name="hidden")(constrain(h, "batch", ...))
        h = constrain(h, "batch", ..., "wide")
        return constrain(Dense(self.features, dtype=self.dtype, name="out")(self.act(h)), "batch", ...)

    def _features(self, t: Any, size: int) -> jax.Array:
        if isinstance(self.frequencies, kept_fourier):
            init = nn.initializers.normal(self.frequencies.scale)
            return self.frequencies.features(t, self.param("frequencies", init, (size // 2,), jnp.float32))
        return self.frequencies(t, size) if callable(self.frequencies) else sinusoids(t, size, self.frequencies)


def rows_of(table: Any, label: Any) -> jax.Array:
    """The rows of a table that labels name, NaN where there is no such row.   [N, d], [B] -> [B, d]

    Example:
        >>> rows_of(jnp.ones((2, 1)), jnp.array([1, -1, 2])).ravel().tolist()
        [1.0, nan, nan]
    """
    rows = jnp.take(table, label, axis=0, mode="fill", fill_value=jnp.nan)
    rows = jnp.where((label >= 0)[..., None], rows, jnp.nan)  # negative indices would count from the end
    return constrain(rows, "batch", None)


class LabelEmbedding(nn.Module):
    """A table of `num_classes + 1` vectors; the last one, index `num_classes`, is the learned "no label".   y =
    E[label]

    Without `null` there are `num_classes`, and no "no label". A label outside gives NaN under jit, where it cannot be
    refused; `read_condition` refuses it elsewhere.
    Args: label: [B] integers.   Returns: [B, features].

    Example:
        >>> v = jax.eval_shape(LabelEmbedding(10, 4).init, jax.random.key(0), jnp.zeros(3, jnp.int32))
        >>> v["params"]["table"].shape
        (11, 4)
    """

    num_classes: int
    features: int
    dtype: Any = jnp.float32
    null: bool = True

    @nn.compact
    def __call__(self, label: Any) -> jax.Array:
        """Look the labels up."""
        # Rows of unit variance, so that label and time code enter their sum with the same size.
        rows = self.num_classes + self.null
        table = self.param("table", fan_in_uniform(fan_in=1), (rows, self.features), jnp.float32)
        return rows_of(table, label).astype(self.dtype)


class LinearLabel(nn.Module):
    """A linear map of the label as a vector of zeros and a one.   y = scale W[label] + b

    "No label", index `num_classes`, is the vector of zeros: it has no row of its own. A label outside [0, num_classes] gives
    NaN, as in `LabelEmbedding`.
    Args: label: [B] integers.   Returns: [B, features].

    Example:
        >>> v = {"params": {"kernel": jnp.ones((2, 1))}}
        >>> LinearLabel(2, 1, scale=3.0, bias=False).apply(v, jnp.array([0, 2])).ravel().tolist()
        [3.0, 0.0]
    """

    num_classes: int
    features: int
    scale: float = 1.0
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, label: Any) -> jax.Array:
        """Look the labels up."""
        kernel = self.param("kernel", fan_in_uniform(fan_in=1), (self.num_classes, self.features), jnp.float32)
        rows = rows_of(jnp.concatenate([kernel, jnp.zeros_like(kernel[:1])]), label)
        rows = rows if self.scale == 1.0 else self.scale * rows
        if self.bias:
            rows = rows + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)[None]
        return rows.astype(self.dtype)
