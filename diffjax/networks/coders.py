"""The convolutional encoder and decoder of the autoencoders of latent diffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from diffjax.networks.attention import logits_of, softmax, weighted
from diffjax.networks.components import fold, unfold
from diffjax.networks.convolution import Conv, ConvForm
from diffjax.networks.layers import Dense, GroupNorm, rematerialised
from diffjax.networks.partition import constrain
from diffjax.networks.resample import double
from diffjax.networks.taps import Tap


class SpatialNorm(nn.Module):
    """Group normalisation, scaled and shifted place by place by a coarser grid.   norm(x) (W z + b) + W' z + b'

    Args: x: [B, H, W, c].   side: z, [B, H / f, W / f, d], repeated f times.
    Reference: Zheng et al. 2022, arXiv:2209.09002.
    """

    groups: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, side: Any) -> Any:
        """Normalise x; the dtype stays."""
        c = x.shape[-1]
        side = double(side.astype(self.dtype), (x.shape[1] // side.shape[1], x.shape[2] // side.shape[2]))
        scale, shift = (Dense(c, dtype=self.dtype, name=name)(side) for name in ("scale", "shift"))
        return GroupNorm(self.groups, name="norm")(x) * scale.astype(x.dtype) + shift.astype(x.dtype)


def normalise(net: Any, name: str, x: Any, side: Any) -> Any:
    """Group normalisation, or that by a side where there is one."""
    if side is None:
        return GroupNorm(net.groups, name=name)(x)
    return SpatialNorm(net.groups, net.dtype, name=name)(x, side)


class Block(nn.Module):
    """A residual block without time.   skip(x) + Conv(act(norm(Conv(act(norm(x))))))"""

    features: int
    groups: int | None
    act: Callable[[Any], Any]
    form: ConvForm | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, side: Any = None) -> Any:
        """One block; the norms of a decoder may read a side."""
        n = self.features
        h = self.act(normalise(self, "norm_in", x, side))
        h = constrain(Conv(n, form=self.form, dtype=self.dtype, name="conv_in")(h), "batch", ..., "wide")
        h = self.act(normalise(self, "norm_out", h, side))
        h = Conv(n, form=self.form, zero=True, dtype=self.dtype, name="conv_out")(h)
        if x.shape[-1] != n:
            x = Dense(n, dtype=self.dtype, name="skip")(x)
        return Tap(name="block")(constrain(x + Tap(name="residual")(h), "batch", ...))


class PixelAttention(nn.Module):
    """Attention of all pixels to all, with one head.   x + softmax(q k^T / sqrt(c)) v W,  q, k, v of norm(x)"""

    groups: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, side: Any = None) -> Any:
        """Mix the pixels of x [B, H, W, c]."""
        c = x.shape[-1]
        h = normalise(self, "norm", x, side).reshape(x.shape[0], -1, 1, c)
        q, k, v = (Tap(name=n)(Dense(c, dtype=self.dtype, name=f"{n}_in")(h)) for n in "qkv")
        weights = Tap(name="weights")(softmax(Tap(name="logits")(logits_of(q * c**-0.5, k))))
        h = Dense(c, zero=True, dtype=self.dtype, name="out")(weighted(weights, v))
        return x + h.reshape(x.shape)


class Encoder(nn.Module):
    """Pictures to a grid `patch` 2^(levels - 1) times coarser.   [B, H, W, C] -> [B, h, w, out]"""

    widths: tuple[int, ...]
    blocks: int
    out: int
    attention: tuple[int, ...]
    middle_attention: bool
    groups: int | None
    act: Callable[[Any], Any]
    patch: int
    form: ConvForm | None
    remat: str
    dtype: Any
    act_out: Callable[[Any], Any] | None = None  # before the last convolution, default `act`

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """The features of x."""
        block, attend = blocks_of(self)
        h = fold(x.astype(self.dtype), self.patch)
        h = Conv(self.widths[0], form=self.form, dtype=self.dtype, name="in")(h)
        for i, n in enumerate(self.widths):
            for j in range(self.blocks):
                h = block(n, f"down_{i}_{j}")(h)
                if i in self.attention:
                    h = attend(f"attention_{i}_{j}")(h)
            if i < len(self.widths) - 1:  # a zero column on the right and a zero row below, none on the other sides
                h = Conv(n, stride=2, before=0, form=self.form, dtype=self.dtype, name=f"halve_{i}")(h)
        h = block(self.widths[-1], "middle_0")(h)
        if self.middle_attention:
            h = attend("middle_attention")(h)
        h = block(self.widths[-1], "middle_1")(h)
        h = (self.act_out or self.act)(GroupNorm(self.groups, name="norm_out")(h))
        return Conv(self.out, form=self.form, dtype=self.dtype, name="out")(h)


class Decoder(nn.Module):
    """The grid back to pictures.   [B, h, w, c] -> [B, H, W, out]"""

    widths: tuple[int, ...]
    blocks: int
    out: int
    attention: tuple[int, ...]
    middle_attention: bool
    groups: int | None
    act: Callable[[Any], Any]
    patch: int
    form: ConvForm | None
    remat: str
    dtype: Any
    act_out: Callable[[Any], Any] | None = None  # before the last convolution, default `act`

    @nn.compact
    def __call__(self, z: Any, side: Any = None) -> Any:
        """The picture of z; all norms read the side [B, h, w, d] if there is one, see `SpatialNorm`."""
        block, attend = blocks_of(self)
        h = Conv(self.widths[-1], form=self.form, dtype=self.dtype, name="in")(z.astype(self.dtype))
        h = block(self.widths[-1], "middle_0")(h, side)
        if self.middle_attention:
            h = attend("middle_attention")(h, side)
        h = block(self.widths[-1], "middle_1")(h, side)
        for i, n in reversed(tuple(enumerate(self.widths))):
            for j in range(self.blocks + 1):
                h = block(n, f"up_{i}_{j}")(h, side)
                if i in self.attention:
                    h = attend(f"attention_{i}_{j}")(h, side)
            if i:
                h = Conv(n, form=self.form, dtype=self.dtype, name=f"double_{i}")(double(h))
        h = (self.act_out or self.act)(normalise(self, "norm_out", h, side))
        h = Conv(self.out * self.patch**2, form=self.form, dtype=self.dtype, name="out")(h)
        return unfold(h, self.patch)


def blocks_of(net: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How an encoder or a decoder makes its blocks and its attention."""
    make = rematerialised(Block, net.remat)
    block = lambda n, name: make(n, net.groups, net.act, net.form, net.dtype, name=name)
    return block, lambda name: PixelAttention(net.groups, net.dtype, name=name)
