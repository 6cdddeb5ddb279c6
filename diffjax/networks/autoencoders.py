"""Autoencoders of pictures: the convolutional encoder and decoder of latent diffusion, with a Gaussian latent or a codebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.codebook import Codebook, Quantised
from diffjax.networks.codec import Posterior
from diffjax.networks.coders import Decoder, Encoder
from diffjax.networks.components import linear_paths
from diffjax.networks.convolution import ConvForm
from diffjax.networks.layers import Dense, at_least_float32
from diffjax.networks.partition import RESIDUAL, Rules

CLIP = (-30.0, 20.0)  # of the log-variance, as in the released code of latent diffusion


def check_picture(net: Any, x: Any) -> Any:
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
    act_out: Callable[[Any], Any] | None = None  # before the last convolutions, default `act`
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
        x = check_picture(self, x)
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
    which quantises first; `picture(z)`, which does not; `quantise(z) -> Quantised`, `decode_tokens(tokens)`;
    `follow(z, tokens, decay)`, see `Codebook`.
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
    spatial_norm: bool = False  # the norms of the decoder read the latent, see `coders.SpatialNorm`
    out_channels: int = 3
    patch: int = 1
    linear: bool = False
    groups: int | None = None
    act: Callable[[Any], Any] = nn.silu
    act_out: Callable[[Any], Any] | None = None  # before the last convolutions, default `act`
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
        x = check_picture(self, x)
        return Posterior(self.quant(self.encoder(x)).astype(at_least_float32(x.dtype)) + self.linear_in(x))

    def quantise(self, z: Any) -> Quantised:
        """The nearest codes of z."""
        return self.codebook(z)

    def decode(self, z: Any) -> jax.Array:
        """The picture of the codes nearest to z; gradients pass straight through to z."""
        return self.picture(self.codebook(z).z)

    def decode_tokens(self, tokens: Any) -> jax.Array:
        """The picture of the codes with these numbers [B, h, w]."""
        return self.picture(self.codebook.lookup(tokens))

    def follow(self, z: Any, tokens: Any, decay: Any) -> jax.Array:
        """The loss that moves codes which are averages; see `Codebook.follow`."""
        return self.codebook.follow(z, tokens, decay)

    def __call__(self, x: Any) -> jax.Array:
        """Encode, quantise and decode."""
        return self.decode(self.encode(x).mean)

    def picture(self, z: Any) -> jax.Array:
        """The picture of the latent z as it is, without quantising it."""
        side = z if self.spatial_norm else None
        return self.decoder(self.post_quant(z), side).astype(at_least_float32(z.dtype)) + self.linear_out(z)


def _coders(net: Any, moments: int) -> tuple[Encoder, Decoder]:
    """Encoder and decoder of an autoencoder whose encoder gives that many numbers for each of the latent."""
    own = dict(
        attention=net.attention, middle_attention=net.middle_attention, groups=net.groups, act=net.act, patch=net.patch,
        act_out=net.act_out, form=net.conv, remat=net.remat, dtype=net.dtype,
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
    # for pictures of 8 to 64 pixels: a quarter of the numbers of a picture with three channels, or 9 bits for
    # 16 pixels
    "kl4": (KLAutoencoder, dict(widths=(64,), blocks=1, latent_channels=12, patch=4, linear=True, middle_attention=False)),
    "vq4": (VQAutoencoder, dict(widths=(64,), blocks=1, latent_channels=8, codes=512, patch=4, linear=True,
                                average=True, middle_attention=False)),
}  # fmt: skip
