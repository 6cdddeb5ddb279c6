"""A U-Net for images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import Attention
from diffjax.networks.conditions import Code, read_condition, read_state, read_time
from diffjax.networks.embeddings import UNIT, Frequencies
from diffjax.networks.layers import (
    Conv,
    ConvForm,
    Dense,
    GroupNorm,
    at_least_float32,
    double,
    halve,
    modulate,
    rematerialised,
    spread,
)
from diffjax.networks.partition import ATTENTION, CODE, FILM, RESIDUAL, Rules, constrain
from diffjax.networks.taps import Tap


def check_levels(net: Any, x: Any) -> None:
    """Refuse a U-Net's `widths`, `blocks` and `attention` that do not fit each other, or a state of another size.

    Raises: ValueError: no widths or blocks, a level of attention that does not exist, a height or width not divisible.
    """
    name, levels = type(net).__name__, len(net.widths)
    if levels == 0 or net.blocks < 1:
        raise ValueError(f"{name} needs at least one width and blocks >= 1; got {net.widths} and blocks={net.blocks}")
    if any(not 0 <= i < levels for i in net.attention):
        raise ValueError(f"attention must name levels 0 to {levels - 1} of widths={net.widths}; got {net.attention}")
    factor = 2 ** (levels - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"{name} with {levels} levels needs height and width divisible by {factor}; got a state of shape "
            f"{x.shape}. Pad it, or use fewer widths"
        )


class ResBlock(nn.Module):
    """Two convolutions with FiLM between them, then attention if asked.   skip(x) + Conv(act(FiLM(norm(h))))"""

    features: int
    heads: int  # 0: no attention
    act: Callable[[Any], Any]
    form: ConvForm | None
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, c: Any, tokens: Any, mask: Any) -> Any:
        """One block at code c, with the tokens and mask of the condition."""
        n = self.features
        h = self.act(GroupNorm(name="norm_in")(x))
        h = constrain(Conv(n, form=self.form, dtype=self.dtype, name="conv_in")(h), "batch", ..., "wide")
        film = constrain(Dense(2 * n, dtype=self.dtype, name="film")(c), "batch", ...)
        shift, scale = jnp.split(film, 2, axis=-1)
        h = modulate(GroupNorm(name="norm_out")(h), spread(shift, h), spread(scale, h))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(self.act(h))
        h = Conv(n, form=self.form, zero=True, dtype=self.dtype, name="conv_out")(h)
        if x.shape[-1] != n:
            x = Dense(n, dtype=self.dtype, name="skip")(x)
        x = constrain(x + Tap(name="residual")(h), "batch", ...)
        if self.heads:
            flat = lambda a: a.reshape(a.shape[0], -1, n)
            h = flat(GroupNorm(name="norm_attention")(x))
            x = x + Attention(self.heads, zero=True, dtype=self.dtype, name="attention")(h).reshape(x.shape)
            if tokens is not None:
                h = flat(GroupNorm(name="norm_cross")(x))
                cross = Attention(self.heads, zero=True, dtype=self.dtype, name="cross")
                x = x + cross(h, tokens, mask).reshape(x.shape)
        return Tap(name="block")(x)


class UNet(nn.Module):
    """A U-Net with FiLM by time, label and vector, and attention at chosen levels.   [B, H, W, C] -> [B, H, W, C]

    Level i works at H / 2^i; downwards there are `blocks` residual blocks a level, upwards one more, and two at the
    bottom. Conditions: label and vector by FiLM, tokens by cross-attention wherever there is self-attention, image by
    channels (see `conditions`). Taps: `down_i_j`, `middle_j`, `up_i_j`, each with `/{residual,block}`,
    `/attention/{q,k,v,logits,weights}`, `/cross/...`; `skip_k` (in the order in which they were made) and
    `bottleneck`. The output starts at zero.
    Args of a call: x: [B, H, W, C], H and W divisible by 2^(levels - 1).   t: scalar or [B].   train: use dropout.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: H or W not divisible; a level of attention that does not exist; shapes or conditions that do
    not fit.

    Example:
        >>> net = UNet(widths=(8,), blocks=1, attention=())
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
        >>> v["params"]["out"]["kernel"].shape
        (3, 3, 8, 3)

    Reference: Ho et al. 2020, arXiv:2006.11239, appendix B; FiLM and zero outputs: Dhariwal & Nichol 2021,
    arXiv:2105.05233, section 3.
    """

    widths: tuple[int, ...] = (16, 32)
    blocks: int = 1
    attention: tuple[int, ...] = (1,)
    head_size: int = 16
    code: int = 64
    num_classes: int = 0
    vector_size: int = 0
    token_size: int = 0
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    frequencies: Frequencies = UNIT
    act: Callable[[Any], Any] = nn.silu
    dropout: float = 0.0
    conv: ConvForm | None = None  # `layers.native`, `layers.slices`, or None: the faster
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (*ATTENTION, *RESIDUAL, *FILM, *CODE)  # along the mesh axis `model`

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        check_levels(self, x)
        if self.token_size and not self.attention:
            raise ValueError(f"token_size={self.token_size} needs attention at some level; got attention=()")
        condition = read_condition(
            cond,
            x,
            num_classes=self.num_classes,
            vector_size=self.vector_size,
            token_size=self.token_size,
            image_channels=self.image_channels,
        )
        code = Code(self.code, self.num_classes, self.vector_size, self.frequencies, self.act, self.dtype, name="code")
        c = code(read_time(t, x), condition)
        last = len(self.widths) - 1
        make = rematerialised(ResBlock, self.remat)

        def block(h: Any, level: int, attend: bool, name: str) -> Any:
            n = self.widths[level]
            heads = max(1, n // self.head_size) if attend else 0
            made = make(n, heads, self.act, self.conv, self.dropout, train, self.dtype, name=name)
            return made(h, c, condition.tokens, condition.mask)

        h = x.astype(self.dtype)
        if condition.image is not None:
            h = jnp.concatenate([h, jnp.asarray(condition.image).astype(self.dtype)], axis=-1)
        h = Conv(self.widths[0], form=self.conv, dtype=self.dtype, name="in")(h)
        skips = [h]
        for i in range(last + 1):
            for j in range(self.blocks):
                h = block(h, i, i in self.attention, f"down_{i}_{j}")
                skips.append(h)
            if i < last:
                h = halve(h)
                skips.append(h)
        h = block(h, last, bool(self.attention), "middle_0")
        h = Tap(name="bottleneck")(block(h, last, False, "middle_1"))
        for i in reversed(range(last + 1)):
            for j in range(self.blocks + 1):
                skip = Tap(name=f"skip_{len(skips) - 1}")(skips.pop())
                h = block(jnp.concatenate([h, skip], axis=-1), i, i in self.attention, f"up_{i}_{j}")
            if i:
                h = double(h)
        h = self.act(GroupNorm(name="norm_out")(h))
        out = self.out_channels or x.shape[-1]
        y = Conv(out, form=self.conv, zero=True, dtype=self.dtype, name="out")(h)
        return y.astype(at_least_float32(x.dtype))
