"""Autoencoders of pictures: the convolutional encoder and decoder of latent diffusion, with a Gaussian latent or a codebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import logits_of, softmax, weighted
from diffjax.networks.codebook import Codebook, Quantised
from diffjax.networks.codec import Posterior
from diffjax.networks.components import fold, linear_paths, unfold
from diffjax.networks.layers import Conv, ConvForm, Dense, GroupNorm, at_least_float32, rematerialised
from diffjax.networks.partition import RESIDUAL, Rules, constrain
from diffjax.networks.resample import double
from diffjax.networks.taps import Tap

CLIP = (-30.0, 20.0)  # of the log-variance, as in the released code of latent diffusion


# ------------------------------------------------------------------------------------------------------------- parts


class Block(nn.Module):
    """A residual block without time.   skip(x) + Conv(act(norm(Conv(act(norm(x))))))"""

    features: int
    groups: int | None
    act: Callable[[Any], Any]
    form: ConvForm | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """One block."""
        n = self.features
        h = self.act(GroupNorm(self.groups, name="norm_in")(x))
        h = constrain(Conv(n, form=self.form, dtype=self.dtype, name="conv_in")(h), "batch", ..., "wide")
        h = self.act(GroupNorm(self.groups, name="norm_out")(h))
        h = Conv(n, form=self.form, zero=True, dtype=self.dtype, name="conv_out")(h)
        if x.shape[-1] != n:
            x = Dense(n, dtype=self.dtype, name="skip")(x)
        return Tap(name="block")(constrain(x + Tap(name="residual")(h), "batch", ...))


class PixelAttention(nn.Module):
    """Attention of all pixels to all, with one head.   x + softmax(q k^T / sqrt(c)) v W,  q, k, v of norm(x)"""

    groups: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Mix the pixels of x [B, H, W, c]."""
        c = x.shape[-1]
        h = GroupNorm(self.groups, name="norm")(x).reshape(x.shape[0], -1, 1, c)
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

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """The features of x."""
        block, attend = _parts(self)
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
        h = self.act(GroupNorm(self.groups, name="norm_out")(h))
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

    @nn.compact
    def __call__(self, z: Any) -> Any:
        """The picture of z."""
        block, attend = _parts(self)
        h = Conv(self.widths[-1], form=self.form, dtype=self.dtype, name="in")(z.astype(self.dtype))
        h = block(self.widths[-1], "middle_0")(h)
        if self.middle_attention:
            h = attend("middle_attention")(h)
        h = block(self.widths[-1], "middle_1")(h)
        for i, n in reversed(tuple(enumerate(self.widths))):
            for j in range(self.blocks + 1):
                h = block(n, f"up_{i}_{j}")(h)
                if i in self.attention:
                    h = attend(f"attention_{i}_{j}")(h)
            if i:
                h = Conv(n, form=self.form, dtype=self.dtype, name=f"double_{i}")(double(h))
        h = self.act(GroupNorm(self.groups, name="norm_out")(h))
        h = Conv(self.out * self.patch**2, form=self.form, dtype=self.dtype, name="out")(h)
        return unfold(h, self.patch)


def _parts(net: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How an encoder or a decoder makes its blocks and its attention."""
    make = rematerialised(Block, net.remat)
    block = lambda n, name: make(n, net.groups, net.act, net.form, net.dtype, name=name)
    return block, lambda name: PixelAttention(net.groups, net.dtype, name=name)


def _check(net: Any, x: Any) -> Any:
    """A picture that fits.   Raises: ValueError: integers, another rank, sizes that do not divide, levels that are none."""
    name, levels = type(net).__name__, len(net.widths)
    factor = net.patch * 2 ** (levels - 1)
    if levels == 0 or net.blocks < 1 or any(not 0 <= i < levels for i in net.attention):
        raise ValueError(
            f"{name} needs at least one width, blocks >= 1 and attention at levels of widths; got {net.widths}, "
            f"blocks={net.blocks} and attention={net.attention}"
        )
    x = jnp.asarray(x)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} takes floating pictures [B, H, W, C]; got {x.dtype} {x.shape}. Encode the data first")
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"{name} with {levels} levels and patch={net.patch} needs height and width divisible by {factor}; got pictures "
            f"of shape {x.shape}. Pad them, or use fewer widths"
        )
    return x


# -------------------------------------------------------------------------------------------------------- the two


class KLAutoencoder(nn.Module):
    """The autoencoder of latent diffusion with a Gaussian latent.   [B, H, W, C] <-> [B, H / f, W / f, latent_channels]

    f = patch 2^(levels - 1). Level i works at H / (patch 2^i), downwards with `blocks` residual blocks, upwards with one
    more, two in the middle around an attention. Taps: `encoder/{down_i_j,middle_j}/{residual,block}`,
    `decoder/{middle_j,up_i_j}/...`, `.../{attention_i_j,middle_attention}/{q,k,v,logits,weights}`.
    Methods: `encode(x) -> Posterior`, log-variance clipped to [-30, 20]; `decode(z) -> x`; the call is
    `decode(encode(x).mean)`.
    Raises: ValueError: H or W not divisible by f; integers; levels that do not exist.

    Example:
        >>> net = KLAutoencoder(widths=(8, 16), blocks=1)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
        >>> v["params"]["quant"]["kernel"].shape
        (8, 8)

    Reference: Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G.
    """

    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    latent_channels: int = 4
    bottleneck: int | None = None  # channels where encoder and decoder meet the latent; default those of the latent
    attention: tuple[int, ...] = ()  # levels with attention after each block
    middle_attention: bool = True
    quant_conv: bool = True  # a linear map of each place after the encoder
    post_quant_conv: bool = True  # and one before the decoder
    out_channels: int = 3
    patch: int = 1  # pixels are folded into channels by squares of this side, which makes the first level cheaper
    linear: bool = False  # add linear maps of squares of f x f pixels to the mean of the latent and back, see below
    groups: int | None = None  # of the norms; default: of four channels or more, at most 32
    act: Callable[[Any], Any] = nn.silu
    conv: ConvForm | None = None
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = RESIDUAL

    def setup(self) -> None:
        """The parts."""
        self.encoder, self.decoder = _coders(self, 2)
        self.quant, self.post_quant = _maps(self, 2)
        self.linear_in, self.linear_out = linear_paths(self)

    def encode(self, x: Any) -> Posterior:
        """The Gaussian posterior of x."""
        x = _check(self, x)
        h = self.quant(self.encoder(x)).astype(at_least_float32(x.dtype))
        mean, log_variance = jnp.split(h, 2, axis=-1)
        return Posterior(mean + self.linear_in(x), jnp.clip(log_variance, *CLIP))

    def decode(self, z: Any) -> jax.Array:
        """The picture of the latent z."""
        z = jnp.asarray(z)
        return self.decoder(self.post_quant(z)).astype(at_least_float32(z.dtype)) + self.linear_out(z)

    def __call__(self, x: Any) -> jax.Array:
        """Encode and decode."""
        return self.decode(self.encode(x).mean)


class VQAutoencoder(nn.Module):
    """The same with a codebook: places of the latent are one of `codes` vectors.   [B, H, W, C] <-> [B, H / f, W / f] tokens

    Methods: `encode(x) -> Posterior`, the point before the codebook, in which a continuous latent model works; `decode(z)`,
    which quantises first; `quantise(z) -> Quantised`, `decode_tokens(tokens)`; `follow(z, tokens, decay)`, see `Codebook`.
    Taps and `Raises` are those of `KLAutoencoder`.

    Example:
        >>> net = VQAutoencoder(widths=(8, 16), blocks=1, codes=32)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
        >>> v["params"]["codebook"]["embedding"].shape
        (32, 4)

    Reference: Esser et al. 2021, arXiv:2012.09841, section 3.1; decoding with the codebook inside: Rombach et al. 2022,
    arXiv:2112.10752, section 3.1.
    """

    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    latent_channels: int = 4
    codes: int = 256
    average: bool = False  # codes as moving averages, see `Codebook`
    bottleneck: int | None = None
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    out_channels: int = 3
    patch: int = 1
    linear: bool = False
    groups: int | None = None
    act: Callable[[Any], Any] = nn.silu
    conv: ConvForm | None = None
    remat: str = "none"
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = RESIDUAL

    def setup(self) -> None:
        """The parts."""
        self.encoder, self.decoder = _coders(self, 1)
        self.quant, self.post_quant = _maps(self, 1)
        self.linear_in, self.linear_out = linear_paths(self)
        self.codebook = Codebook(self.codes, self.latent_channels, self.average)

    def encode(self, x: Any) -> Posterior:
        """The point that the codebook would quantise."""
        x = _check(self, x)
        return Posterior(self.quant(self.encoder(x)).astype(at_least_float32(x.dtype)) + self.linear_in(x))

    def quantise(self, z: Any) -> Quantised:
        """The nearest codes of z."""
        return self.codebook(z)

    def decode(self, z: Any) -> jax.Array:
        """The picture of the codes nearest to z; gradients pass straight through to z."""
        return self._picture(self.codebook(z).z)

    def decode_tokens(self, tokens: Any) -> jax.Array:
        """The picture of the codes with these numbers [B, h, w]."""
        return self._picture(self.codebook.lookup(tokens))

    def follow(self, z: Any, tokens: Any, decay: Any) -> jax.Array:
        """The loss that moves codes which are averages; see `Codebook.follow`."""
        return self.codebook.follow(z, tokens, decay)

    def __call__(self, x: Any) -> jax.Array:
        """Encode, quantise and decode."""
        return self.decode(self.encode(x).mean)

    def _picture(self, z: Any) -> jax.Array:
        return self.decoder(self.post_quant(z)).astype(at_least_float32(z.dtype)) + self.linear_out(z)


def _coders(net: Any, moments: int) -> tuple[Encoder, Decoder]:
    """Encoder and decoder of an autoencoder whose encoder gives that many numbers for each of the latent."""
    own = dict(
        attention=net.attention, middle_attention=net.middle_attention, groups=net.groups, act=net.act, patch=net.patch,
        form=net.conv, remat=net.remat, dtype=net.dtype,
    )  # fmt: skip
    inner = (net.bottleneck if net.quant_conv else None) or net.latent_channels
    encoder = Encoder(net.widths, net.blocks, moments * inner, **own)
    return encoder, Decoder(net.widths, net.blocks, net.out_channels, **own)


def _maps(net: Any, moments: int) -> tuple[Any, Any]:
    """The linear maps of each place between encoder and latent, and between latent and decoder."""
    inner = net.bottleneck or net.latent_channels
    quant = Dense(moments * net.latent_channels, dtype=net.dtype) if net.quant_conv else lambda h: h
    return quant, Dense(inner, dtype=net.dtype) if net.post_quant_conv else lambda z: z


# Widths, levels and codes from the configurations released with arXiv:2112.10752 (table 8 of its appendix lists f, |Z| and
# the channels of the latent) and arXiv:2012.09841.
_LDM = dict(blocks=2)
_F4, _F8, _F16 = (128, 256, 512), (128, 256, 512, 512), (128, 128, 256, 256, 512)
PRESETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kl-f4": (KLAutoencoder, dict(widths=_F4, latent_channels=3, **_LDM)),
    "kl-f8": (KLAutoencoder, dict(widths=_F8, latent_channels=4, **_LDM)),  # that of Stable Diffusion 1 and 2
    "kl-f16": (KLAutoencoder, dict(widths=_F16, latent_channels=16, attention=(4,), **_LDM)),
    "vq-f4": (VQAutoencoder, dict(widths=_F4, latent_channels=3, codes=8192, **_LDM)),
    "vq-f16": (VQAutoencoder, dict(widths=_F16, latent_channels=8, codes=16384, attention=(4,), **_LDM)),
    "vqgan-f16-1024": (VQAutoencoder, dict(widths=_F16, latent_channels=256, codes=1024, attention=(4,), **_LDM)),
    "vqgan-f16-16384": (VQAutoencoder, dict(widths=_F16, latent_channels=256, codes=16384, attention=(4,), **_LDM)),
    # for pictures of 8 to 64 pixels: a quarter of the numbers of a picture with three channels, or 6 to 9 bits for 16 pixels
    "kl4": (KLAutoencoder, dict(widths=(64,), blocks=1, latent_channels=12, patch=4, linear=True, middle_attention=False)),
    "vq4": (VQAutoencoder, dict(widths=(64,), blocks=1, latent_channels=8, codes=512, patch=4, linear=True,
                                average=True, middle_attention=False)),
}  # fmt: skip
