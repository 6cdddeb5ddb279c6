"""Signals as functions of coordinates: grids read between their points, and a network of what is read there.

Coordinates lie in [-1, 1]; axis k of a coordinate goes with axis k of the grid, and the points of a grid are the centres
of its cells, `(2 i + 1) / n - 1`, whatever its size: grids of different sizes cover the same square.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

PLANES = ((0, 1), (0, 2), (1, 2))  # the axes of space that each of three planes spans
HATS = 256  # grid points up to which all of them are weighted, and none gathered


def cell_centres(*shape: int) -> jax.Array:
    """The coordinates of the points of a grid, in order.   [prod(shape), len(shape)]

    Example:
        >>> cell_centres(1, 2).tolist()
        [[0.0, -0.5], [0.0, 0.5]]
    """
    axes = [(2 * jnp.arange(n, dtype=jnp.float32) + 1) / n - 1 for n in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))


def interpolate(grid: Any, coords: Any) -> jax.Array:
    """Bilinear interpolation of a grid of vectors.   sum_ij hat(y - i) hat(x - j) grid_ij,  hat(u) = max(0, 1 - |u|)

    Exact for functions that are affine between the outermost points; beyond these, the value at the border. On small
    grids this is one product with the matrix of all weights (the gradient of a gather is up to six times slower on a CPU),
    on others four points are gathered.
    Args: grid: [B, H, W, C].   coords: [N, 2], the same for all items, or [B, N, 2], in [-1, 1].
    Returns: [B, N, C].
    Raises: ValueError: other shapes.

    Example:
        >>> grid = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> interpolate(grid, jnp.array([[-0.5, -0.5], [0.0, 0.0], [0.5, 0.0]]))[0, :, 0].tolist()
        [0.0, 1.5, 2.5]
    """
    grid = jnp.asarray(grid)
    coords = _check_coords(coords, grid, 2)
    b, h, w, c = grid.shape
    flat = grid.reshape(b, h * w, c)
    one = _weigh if h * w <= HATS else _gather
    return jax.vmap(lambda f, at: one(f, at, h, w), (0, None if coords.ndim == 2 else 0))(flat, coords)


def _place(coords: Any, n: int) -> Any:
    """Where a coordinate is among the n points of an axis, in [0, n - 1]."""
    return jnp.clip((coords + 1) * (n / 2) - 0.5, 0, n - 1)


def _weigh(flat: Any, coords: Any, h: int, w: int) -> Any:
    hat = lambda at, n: jnp.maximum(0, 1 - jnp.abs(at[:, None] - jnp.arange(n, dtype=at.dtype)[None]))
    weights = hat(_place(coords[:, 0], h), h)[:, :, None] * hat(_place(coords[:, 1], w), w)[:, None]
    return weights.reshape(-1, h * w).astype(flat.dtype) @ flat


def _gather(flat: Any, coords: Any, h: int, w: int) -> Any:
    corners = []
    for axis, n in ((0, h), (1, w)):
        at = _place(coords[:, axis], n)
        low = jnp.clip(jnp.floor(at), 0, max(n - 2, 0))
        i = low.astype(jnp.int32)
        corners.append(((i, 1 - (at - low)), (jnp.minimum(i + 1, n - 1), at - low)))
    rows, columns = corners
    return sum((fy * fx)[:, None].astype(flat.dtype) * flat[y * w + x] for y, fy in rows for x, fx in columns)


def interpolate_planes(planes: Any, coords: Any) -> jax.Array:
    """A function of space from three planes: each is read at the projection of the point on it.   sum_k plane_k(P_k c)

    Args: planes: three grids [B, H, W, C], of the axes (0, 1), (0, 2) and (1, 2).   coords: [N, 3] or [B, N, 3].
    Returns: [B, N, C].
    Raises: ValueError: not three planes; other shapes.

    Reference: Park et al. 2024, arXiv:2401.12517; planes: Chan et al. 2021, arXiv:2112.07945.
    """
    if len(planes) != len(PLANES):
        raise ValueError(f"planes must be three grids, of the axes {PLANES}; got {len(planes)}")
    coords = _check_coords(coords, jnp.asarray(planes[0]), 3)
    project = lambda axes: jnp.stack([coords[..., k] for k in axes], -1)
    return sum(interpolate(plane, project(axes)) for plane, axes in zip(planes, PLANES, strict=True))


def _check_coords(coords: Any, grid: Any, dimensions: int) -> jax.Array:
    coords = jnp.asarray(coords)
    fits = coords.ndim in (2, 3) and coords.shape[-1] == dimensions and jnp.issubdtype(coords.dtype, jnp.floating)
    if not fits or (coords.ndim == 3 and coords.shape[0] != grid.shape[0]):
        raise ValueError(
            f"coords must be floats [N, {dimensions}] or [{grid.shape[0]}, N, {dimensions}], in [-1, 1]; got "
            f"{coords.dtype} of shape {coords.shape}"
        )
    if grid.ndim != 4:
        raise ValueError(f"a grid must be [B, H, W, C]; got shape {grid.shape}")
    return coords
