"""What the transformers of other libraries share: kinds of patches, time features and position tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from diffjax.interop import options
from diffjax.interop.kinds import Kind, qkv, same
from diffjax.interop.rules import Rule, joined, layer
from diffjax.networks import Learned, Sincos
from diffjax.networks.embeddings import Frequencies


def sigmoid_gelu(x: Any) -> jax.Array:
    """The approximation of the Gaussian error linear unit by a logistic function.   x sigmoid(1.702 x)"""
    return x * nn.sigmoid(1.702 * x)


# of the feed-forward part of their blocks
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu-approximate": nn.gelu,
    "gelu": options.gelu,
    "geglu-approximate": sigmoid_gelu,
    "linear-silu": nn.silu,
}
THOUSANDS: Frequencies = (1e-4, 1.0)  # of t = 0 ... 999, from the highest to the lowest frequency, both included
SINUSOIDS = 256  # features of the time, in all of them

# -------------------------------------------------------------------------------------------------------------- kinds


def _turned(a: Any) -> Any:
    return a.reshape(2, -1, *a.shape[1:])[:, ::-1].reshape(a.shape)


# A layer after cosines and sines whose frequencies fall, where ours rise.   [out, 2 n] <-> [2 n, out]
rising = Kind("rising", lambda a: _turned(a.T), lambda a: (_turned(a).T,))


@functools.cache
def pixels(p: int) -> Kind:
    """A convolution of squares of side p that do not overlap, as a dense layer of patches.   [d, C, p, p] <-> [p p C, d]"""
    write = lambda a: (a.reshape(p, p, -1, a.shape[1]).transpose(3, 2, 0, 1),)
    return Kind(f"pixels({p})", lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]), write)


@functools.cache
def packed_in(p: int) -> Kind:
    """A layer of patches whose numbers are sorted by channel, then pixel, as ours by pixel.   [d, C p p] <-> [p p C, d]"""
    read = lambda a: a.reshape(a.shape[0], -1, p, p).transpose(2, 3, 1, 0).reshape(-1, a.shape[0])
    write = lambda a: (a.reshape(p, p, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1),)
    return Kind(f"packed_in({p})", read, write)


@functools.cache
def packed_out(p: int) -> Kind:
    """The same of a layer, or its bias, that gives patches.   [C p p, d] <-> [d, p p C]"""

    def read(a: Any) -> Any:
        return a.reshape(-1, p * p, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape).T

    def write(a: Any) -> tuple:
        return (a.T.reshape(p * p, -1, *a.T.shape[1:]).swapaxes(0, 1).reshape(a.T.shape),)

    return Kind(f"packed_out({p})", read, write, True)


def both(ours: str, theirs: str, kind: Kind) -> list[Rule]:
    """The rules of a layer whose bias is moved as its kernel is."""
    return joined(ours, (theirs,), kind)


# -------------------------------------------------------------------------------------------------------------- parts


def time_rules(ours: str, theirs: str) -> list[Rule]:
    """The rules of the code of the time."""
    return layer(f"{ours}/hidden", f"{theirs}.linear_1", rising) + layer(f"{ours}/out", f"{theirs}.linear_2")


def attention_rules(ours: str, theirs: str, heads: int, *, norm: bool = False, bias: bool = True) -> list[Rule]:
    """The rules of attention of a sequence to itself: projections with their norms, and the map of the output."""
    return projections(ours, theirs, heads, norm=norm, bias=bias) + layer(f"{ours}/out", f"{theirs}.to_out.0")


def projections(
    ours: str, theirs: str, heads: int, *, text: bool = False, norm: bool = False, bias: bool = True
) -> list[Rule]:
    """The rules of queries, keys and values with their norms; of the text, in attention of two streams, or of the image."""
    end = "_1" if text else ""
    names = [f"{theirs}.add_{a}_proj" if text else f"{theirs}.to_{a}" for a in "qkv"]
    found = joined(f"{ours}/qkv{end}", names, qkv(heads), bias=bias)
    scale = f"{theirs}.norm_added_" if text else f"{theirs}.norm_"
    return found + [Rule(f"{ours}/{a}_norm{end}/scale", (f"{scale}{a}.weight",), same) for a in "qk" if norm]


def mlp_rules(end: str, theirs: str) -> list[Rule]:
    """The rules of the feed-forward part of a block."""
    return layer(f"hidden{end}", f"{theirs}.net.0.proj") + layer(f"out{end}", f"{theirs}.net.2")


# ---------------------------------------------------------------------------------------------------------- positions


def positions_of(base: int, largest: int | None = None) -> Sincos:
    """Their positions: a grid of any size spans `base` units, or is cut from one of side `largest` that does."""
    if largest:
        return Sincos(crop=largest, scale=base / largest, columns_first=True)
    return Sincos(fit=(base, base), columns_first=True)


def base_of(positions: Any) -> tuple[int, int | None]:
    """The inverse of `positions_of`.   Raises: ValueError: positions of another kind."""
    if isinstance(positions, Sincos):
        largest = positions.crop
        base = round(positions.scale * largest) if largest else (positions.fit or (0, 0))[0]
        if base and positions_of(base, largest) == positions:
            return base, largest
    raise ValueError(
        f"positions={positions!r} have no counterpart in the other library; accepted are Sincos(fit=(n, n), "
        "columns_first=True) and Sincos(crop=m, scale=n / m, columns_first=True)"
    )


def rows_of_table(side: int, base: int, size: int) -> list[np.ndarray]:
    """Their table of a square grid, row by row, with their rounding.   side x [side, size]"""
    place = np.arange(side, dtype=np.float32) / np.float32(side / base)
    phase = np.outer(place.astype(np.float64), 1.0 / 10000.0 ** (np.arange(size // 4) / (size / 4)))
    one = np.concatenate([np.sin(phase), np.cos(phase)], axis=1).astype(np.float32)
    return [np.concatenate([one, np.broadcast_to(row, one.shape)], axis=1) for row in one]


def table_of(side: int, base: int, size: int) -> np.ndarray:
    """The same as one array.   [1, side side, size]"""
    return np.concatenate(rows_of_table(side, base, size))[None]


def is_table(a: Any, side: int, base: int) -> bool:
    """Whether an array [1, side side, size] is that table, up to the precision of its dtype."""
    size = a.shape[-1]
    if a.shape != (1, side * side, size) or size % 4:
        return False
    limit = max(1e-5, float(ml_dtypes.finfo(a.dtype).eps))
    rows = zip(rows_of_table(side, base, size), a[0].reshape(side, side, size), strict=True)
    return all(float(np.abs(mine - np.asarray(row, np.float32)).max()) <= limit for mine, row in rows)


def fitted(positions: Any, table: Any, side: int, base: int) -> Any:
    """The positions for a stored table [1, side side, size]: those of the formula, or learned ones where it differs."""
    return positions if table is None or is_table(table, side, base) else Learned(side, side, crop=True)
