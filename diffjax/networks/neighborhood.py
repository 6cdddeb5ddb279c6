"""Neighbourhood attention: each token of a grid attends to a square window of fixed size, which stops at borders."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.networks.attention import full
from diffjax.networks.layers import at_least_float32
from diffjax.networks.partition import constrain
from diffjax.networks.taps import Tap


@dataclasses.dataclass(frozen=True)
class Neighborhood:
    """A `mixing`: token (i, j) attends to the `kernel` x `kernel` tokens around it; near a border, to those next to it.

    Every token has the same number of keys, as the window is moved inside where it would stick out. The grid is cut into
    tiles of queries that share the keys of all their windows, so all is products of fixed shapes, linear in the number of
    tokens. Taps: `logits`, `weights` [B, rows of tiles, columns, heads, queries, keys], where `logits` of keys outside
    the window are not masked yet. Windows as large as the grid are `attention.full`.
    Args: kernel: side of the window, odd.   tile: largest side of a tile; a divisor of the grid's side is taken.
    Raises: ValueError: kernel even or not positive; at the call, no grid, or one that does not fit the tokens.

    Example:
        >>> Neighborhood(3).windows(5, 5)[0, 0, :, 0].tolist()  # row 0 sees rows 0 to 2
        [True, True, True, False, False]

    Reference: Hassani et al. 2022, arXiv:2204.07143, section 3.
    """

    kernel: int = 7
    tile: int = 8

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0 or self.tile < 1:
            raise ValueError(
                f"a neighbourhood needs an odd kernel >= 1 and tile >= 1; got kernel={self.kernel}, tile={self.tile}"
            )

    def starts(self, n: int) -> np.ndarray:
        """The first token of the window of each of n tokens in a line, [n]."""
        return np.clip(np.arange(n) - self.kernel // 2, 0, max(n - self.kernel, 0))

    def windows(self, height: int, width: int) -> np.ndarray:
        """Which keys each token attends to.   bool [height, width, height, width]"""
        line = lambda n: (np.arange(n)[None] - self.starts(n)[:, None]) // self.kernel == 0
        return line(height)[:, None, :, None] & line(width)[None, :, None, :]

    def cut(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys of the tiles of a line of n tokens [tiles, keys], and which of them are in the window of which query."""
        side = max(s for s in range(1, min(self.tile, n) + 1) if n % s == 0)
        starts = self.starts(n).reshape(-1, side)
        count = min(int((starts[:, -1] - starts[:, 0]).max()) + self.kernel, n)
        keys = np.minimum(starts[:, :1], n - count) + np.arange(count)
        offset = keys[:, None] - starts[:, :, None]
        return keys, (offset >= 0) & (offset < self.kernel)

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None, grid: Any = None) -> jax.Array:
        """Mix v [B, h w, H, D] for the queries [B, h w, H, D], already scaled."""
        if mask is not None or grid is None or q.shape[1] != k.shape[1] or grid[0] * grid[1] != q.shape[1]:
            raise ValueError(
                f"Neighborhood mixes a grid of tokens with itself, without a mask: it needs grid=(height, width) of "
                f"{q.shape[1]} tokens and as many keys; got grid={grid} and {k.shape[1]} keys"
            )
        (h, w), (b, _, heads, size) = grid, q.shape
        if self.kernel >= max(h, w):
            return full(q, k, v)
        (rows, inside_rows), (columns, inside_columns) = self.cut(h), self.cut(w)
        (n, i, up), (m, j, across) = inside_rows.shape, inside_columns.shape
        seen = inside_rows[:, None, :, None, :, None] & inside_columns[None, :, None, :, None]

        def keys(x: Any) -> Any:  # [B, n, m, H, keys, D]; windows reach beyond what a device has of the rows
            x = constrain(x, "batch", None, "heads", None).reshape(b, h, w, heads, size)
            x = jnp.take(jnp.take(x, jnp.asarray(rows), axis=1), jnp.asarray(columns), axis=3)
            return x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(b, n, m, heads, up * across, size)

        q = q.reshape(b, n, i, m, j, heads, size).transpose(0, 1, 3, 5, 2, 4, 6).reshape(b, n, m, heads, i * j, size)
        logits = jnp.matmul(q, jnp.swapaxes(keys(k), -1, -2), preferred_element_type=at_least_float32(q.dtype))
        logits = Tap(name="logits")(logits)
        seen = jnp.asarray(seen.reshape(1, n, m, 1, i * j, up * across))
        weights = jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(logits.dtype).min), axis=-1)
        y = Tap(name="weights")(weights).astype(v.dtype) @ keys(v)
        return y.reshape(b, n, m, heads, i, j, size).transpose(0, 1, 4, 2, 5, 3, 6).reshape(b, h * w, heads, size)
