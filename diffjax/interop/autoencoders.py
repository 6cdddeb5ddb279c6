"""AutoencoderKL of diffusers as `networks.KLAutoencoder`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffjax.interop import options
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule, conv, conv1x1, layer, norm
from diffjax.networks import KLAutoencoder, autoencoder

DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
DEFAULTS = dict(
    in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    block_out_channels=(64,), layers_per_block=1, act_fn="silu", latent_channels=4, norm_num_groups=32, sample_size=32,
    scaling_factor=0.18215, shift_factor=None, latents_mean=None, latents_std=None, force_upcast=True,
    use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
)  # fmt: skip
# names of attention layers before diffusers 0.15, in weights that are still in use
OLD = tuple(
    (rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
)


def network(config: Config) -> KLAutoencoder:
    """The module of a configuration."""
    kind = "AutoencoderKL"
    c = options.read(kind, config, DEFAULTS)
    return KLAutoencoder(
        widths=c.block_out_channels,
        blocks=c.layers_per_block,
        latent_channels=c.latent_channels,
        attention=levels(kind, c),
        middle_attention=c.mid_block_add_attention,
        quant_conv=c.use_quant_conv,
        post_quant_conv=c.use_post_quant_conv,
        out_channels=c.out_channels,
        groups=c.norm_num_groups,
        act=options.accept(kind, "act_fn", c.act_fn, {"silu": jax.nn.silu, "swish": jax.nn.silu}),
    )


def levels(kind: str, c: Any) -> tuple[int, ...]:
    """The levels with attention, which must be the same downwards and upwards."""
    down = [options.accept(kind, "down_block_types", name, DOWN) for name in c.down_block_types]
    up = [options.accept(kind, "up_block_types", name, UP) for name in reversed(c.up_block_types)]
    if down != up or len(down) != len(c.block_out_channels):
        raise ValueError(
            f"{kind}: down_block_types={c.down_block_types} and up_block_types={c.up_block_types} must mirror each other, "
            f"one for each of block_out_channels={c.block_out_channels}"
        )
    return tuple(i for i, attends in enumerate(down) if attends)


def config(module: KLAutoencoder) -> dict[str, Any]:
    """The configuration of a module."""
    n = range(len(module.widths))
    return dict(
        out_channels=module.out_channels,
        down_block_types=[list(DOWN)[i in module.attention] for i in n],
        up_block_types=[list(UP)[i in module.attention] for i in reversed(n)],
        block_out_channels=list(module.widths),
        layers_per_block=module.blocks,
        act_fn="silu",
        latent_channels=module.latent_channels,
        norm_num_groups=module.groups,
        use_quant_conv=module.quant_conv,
        use_post_quant_conv=module.post_quant_conv,
        mid_block_add_attention=module.middle_attention,
    )


def rules(module: KLAutoencoder) -> list[Rule]:
    """The rules of a module."""
    found = coder_rules(module)
    if module.quant_conv:
        found += layer("quant", "quant_conv", conv1x1)
    if module.post_quant_conv:
        found += layer("post_quant", "post_quant_conv", conv1x1)
    return found


def coder_rules(module: Any) -> list[Rule]:
    """The rules of encoder and decoder."""
    last = len(module.widths) - 1
    found: list[Rule] = []
    for part in ("encoder", "decoder"):
        found += layer(f"{part}/in", f"{part}.conv_in", conv) + layer(f"{part}/out", f"{part}.conv_out", conv)
        found += norm(f"{part}/norm_out", f"{part}.conv_norm_out")
        for j in range(2):
            found += block_rules(f"{part}/middle_{j}", f"{part}.mid_block.resnets.{j}", False)
        if module.middle_attention:
            found += attention_rules(f"{part}/middle_attention", f"{part}.mid_block.attentions.0")
    for i, width in enumerate(module.widths):
        before = (module.widths[max(i - 1, 0)], module.widths[min(i + 1, last)])  # from above, from below
        sides = (("encoder", "down", i, module.blocks), ("decoder", "up", last - i, module.blocks + 1))
        for (part, way, place, blocks), width_before in zip(sides, before, strict=True):
            theirs = f"{part}.{way}_blocks.{place}"
            for j in range(blocks):
                skip = j == 0 and width_before != width
                found += block_rules(f"{part}/{way}_{i}_{j}", f"{theirs}.resnets.{j}", skip)
                if i in module.attention:
                    found += attention_rules(f"{part}/attention_{i}_{j}", f"{theirs}.attentions.{j}")
        if i < last:
            found += layer(f"encoder/halve_{i}", f"encoder.down_blocks.{i}.downsamplers.0.conv", conv)
        if i:
            found += layer(f"decoder/double_{i}", f"decoder.up_blocks.{last - i}.upsamplers.0.conv", conv)
    return found


def block_rules(ours: str, theirs: str, skip: bool) -> list[Rule]:
    """The rules of a residual block without time."""
    found = norm(f"{ours}/norm_in", f"{theirs}.norm1") + layer(f"{ours}/conv_in", f"{theirs}.conv1", conv)
    found += norm(f"{ours}/norm_out", f"{theirs}.norm2") + layer(f"{ours}/conv_out", f"{theirs}.conv2", conv)
    return found + (layer(f"{ours}/skip", f"{theirs}.conv_shortcut", conv1x1) if skip else [])


def attention_rules(ours: str, theirs: str) -> list[Rule]:
    """The rules of attention with one head."""
    found = norm(f"{ours}/norm", f"{theirs}.group_norm") + layer(f"{ours}/out", f"{theirs}.to_out.0")
    return found + [rule for a in "qkv" for rule in layer(f"{ours}/{a}_in", f"{theirs}.to_{a}")]


def example(module: Any, config: Config) -> tuple:
    """One picture of the smallest size."""
    side = module.patch * 2 ** (len(module.widths) - 1)
    return (jax.ShapeDtypeStruct((1, side, side, config.get("in_channels", 3)), np.float32),)


def latent(module: Any, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale of the latent.   (E(x) - shift_factor) scaling_factor = (E(x) - shift) / scale"""
    c = options.read("AutoencoderKL", config, DEFAULTS)
    ones = np.ones(module.latent_channels, np.float32)
    return ones * (c.shift_factor or 0.0), ones / c.scaling_factor


KL = Peer(network, config, rules, example, fn=lambda module, config: autoencoder(module), latent=latent, renames=OLD)
