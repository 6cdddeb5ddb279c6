"""Local attention on a grid: each token attends to a circle around it, at a cost linear in the number of tokens.

`DiT(mixing=Circle(3))` has the parameters of `DiT()`: a trained transformer is converted by exchanging the field.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from diffjax.networks.attention import full, logits_of, softmax, weighted
from diffjax.networks.layers import at_least_float32
from diffjax.networks.partition import MEANING, constrain
from diffjax.networks.taps import Tap

ROWS = MEANING["tokens"][0]  # the mesh axis along which rows of the grid may be cut


@dataclasses.dataclass(frozen=True)
class Circle:
    """A `mixing` of `Attention`: token (i, j) attends to (i', j') with (i - i')^2 + (j - j')^2 < radius^2, and to text.

    What is before the `height * width` tokens of the grid is text, which attends to all and is attended to by all. The
    grid is cut into tiles of `tile` x `tile` queries that share the keys of the tile and of a border around it, so all is
    products of fixed shapes. Where rows are cut over devices (mesh axis `sequence`), borders come from the neighbours and
    nothing else is sent. Taps of the grid: `logits`, `weights` [B, rows of tiles, columns, heads, tile^2, text + keys],
    where `logits` of keys outside the circle are not masked yet; of the text, where there is one, `text_logits`, ...
    A circle that covers the grid is `attention.full`.
    Args: radius: > 0, in tokens; 1 is the token alone.   tile: side of a tile, default the fastest measured.
    Raises: ValueError: radius or tile not positive; at the call, no grid, or one that does not fit the tokens.

    Example:
        >>> Circle(3).keys_per_token(), Circle(1).keys_per_token()
        (25, 1)

    Reference: Liu et al. 2024, arXiv:2412.16112.
    """

    radius: float | int
    tile: int | None = None

    def __post_init__(self) -> None:
        if not self.radius > 0 or (self.tile is not None and self.tile < 1):
            raise ValueError(
                f"a circle needs radius > 0 and tile >= 1; got radius={self.radius}, tile={self.tile}. A radius of 1 is "
                "the token alone, one above the diagonal of the grid is full attention"
            )

    @property
    def reach(self) -> int:
        """The largest distance along a row or column."""
        return math.ceil(self.radius) - 1

    def keys_per_token(self) -> int:
        """How many tokens lie in the circle, far from borders."""
        return int(self.inside(1, 1, self.reach, self.reach).sum())

    def inside(self, rows: int, columns: int, up: int, left: int) -> np.ndarray:
        """Which keys are in the circle of which query of a tile.   bool [rows columns, (rows + 2 up) (columns + 2 left)]"""
        i = (np.arange(rows)[:, None] + up - np.arange(rows + 2 * up)[None]) ** 2
        j = (np.arange(columns)[:, None] + left - np.arange(columns + 2 * left)[None]) ** 2
        near = i[:, None, :, None] + j[None, :, None, :] < self.radius**2
        return near.reshape(rows * columns, -1)

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None, grid: Any = None) -> jax.Array:
        """Mix v [B, S, H, D] for the queries [B, S, H, D]; mask [B, S] of the text or None."""
        if grid is None or q.shape[1] != k.shape[1] or not 0 < grid[0] * grid[1] <= q.shape[1]:
            raise ValueError(
                f"Circle mixes a grid of tokens with itself: it needs grid=(height, width) of at most {q.shape[1]} tokens "
                f"and as many keys; got grid={grid} and {k.shape[1]} keys"
            )
        text = q.shape[1] - grid[0] * grid[1]
        if self.radius**2 > (grid[0] - 1) ** 2 + (grid[1] - 1) ** 2:
            return full(q, k, v, mask)
        parts = [(a[:, :text], a[:, text:]) for a in (q, k, v)]
        keep = None if mask is None else mask[:, :text]
        (q_t, q), (k_t, k), (v_t, v) = parts
        y = self._on_grid(q, k, v, (k_t, v_t, keep), grid)
        if not text:
            return y
        k, v = (jnp.concatenate([constrain(a, "batch", None, "heads", None) for a in p], axis=1) for p in parts[1:])
        weights = softmax(Tap(name="text_logits")(logits_of(q_t, k)), mask)
        return jnp.concatenate([weighted(Tap(name="text_weights")(weights), v), y], axis=1)

    def _on_grid(self, q: Any, k: Any, v: Any, text: tuple[Any, Any, Any], grid: tuple[int, int]) -> jax.Array:
        """Attention of the grid to its circles and the text.   [B, h w, H, D]"""
        (h, w), (b, _, heads, size) = grid, q.shape
        devices = _devices()
        if h % devices:
            raise ValueError(f"{h} rows of tokens cannot be cut over {devices} devices; choose a divisor of {h}")
        # Milliseconds of forward / forward and gradient, two items of 32 x 32 tokens, 4 heads of 32, radius 3, 2 cores: tiles of
        # 1: 26 / 43, 2: 4 / 14, 4: 2 / 6, 8: 3 / 8; full attention 10 / 111.
        side = self.tile or max(4, self.reach)
        # tiles stay on one device; a last one that sticks out is padded where rows are not cut
        rows = min(side, h) if devices == 1 else max(s for s in range(1, side + 1) if h // devices % s == 0)
        columns = min(side, w)
        up, left = min(self.reach, h - 1), min(self.reach, w - 1)
        n, m = -(-h // rows), -(-w // columns)

        def tiles(x: Any, up: int, left: int) -> Any:  # -> [B, n, rows + 2 up, m, columns + 2 left, H, D]
            x = constrain(x.reshape(b, h, w, heads, size), "batch", "tokens", None, "heads", None)
            x = jnp.pad(x, ((0, 0), (0, n * rows - h), (0, m * columns - w), (0, 0), (0, 0)))
            x = _tile_rows(x, rows, up, devices)
            x = _cut(jnp.pad(x, (*[(0, 0)] * 3, (left, left), (0, 0), (0, 0))), 3, m, columns, left)
            return constrain(x, "batch", "tokens", None, None, None, "heads", None)

        flat = lambda x, order, *last: x.transpose(order).reshape(b, n, m, heads, *last)
        q = flat(tiles(q, 0, 0), (0, 1, 3, 5, 2, 4, 6), rows * columns, size)
        k = flat(tiles(k, up, left), (0, 1, 3, 5, 6, 2, 4), size, -1)
        v = flat(tiles(v, up, left), (0, 1, 3, 5, 2, 4, 6), -1, size)
        on_grid = lambda count, side, border, n: (  # [tiles, keys]: the border of the grid, and what was padded
            lambda i: (i >= 0) & (i < count)
        )(np.arange(n)[:, None] * side + np.arange(side + 2 * border)[None] - border)
        seen = on_grid(h, rows, up, n)[:, None, :, None] & on_grid(w, columns, left, m)[None, :, None, :]
        seen = seen.reshape(n, m, 1, 1, -1) & self.inside(rows, columns, up, left)
        # a padded query sees itself, so that its softmax is finite
        seen |= ~seen.any(-1, keepdims=True)
        precise = functools.partial(jnp.matmul, preferred_element_type=at_least_float32(q.dtype))
        logits, seen = precise(q, k), jnp.asarray(seen)[None]
        k_t, v_t, keep = text
        if k_t.shape[1]:
            to_text = precise(q, k_t.transpose(0, 2, 3, 1)[:, None, None])
            logits = jnp.concatenate([to_text, logits], axis=-1)
            keep = jnp.ones(k_t.shape[:2], bool) if keep is None else keep
            keep, seen = keep[:, None, None, None, None], jnp.broadcast_to(seen, (b, *seen.shape[1:]))
            keep = jnp.broadcast_to(keep, (*seen.shape[:-1], keep.shape[-1]))
            seen = jnp.concatenate([keep, seen], axis=-1)
        logits = Tap(name="logits")(logits)
        weights = jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(logits.dtype).min), axis=-1)
        weights = Tap(name="weights")(weights).astype(v.dtype)
        y = weights[..., k_t.shape[1] :] @ v
        if k_t.shape[1]:
            y = y + weights[..., : k_t.shape[1]] @ v_t.transpose(0, 2, 1, 3)[:, None, None]
        y = y.reshape(b, n, m, heads, rows, columns, size).transpose(0, 1, 4, 2, 5, 3, 6)
        y = y.reshape(b, n * rows, m * columns, heads, size)[:, :h, :w]
        return y.reshape(b, h * w, heads, size)


def _devices() -> int:
    """Over how many devices the mesh of the program that is being traced cuts rows."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto}
    return mesh.shape[ROWS] if ROWS in automatic else 1


def _cut(x: Any, axis: int, n: int, size: int, border: int) -> Any:
    """`n` overlapping pieces along an axis that has borders.   [.., n size + 2 border, ..] -> [.., n, size + 2 border, ..]"""
    more = -(-2 * border // size)  # tiles that a border covers
    width = [(0, 0)] * x.ndim
    width[axis] = (0, more * size - 2 * border)
    x = jnp.pad(x, width)
    x = x.reshape(*x.shape[:axis], n + more, size, *x.shape[axis + 1 :])
    pieces = [lax.slice_in_dim(x, j, j + n, axis=axis) for j in range(more + 1)]
    return lax.slice_in_dim(jnp.concatenate(pieces, axis=axis + 1), 0, size + 2 * border, axis=axis + 1)


def _tile_rows(x: Any, rows: int, up: int, devices: int) -> Any:
    """Rows in pieces with borders of `up` rows.   [B, h, ...] -> [B, h / rows, rows + 2 up, ...]"""
    if devices == 1 or up == 0:
        x = jnp.pad(x, ((0, 0), (up, up), *[(0, 0)] * (x.ndim - 2)))
        return _cut(x, 1, (x.shape[1] - 2 * up) // rows, rows, up)
    cut = PartitionSpec(None, ROWS)

    def local(x: Any) -> Any:
        return _cut(halo(x, up, devices), 1, x.shape[1] // rows, rows, up)

    return jax.shard_map(local, in_specs=cut, out_specs=cut, axis_names={ROWS})(x)


def halo(x: Any, border: int, devices: int, axis_name: str = ROWS) -> jax.Array:
    """The rows of this device with `border` rows of its neighbours on both sides, zeros beyond the first and the last.

    To be called inside `shard_map`. One message to each neighbour for every started multiple of the device's rows.
    Args: x: [B, h, ...] rows of this device.   border: rows.   devices: along `axis_name`.
    Returns: [B, border + h + border, ...].
    """
    h = x.shape[1]
    above, below = [], []
    for hop in range(1, -(-border // h) + 1):
        take = min(h, border - (hop - 1) * h)
        forth = [(i, i + hop) for i in range(devices - hop)]
        above.insert(0, lax.ppermute(x[:, h - take :], axis_name, forth))
        below.append(lax.ppermute(x[:, :take], axis_name, [(i, j) for j, i in forth]))
    return jnp.concatenate([*above, x, *below], axis=1)
