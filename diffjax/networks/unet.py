"""A U-Net over one, two or three axes, made of parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.conditions import Code, condition_of, read_state, read_time
from diffjax.networks.convolution import Conv, ConvForm
from diffjax.networks.embeddings import UNIT, Features
from diffjax.networks.layers import GroupNorm, at_least_float32, rematerialised
from diffjax.networks.partition import ATTENTION, BLOCK, CODE, FILM, GATE, RESIDUAL, Rules
from diffjax.networks.resample import Factor, per_axis
from diffjax.networks.taps import Tap
from diffjax.networks.unet_parts import ResBlock, Site, attend, part, pooled, repeated


def check_levels(net: Any, x: Any, factor: Factor = 2) -> None:
    """Refuse a U-Net's `widths`, `blocks` and `attention` that do not fit each other, or a state of another size.

    Raises: ValueError: no widths or blocks, a level of attention that does not exist, an axis not divisible.
    """
    name, levels = type(net).__name__, len(net.widths)
    if levels == 0 or net.blocks < 1:
        raise ValueError(f"{name} needs at least one width and blocks >= 1; got {net.widths} and blocks={net.blocks}")
    if any(not 0 <= i < levels for i in net.attention):
        raise ValueError(f"attention must name levels 0 to {levels - 1} of widths={net.widths}; got {net.attention}")
    factors = [f ** (levels - 1) for f in per_axis(factor, x, "factor")]
    if any(n % f for n, f in zip(x.shape[1:-1], factors, strict=True)):
        raise ValueError(
            f"{name} with {levels} levels needs axes divisible by {' x '.join(map(str, factors))}; got a state of shape "
            f"{x.shape}. Pad it, or use fewer widths"
        )


class UNet(nn.Module):
    """A U-Net with the code in every block, and attention at chosen levels.   [B, *n, C] -> [B, *n, C]

    Level i works at n / factor^i: downwards there are `blocks` residual blocks a level, upwards one more, and two at the
    bottom. The spatial axes n may be one, two or three. Conditions: label and vector by the code, tokens by
    cross-attention wherever there is self-attention, image by channels (see `conditions`).
    The parts are functions or modules of `unet_parts`, `transformer` and `resample`, with `part` to give them arguments;
    `presets` has the published choices.
    Taps: `down_i_j`, `middle_j`, `up_i_j`, each with `/{residual,block}`, `/attention/{q,k,v,logits,weights}`,
    `/cross/...`; `skip_k` (in the order in which they were made), `up_i` (what enters level i from below) and
    `bottleneck`. The output starts at zero.
    Args of a call: x: [B, *n, C], each axis divisible by factor^(levels - 1).   t: scalar or [B].   train: use dropout.
    Returns: [B, *n, out_channels or C], at least float32.
    Raises: ValueError: an axis not divisible; a level of attention that does not exist; shapes or conditions that do
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
    frequencies: Features = UNIT
    act: Callable[[Any], Any] = nn.silu
    dropout: float = 0.0
    conv: ConvForm | None = None  # `native`, `slices`, or None: the faster
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    kernel: int | tuple[int, ...] = 3  # of the convolutions, for all axes or by axis
    factor: Factor = 2  # of a level, for all axes or by axis: (1, 2, 2) keeps the first
    stem: int | None = None  # channels of the first convolution, default widths[0]
    heads: int | tuple[int, ...] | None = None  # of every attention, or of each level; default channels / head_size
    sinusoids: int | None = None  # sinusoidal features of the time, default as `code`
    norm: Any = GroupNorm
    block: Any = ResBlock
    # after the blocks of a level of attention: `attend`, `transformer`, or a tuple, one for each such level, and perhaps
    # one more for the bottom
    mix: Any = attend
    late: bool = False  # upwards, `mix` after the last block of a level alone
    down: Any = pooled  # `pooled`, `strided`, `within`
    up: Any = repeated  # `repeated`, `enlarged`, `within`
    pyramid_in: Any = None  # `input_skip`, `input_residual`
    pyramid_out: Any = None  # (y, factor) -> y enlarged, where each level adds to the output: `double`, `fir_double`
    deep_vector: bool = False  # see `Code`
    label: Any = None  # see `Code`
    early: tuple[str, ...] = ()  # see `Code`
    null_label: bool = True  # whether num_classes has a "no label" beside the classes, see `LabelEmbedding`
    middle: tuple[bool, ...] | None = (
        None  # blocks at the bottom, True with `mix`; default two, the first as the levels
    )
    RULES: ClassVar[Rules] = (*ATTENTION, *RESIDUAL, *FILM, *CODE, *BLOCK, *GATE)  # along the mesh axis `model`

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, *n, C]")
        check_levels(self, x, self.factor)
        middle = (bool(self.attention), False) if self.middle is None else self.middle
        if self.token_size and not (self.attention or any(middle)):
            raise ValueError(f"token_size={self.token_size} needs attention at some level; got attention=()")
        condition = condition_of(self, cond, x)
        kinds = (self.num_classes, self.vector_size, self.frequencies, self.act, self.dtype)
        more = dict(deep_vector=self.deep_vector, null_label=self.null_label, label=self.label, early=self.early)
        code = Code(self.code, *kinds, sinusoids=self.sinusoids, **more, name="code")
        c = code(read_time(t, x), condition)
        levels = range(len(self.widths))
        last = levels[-1]
        conv = part(Conv, kernel=self.kernel, form=self.conv, dtype=self.dtype)
        make = self._block(train)

        def block(h: Any, level: int, attend: bool, name: str, bottom: bool = False) -> Any:
            heads = self.heads_of(level) if attend else 0
            made = make(features=self.widths[level], heads=heads, mix=self.mix_of(level, bottom), name=name)
            return made(h, c, condition.tokens, condition.mask)

        def resized(h: Any, name: str, resize: Any) -> Any:
            made = make(features=h.shape[-1], heads=0, resize=resize, name=name)
            return made(h, c, condition.tokens, condition.mask)

        site = lambda name: Site(name, self.factor, conv, resized)
        h = condition.joined(x, self.dtype)
        pyramid, h = h, conv(self.stem or self.widths[0], name="in")(h)
        skips = [h]
        for i in levels:
            for j in range(self.blocks):
                h = block(h, i, i in self.attention, f"down_{i}_{j}")
                skips.append(h)
            if i < last:
                here = site(f"halve_{i + 1}")
                h = self.down(h, here)
                if self.pyramid_in is not None:
                    h, pyramid = self.pyramid_in(h, pyramid, here)
                skips.append(h)
        for j, attends in enumerate(middle):
            h = block(h, last, attends, f"middle_{j}", bottom=True)
        h = Tap(name="bottleneck")(h)
        y = None
        for i in reversed(levels):
            for j in range(self.blocks + 1):
                skip = Tap(name=f"skip_{len(skips) - 1}")(skips.pop())
                attend = i in self.attention and (j == self.blocks or not self.late)
                h = block(jnp.concatenate([h, skip], axis=-1), i, attend, f"up_{i}_{j}")
            if i == 0 or self.pyramid_out is not None:
                level = f"_{i}" if i else ""
                here = self.act(self.norm(name=f"norm_out{level}")(h))
                here = conv(self.out_channels or x.shape[-1], zero=True, name=f"out{level}")(here)
                y = here if y is None else here + self.pyramid_out(y, self.factor)
            if i:
                h = Tap(name=f"up_{i - 1}")(self.up(h, site(f"double_{i - 1}")))
        return y.astype(at_least_float32(x.dtype))

    def _block(self, train: bool) -> Any:
        """The residual block with all that is the same everywhere, rematerialised if asked."""
        block = self.block if isinstance(self.block, part) else part(self.block)
        same = dict(act=self.act, form=self.conv, dropout=self.dropout, train=train, dtype=self.dtype)
        same |= dict(kernel=self.kernel, norm=self.norm)
        return part(rematerialised(block.make, self.remat), **(same | dict(block.given)))

    def heads_of(self, level: int) -> int:
        """How many heads the attention of a level has."""
        if isinstance(self.heads, tuple):
            if len(self.heads) != len(self.widths):
                raise ValueError(f"heads must be one number, or one for each of widths={self.widths}; got {self.heads}")
            return self.heads[level]
        return self.heads or max(1, self.widths[level] // self.head_size)

    def mix_of(self, level: int, bottom: bool) -> Any:
        """What follows the blocks of a level of attention; the bottom has its own, or that of the last level of attention."""
        if not isinstance(self.mix, tuple):
            return self.mix
        if len(self.mix) - len(self.attention) not in (0, 1) or not self.mix:
            raise ValueError(
                f"mix must be one part, or one for each level of attention={self.attention}, and perhaps one for the "
                f"bottom; got {len(self.mix)} parts"
            )
        if bottom and len(self.mix) > len(self.attention):
            return self.mix[-1]
        return dict(zip(self.attention, self.mix, strict=False)).get(level, self.mix[-1])
