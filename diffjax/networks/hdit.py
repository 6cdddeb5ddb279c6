"""HDiT: an hourglass of transformers for pixels, with attention to the neighbourhood at the finer levels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffjax.networks.attention import Mixing, full, per_head
from diffjax.networks.conditions import Condition, condition_of, read_state, read_time
from diffjax.networks.dit import check_patch, patches, unpatches
from diffjax.networks.embeddings import UNIT, Features, LabelEmbedding, sinusoids
from diffjax.networks.layers import Dense, RMSNorm, at_least_float32, mark_layer, repeat
from diffjax.networks.neighborhood import Neighborhood
from diffjax.networks.partition import ATTENTION, BLOCK, FILM, GATE, Rules, constrain
from diffjax.networks.positions import rotate
from diffjax.networks.taps import Tap
from diffjax.networks.uvit import gelu


class Level(NamedTuple):
    """Blocks of one resolution, before and after those that are coarser.

    Args: width: of the tokens.   depth: blocks on the way down, and as many on the way up; of the last level, in all.
    mixing: of attention, `Neighborhood(kernel)` or `full`.
    """

    width: int
    depth: int
    mixing: Mixing = full


class Mapping(NamedTuple):
    """The network that makes one code of time, label and vector.   Args: width; depth: its blocks."""

    width: int = 256
    depth: int = 2


@dataclasses.dataclass(frozen=True)
class CentredRope:
    """Axial rotary positions in a picture that spans [-1, 1], so that every level of an hourglass has the same places.

    A quarter of the pairs of features turn with the row and a quarter with the column; the longer side of the grid spans
    [-1, 1].   angle_i = w_i p,   w_i from `low`, evenly in log, up to but not at `high`
    Args of a call: height, width: of the grid.   size: of a head.
    Returns: angles [height width, size / 2] float32, for `rotate`.
    Raises: ValueError: a head that is no multiple of 8.

    Example:
        >>> (CentredRope()(2, 2, 8)[:, 2] / np.pi).tolist()
        [-0.5, -0.5, 0.5, 0.5]

    Reference: Crowson et al. 2024, arXiv:2401.11605.
    """

    low: float = math.pi
    high: float = 10 * math.pi

    def __call__(self, height: int, width: int, size: int) -> np.ndarray:
        """The angles of a grid."""
        if size % 8:
            raise ValueError(f"rotary positions of half of the features need heads of a multiple of 8; got {size}")
        n = size // 8
        w = self.low * (self.high / self.low) ** (np.arange(n) / n)
        places = lambda count: (2 * np.arange(count) + 1 - count) / max(height, width)
        row, column = np.meshgrid(places(height), places(width), indexing="ij")
        still = np.zeros((height * width, size // 4))
        return np.concatenate([still, row.reshape(-1, 1) * w, column.reshape(-1, 1) * w], 1).astype(np.float32)


class AdaRMSNorm(nn.Module):
    """Division by the root mean square, and a scale that the code sets.   (1 + c W) x / sqrt(mean(x^2) + 1e-6),   W = 0 at first"""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, c: Any) -> jax.Array:
        """Normalise x [B, T, d] for codes c [B, e]."""
        scale = Dense(x.shape[-1], zero=True, bias=False, dtype=self.dtype, name="film")(c)
        h = x.astype(at_least_float32(x.dtype))
        h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)
        return (h * (1 + scale[:, None].astype(h.dtype))).astype(x.dtype)


class CosineAttention(nn.Module):
    """Attention by angles, with a learned sharpness of each head.   softmax(s q k^T / (|q| |k|)) v W,   s = 10 at first

    Taps: `q`, `k`, `v` [B, T, H, D] as the mixing reads them, and those of the mixing.
    Args: x: [B, T, d].   angles: [T, D / 2].   grid: height and width of the tokens.   Returns: [B, T, d].
    """

    head: int
    mixing: Mixing = full
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, angles: Any, grid: tuple[int, int]) -> jax.Array:
        """Mix v."""
        d = x.shape[-1]
        heads = d // self.head
        y = Dense(3 * d, bias=False, init=per_head(heads, 3), dtype=self.dtype, name="qkv")(x)
        y = constrain(y.reshape(*y.shape[:2], heads, 3 * self.head), "batch", "tokens", "heads", None)
        q, k, v = jnp.split(y, 3, axis=-1)
        s = self.param("sharpness", nn.initializers.constant(10.0), (heads,), jnp.float32)
        wide = at_least_float32(self.dtype)

        def unit(a: Any) -> Any:
            h = a.astype(wide)
            return h * lax.rsqrt(jnp.square(h).sum(-1, keepdims=True) + 1e-6)

        q = rotate((unit(q) * s.astype(wide)[None, None, :, None]).astype(q.dtype), angles)
        k = rotate(unit(k).astype(k.dtype), angles)
        q, k, v = Tap(name="q")(q), Tap(name="k")(k), Tap(name="v")(v)
        y = self.mix(q, k, v, None, grid)
        y = constrain(constrain(y, "batch", "tokens", "heads", None).reshape(x.shape), "batch", "tokens", "wide")
        return Dense(d, zero=True, bias=False, dtype=self.dtype, name="out")(y)

    def mix(self, q: Any, k: Any, v: Any, mask: Any = None, grid: Any = None) -> jax.Array:
        """The mixing of values, to be changed from outside by `tapped(around={"PATH.mix": f})`."""
        return self.mixing(q, k, v, mask, grid)


class GatedBlock(nn.Module):
    """The feed-forward part of a block.   (gelu(x W_g) * x W_h) W_out,   W_out = 0 at first"""

    expand: int
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """What is to be added to the stream."""
        d = x.shape[-1]
        h, gate = (Dense(self.expand * d, bias=False, dtype=self.dtype, name=n)(x) for n in ("hidden", "gate"))
        h = h * gelu(gate)
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        return Dense(d, zero=True, bias=False, dtype=self.dtype, name="out")(h)


class HDiTBlock(nn.Module):
    """Attention and feed-forward, each after a norm that reads the code.   x + A(norm(x, c), angles);   x + F(norm(x, c))"""

    head: int
    mixing: Mixing
    grid: tuple[int, int]
    expand: int
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, layer: Any, c: Any, angles: Any) -> tuple[Any, None]:
        """One block; see `layers.repeat` for the form."""
        mark_layer(layer)
        h = AdaRMSNorm(self.dtype, name="norm_attention")(x, c)
        h = CosineAttention(self.head, self.mixing, self.dtype, name="attention")(h, angles, self.grid)
        x = constrain(x + Tap(name="attended")(h), "batch", "tokens", None)
        h = AdaRMSNorm(self.dtype, name="norm_mlp")(x, c)
        h = GatedBlock(self.expand, self.dropout, self.train, self.dtype, name="block_mlp")(h)
        return Tap(name="block")(constrain(x + Tap(name="mixed")(h), "batch", "tokens", None)), None


class Stage(nn.Module):
    """The blocks of one level, on the way down or up."""

    level: Level
    fields: Any  # of the blocks
    scan_layers: bool
    remat: str

    @nn.compact
    def __call__(self, x: Any, c: Any, angles: Any) -> Any:
        """Tokens after all blocks."""
        fields = dict(self.fields, mixing=self.level.mixing)
        return repeat(HDiTBlock, fields, self.level.depth, x, (c, angles), scan=self.scan_layers, remat=self.remat)


class MappingNetwork(nn.Module):
    """One code of time, label and vector, for all norms.   norm(blocks(norm(W features(t) + label + V vector)))"""

    size: Mapping
    num_classes: int
    vector_size: int
    frequencies: Features
    expand: int
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, t: Any, condition: Condition) -> jax.Array:
        """The code [B, width]."""
        width, depth = self.size
        features = self.frequencies(t, width) if callable(self.frequencies) else sinusoids(t, width, self.frequencies)
        c = Dense(width, bias=False, dtype=self.dtype, name="time")(features)
        if self.num_classes:
            c = c + LabelEmbedding(self.num_classes, width, self.dtype, name="label")(condition.label)
        if self.vector_size:
            v = jnp.asarray(condition.vector).astype(self.dtype)
            c = c + Dense(width, bias=False, dtype=self.dtype, name="vector")(v)
        c = RMSNorm(name="norm_in")(c)
        for i in range(depth):
            h = RMSNorm(name=f"norm_{i}")(c)
            c = c + GatedBlock(self.expand, self.dropout, self.train, self.dtype, name=f"block_{i}")(h)
        return constrain(RMSNorm(name="norm_out")(c), "batch", None)


class HDiT(nn.Module):
    """An hourglass diffusion transformer for images of sizes divisible by `patch` 2^(levels - 1).   [B, H, W, C] -> [B, H, W, C]

    Patches of 2 x 2 tokens are merged between levels and split again, and what was merged is mixed with what comes back,
    x <- f skip + (1 - f) split(x), f learned. With attention to neighbourhoods at all levels but the coarsest, the cost is
    linear in the number of pixels.
    Conditions: label and vector by the code of the norms, image by channels. Taps: `{down_i,up_i,middle}/block_j/{attended,
    mixed,block}` (`blocks/...` if scanned), `.../attention/{q,k,v,logits,weights}`, `skip_i` as the way up sees it. The
    output starts at zero.
    Args of a call: x: [B, H, W, C].   t: scalar or [B].   train: use dropout.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: no level; sizes not divisible; widths not divisible by head; shapes or conditions that do not fit.

    Example:
        >>> net = HDiT(levels=(Level(8, 1, Neighborhood(3)), Level(16, 1)), head=8, mapping=Mapping(8, 1))
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))
        >>> sorted(v["params"])
        ['code', 'down_0', 'in', 'merge_0', 'middle', 'norm', 'out', 'skip_0', 'split_0', 'up_0']

    Reference: Crowson et al. 2024, arXiv:2401.11605, section 4.
    """

    levels: tuple[Level, ...] = (Level(64, 1, Neighborhood(7)), Level(128, 2))
    mapping: Mapping = Mapping()
    head: int = 32  # features of a head
    patch: int = 2
    expand: int = 3
    num_classes: int = 0
    vector_size: int = 0
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    rope: CentredRope = CentredRope()
    frequencies: Features = UNIT
    dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (*ATTENTION, *BLOCK, *GATE, *FILM, (r"block_mlp/(hidden|gate)/kernel$", BLOCK[0][1]))

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        _, height, width, channels = x.shape
        if not self.levels:
            raise ValueError("HDiT needs at least one level; got levels=()")
        bad = [level.width for level in self.levels if level.width % self.head]
        if bad:
            raise ValueError(f"the widths of levels must be divisible by head={self.head}; got {bad}")
        whole = self.patch * 2 ** (len(self.levels) - 1)
        check_patch(self, x, whole)
        condition = condition_of(self, cond, x)
        parts = dict(expand=self.expand, dropout=self.dropout, train=train, dtype=self.dtype)
        conditions = dict(num_classes=self.num_classes, vector_size=self.vector_size, frequencies=self.frequencies)
        c = MappingNetwork(self.mapping, **conditions, **parts, name="code")(read_time(t, x), condition)
        dense = lambda n, name, **k: Dense(n, bias=False, dtype=self.dtype, name=name, **k)
        grids = [(height // self.patch // 2**i, width // self.patch // 2**i) for i in range(len(self.levels))]

        def stage(i: int, name: str) -> Any:
            fields = dict(head=self.head, grid=grids[i], **parts)
            angles = jnp.asarray(self.rope(*grids[i], self.head))
            module = Stage(self.levels[i], fields, self.scan_layers, self.remat, name=name)
            return lambda z: module(z, c, angles)

        z = dense(self.levels[0].width, "in")(patches(condition.joined(x, self.dtype), self.patch))
        z = constrain(z, "batch", "tokens", None)
        last, skips = len(self.levels) - 1, []
        for i in range(last):
            z = stage(i, f"down_{i}")(z)
            skips.append(z)
            z = patches(z.reshape(z.shape[0], *grids[i], z.shape[-1]), 2)
            z = constrain(dense(self.levels[i + 1].width, f"merge_{i}")(z), "batch", "tokens", None)
        z = stage(last, "middle")(z)
        for i in reversed(range(last)):
            z = dense(4 * self.levels[i].width, f"split_{i}")(z)
            z = unpatches(z, 2, *grids[i]).reshape(z.shape[0], -1, self.levels[i].width)
            share = self.param(f"skip_{i}", nn.initializers.constant(0.5), (1,), jnp.float32).astype(z.dtype)
            skip = Tap(name=f"skipped_{i}")(skips.pop())
            z = constrain(z + share[None, None] * (skip - z), "batch", "tokens", None)
            z = stage(i, f"up_{i}")(z)
        out = self.out_channels or channels
        y = dense(self.patch**2 * out, "out", zero=True)(RMSNorm(name="norm")(z))
        return unpatches(y, self.patch, height, width).astype(at_least_float32(x.dtype))


NEAR = Neighborhood(7)


def hourglass(widths: tuple[int, ...], depths: tuple[int, ...], near: int) -> tuple[Level, ...]:
    """Levels of which the first `near` attend to neighbourhoods of 7 x 7, the others to all."""
    return tuple(Level(w, d, NEAR if i < near else full) for i, (w, d) in enumerate(zip(widths, depths, strict=True)))


# Levels, patch and heads of 64: arXiv:2401.11605, Tables 7 and 8. Their mapping width of 768 is that of its feed-forward
# part: with codes of 256 all ten counts of parameters are those published, with codes of 768 none is.
SIZES = {"s": ((256, 512, 1024), 8), "m": ((320, 640, 1280), 12), "l": ((384, 768, 1536), 16)}
PRESETS = {
    f"hdit-{name}/{patch}": (
        HDiT,
        dict(levels=hourglass(widths[2 - near :], (2,) * near + (depth,), near), head=64, patch=patch),
    )
    for name, (widths, depth) in SIZES.items()
    for patch, near in ((4, 2), (8, 1), (16, 0))
}
PRESETS["hdit-ffhq-1024"] = (
    HDiT,
    dict(levels=hourglass((128, 256, 384, 768, 1024), (2, 2, 2, 2, 2), 3), head=64, patch=4),
)
