"""SD3Transformer2DModel and FluxTransformer2DModel of diffusers as `networks.MMDiT`.

Both take the time code t = 1000 sigma, as their schedulers give it (the class of Flux itself is given sigma, and multiplies).
Their pooled text is `cond["vector"]`, and behind it 1000 times the guidance weight, if Flux takes one; their text tokens are
`cond["tokens"]`. Flux works on packed patches of 2 x 2; here it takes the latents themselves, and channels beyond those of
the output are `cond["image"]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from diffjax.interop import options
from diffjax.interop.kinds import beside, chunks, same, shaped
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule, blocks, layer
from diffjax.interop.transformers import (
    SINUSOIDS,
    attention_rules,
    base_of,
    both,
    fitted,
    mlp_rules,
    packed_in,
    packed_out,
    pixels,
    positions_of,
    projections,
    table_of,
    time_rules,
)
from diffjax.networks import Learned, MMDiT, Rope
from diffjax.networks.mmdit import THOUSAND

SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
SD3_DEFAULTS = dict(
    sample_size=128, patch_size=2, in_channels=16, num_layers=18, attention_head_dim=64, num_attention_heads=18,
    joint_attention_dim=4096, caption_projection_dim=1152, pooled_projection_dim=2048, out_channels=16,
    pos_embed_max_size=96, dual_attention_layers=(), qk_norm=None,
)  # fmt: skip
FLUX_DEFAULTS = dict(
    patch_size=1, in_channels=64, out_channels=None, num_layers=19, num_single_layers=38, attention_head_dim=128,
    num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=False,
    axes_dims_rope=(16, 56, 56),
)  # fmt: skip
PACKED = 2  # side of the patches that Flux is given
TABLE = "pos_embed.pos_embed"
SWAPPED = chunks((1, 0))  # they have the scale before the shift

# ---------------------------------------------------------------------------------------------------------------- SD3


def sd3_network(config: Config) -> MMDiT:
    """The module of a configuration."""
    c = options.read(SD3, config, SD3_DEFAULTS)
    width = c.num_attention_heads * c.attention_head_dim
    options.accept(SD3, "caption_projection_dim", c.caption_projection_dim, (width,))
    alone = len(c.dual_attention_layers)
    options.accept(SD3, "dual_attention_layers", c.dual_attention_layers, (tuple(range(alone)),))
    options.accept(SD3, "the number of dual_attention_layers", alone, range(c.num_layers))
    return MMDiT(
        width=width,
        depth=c.num_layers,
        heads=c.num_attention_heads,
        patch=c.patch_size,
        vector_size=c.pooled_projection_dim,
        token_size=c.joint_attention_dim,
        out_channels=c.out_channels,
        qk_norm=options.accept(SD3, "qk_norm", c.qk_norm, {None: False, "rms_norm": True}),
        positions=positions_of(c.sample_size // c.patch_size, c.pos_embed_max_size),
        alone=alone,
        frequencies=THOUSAND,
        act=nn.gelu,
    )


def sd3_config(module: MMDiT) -> dict[str, Any]:
    """The configuration of a module; `sample_size` is open where its positions are learned."""
    check_plain(module, frequencies=(THOUSAND,), guided=(False,), single=(0,), rope=(None,), image_channels=(0,))
    if isinstance(module.positions, Learned):
        options.only(module, positions=(Learned(module.positions.height, module.positions.height, crop=True),))
        size = dict(pos_embed_max_size=module.positions.height)
    else:
        base, largest = base_of(module.positions)
        size = dict(pos_embed_max_size=largest, sample_size=base * module.patch)
    return dict(
        **size,
        patch_size=module.patch,
        num_layers=module.depth,
        attention_head_dim=module.width // module.heads,
        num_attention_heads=module.heads,
        joint_attention_dim=module.token_size,
        caption_projection_dim=module.width,
        pooled_projection_dim=module.vector_size,
        out_channels=module.out_channels,
        dual_attention_layers=list(range(module.alone)),
        qk_norm="rms_norm" if module.qk_norm else None,
    )


def sd3_rules(module: MMDiT) -> list[Rule]:
    """The rules of a module."""
    n, last = module.alone, module.depth - 1
    found = end_rules(module) + layer("in", "pos_embed.proj", pixels(module.patch)) + layer("out", "proj_out")
    if isinstance(module.positions, Learned):
        side = module.positions.height
        table = shaped((side * side, module.width), (1, side * side, module.width))
        found.append(Rule("positions/table", (TABLE,), table))
    found += blocks("dual/", n, lambda i: pair_rules(module, i, alone=True), scan=module.scan_layers)
    found += blocks("", last - n, lambda i: pair_rules(module, n + i), scan=module.scan_layers)
    return found + within("last/", pair_rules(module, last, last=True))


def sd3_fit(module: MMDiT, config: Config, tensors: Any) -> MMDiT:
    """Learned positions, where the table is not that of the configuration."""
    side = module.positions.crop
    if side is None or TABLE not in tensors:
        return module
    return module.clone(positions=fitted(module.positions, tensors[TABLE], side, base_of(module.positions)[0]))


def sd3_buffers(module: MMDiT, config: Config) -> Mapping[str, Any]:
    """Their table of positions, unless it is learned here or they do not store it."""
    side = getattr(module.positions, "crop", None)
    if isinstance(module.positions, Learned) or side is None:
        return {}
    return {TABLE: table_of(side, base_of(module.positions)[0], module.width)}


def sd3_example(module: MMDiT, config: Config) -> tuple:
    """One picture of the smallest size."""
    return example_of(module, module.patch, config.get("in_channels", SD3_DEFAULTS["in_channels"]))


# --------------------------------------------------------------------------------------------------------------- Flux


def flux_network(config: Config) -> MMDiT:
    """The module of a configuration."""
    c = options.read(FLUX, config, FLUX_DEFAULTS)
    options.accept(FLUX, "patch_size", c.patch_size, (1,))
    still, *axes = c.axes_dims_rope
    if len(axes) != 2 or sum(c.axes_dims_rope) != c.attention_head_dim:
        raise ValueError(
            f"{FLUX}: axes_dims_rope={c.axes_dims_rope!r} must be three numbers whose sum is attention_head_dim="
            f"{c.attention_head_dim}: of the text's axis, which is zero for all patches, of rows and of columns"
        )
    given = c.out_channels or c.in_channels
    pixels = PACKED * PACKED
    if c.in_channels % pixels or given % pixels or given > c.in_channels:
        raise ValueError(
            f"{FLUX}: in_channels={c.in_channels} and out_channels={c.out_channels} must be multiples of {pixels}, the "
            "pixels of a packed patch, and no more must come out than go in"
        )
    for field in ("num_layers", "num_single_layers"):
        options.accept(FLUX, field, getattr(c, field), range(1, 1000))
    return MMDiT(
        width=c.num_attention_heads * c.attention_head_dim,
        depth=c.num_layers,
        heads=c.num_attention_heads,
        patch=PACKED,
        vector_size=c.pooled_projection_dim + c.guidance_embeds,
        token_size=c.joint_attention_dim,
        image_channels=(c.in_channels - given) // pixels,
        out_channels=given // pixels,
        qk_norm=True,
        positions=None,
        rope=Rope(features=tuple(axes)),
        single=c.num_single_layers,
        guided=c.guidance_embeds,
        frequencies=THOUSAND,
        act=nn.gelu,
    )


def flux_config(module: MMDiT) -> dict[str, Any]:
    """The configuration of a module."""
    check_plain(module, frequencies=(THOUSAND,), qk_norm=(True,), patch=(PACKED,), positions=(None,), alone=(0,))
    size = module.width // module.heads
    rope = module.rope
    if rope is None or rope != Rope(features=rope.features) or rope.features is None or not module.single:
        raise ValueError(
            f"{FLUX} has rope=Rope(features=(rows, columns)) and single > 0; got rope={rope!r} and single={module.single}"
        )
    if module.out_channels is None:
        raise ValueError(f"{FLUX} wants to know the channels: give the module out_channels")
    return dict(
        patch_size=1,
        in_channels=PACKED**2 * (module.out_channels + module.image_channels),
        out_channels=PACKED**2 * module.out_channels,
        num_layers=module.depth,
        num_single_layers=module.single,
        attention_head_dim=size,
        num_attention_heads=module.heads,
        joint_attention_dim=module.token_size,
        pooled_projection_dim=module.vector_size - module.guided,
        guidance_embeds=module.guided,
        axes_dims_rope=[size - sum(rope.features), *rope.features],
    )


def flux_rules(module: MMDiT) -> list[Rule]:
    """The rules of a module."""
    found = (
        end_rules(module) + layer("in", "x_embedder", packed_in(PACKED)) + both("out", "proj_out", packed_out(PACKED))
    )
    found += blocks("", module.depth, lambda i: pair_rules(module, i), scan=module.scan_layers)
    return found + blocks("single/", module.single, lambda i: single_rules(module, i), scan=module.scan_layers)


def single_rules(module: MMDiT, i: int) -> list[Rule]:
    """The rules of a block of one stream, whose outputs they make in one layer."""
    theirs = f"single_transformer_blocks.{i}"
    found = layer("film", f"{theirs}.norm.linear") + layer("hidden", f"{theirs}.proj_mlp")
    found += projections("attention", f"{theirs}.attn", module.heads, norm=True)
    found.append(Rule(("project/kernel", "out/kernel"), (f"{theirs}.proj_out.weight",), beside(module.width)))
    return [*found, Rule("project/bias", (f"{theirs}.proj_out.bias",), same)]


def flux_example(module: MMDiT, config: Config) -> tuple:
    """One patch."""
    return example_of(module, PACKED, module.out_channels)


# --------------------------------------------------------------------------------------------------------------- both


def check_plain(module: MMDiT, **fields: tuple) -> None:
    """Refuse what neither of them has, and other values of these fields."""
    options.only(
        module, num_classes=(0,), expand=(4,), dropout=(0.0,), sinusoids=(SINUSOIDS,), act=(nn.gelu,), **fields
    )
    if not module.vector_size:
        raise ValueError("an MMDiT without pooled text (vector_size=0) has no counterpart in the other library")


def end_rules(module: MMDiT) -> list[Rule]:
    """The rules of the code, of the text's embedding and of the last modulation."""
    found = time_rules("time", "time_text_embed.timestep_embedder")
    if module.guided:
        found += time_rules("guidance", "time_text_embed.guidance_embedder")
    for name, number in (("hidden", 1), ("out", 2)):
        found += layer(f"vector_{name}", f"time_text_embed.text_embedder.linear_{number}")
    return found + layer("in_text", "context_embedder") + both("film", "norm_out.linear", SWAPPED)


def pair_rules(module: MMDiT, i: int, *, alone: bool = False, last: bool = False) -> list[Rule]:
    """The rules of a block of two streams."""
    theirs, heads, norm = f"transformer_blocks.{i}", module.heads, module.qk_norm
    found = layer("film", f"{theirs}.norm1.linear") + mlp_rules("", f"{theirs}.ff")
    found += projections("attention", f"{theirs}.attn", heads, norm=norm)
    found += projections("attention", f"{theirs}.attn", heads, text=True, norm=norm)
    found += layer("project", f"{theirs}.attn.to_out.0")
    if alone:
        found += attention_rules("own_attention", f"{theirs}.attn2", heads, norm=norm)
    if last:
        return found + both("film_text", f"{theirs}.norm1_context.linear", SWAPPED)
    found += layer("film_text", f"{theirs}.norm1_context.linear") + mlp_rules("_text", f"{theirs}.ff_context")
    return found + layer("project_text", f"{theirs}.attn.to_add_out")


def within(ours: str, rules: list[Rule]) -> list[Rule]:
    """The rules of a part, under its name."""
    return [rule._replace(ours=f"{ours}{rule.ours}") for rule in rules]


def example_of(module: MMDiT, side: int, channels: int) -> tuple:
    """A picture, a time and a text of one token."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    cond = {"tokens": array(1, 1, module.token_size), "vector": array(1, module.vector_size)}
    if module.image_channels:
        cond["image"] = array(1, side, side, module.image_channels)
    return array(1, side, side, channels), array(1), cond


SD3_PEER = Peer(sd3_network, sd3_config, sd3_rules, sd3_example, fit=sd3_fit, buffers=sd3_buffers)
FLUX_PEER = Peer(flux_network, flux_config, flux_rules, flux_example, unit=1e-3)
