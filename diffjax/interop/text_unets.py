"""UNet2DConditionModel of diffusers as `networks.UNet`: Stable Diffusion 1, 2 and XL, their inpainting and upscaling.

Heads are given as `attention_head_dim`, a number of heads in spite of its name. Where there are more channels of input than
of output, the last of them are the condition's image. What else stands in the condition: `tokens`; `label` for
`num_class_embeds`; `vector` for `class_embed_type="projection"`, `addition_embed_type="text_time"` (made by `text_time`) and
`time_cond_proj_dim`. Refused, among others: blocks of simple cross-attention, and depths or blocks that differ up and down.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.interop import options
from diffjax.interop.autoencoders import OLD
from diffjax.interop.kinds import conv1x1, dense
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule
from diffjax.interop.unet_rules import (
    DOWN,
    SHIFTS,
    check_same,
    code_rules,
    decoder_rules,
    encoder_rules,
    given,
    middle_of,
    norm_of,
)
from diffjax.interop.unets import example
from diffjax.networks import UNet, falling, part
from diffjax.networks.layers import GroupNorm
from diffjax.networks.transformer import transformer
from diffjax.networks.unet_parts import ResBlock, enlarged, film

KIND = "UNet2DConditionModel"
CROSS = ("CrossAttnDownBlock2D",) * 3
# fields of all U-Nets with text, the encoder of a ControlNet among them
ENCODER = dict(
    in_channels=4, flip_sin_to_cos=True, freq_shift=0, down_block_types=(*CROSS, "DownBlock2D"),
    mid_block_type="UNetMidBlock2DCrossAttn", only_cross_attention=False, block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2, downsample_padding=1, mid_block_scale_factor=1, act_fn="silu", norm_num_groups=32, norm_eps=1e-5,
    cross_attention_dim=1280, transformer_layers_per_block=1, encoder_hid_dim=None, encoder_hid_dim_type=None,
    attention_head_dim=8, num_attention_heads=None, use_linear_projection=False, class_embed_type=None,
    addition_embed_type=None, addition_time_embed_dim=None, num_class_embeds=None, upcast_attention=False,
    resnet_time_scale_shift="default", projection_class_embeddings_input_dim=None, addition_embed_type_num_heads=64,
)  # fmt: skip
DEFAULTS = ENCODER | dict(
    sample_size=None, out_channels=4, center_input_sample=False,
    up_block_types=("UpBlock2D", *(name.replace("Down", "Up") for name in CROSS)), dropout=0.0,
    reverse_transformer_layers_per_block=None, dual_cross_attention=False, resnet_skip_time_act=False,
    resnet_out_scale_factor=1.0, time_embedding_type="positional", time_embedding_dim=None, time_embedding_act_fn=None,
    timestep_post_act=None, time_cond_proj_dim=None, conv_in_kernel=3, conv_out_kernel=3, attention_type="default",
    class_embeddings_concat=False, mid_block_only_cross_attention=None, cross_attention_norm=None,
)  # fmt: skip
# fields with one value that has a counterpart; upcast_attention has none: logits are in float32 here
FIXED = dict(
    mid_block_scale_factor=1, encoder_hid_dim=None, encoder_hid_dim_type=None, num_attention_heads=None,
    center_input_sample=False, reverse_transformer_layers_per_block=None, dual_cross_attention=False,
    resnet_skip_time_act=False, resnet_out_scale_factor=1, time_embedding_type="positional", time_embedding_act_fn=None,
    timestep_post_act=None, conv_in_kernel=3, conv_out_kernel=3, attention_type="default",
    class_embeddings_concat=False, mid_block_only_cross_attention=None, cross_attention_norm=None,
)  # fmt: skip
LEVELS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_LEVELS = {name.replace("Down", "Up"): attends for name, attends in LEVELS.items()}
MIDDLE = {"UNetMidBlock2DCrossAttn": (True, False), "UNetMidBlock2D": (False,), None: ()}
VECTORS = {  # (class_embed_type, addition_embed_type, whether time_cond_proj_dim is given): where the vector enters
    (None, None, False): "",
    (None, "text_time", False): "code",
    ("projection", None, False): "code",
    (None, None, True): "time",
}


def network(config: Config) -> UNet:
    """The module of a configuration."""
    c = options.read(KIND, config, DEFAULTS)
    up = tuple(options.accept(KIND, "up_block_types", name, UP_LEVELS) for name in reversed(c.up_block_types))
    net = UNet(
        **encoder(KIND, c),
        dropout=c.dropout,
        image_channels=max(c.in_channels - c.out_channels, 0),
        out_channels=c.out_channels,
        up=enlarged,
    ).clone(**({"code": c.time_embedding_dim} if c.time_embedding_dim else {}))
    if tuple(i in net.attention for i in range(len(net.widths))) != up:
        raise ValueError(
            f"{KIND}: down_block_types={c.down_block_types} and up_block_types={c.up_block_types} must mirror each other, "
            f"one for each of block_out_channels={c.block_out_channels}"
        )
    return net


def encoder(kind: str, c: Any) -> dict[str, Any]:
    """The fields of a `UNet` that its way down decides.

    Args: kind: name of the class, for messages.   c: its fields.
    """
    for name, value in FIXED.items():
        options.accept(kind, name, getattr(c, name, value), (value,))
    n = len(c.block_out_channels)
    attends = [options.accept(kind, "down_block_types", name, LEVELS) for name in c.down_block_types]
    if len(attends) != n:
        raise ValueError(f"{kind}: down_block_types={c.down_block_types} must be as many as block_out_channels")
    middle = options.accept(kind, "mid_block_type", c.mid_block_type, MIDDLE)
    guidance = getattr(c, "time_cond_proj_dim", None)
    embedded = (c.class_embed_type, c.addition_embed_type, guidance is not None)
    names = "(class_embed_type, addition_embed_type, time_cond_proj_dim is given)"
    vector = options.accept(kind, names, embedded, VECTORS)
    act = options.accept(kind, "act_fn", c.act_fn, {"silu": jax.nn.silu} if vector == "code" else options.ACTIVATIONS)
    shift = options.accept(kind, "resnet_time_scale_shift", c.resnet_time_scale_shift, SHIFTS)
    each = lambda name: levels(kind, name, getattr(c, name), n)
    size = {"code": c.projection_class_embeddings_input_dim, "time": guidance, "": 0}[vector]
    for name, value in (("norm_num_groups", c.norm_num_groups), ("projection_class_embeddings_input_dim", size)):
        if value is None:
            raise ValueError(
                f"{kind}: {name}=None has no counterpart here beside the other fields; accepted is a number"
            )
    heads, depths, only = (
        each(name) for name in ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention")
    )
    reads = [*attends[:-1], attends[-1] or any(middle)]
    if any(a and (h < 1 or width % h) for a, h, width in zip(reads, heads, c.block_out_channels, strict=True)):
        raise ValueError(
            f"{kind}: attention_head_dim={c.attention_head_dim}, the number of heads, does not divide "
            f"block_out_channels={c.block_out_channels}"
        )
    norm = part(GroupNorm, groups=c.norm_num_groups)
    parts = [part(transformer, norm=norm, depth=d, only_tokens=o) for d, o in zip(depths, only, strict=True)]
    bottom = part(transformer, norm=norm, depth=depths[-1], only_tokens=False)
    return dict(
        widths=c.block_out_channels,
        blocks=one(kind, "layers_per_block", c.layers_per_block),
        attention=tuple(i for i, a in enumerate(attends) if a),
        middle=middle,
        heads=heads,
        code=4 * c.block_out_channels[0],
        num_classes=c.num_class_embeds or 0,
        null_label=not c.num_class_embeds,
        vector_size=size,
        deep_vector=vector == "code",
        early=("vector",) if vector == "time" else (),
        token_size=one(kind, "cross_attention_dim", c.cross_attention_dim) if any(attends) or any(middle) else 0,
        frequencies=falling(int(c.freq_shift), c.flip_sin_to_cos),
        sinusoids=c.block_out_channels[0],
        act=act,
        norm=part(GroupNorm, groups=c.norm_num_groups, eps=c.norm_eps),
        block=part(ResBlock, modulation=shift),
        mix=(*(p for p, a in zip(parts, attends, strict=True) if a), bottom),
        down=DOWN[
            options.accept(kind, "downsample_padding", c.downsample_padding, {1: "conv", 0: "conv, zeros after"})
        ],
    )


def levels(kind: str, name: str, value: Any, n: int) -> tuple:
    """One value for each level.   Raises: ValueError: another number of values, or lists of lists."""
    values = value if isinstance(value, tuple) else (value,) * n
    if len(values) != n or any(isinstance(a, tuple) or a is None for a in values):
        raise ValueError(
            f"{kind}: {name}={value!r} has no counterpart here; accepted is one value, or one for each level"
        )
    return values


def one(kind: str, name: str, value: Any) -> int:
    """The value of all levels.   Raises: ValueError: they differ."""
    values = set(value) if isinstance(value, tuple) else {value}
    if len(values) != 1 or None in values:
        raise ValueError(f"{kind}: {name}={value!r} has no counterpart here; accepted is one value for all levels")
    return values.pop()


def config(module: UNet) -> dict[str, Any]:
    """The configuration of a module.   Raises: ValueError: there is none."""
    attends = [i in module.attention for i in range(len(module.widths))]
    page = encoder_config(module) | dict(
        in_channels=(module.out_channels or 0) + module.image_channels,
        out_channels=module.out_channels,
        up_block_types=[options.name_of(UP_LEVELS, a, "attention") for a in reversed(attends)],
        dropout=module.dropout,
        time_embedding_dim=module.code,
        time_cond_proj_dim=module.vector_size if "vector" in module.early else None,
    )
    check_same(KIND, network(page), module)
    return page


def encoder_config(module: UNet) -> dict[str, Any]:
    """What the way down of a module decides of a configuration."""
    n = range(len(module.widths))
    groups, eps = norm_of(module.norm)
    shift = given(module.block)[1].get("modulation", film)
    options_of = lambda i, bottom=False: given(module.mix_of(i, bottom))[1]
    last = options_of(n[-1], True)
    depths = [options_of(i).get("depth", 1) if i in module.attention else 1 for i in n]
    depths[-1] = last.get("depth", 1) if middle_of(module) else depths[-1]
    down = options.name_of(DOWN, module.down, "down")
    times = module.frequencies if isinstance(module.frequencies, falling) else falling()
    return dict(
        flip_sin_to_cos=times.cosines_first,
        freq_shift=times.shift,
        down_block_types=[options.name_of(LEVELS, i in module.attention, "attention") for i in n],
        mid_block_type=options.name_of(MIDDLE, middle_of(module), "middle"),
        only_cross_attention=[i in module.attention and options_of(i).get("only_tokens", False) for i in n],
        block_out_channels=list(module.widths),
        layers_per_block=module.blocks,
        downsample_padding=0 if down == "conv, zeros after" else 1,
        act_fn=options.name_of(options.ACTIVATIONS, module.act, "act"),
        norm_num_groups=groups,
        norm_eps=eps,
        cross_attention_dim=module.token_size or ENCODER["cross_attention_dim"],
        transformer_layers_per_block=depths,
        attention_head_dim=[module.heads_of(i) for i in n],
        addition_embed_type="text_time" if module.deep_vector else None,
        addition_time_embed_dim=256 if module.deep_vector else None,
        num_class_embeds=module.num_classes or None,
        resnet_time_scale_shift=options.name_of(SHIFTS, shift, "modulation"),
        projection_class_embeddings_input_dim=module.vector_size if module.deep_vector else None,
    )


def rules(module: UNet, config: Config) -> list[Rule]:
    """The rules of a module."""
    return encoder_side(module, config) + decoder_rules(module, projection(config))


def encoder_side(module: UNet, config: Config) -> list[Rule]:
    """The rules of embeddings, way down and bottom."""
    vector = "class_embedding" if config.get("class_embed_type") == "projection" else "add_embedding"
    return code_rules(module, vector) + encoder_rules(module, projection(config))


def projection(config: Config) -> Any:
    """The form of the maps around the transformers."""
    return dense if config.get("use_linear_projection", False) else conv1x1


def text_time(text: Any, numbers: Any, size: int = 256) -> jax.Array:
    """The vector of Stable Diffusion XL: the pooled text, and features of six numbers.   [B, k], [B, 6] -> [B, k + 6 size]

    Args: text: of the second encoder.   numbers: height and width of the original, top and left of the crop, height and
    width wanted; the refiner has a score in the place of the last two.   size: `addition_time_embed_dim`.

    Example:
        >>> text_time(jnp.zeros((2, 8)), jnp.ones((2, 6)), 4).shape
        (2, 32)

    Reference: Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """
    return jnp.concatenate([text, falling()(numbers, size).reshape(len(text), -1).astype(text.dtype)], axis=-1)


PEER = Peer(network, config, rules, example, renames=OLD, by_config=True)
