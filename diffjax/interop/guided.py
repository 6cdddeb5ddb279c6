"""ADM checkpoints of guided diffusion, with the names of their own repository, as `networks.UNet`.

A folder holds the tensors as safetensors and a `config.json` that names the class and the flags with which the model is
made there: `{"_class_name": "GuidedDiffusion", "image_size": 256, "num_channels": 256, "class_cond": true, ...}`. Flags left
out have the defaults of that repository. A file alone is read by `load_guided`, which is given the flags. A network for
higher resolution has `large_size` and `small_size` too, and takes as image the small picture, enlarged bilinearly to the
state's size. Two fields are ours: `num_classes`, 1000 there, and `norm_groups`, 32 there. Flags of precision, memory and
diffusion are kept and change nothing of the network.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from diffjax.interop import options, unets
from diffjax.interop.kinds import Kind, by_head_fused, chunks, conv, conv1x1, dense, pointwise, same
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule, layer, norm
from diffjax.interop.unet_rules import PAIR, attending, check_same, given, norm_of
from diffjax.networks import UNet, falling, part
from diffjax.networks.layers import GroupNorm
from diffjax.networks.resample import double, halve
from diffjax.networks.unet_parts import ResBlock, added, attend, enlarged, film, strided, within

KIND = "GuidedDiffusion"
DIFFUSION = dict(
    diffusion_steps=1000, noise_schedule="linear", timestep_respacing="", use_kl=False, predict_xstart=False,
    rescale_timesteps=False, rescale_learned_sigmas=False,
)  # fmt: skip
DEFAULTS = DIFFUSION | dict(
    image_size=64, num_channels=128, num_res_blocks=2, num_heads=4, num_heads_upsample=-1, num_head_channels=-1,
    attention_resolutions="16,8", channel_mult="", dropout=0.0, class_cond=False, use_checkpoint=False,
    use_scale_shift_norm=True, resblock_updown=False, use_fp16=False, use_new_attention_order=False, learn_sigma=False,
    large_size=None, small_size=None, num_classes=1000, norm_groups=32,
)  # fmt: skip
MULTIPLES = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
LARGE = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
BLOCKS = {True: part(ResBlock, modulation=film), False: part(ResBlock, modulation=added)}
RESIZE = {True: part(within, resize=halve), False: strided}


def network(config: Config) -> UNet:
    """The module of a set of flags."""
    c = options.read(KIND, config, DEFAULTS)
    size = c.large_size or c.image_size
    if c.channel_mult:
        multiples = tuple(float(m) for m in c.channel_mult.split(","))
    else:
        multiples = options.accept(KIND, "image_size", size, LARGE if c.large_size else MULTIPLES)
    if c.num_head_channels == -1:
        options.accept(KIND, "num_heads_upsample", c.num_heads_upsample, (-1, c.num_heads))
    widths = tuple(int(m * c.num_channels) for m in multiples)
    rates = {size // int(resolution) for resolution in c.attention_resolutions.split(",") if resolution}
    norm = part(GroupNorm, groups=c.norm_groups, eps=1e-5)
    net = UNet(
        widths=widths,
        blocks=c.num_res_blocks,
        attention=tuple(i for i in range(len(widths)) if 2**i in rates),
        middle=(True, False),
        code=4 * c.num_channels,
        num_classes=c.num_classes if c.class_cond else 0,
        null_label=not c.class_cond,
        image_channels=3 if c.large_size else 0,
        out_channels=6 if c.learn_sigma else 3,
        frequencies=falling(),
        sinusoids=c.num_channels,
        act=jax.nn.silu,
        dropout=c.dropout,
        norm=norm,
        block=options.accept(KIND, "use_scale_shift_norm", c.use_scale_shift_norm, BLOCKS),
        mix=part(attend, norm=norm),
        down=options.accept(KIND, "resblock_updown", c.resblock_updown, RESIZE),
        up=part(within, resize=double) if c.resblock_updown else enlarged,
        **({"heads": c.num_heads} if c.num_head_channels == -1 else {"head_size": c.num_head_channels}),
    )
    for i in attending(net):
        if widths[i] % net.heads_of(i) or (c.num_head_channels > 0 and widths[i] % c.num_head_channels):
            raise ValueError(
                f"{KIND}: num_heads={c.num_heads}, num_head_channels={c.num_head_channels} do not divide {widths[i]} channels"
            )
    return net


def config(module: UNet) -> dict[str, Any]:
    """The flags of a module, with a nominal size.   Raises: ValueError: there are none."""
    groups, _ = norm_of(module.norm)
    base = module.sinusoids or module.widths[0]
    size = 2 ** max(6, len(module.widths) - 1)
    heads = {"num_heads": module.heads} if module.heads else {"num_head_channels": module.head_size}
    page = dict(
        image_size=size,
        num_channels=base,
        channel_mult=",".join(f"{width / base:g}" for width in module.widths),
        num_res_blocks=module.blocks,
        attention_resolutions=",".join(str(size // 2**i) for i in module.attention),
        dropout=module.dropout,
        class_cond=bool(module.num_classes),
        num_classes=module.num_classes or 1000,
        use_scale_shift_norm=given(module.block)[1].get("modulation", film) is film,
        resblock_updown=given(module.down)[0] is within,
        learn_sigma=module.out_channels == 6,
        norm_groups=groups,
        **heads,
        **({"large_size": size, "small_size": size // 4} if module.image_channels else {}),
    )
    check_same(KIND, network(page), module)
    return page


def rules(module: UNet, config: Config) -> list[Rule]:
    """The rules of a module; the order of queries, keys and values is that of the flag `use_new_attention_order`."""
    new = config.get("use_new_attention_order", False)
    found = layer("code/time/hidden", "time_embed.0") + layer("code/time/out", "time_embed.2")
    if module.num_classes:
        found.append(Rule("code/label/table", ("label_emb.weight",), same))
    found += layer("in", "input_blocks.0.0", conv)
    before, k, last = module.widths[0], 1, len(module.widths) - 1
    for i, width in enumerate(module.widths):
        for j in range(module.blocks):
            found += block_rules(module, f"down_{i}_{j}", f"input_blocks.{k}.0", skip=before != width)
            found += attention_rules(module, i, f"down_{i}_{j}", f"input_blocks.{k}.1", new)
            before, k = width, k + 1
        if i < last:
            found += resize_rules(module, f"halve_{i + 1}", f"input_blocks.{k}.0", "op")
            k += 1
    found += block_rules(module, "middle_0", "middle_block.0") + block_rules(module, "middle_1", "middle_block.2")
    found += attention_rules(module, last, "middle_0", "middle_block.1", new, always=True)
    k = 0
    for i in range(last, -1, -1):
        for j in range(module.blocks + 1):
            found += block_rules(module, f"up_{i}_{j}", f"output_blocks.{k}.0", skip=True)
            found += attention_rules(module, i, f"up_{i}_{j}", f"output_blocks.{k}.1", new)
            if i and j == module.blocks:
                place = f"output_blocks.{k}.{1 + (i in module.attention)}"
                found += resize_rules(module, f"double_{i - 1}", place, "conv")
            k += 1
    return found + norm("norm_out", "out.0") + layer("out", "out.2", conv)


def block_rules(net: UNet, ours: str, theirs: str, *, skip: bool = False) -> list[Rule]:
    """The rules of a residual block."""
    found = norm(f"{ours}/norm_in", f"{theirs}.in_layers.0") + layer(f"{ours}/conv_in", f"{theirs}.in_layers.2", conv)
    found += norm(f"{ours}/norm_out", f"{theirs}.out_layers.0")
    found += layer(f"{ours}/conv_out", f"{theirs}.out_layers.3", conv)
    kind = (
        chunks((1, 0)) if given(net.block)[1].get("modulation", film) is film else dense
    )  # theirs are scale and shift
    found += [Rule(f"{ours}/film/{a}", (f"{theirs}.emb_layers.1.{b}",), kind) for a, b in PAIR.items()]
    return found + (layer(f"{ours}/skip", f"{theirs}.skip_connection", conv1x1) if skip else [])


def resize_rules(net: UNet, ours: str, theirs: str, name: str) -> list[Rule]:
    """The rules of what is between two levels."""
    if given(net.down)[0] is within:
        return block_rules(net, ours, theirs)
    return layer(ours, f"{theirs}.{name}", conv)


def attention_rules(net: UNet, level: int, ours: str, theirs: str, new: bool, always: bool = False) -> list[Rule]:
    """The rules of attention, if there is any."""
    if level not in net.attention and not always:
        return []
    kernel, bias = fused(net.heads_of(level)) if new else (pointwise(1), dense)
    return [
        *norm(f"{ours}/norm_attention", f"{theirs}.norm"),
        Rule(f"{ours}/attention/qkv/kernel", (f"{theirs}.qkv.weight",), kernel),
        Rule(f"{ours}/attention/qkv/bias", (f"{theirs}.qkv.bias",), bias),
        *layer(f"{ours}/attention/out", f"{theirs}.proj_out", pointwise(1)),
    ]


@functools.cache
def fused(heads: int) -> tuple[Kind, Kind]:
    """The kinds of a kernel [3 heads D, in, 1] and its bias, sorted by kind, then head; legacy is sorted as ours."""
    bias = by_head_fused(heads, 3)
    write = lambda a: (bias.write(a)[0][..., None],)
    return Kind(f"{bias.name} pointwise", lambda a: bias.read(a[..., 0]), write), bias


def scheduler(config: Config) -> dict[str, Any]:
    """The configuration of a scheduler that the flags of diffusion describe; of `timestep_respacing` it says nothing.

    Raises: ValueError: `rescale_timesteps` with another number of steps than 1000.
    """
    c = options.read(KIND, config, DEFAULTS)
    options.accept(KIND, "rescale_timesteps", c.rescale_timesteps, (False, c.diffusion_steps == 1000))
    scale = 1000 / c.diffusion_steps
    return dict(
        _class_name="DDPMScheduler",
        num_train_timesteps=c.diffusion_steps,
        beta_schedule=options.accept(KIND, "noise_schedule", c.noise_schedule, SCHEDULES),
        beta_start=scale * 1e-4,
        beta_end=scale * 0.02,
        prediction_type="sample" if c.predict_xstart else "epsilon",
        variance_type="learned_range" if c.learn_sigma else "fixed_large",
    )


def example(module: UNet, config: Config) -> tuple:
    """One state of the smallest size, its time and its condition."""
    return unets.example(module, {"in_channels": 3 + module.image_channels})


PEER = Peer(network, config, rules, example, by_config=True)
