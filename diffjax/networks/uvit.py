"""U-ViT: a transformer of which every input is a token, with long skips from the first half of its blocks to the second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.conditions import condition_of, read_state, read_time
from diffjax.networks.convolution import Conv
from diffjax.networks.dit import check_patch, patches, unpatches
from diffjax.networks.embeddings import UNIT, Frequencies, LabelEmbedding, grid_positions, sinusoids
from diffjax.networks.joint import JOINT, JointAttention
from diffjax.networks.layers import Dense, LayerNorm, at_least_float32, rematerialised
from diffjax.networks.mmdit import THOUSAND
from diffjax.networks.partition import COLUMN, ROW, Rules, constrain
from diffjax.networks.positions import Learned, LearnedTable, Rope, Table
from diffjax.networks.taps import Tap


def gelu(x: Any) -> jax.Array:
    """The exact GELU.   x Phi(x)"""
    return nn.gelu(x, approximate=False)


class UViTBlock(nn.Module):
    """A block of a vision transformer; with a skip, the two are joined first.   x <- [x; skip] W;   x + f(norm(x))"""

    width: int
    heads: int
    expand: int
    qk_norm: bool
    act: Callable[[Any], Any]
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, skip: Any, mask: Any, angles: Any) -> jax.Array:
        """One block."""
        if skip is not None:
            x = Dense(self.width, dtype=self.dtype, name="join")(jnp.concatenate([x, skip], axis=-1))
        attention = JointAttention(self.heads, self.qk_norm, bias=False, dtype=self.dtype, name="attention")
        (h,) = attention((LayerNorm(1e-6, name="norm_attention")(x),), mask, angles)
        h = Dense(self.width, dtype=self.dtype, name="project")(h)
        x = constrain(x + Tap(name="attended")(h), "batch", None, None)
        h = Dense(self.expand * self.width, dtype=self.dtype, name="hidden")(LayerNorm(1e-6, name="norm_mlp")(x))
        h = self.act(constrain(h, "batch", None, "wide"))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        h = Dense(self.width, dtype=self.dtype, name="out")(h)
        return Tap(name="block")(constrain(x + Tap(name="mixed")(h), "batch", None, None))


class UViT(nn.Module):
    """A transformer of patches, time, label, vector and text as tokens, whose block i skips to block depth - 1 - i.

    [B, H, W, C] -> [B, H, W, C], for sizes divisible by `patch`. Every token that is no patch has a learned position.

    Conditions: label, vector, tokens (one token each, and L), image by channels. Taps: `block_i/{attended,mixed,block}`,
    `.../attention/{q,k,v,logits,weights}`, `skip_i` as its receiver sees it. The output starts at zero.
    Args of a call: x: [B, H, W, C].   t: scalar or [B].   train: use dropout.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: an even depth; more tokens than token_length; H or W not divisible by patch; width by heads; a grid
        that `positions` refuses; shapes or conditions that do not fit.

    Example:
        >>> net = UViT(width=8, depth=3, heads=2)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
        >>> v["params"]["block_2"]["join"]["kernel"].shape
        (16, 8)

    Reference: Bao et al. 2022, arXiv:2209.12152, section 3.
    """

    width: int = 64
    depth: int = 5  # odd: as many blocks before the middle one as after it
    heads: int = 4
    patch: int = 2
    expand: int = 4
    num_classes: int = 0
    vector_size: int = 0
    token_size: int = 0
    token_length: int = 77  # text tokens that have a position; fewer may be given
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    qk_norm: bool = False
    positions: Table | None = grid_positions  # added to the patches, see `positions`
    rope: Rope | None = None  # of the patches; other tokens do not turn
    conv: bool = True  # end with a convolution of 3 x 3 pixels
    frequencies: Frequencies = UNIT
    act: Callable[[Any], Any] = gelu
    dropout: float = 0.0
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (*JOINT, (r"join/(kernel|bias)$", COLUMN), (r"decode/kernel$", ROW))

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        b, h, w, channels = x.shape
        p = self.patch
        if self.depth % 2 == 0:
            raise ValueError(f"depth must be odd: blocks before and after a middle one; got {self.depth}")
        check_patch(self, x, p)
        condition = condition_of(self, cond, x)
        z = condition.joined(x, self.dtype)
        z = Dense(self.width, dtype=self.dtype, name="in")(patches(z, p))
        if self.positions is not None:
            z = z + jnp.asarray(self.positions(h // p, w // p, self.width), self.dtype)[None]
        extra = self._extra(read_time(t, x), condition)
        n = extra.shape[1]
        mask = angles = None
        if condition.mask is not None:
            rest = jnp.ones((b, n - condition.mask.shape[1] + z.shape[1]), bool)
            mask = jnp.concatenate([rest[:, : n - condition.mask.shape[1]], condition.mask, rest[:, -z.shape[1] :]], 1)
        if self.rope is not None:
            angles = jnp.asarray(self.rope(h // p, w // p, self.width // self.heads))
            angles = jnp.concatenate([jnp.zeros((n, angles.shape[1]), angles.dtype), angles])
        z = constrain(jnp.concatenate([extra, z], axis=1), "batch", None, None)
        fields = dict(
            width=self.width,
            heads=self.heads,
            expand=self.expand,
            qk_norm=self.qk_norm,
            act=self.act,
            dropout=self.dropout,
            train=train,
            dtype=self.dtype,
        )
        block, skips = rematerialised(UViTBlock, self.remat), []
        for i in range(self.depth):
            j = self.depth - 1 - i
            skip = Tap(name=f"skip_{j}")(skips.pop()) if i > j else None
            z = block(**fields, name=f"block_{i}")(z, skip, mask, angles)
            if i < j:
                skips.append(z)
        out = self.out_channels or channels
        zero = not self.conv
        y = Dense(p * p * out, zero=zero, dtype=self.dtype, name="decode")(LayerNorm(1e-6, name="norm")(z[:, n:]))
        y = unpatches(y, p, h, w)
        if self.conv:
            y = Conv(out, zero=True, dtype=self.dtype, name="out")(y)
        return y.astype(at_least_float32(x.dtype))

    def _extra(self, t: Any, condition: Any) -> Any:
        """The tokens that are no patches, with their positions: time, label, vector, text.   [B, n, d]"""
        tokens = [sinusoids(t, self.width, self.frequencies).astype(self.dtype)]
        if self.num_classes:
            tokens.append(LabelEmbedding(self.num_classes, self.width, self.dtype, name="label")(condition.label))
        if self.vector_size:
            v = jnp.asarray(condition.vector).astype(self.dtype)
            tokens.append(Dense(self.width, dtype=self.dtype, name="vector")(v))
        z = jnp.stack(tokens, axis=1)
        n = z.shape[1]
        if self.token_size:
            length = condition.tokens.shape[1]
            if length > self.token_length:
                raise ValueError(f"this UViT has positions for token_length={self.token_length} tokens; got {length}")
            text = Dense(self.width, dtype=self.dtype, name="text")(condition.tokens.astype(self.dtype))
            z, n = jnp.concatenate([z, text], axis=1), n + self.token_length
        table = LearnedTable(n, self.width, name="extra_positions")()
        return z + table[: z.shape[1]].astype(self.dtype)[None]


# Layers, width and heads: arXiv:2209.12152, Table 1, and the sizes of its released configurations: learned positions of
# 16 x 16 patches, 1000 classes and none. S/2 is for 32 x 32 pixels, M/4 and L/4 for 64 x 64, L/2 and H/2 for latents of
# 32 x 32 x 4; H has no convolution at the end. The deep S has 17 layers.
SIZES = {"s": (512, 13, 8), "s-deep": (512, 17, 8), "m": (768, 17, 12), "l": (1024, 21, 16), "h": (1152, 29, 16)}
PRESETS = {
    f"uvit-{name}/{patch}": (
        UViT,
        dict(
            width=width,
            depth=depth,
            heads=heads,
            patch=patch,
            conv=name != "h",
            positions=Learned(16, 16, resize=True),
            frequencies=THOUSAND,
        ),
    )
    for name, (width, depth, heads) in SIZES.items()
    for patch in (2, 4)
}
