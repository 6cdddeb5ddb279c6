"""Positions of tokens on a grid, as values that a transformer is given: tables to add, and rotations of queries and keys.

A table is any function `(height, width, size) -> [height width, size]`; the transformer calls it inside its compact method,
so that it may own parameters, and adds it to its tokens. `embeddings.grid_positions` is one, `Sincos` and `Learned` make
others, None adds nothing. `Rope` gives angles by which `rotate` turns the pairs of features of queries and keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.networks.embeddings import sincos_features
from diffjax.networks.layers import at_least_float32, fan_in_uniform

Table = Callable[[int, int, int], Any]
Grid = tuple[int, int]


def coordinates(height: int, width: int, fit: Grid | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every cell of a grid, row by row.   i H / height, j W / width

    Args: fit: (H, W) of the grid of training: a grid of any size then spans the same range. None counts cells.
    Returns: two arrays [height width].

    Example:
        >>> coordinates(1, 4, fit=(1, 2))[1].tolist()
        [0.0, 0.5, 1.0, 1.5]

    Reference: Chen et al. 2023, arXiv:2306.15595 (position interpolation).
    """
    h, w = fit or (height, width)
    row, column = np.mgrid[:height, :width].astype(np.float64).reshape(2, -1)
    return row * (h / height), column * (w / width)


@dataclasses.dataclass(frozen=True)
class Sincos:
    """Sine-cosine positions with their coordinates scaled, stretched or cropped; `Sincos()` is `grid_positions`.

    Args: scale: factor on the coordinates.   fit: see `coordinates`.   crop: side of a larger square grid, of whose middle
        a smaller one is cut.   columns_first: whether the first half of the features tells the column.
    Args of a call: height, width: of the grid.   size: a multiple of 4.
    Returns: [height width, size] float32.
    Raises: ValueError: a grid larger than `crop`; a size that is no multiple of 4.

    Example:
        >>> bool(abs(Sincos(crop=4)(2, 2, 4)[0, 0] - np.sin(1.0)) < 1e-6)
        True

    Reference: Esser et al. 2024, arXiv:2403.03206, section 5.3.2 (positions for varying aspect ratios); its released
    networks crop from a grid of 192 scaled by 1 / 3.
    """

    scale: float = 1.0
    fit: Grid | None = None
    crop: int | None = None
    columns_first: bool = False

    def __call__(self, height: int, width: int, size: int) -> np.ndarray:
        """The table of a grid."""
        row, column = coordinates(height, width, self.fit)
        if self.crop is not None:
            if max(height, width) > self.crop:
                raise ValueError(
                    f"these positions are cut from a grid of {self.crop} x {self.crop} patches; got {height} x {width}. "
                    "Give Sincos a larger crop, or fit= to stretch"
                )
            row, column = row + (self.crop - height) // 2, column + (self.crop - width) // 2
        axes = (column, row) if self.columns_first else (row, column)
        return sincos_features(*(self.scale * a for a in axes), size)


class LearnedTable(nn.Module):
    """One learned vector per position.   [n, size]"""

    n: int
    size: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """The table."""
        return jnp.asarray(self.param("table", fan_in_uniform(fan_in=1, gain=0.02), (self.n, self.size), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Learned:
    """Learned positions of one grid, interpolated to others if `resize`.

    Args: height, width: of the grid that has parameters.   resize: bicubic interpolation for any other grid.   crop: a
        smaller grid is cut from the middle.
    Returns: of a call, [height width, size]; its parameter is `positions/table` of the network that calls it.
    Raises: ValueError: another grid, without `resize`; a larger one, with `crop` alone.

    Example:
        >>> class Net(nn.Module):
        ...     __call__ = nn.compact(lambda self: Learned(2, 3, resize=True)(4, 6, 8))
        >>> jax.eval_shape(Net().init_with_output, jax.random.key(0))[0].shape
        (24, 8)
    """

    height: int
    width: int
    resize: bool = False
    crop: bool = False

    def __call__(self, height: int, width: int, size: int) -> jax.Array:
        """The table of a grid, inside a compact method."""
        own = (self.height, self.width)
        inside = self.crop and height <= self.height and width <= self.width
        if (height, width) != own and not self.resize and not inside:
            raise ValueError(
                f"learned positions are for {self.height} x {self.width} patches; got {height} x {width}. Give "
                f"Learned({self.height}, {self.width}, resize=True) to interpolate them"
            )
        table = LearnedTable(self.height * self.width, size, name="positions")()
        if (height, width) == own:
            return table
        if inside:
            top, left = (self.height - height) // 2, (self.width - width) // 2
            return table.reshape(*own, size)[top : top + height, left : left + width].reshape(-1, size)
        table = jax.image.resize(table.reshape(*own, size), (height, width, size), "bicubic")
        return table.reshape(height * width, size)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Axial rotary positions: some pairs of features turn with the row, some with the column.   angle_i = w_i p

    The logits of two tokens then depend on the difference of their positions alone. The frequencies of an axis with n
    features are w_i = period^(-2 i / n).
    Args: features: how many features turn with the row and how many with the column, even; those left over come first and
        do not turn. Default half of them each.   period: > 1.   fit: see `coordinates`, for grids other than that of training.
    Args of a call: height, width: of the grid.   size: of a head.
    Returns: angles [height width, size / 2] float32, for `rotate`.
    Raises: ValueError: features that are odd or more than a head has; a head that is no multiple of 4, by default.

    Example:
        >>> Rope()(2, 3, 8)[:, 0].tolist()
        [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]

    Reference: Su et al. 2021, arXiv:2104.09864, Eq. 34; by axes: Heo et al. 2024, arXiv:2403.13298.
    """

    features: Grid | None = None
    period: float = 10000.0
    fit: Grid | None = None

    def __call__(self, height: int, width: int, size: int) -> np.ndarray:
        """The angles of a grid."""
        if self.features is None and size % 4:
            raise ValueError(f"axial rotary positions need heads of a multiple of 4 features; got heads of {size}")
        axes = self.features or (size // 2, size // 2)
        if any(n < 0 or n % 2 for n in axes) or sum(axes) > size or size % 2:
            raise ValueError(f"rotary features must be even and at most {size} in all, the size of a head; got {axes}")
        angles = [np.zeros((height * width, (size - sum(axes)) // 2))]
        for n, p in zip(axes, coordinates(height, width, self.fit), strict=True):
            angles.append(p[:, None] * self.period ** (-np.arange(n // 2) / max(n // 2, 1)))
        return np.concatenate(angles, axis=1).astype(np.float32)


def rotate(x: Any, angles: Any) -> jax.Array:
    """Turn neighbouring features as pairs.   (x_2i cos a - x_2i+1 sin a, x_2i sin a + x_2i+1 cos a)

    Args: x: [B, T, H, D].   angles: [T, D / 2] from `Rope`.
    Returns: [B, T, H, D], computed in float32, of the dtype of x.

    Example:
        >>> rotate(jnp.array([[[[1.0, 0.0]]]]), jnp.array([[np.pi / 2]])).round(3).ravel().tolist()
        [-0.0, 1.0]

    Reference: Su et al. 2021, arXiv:2104.09864, Eq. 34.
    """
    wide = at_least_float32(x.dtype)
    angles = jnp.asarray(angles, wide)[None, :, None]
    c, s = jnp.cos(angles), jnp.sin(angles)
    pairs = x.astype(wide).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(x.shape).astype(x.dtype)
