"""UNet2DModel of diffusers as `networks.UNet`: DDPM, latent diffusion, consistency models, NCSN++."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.interop import options
from diffjax.interop.autoencoders import OLD
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule
from diffjax.interop.unet_rules import (
    DOWN,
    SHIFTS,
    attending,
    check_same,
    code_rules,
    decoder_rules,
    encoder_rules,
    given,
    middle_of,
    norm_of,
)
from diffjax.networks import UNet, falling, from_linen, kept_fourier, part
from diffjax.networks.layers import GroupNorm
from diffjax.networks.resample import double, fir_double
from diffjax.networks.unet_parts import ResBlock, attend, enlarged, film, input_skip, unnormalised, within

KIND = "UNet2DModel"
DEFAULTS = dict(
    sample_size=None, in_channels=3, out_channels=3, center_input_sample=False, time_embedding_type="positional",
    time_embedding_dim=None, freq_shift=0, flip_sin_to_cos=True,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(224, 448, 672, 896), layers_per_block=2, mid_block_scale_factor=1, downsample_padding=1,
    downsample_type="conv", upsample_type="conv", dropout=0.0, act_fn="silu", attention_head_dim=8, norm_num_groups=32,
    attn_norm_num_groups=None, norm_eps=1e-5, resnet_time_scale_shift="default", add_attention=True,
    class_embed_type=None, num_class_embeds=None, num_train_timesteps=None,
)  # fmt: skip
# (how a level is left, attention) by the name of a block; None: as downsample_type or upsample_type says
WAYS = {
    "DownBlock2D": ("conv", False),
    "AttnDownBlock2D": (None, True),
    "ResnetDownsampleBlock2D": ("resnet", False),
    "SkipDownBlock2D": ("skip", False),
    "AttnSkipDownBlock2D": ("skip", True),
}
UP_WAYS = {name.replace("Downsample", "Upsample").replace("Down", "Up"): way for name, way in WAYS.items()}
UP = {"conv": enlarged, "resnet": part(within, resize=double), "skip": part(within, resize=fir_double)}
HALF = math.sqrt(0.5)


def network(config: Config) -> UNet:
    """The module of a configuration."""
    c = options.read(KIND, config, DEFAULTS)
    options.accept(KIND, "act_fn", c.act_fn, ("silu", "swish"))
    options.accept(KIND, "center_input_sample", c.center_input_sample, (False,))
    options.accept(KIND, "class_embed_type", c.class_embed_type, (None,))
    middle = options.accept(KIND, "mid_block_type", c.mid_block_type, {"UNetMidBlock2D": (True, False), None: ()})
    down, attention = ways(c, "down_block_types", c.downsample_type, WAYS)
    up, also = ways(c, "up_block_types", c.upsample_type, UP_WAYS)
    if attention != also or (down == "skip") != (up == "skip"):
        raise ValueError(
            f"{KIND}: down_block_types={c.down_block_types} and up_block_types={c.up_block_types} must mirror each other"
        )
    if down == "conv":
        down = options.accept(KIND, "downsample_padding", c.downsample_padding, {1: "conv", 0: "conv, zeros after"})
    skip = up == "skip"
    if skip:
        check_skip(c, bool(middle))
    elif c.mid_block_scale_factor != 1 or c.norm_num_groups is None:
        raise ValueError(
            f"{KIND}: mid_block_scale_factor={c.mid_block_scale_factor}, norm_num_groups={c.norm_num_groups} have no "
            "counterpart beside these blocks; accepted are 1 and a number"
        )
    net = UNet(
        widths=c.block_out_channels,
        blocks=c.layers_per_block,
        attention=attention,
        middle=middle if c.add_attention else (False,) * len(middle),
        code=c.time_embedding_dim or 4 * c.block_out_channels[0],
        num_classes=c.num_class_embeds or 0,  # none of theirs is "no label"
        null_label=not c.num_class_embeds,
        image_channels=max(c.in_channels - c.out_channels, 0),
        out_channels=c.out_channels,
        act=nn.silu,
        dropout=c.dropout,
        norm=part(GroupNorm, groups=c.norm_num_groups, eps=c.norm_eps),
        block=residual(c, skip),
        mix=mixes(c, len(attention), skip),
        late=skip and bool(attention),
        down=DOWN[down],
        up=UP[up],
        pyramid_in=input_skip if skip else None,
        pyramid_out=fir_double if skip else None,
        **times(c),
        **({"heads": 1} if c.attention_head_dim is None else {"head_size": c.attention_head_dim}),
    )
    for i in attending(net):
        if net.widths[i] % (c.attention_head_dim or 1):
            raise ValueError(
                f"{KIND}: attention_head_dim={c.attention_head_dim} does not divide {net.widths[i]} channels"
            )
    return net


def ways(c: Any, field: str, kind: str, table: Any) -> tuple[str, tuple[int, ...]]:
    """How all levels are left, and which have attention, the widest first."""
    names = getattr(c, field) if field.startswith("down") else getattr(c, field)[::-1]
    options.accept(KIND, f"{field[:-12]}sample_type", kind, ("conv", "resnet"))
    found = [options.accept(KIND, field, name, table) for name in names]
    if len(found) != len(c.block_out_channels):
        raise ValueError(f"{KIND}: {field}={names} must have one name for each of {c.block_out_channels}")
    left = [way or kind for way, _ in found]
    between = left[:-1] if field.startswith("down") else left[1:]  # the last block of a way leaves no level
    ways = set(left) if "skip" in left else set(between or left)
    if len(ways) > 1:
        raise ValueError(f"{KIND}: {field}={names} resample in different ways ({', '.join(sorted(ways))}), not in one")
    return ways.pop(), tuple(i for i, (_, attends) in enumerate(found) if attends)


def check_skip(c: Any, middle: bool) -> None:
    """What blocks with a pyramid fix, which the fields must say too."""
    scale = math.sqrt(2.0)
    wanted = dict(in_channels=3, out_channels=3, norm_num_groups=None)
    wrong = {name: getattr(c, name) for name, value in wanted.items() if getattr(c, name) != value}
    if wrong or (middle and not math.isclose(c.mid_block_scale_factor, scale, rel_tol=1e-6)):
        raise ValueError(
            f"{KIND}: blocks with skips need {wanted} and mid_block_scale_factor={scale}; got {wrong} and "
            f"{c.mid_block_scale_factor}"
        )
    # their norms have 32 groups at attention, however few the channels are
    if any("Attn" in kind for kind in c.down_block_types) and any(n % 64 for n in c.block_out_channels):
        raise ValueError(
            f"{KIND}: block_out_channels={c.block_out_channels} beside AttnSkip blocks must be multiples of 64"
        )


def residual(c: Any, skip: bool) -> Any:
    """The residual block."""
    shift = options.accept(KIND, "resnet_time_scale_shift", c.resnet_time_scale_shift, SHIFTS)
    return part(ResBlock, modulation=shift, **(dict(rescale=HALF, project=True) if skip else {}))


def mixes(c: Any, levels: int, skip: bool) -> tuple[Any, ...]:
    """The attention of each level, and of the bottom, which has a norm of its own, or none."""
    rescale = dict(rescale=HALF) if skip else {}
    norm = lambda groups: part(GroupNorm, groups=groups, eps=c.norm_eps)
    bottom = norm(c.attn_norm_num_groups or c.norm_num_groups)
    if c.resnet_time_scale_shift != "default" and c.attn_norm_num_groups is None:
        bottom = unnormalised
    above = part(attend, norm=norm(32 if skip else c.norm_num_groups), **rescale)
    return (above,) * levels + (part(attend, norm=bottom, **rescale),)


def times(c: Any) -> dict[str, Any]:
    """The features of the time."""
    first = c.block_out_channels[0]
    kinds = {"positional": False, "fourier": True}
    if options.accept(KIND, "time_embedding_type", c.time_embedding_type, kinds):
        return dict(frequencies=kept_fourier(16.0), sinusoids=2 * first)
    return dict(frequencies=falling(int(c.freq_shift), c.flip_sin_to_cos), sinusoids=first)


def config(module: UNet) -> dict[str, Any]:
    """The configuration of a module.   Raises: ValueError: there is none."""
    groups, eps = norm_of(module.norm)
    block = given(module.block)[1]
    skip = block.get("project", ResBlock.project)
    down = options.name_of(DOWN, module.down, "down")
    up = options.name_of(UP, module.up, "up")
    bottom = given(module.mix[-1] if isinstance(module.mix, tuple) else module.mix)[1].get("norm", GroupNorm)
    kinds = lambda way: (way,) if skip else (way, None)
    names = lambda table, way: [
        next(name for name, (kind, also) in table.items() if also == (i in module.attention) and kind in kinds(way))
        for i in range(len(module.widths))
    ]
    fourier = isinstance(module.frequencies, kept_fourier)
    sizes = {module.widths[i] // module.heads_of(i) for i in attending(module)}
    middle = middle_of(module)
    page = dict(
        in_channels=(module.out_channels or 0) + module.image_channels,
        out_channels=module.out_channels,
        time_embedding_type="fourier" if fourier else "positional",
        time_embedding_dim=module.code,
        down_block_types=names(WAYS, down.partition(",")[0]),
        mid_block_type="UNetMidBlock2D" if middle else None,
        up_block_types=names(UP_WAYS, up)[::-1],
        block_out_channels=list(module.widths),
        layers_per_block=module.blocks,
        mid_block_scale_factor=math.sqrt(2.0) if skip else 1,
        downsample_padding=0 if down == "conv, zeros after" else 1,
        downsample_type="resnet" if down == "resnet" else "conv",
        upsample_type="resnet" if up == "resnet" else "conv",
        dropout=module.dropout,
        act_fn="silu",
        attention_head_dim=None if module.heads == 1 or len(sizes) != 1 else sizes.pop(),
        norm_num_groups=groups,
        attn_norm_num_groups=None if bottom is unnormalised else norm_of(bottom)[0] or groups,
        norm_eps=eps,
        resnet_time_scale_shift=options.name_of(SHIFTS, block.get("modulation", film), "modulation"),
        add_attention=any(middle),
        num_class_embeds=module.num_classes or None,
    )
    if isinstance(module.frequencies, falling):
        page |= dict(freq_shift=module.frequencies.shift, flip_sin_to_cos=module.frequencies.cosines_first)
    check_same(KIND, network(page), module)
    return page


def rules(module: UNet) -> list[Rule]:
    """The rules of a module."""
    return code_rules(module) + encoder_rules(module) + decoder_rules(module)


def example(module: UNet, config: Config) -> tuple:
    """One state of the smallest size, its time and its condition."""
    side = 2 ** (len(module.widths) - 1)
    shape = lambda *n, dtype=np.float32: jax.ShapeDtypeStruct((1, *n), dtype)
    cond = {
        "label": (module.num_classes, shape(dtype=np.int32)),
        "vector": (module.vector_size, shape(module.vector_size)),
        "tokens": (module.token_size, shape(1, module.token_size)),
        "image": (module.image_channels, shape(side, side, module.image_channels)),
    }
    channels = config.get("in_channels", module.out_channels) - module.image_channels
    given = {name: a for name, (size, a) in cond.items() if size}
    return shape(side, side, channels), shape(), given or None


@dataclasses.dataclass(frozen=True)
class OfNoise:
    """A network of log(t) whose output is divided by t, a noise level.   net(x, log t) / t"""

    net: Any

    def __call__(self, params: Any, x: Any, t: Any, cond: Any = None, key: Any = None, *, mutable: Any = False) -> Any:
        """The score at noise level t."""
        t = jnp.asarray(t)
        if mutable:
            out, variables = self.net(params, x, jnp.log(t), cond, key, mutable=mutable)
            return out / t.reshape(t.shape + (1,) * (x.ndim - t.ndim)), variables
        out = self.net(params, x, jnp.log(t), cond, key)
        return out / t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def function(module: UNet, config: Config) -> Any:
    """The module at t = 0 ... 999; that with Fourier features at noise levels, and divided by them."""
    net = from_linen(module)
    return OfNoise(net) if isinstance(module.frequencies, kept_fourier) else net


PEER = Peer(network, config, rules, example, fn=function, renames=OLD)
