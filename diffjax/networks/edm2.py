"""The magnitude-preserving U-Net of EDM2, and a residual MLP for vectors made of the same layers."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.conditions import condition_of, read_state, read_time
from diffjax.networks.layers import at_least_float32, rematerialised, spread
from diffjax.networks.magnitude import (
    CosineAttention,
    Gain,
    KeptFourier,
    MPCode,
    MPConv,
    MPDense,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
    with_ones,
)
from diffjax.networks.partition import COLUMN, ROW, Rules
from diffjax.networks.resample import double, halve
from diffjax.networks.taps import Tap
from diffjax.networks.unet import check_levels


def modulated(y: Any, c: Any, dtype: Any, name: str, eps: float = 0.0) -> jax.Array:
    """Channels scaled by the code, by a gain that starts at zero.   y (1 + gain W c)"""
    scale = MPDense(y.shape[-1], dtype, eps, name=name)(c) * Gain(name=f"{name}_gain")().astype(dtype)
    return y * (1 + spread(scale, y))


class EDM2Block(nn.Module):
    """One block of the encoder or decoder.   x' = mp_sum(x, Conv(mp_silu(Conv(mp_silu(x)) (1 + gain W c))), 0.3)

    The encoder normalises each pixel first; the decoder does not. Taps: `residual`, `block`, and those of the layers.
    """

    features: int
    encoder: bool
    heads: int  # 0: no attention
    residual: float
    dropout: float
    clip: float | None
    train: bool
    dtype: Any
    eps: float = 0.0

    @nn.compact
    def __call__(self, x: Any, c: Any) -> jax.Array:
        """One block at code c."""
        n, same = self.features, dict(dtype=self.dtype, eps=self.eps)
        skip = lambda x: x if x.shape[-1] == n else MPConv(n, (1, 1), name="skip", **same)(x)
        if self.encoder:
            x = pixel_norm(skip(x), self.eps)
        y = MPConv(n, name="conv_in", **same)(mp_silu(x))
        y = mp_silu(modulated(y, c, self.dtype, "film", self.eps))
        y = nn.Dropout(self.dropout, deterministic=not self.train)(y)
        y = MPConv(n, name="conv_out", **same)(y)
        x = mp_sum(x if self.encoder else skip(x), Tap(name="residual")(y), self.residual)
        if self.heads:
            h = CosineAttention(self.heads, name="attention", **same)(x.reshape(x.shape[0], -1, n))
            x = mp_sum(x, h.reshape(x.shape), self.residual)
        if self.clip is not None:
            x = jnp.clip(x, -self.clip, self.clip)
        return Tap(name="block")(x)


class EDM2UNet(nn.Module):
    """The U-Net of EDM2: magnitude-preserving layers throughout, no biases, one learned gain at the output.

    Level i works at H / 2^i: downwards a block that halves (from the second level on) and `blocks` more, upwards two at
    the bottom or one that doubles, and `blocks` + 1 more that join what the way down left. Conditions: label and vector by
    the code, image by channels. The output starts at zero. Taps: `in`, `down_i_half`, `down_i_j`, `middle_j`,
    `up_i_double`, `up_i_j`, each with its layers' `/out`, `/residual` and `/block`.
    Args of a call: x: [B, H, W, C], H and W divisible by 2^(levels - 1).   t: scalar or [B], such as `log(sigma) / 4`.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: H or W not divisible; a level of attention that does not exist; conditions that do not fit.

    Example:
        >>> net = EDM2UNet(widths=(8,), blocks=1, attention=())
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
        >>> v["params"]["out"]["kernel"].shape
        (3, 3, 8, 3)

    Reference: Karras et al. 2024, arXiv:2312.02696, Fig. 21 (configuration G).
    """

    widths: tuple[int, ...] = (192, 384, 576, 768)
    blocks: int = 3
    attention: tuple[int, ...] = (2, 3)
    head_size: int = 64
    num_classes: int = 0
    vector_size: int = 0
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    residual: float = 0.3  # share of a block's branch
    join: float = 0.5  # share of what the way down left
    clip: float | None = 256.0
    dropout: float = 0.0
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    # what published weights need
    fourier: int | None = None  # features of the time, default widths[0]
    code: int | None = None  # default the largest of widths
    kept_fourier: bool = False  # frequencies of the time as parameters that are not trained
    zero_label: bool = False  # "no label" is zero and has no row of its own
    label_share: float = 0.5  # of the label in the code
    middle: bool | None = None  # attention at the bottom, default wherever there is any
    log_variance: int = (
        0  # features of a head that tells the log of the loss at each noise level, by the tap `log_variance`
    )
    eps: float = 0.0  # see `magnitude.pixel_norm`
    RULES: ClassVar[Rules] = ((r"_\d+/(conv_in|film)/kernel$", COLUMN), (r"_\d+/conv_out/kernel$", ROW))

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        check_levels(self, x)
        condition = condition_of(self, cond, x)
        same = dict(dtype=self.dtype, eps=self.eps)
        sizes = (self.code or max(self.widths), self.fourier or self.widths[0], self.num_classes, self.vector_size)
        more = dict(kept=self.kept_fourier, zero_label=self.zero_label, share=self.label_share)
        time = read_time(t, x)
        c = MPCode(*sizes, **same, **more, name="code")(time, condition)
        if self.log_variance:
            h = KeptFourier(self.log_variance, name="log_variance_fourier")(time)
            Tap(name="log_variance")(MPDense(1, eps=self.eps, name="log_variance_out")(h)[..., 0])
        make = rematerialised(EDM2Block, self.remat)

        def block(h: Any, n: int, attend: bool, name: str) -> Any:
            heads = max(1, n // self.head_size) if attend else 0
            encoder = name.startswith("down")
            fields = (n, encoder, heads, self.residual, self.dropout, self.clip, train)
            made = make(*fields, **same, name=name)
            return made(h, c)

        h = condition.joined(x, self.dtype)
        h = MPConv(self.widths[0], name="in", **same)(with_ones(h))
        skips = [h]
        for i, n in enumerate(self.widths):
            if i:
                h = block(halve(h), h.shape[-1], False, f"down_{i}_half")
                skips.append(h)
            for j in range(self.blocks):
                h = block(h, n, i in self.attention, f"down_{i}_{j}")
                skips.append(h)
        h = block(h, self.widths[-1], bool(self.attention) if self.middle is None else self.middle, "middle_0")
        h = block(h, self.widths[-1], False, "middle_1")
        for i, n in reversed(list(enumerate(self.widths))):
            if i < len(self.widths) - 1:
                h = block(double(h), h.shape[-1], False, f"up_{i}_double")
            for j in range(self.blocks + 1):
                h = block(mp_cat(h, skips.pop(), self.join), n, i in self.attention, f"up_{i}_{j}")
        y = MPConv(self.out_channels or x.shape[-1], name="out", **same)(h)
        return (y * Gain(name="out_gain")().astype(y.dtype)).astype(at_least_float32(x.dtype))


class EDM2MLP(nn.Module):
    """A residual MLP for vectors of magnitude-preserving layers.   [B, ..., d] -> [B, ..., d]

    x' = mp_sum(h, W mp_silu(W mp_silu(h) (1 + gain W c)), 0.3),  h = pixel_norm(x). The output starts at zero.
    Conditions: label, vector. Taps: `block_i`, and `/out` of every layer.
    Args of a call: x: [B, ..., d].   t: scalar, [B], or a time for each of more leading axes of x.
    Returns: [B, ..., out_features or d], at least float32.
    Raises: ValueError: shapes or conditions that do not fit.

    Example:
        >>> v = jax.eval_shape(EDM2MLP(width=8, depth=2).init, jax.random.key(0), jnp.zeros((3, 2)), jnp.zeros(3))
        >>> v["params"]["out"]["kernel"].shape
        (8, 2)
    """

    width: int = 128
    depth: int = 3
    num_classes: int = 0
    vector_size: int = 0
    out_features: int | None = None  # default those of x
    residual: float = 0.3
    dropout: float = 0.0
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = ((r"(hidden|film)_\d+/kernel$", COLUMN), (r"residual_\d+/kernel$", ROW))

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, ..., d]")
        condition = condition_of(self, cond, x)
        c = MPCode(self.width, self.width, self.num_classes, self.vector_size, self.dtype, name="code")(
            read_time(t, x, axes=x.ndim - 1), condition
        )
        h = MPDense(self.width, self.dtype, name="in")(with_ones(x.astype(self.dtype)))
        for i in range(self.depth):
            h = pixel_norm(h)
            y = MPDense(self.width, self.dtype, name=f"hidden_{i}")(mp_silu(h))
            y = mp_silu(modulated(y, c, self.dtype, f"film_{i}"))
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
            y = MPDense(self.width, self.dtype, name=f"residual_{i}")(y)
            h = Tap(name=f"block_{i}")(mp_sum(h, y, self.residual))
        y = MPDense(self.out_features or x.shape[-1], self.dtype, name="out")(h)
        return (y * Gain(name="out_gain")().astype(y.dtype)).astype(at_least_float32(x.dtype))


# channels of the first level: arXiv:2312.02696, Table 2 (configuration G for ImageNet-512 latents)
PRESETS = {
    f"edm2-{name}": (EDM2UNet, {"widths": (w, 2 * w, 3 * w, 4 * w)})
    for name, w in {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}.items()
}
