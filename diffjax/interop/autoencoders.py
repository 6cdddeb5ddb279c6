"""AutoencoderKL and VQModel of diffusers as `networks.KLAutoencoder` and `networks.VQAutoencoder`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffjax.interop import options
from diffjax.interop.kinds import conv, conv1x1, same
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule, layer, norm
from diffjax.networks import KLAutoencoder, VQAutoencoder, autoencoder

DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# `sample_size` is that of the pictures trained on, `force_upcast` an advice on dtypes: no part of the network
CODERS = dict(
    in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    block_out_channels=(64,), layers_per_block=1, act_fn="silu", norm_num_groups=32, sample_size=32,
    scaling_factor=0.18215, mid_block_add_attention=True,
)  # fmt: skip
KL_FIELDS = CODERS | dict(
    latent_channels=4, shift_factor=None, latents_mean=None, latents_std=None, force_upcast=True,
    use_quant_conv=True, use_post_quant_conv=True,
)  # fmt: skip
# with `lookup_from_codebook` their decoder takes tokens too, as `decode_tokens` always does
VQ_FIELDS = CODERS | dict(
    latent_channels=3, num_vq_embeddings=256, vq_embed_dim=None, norm_type="group", lookup_from_codebook=False,
    force_upcast=False,
)  # fmt: skip
# names of attention layers before diffusers 0.15, in weights that are still in use
OLD = tuple(
    (rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
)


# ------------------------------------------------------------------------------------------------------ configuration


def kl_network(config: Config) -> KLAutoencoder:
    """The module of a configuration of AutoencoderKL."""
    c = options.read("AutoencoderKL", config, KL_FIELDS)
    return KLAutoencoder(
        **coder_fields("AutoencoderKL", c),
        latent_channels=c.latent_channels,
        quant_conv=c.use_quant_conv,
        post_quant_conv=c.use_post_quant_conv,
    )


def vq_network(config: Config) -> VQAutoencoder:
    """The module of a configuration of VQModel."""
    c = options.read("VQModel", config, VQ_FIELDS)
    spatial = options.accept("VQModel", "norm_type", c.norm_type, {"group": False, "spatial": True})
    size = c.latent_channels if c.vq_embed_dim is None else c.vq_embed_dim
    if spatial and (c.norm_num_groups != 32 or size != c.latent_channels):
        raise ValueError(
            f"VQModel: norm_type='spatial' has 32 groups and a latent of the size of its codes; got norm_num_groups="
            f"{c.norm_num_groups}, latent_channels={c.latent_channels} and vq_embed_dim={c.vq_embed_dim}"
        )
    return VQAutoencoder(
        **coder_fields("VQModel", c),
        latent_channels=size,
        codes=c.num_vq_embeddings,
        bottleneck=None if size == c.latent_channels else c.latent_channels,
        spatial_norm=spatial,
    )


def coder_fields(kind: str, c: Any) -> dict[str, Any]:
    """The fields of encoder and decoder."""
    act = options.accept(kind, "act_fn", c.act_fn, options.ACTIVATIONS)
    return dict(
        widths=c.block_out_channels,
        blocks=c.layers_per_block,
        attention=levels(kind, c),
        middle_attention=c.mid_block_add_attention,
        out_channels=c.out_channels,
        groups=c.norm_num_groups,
        act=act,
        act_out=None if act is jax.nn.silu else jax.nn.silu,  # theirs is SiLU whatever the others are
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


def kl_config(module: KLAutoencoder) -> dict[str, Any]:
    """The configuration of a module.   Raises: ValueError: AutoencoderKL has no such network."""
    options.only(module, bottleneck=(None, module.latent_channels))
    own = dict(latent_channels=module.latent_channels)
    own |= dict(use_quant_conv=module.quant_conv, use_post_quant_conv=module.post_quant_conv)
    return coder_config(module) | own


def vq_config(module: VQAutoencoder) -> dict[str, Any]:
    """The configuration of a module.   Raises: ValueError: VQModel has no such network."""
    options.only(module, quant_conv=(True,), post_quant_conv=(True,), average=(False,))
    return coder_config(module) | dict(
        latent_channels=module.bottleneck or module.latent_channels,
        vq_embed_dim=module.latent_channels,
        num_vq_embeddings=module.codes,
        norm_type="spatial" if module.spatial_norm else "group",
    )


def coder_config(module: Any) -> dict[str, Any]:
    """The part of the configuration that is of encoder and decoder."""
    options.only(module, patch=(1,), linear=(False,))
    if (module.act_out or module.act) is not jax.nn.silu:
        raise ValueError(f"their last activation is SiLU; got {module.act_out or module.act}. Give act_out=nn.silu")
    n = range(len(module.widths))
    return dict(
        out_channels=module.out_channels,
        down_block_types=[list(DOWN)[i in module.attention] for i in n],
        up_block_types=[list(UP)[i in module.attention] for i in reversed(n)],
        block_out_channels=list(module.widths),
        layers_per_block=module.blocks,
        act_fn=options.name_of(options.ACTIVATIONS, module.act, "act"),
        norm_num_groups=options.groups_of(module.groups, module.widths),
        mid_block_add_attention=module.middle_attention,
    )


# -------------------------------------------------------------------------------------------------------------- rules


def kl_rules(module: KLAutoencoder) -> list[Rule]:
    """The rules of AutoencoderKL."""
    quant = layer("quant", "quant_conv", conv1x1) if module.quant_conv else []
    return (
        coder_rules(module)
        + quant
        + (layer("post_quant", "post_quant_conv", conv1x1) if module.post_quant_conv else [])
    )


def vq_rules(module: VQAutoencoder) -> list[Rule]:
    """The rules of VQModel."""
    found = coder_rules(module, module.spatial_norm)
    found += layer("quant", "quant_conv", conv1x1) + layer("post_quant", "post_quant_conv", conv1x1)
    return [*found, Rule("codebook/embedding", ("quantize.embedding.weight",), same)]


def coder_rules(module: Any, spatial: bool = False) -> list[Rule]:
    """The rules of encoder and decoder.   spatial: the norms of the decoder are `SpatialNorm`s"""
    last = len(module.widths) - 1
    found: list[Rule] = []
    for part in ("encoder", "decoder"):
        side = spatial and part == "decoder"
        found += layer(f"{part}/in", f"{part}.conv_in", conv) + layer(f"{part}/out", f"{part}.conv_out", conv)
        found += norm_rules(f"{part}/norm_out", f"{part}.conv_norm_out", side)
        for j in range(2):
            found += block_rules(f"{part}/middle_{j}", f"{part}.mid_block.resnets.{j}", False, side)
        if module.middle_attention:
            found += attention_rules(f"{part}/middle_attention", f"{part}.mid_block.attentions.0", side)
    for i, width in enumerate(module.widths):
        before = (module.widths[max(i - 1, 0)], module.widths[min(i + 1, last)])  # on the way down, on the way up
        ways = (("encoder", "down", i, module.blocks, False), ("decoder", "up", last - i, module.blocks + 1, spatial))
        for (part, way, place, blocks, side), width_before in zip(ways, before, strict=True):
            theirs = f"{part}.{way}_blocks.{place}"
            for j in range(blocks):
                skip = j == 0 and width_before != width
                found += block_rules(f"{part}/{way}_{i}_{j}", f"{theirs}.resnets.{j}", skip, side)
                if i in module.attention:
                    found += attention_rules(f"{part}/attention_{i}_{j}", f"{theirs}.attentions.{j}", side)
        if i < last:
            found += layer(f"encoder/halve_{i}", f"encoder.down_blocks.{i}.downsamplers.0.conv", conv)
        if i:
            found += layer(f"decoder/double_{i}", f"decoder.up_blocks.{last - i}.upsamplers.0.conv", conv)
    return found


def block_rules(ours: str, theirs: str, skip: bool, spatial: bool = False) -> list[Rule]:
    """The rules of a residual block without time."""
    found = norm_rules(f"{ours}/norm_in", f"{theirs}.norm1", spatial) + layer(
        f"{ours}/conv_in", f"{theirs}.conv1", conv
    )
    found += norm_rules(f"{ours}/norm_out", f"{theirs}.norm2", spatial)
    found += layer(f"{ours}/conv_out", f"{theirs}.conv2", conv)
    return found + (layer(f"{ours}/skip", f"{theirs}.conv_shortcut", conv1x1) if skip else [])


def attention_rules(ours: str, theirs: str, spatial: bool = False) -> list[Rule]:
    """The rules of attention with one head."""
    found = norm_rules(f"{ours}/norm", f"{theirs}.{'spatial_norm' if spatial else 'group_norm'}", spatial)
    found += layer(f"{ours}/out", f"{theirs}.to_out.0")
    return found + [rule for a in "qkv" for rule in layer(f"{ours}/{a}_in", f"{theirs}.to_{a}")]


def norm_rules(ours: str, theirs: str, spatial: bool) -> list[Rule]:
    """The rules of group normalisation, or of that by a side."""
    if not spatial:
        return norm(ours, theirs)
    sides = layer(f"{ours}/scale", f"{theirs}.conv_y", conv1x1) + layer(f"{ours}/shift", f"{theirs}.conv_b", conv1x1)
    return norm(f"{ours}/norm", f"{theirs}.norm_layer") + sides


# -------------------------------------------------------------------------------------------------------------- latent


def example(module: Any, config: Config) -> tuple:
    """One picture of the smallest size."""
    side = 2 ** (len(module.widths) - 1)
    return (jax.ShapeDtypeStruct((1, side, side, config.get("in_channels", 3)), np.float32),)


def function(module: Any, config: Config) -> Any:
    """The autoencoder as a function of its parameters."""
    return autoencoder(module)


def kl_latent(module: Any, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale of the latent.   (E(x) - shift_factor) scaling_factor, or (E(x) - mean) scaling_factor / std"""
    c = options.read("AutoencoderKL", config, KL_FIELDS)
    given = (c.latents_mean is not None, c.latents_std is not None, c.shift_factor is not None)
    if given not in ((False, False, False), (False, False, True), (True, True, False)):
        raise ValueError(
            f"AutoencoderKL: latents_mean={c.latents_mean}, latents_std={c.latents_std} and shift_factor={c.shift_factor} "
            "say two things or half a thing; accepted is shift_factor, or mean and std, or none"
        )
    shift, std = (c.latents_mean, c.latents_std) if given[0] else (c.shift_factor or 0.0, 1.0)
    one = np.ones(module.latent_channels, np.float32)
    return one * np.float32(shift), one * np.float32(std) / np.float32(c.scaling_factor)


def vq_latent(module: Any, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale of the latent.   E(x) scaling_factor"""
    c = options.read("VQModel", config, VQ_FIELDS)
    one = np.ones(module.latent_channels, np.float32)
    return 0 * one, one / np.float32(c.scaling_factor)


KL = Peer(kl_network, kl_config, kl_rules, example, fn=function, latent=kl_latent, renames=OLD)
VQ = Peer(vq_network, vq_config, vq_rules, example, fn=function, latent=vq_latent, renames=OLD)
