"""How the parameters of a `UNet` are named in U-Nets of diffusers: what its classes share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from diffjax.interop.kinds import Kind, chunks, conv, conv1x1, dense, kv, parted, qkv, same
from diffjax.interop.rules import Rule, joined, layer, norm
from diffjax.networks import UNet, part
from diffjax.networks.embeddings import kept_fourier
from diffjax.networks.layers import GroupNorm, default_groups
from diffjax.networks.resample import fir_halve, halve
from diffjax.networks.transformer import transformer
from diffjax.networks.unet_parts import ResBlock, added, attend, film, strided, unnormalised, within

SHIFTS = {"default": added, "scale_shift": film}  # resnet_time_scale_shift
DOWN = {
    "conv": strided,
    "conv, zeros after": part(strided, before=0),
    "resnet": part(within, resize=halve),
    "skip": part(within, resize=fir_halve),
}
FREE = ("conv", "remat", "dtype", "heads", "head_size", "name", "parent")  # fields that no configuration decides


def given(made: Any) -> tuple[Any, dict[str, Any]]:
    """A part as its function and its arguments."""
    return (made.make, dict(made.given)) if isinstance(made, part) else (made, {})


def norm_of(made: Any) -> tuple[int | None, float]:
    """Groups and eps of a norm.   Raises: ValueError: another norm."""
    make, fields = given(made)
    if make is not GroupNorm:
        raise ValueError(f"norm={made} has no counterpart; use part(GroupNorm, groups=32, eps=1e-5)")
    return fields.get("groups"), fields.get("eps", GroupNorm.eps)


def middle_of(net: UNet) -> tuple[bool, ...]:
    """Which blocks at the bottom attend."""
    return (bool(net.attention), False) if net.middle is None else net.middle


def attending(net: UNet) -> list[int]:
    """The levels with attention, that at the bottom too."""
    return sorted({*net.attention, *([len(net.widths) - 1] if any(middle_of(net)) else [])})


def settled(net: UNet) -> dict[str, Any]:
    """The fields of a U-Net with all defaults filled in, so that networks that compute the same are equal."""
    found = {f.name: getattr(net, f.name) for f in dataclasses.fields(UNet) if f.name not in FREE}
    last = len(net.widths) - 1
    mixes = [filled(net.mix_of(i, False), net.widths[i]) for i in net.attention]
    bottom = [filled(net.mix_of(last, True), net.widths[last])] if any(middle_of(net)) else []
    heads = {i: net.heads_of(i) for i in attending(net)}
    found["norm"] = norm_of(net.norm)
    found |= {"middle": middle_of(net), "mix": mixes + bottom, "block": filled(net.block), "heads": heads}
    return found | {
        "stem": net.stem or net.widths[0],
        "sinusoids": net.sinusoids or net.code,
        "late": net.late and bool(net.attention),
    }


def filled(made: Any, width: int = 0) -> tuple[Any, dict[str, Any]]:
    """A part as its function and all its arguments; a norm as its groups for a width, and eps."""
    make, fields = given(made)
    defaults = {p.name: p.default for p in inspect.signature(make).parameters.values() if p.default is not p.empty}
    fields = {name: value for name, value in (defaults | fields).items() if name not in ("name", "parent", "remat")}
    if width and fields.get("norm") is not unnormalised:
        groups, eps = norm_of(fields["norm"])
        fields["norm"] = (groups or default_groups(width), eps)
    return make, fields


def check_same(kind: str, made: UNet, net: UNet) -> None:
    """Refuse a module that is not the one which its configuration makes.

    Raises: ValueError: names the fields that differ.
    """
    theirs, ours = settled(made), settled(net)
    wrong = [name for name in ours if ours[name] != theirs[name]]
    if wrong:
        shown = "; ".join(f"{name}={ours[name]}, in {kind} {theirs[name]}" for name in wrong)
        raise ValueError(f"{kind} cannot express this UNet: {shown}")


# ------------------------------------------------------------------------------------------------------------- rules


def code_rules(net: UNet, vector: str = "add_embedding") -> list[Rule]:
    """The rules of the embeddings of time, class and vector."""
    found = layer("code/time/hidden", "time_embedding.linear_1") + layer("code/time/out", "time_embedding.linear_2")
    if isinstance(net.frequencies, kept_fourier):
        found.append(Rule("code/time/frequencies", ("time_proj.weight",), same))
    if net.num_classes:
        found.append(Rule("code/label/table", ("class_embedding.weight",), same))
    if net.vector_size and "vector" in net.early:
        return found + layer("code/vector", "time_embedding.cond_proj", bias=False)
    if net.vector_size:
        found += layer("code/vector_hidden", f"{vector}.linear_1") + layer("code/vector", f"{vector}.linear_2")
    return found


def encoder_rules(net: UNet, projection: Kind = conv1x1) -> list[Rule]:
    """The rules of the way down and of the bottom."""
    found = layer("in", "conv_in", conv)
    before = net.stem or net.widths[0]
    for i, width in enumerate(net.widths):
        theirs = f"down_blocks.{i}"
        for j in range(net.blocks):
            found += block_rules(net, f"down_{i}_{j}", f"{theirs}.resnets.{j}", skip=before != width)
            if i in net.attention:
                found += mix_rules(net, i, f"down_{i}_{j}", f"{theirs}.attentions.{j}", projection)
            before = width
        if i < len(net.widths) - 1:
            found += resize_rules(net, net.down, f"halve_{i + 1}", theirs, "down")
            if net.pyramid_in is not None:
                found += layer(f"halve_{i + 1}_pyramid", f"{theirs}.skip_conv", conv)
    attentions = iter(range(len(net.widths)))
    for j, attends in enumerate(middle_of(net)):
        found += block_rules(net, f"middle_{j}", f"mid_block.resnets.{j}")
        if attends:
            theirs = f"mid_block.attentions.{next(attentions)}"
            found += mix_rules(net, len(net.widths) - 1, f"middle_{j}", theirs, projection, bottom=True)
    return found


def decoder_rules(net: UNet, projection: Kind = conv1x1) -> list[Rule]:
    """The rules of the way up and of the output."""
    found: list[Rule] = []
    last = len(net.widths) - 1
    for i in range(last, -1, -1):
        theirs = f"up_blocks.{last - i}"
        attends = [j for j in range(net.blocks + 1) if i in net.attention and (j == net.blocks or not net.late)]
        for j in range(net.blocks + 1):
            found += block_rules(net, f"up_{i}_{j}", f"{theirs}.resnets.{j}", skip=True)
            if j in attends:
                found += mix_rules(net, i, f"up_{i}_{j}", f"{theirs}.attentions.{attends.index(j)}", projection)
        if i:
            found += resize_rules(net, net.up, f"double_{i - 1}", theirs, "up")
        if i and net.pyramid_out is not None:
            found += norm(f"norm_out_{i}", f"{theirs}.skip_norm") + layer(f"out_{i}", f"{theirs}.skip_conv", conv)
    return found + norm("norm_out", "conv_norm_out") + layer("out", "conv_out", conv)


def block_rules(net: UNet, ours: str, theirs: str, *, skip: bool = False) -> list[Rule]:
    """The rules of a residual block."""
    shift = given(net.block)[1].get("modulation", film)
    found = norm(f"{ours}/norm_in", f"{theirs}.norm1") + layer(f"{ours}/conv_in", f"{theirs}.conv1", conv)
    found += norm(f"{ours}/norm_out", f"{theirs}.norm2") + layer(f"{ours}/conv_out", f"{theirs}.conv2", conv)
    # theirs are scale and shift, ours shift and scale
    kind = chunks((1, 0)) if shift is film else dense
    found += [Rule(f"{ours}/film/{a}", (f"{theirs}.time_emb_proj.{b}",), kind) for a, b in PAIR.items()]
    return found + (layer(f"{ours}/skip", f"{theirs}.conv_shortcut", conv1x1) if skip else [])


PAIR = {"kernel": "weight", "bias": "bias"}


def resize_rules(net: UNet, resize: Any, ours: str, theirs: str, way: str) -> list[Rule]:
    """The rules of what is between two levels."""
    make, fields = given(resize)
    if make is not within:
        return layer(ours, f"{theirs}.{way}samplers.0.conv", conv)
    project = given(net.block)[1].get("project", ResBlock.project)
    theirs = f"{theirs}.resnet_{way}" if project else f"{theirs}.{way}samplers.0"
    return block_rules(net, ours, theirs, skip=project)


def mix_rules(net: UNet, level: int, ours: str, theirs: str, projection: Kind, bottom: bool = False) -> list[Rule]:
    """The rules of what follows a residual block where there is attention."""
    heads = net.heads_of(level)
    make, fields = given(net.mix_of(level, bottom))
    if make is attend:
        normalised = fields.get("norm", GroupNorm) is not unnormalised
        found = norm(f"{ours}/norm_attention", f"{theirs}.group_norm") if normalised else []
        found += joined(f"{ours}/attention/qkv", [f"{theirs}.to_{a}" for a in "qkv"], qkv(heads))
        return found + layer(f"{ours}/attention/out", f"{theirs}.to_out.0")
    if make is not transformer:
        raise ValueError(f"mix={make} has no counterpart; there are attend and transformer")
    found = norm(f"{ours}/norm_attention", f"{theirs}.norm")
    for name in ("proj_in", "proj_out"):
        found += layer(f"{ours}/{name}", f"{theirs}.{name}", projection)
    for k in range(fields.get("depth", 1)):
        block = f"{theirs}.transformer_blocks.{k}"
        found += transformer_rules(f"{ours}/block_{k}", block, heads, fields.get("only_tokens", False))
    return found


def transformer_rules(ours: str, theirs: str, heads: int, only_tokens: bool) -> Iterator[Rule]:
    """The rules of a transformer block."""
    for a, b, to_tokens in (("attention", "attn1", only_tokens), ("cross", "attn2", True)):
        names = {kind: f"{theirs}.{b}.to_{kind}" for kind in "qkv"}
        if to_tokens:
            yield from layer(f"{ours}/{a}/q_in", names["q"], bias=False)
            yield from joined(f"{ours}/{a}/kv", (names["k"], names["v"]), kv(heads), bias=False)
        else:
            yield from joined(f"{ours}/{a}/qkv", tuple(names.values()), qkv(heads), bias=False)
        yield from layer(f"{ours}/{a}/out", f"{theirs}.{b}.to_out.0")
    for i, a in enumerate(("attention", "cross", "mlp"), 1):
        yield from norm(f"{ours}/norm_{a}", f"{theirs}.norm{i}")
    for a, b in PAIR.items():
        yield Rule((f"{ours}/hidden/{a}", f"{ours}/gate/{a}"), (f"{theirs}.ff.net.0.proj.{b}",), parted(2))
    yield from layer(f"{ours}/out", f"{theirs}.ff.net.2")
