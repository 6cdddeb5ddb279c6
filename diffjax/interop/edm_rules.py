"""How the parameters of a `UNet` are named in the files of EDM."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from diffjax.interop.kinds import Kind, chunks, conv, conv1x1, dense, same
from diffjax.interop.peer import Config
from diffjax.interop.rules import Rule, layer, norm
from diffjax.interop.unet_rules import PAIR, given, middle_of
from diffjax.networks import UNet, kept_fourier
from diffjax.networks.resample import fir_halve
from diffjax.networks.unet_parts import film, input_residual


@functools.cache
def interleaved(heads: int, *, kind_first: bool = False) -> Kind:
    """Queries, keys and values whose rows are sorted by head, feature, kind, as ours: by head, kind, feature.

    [heads D 3, in, 1, 1], or biases <-> [in, heads 3 D].   Args: kind_first: ours are sorted by kind, head, feature.
    """
    ours = (2, 0, 1) if kind_first else (0, 2, 1)
    split = (3, heads, -1) if kind_first else (heads, 3, -1)
    back = tuple(int(i) for i in np.argsort(ours))
    turn = lambda a, axes: a.transpose(*axes, *range(3, a.ndim)).reshape(-1, *a.shape[3:])

    def load(a: Any) -> Any:
        return turn(a.reshape(heads, -1, 3, *a.shape[1:2]), ours).T

    def write(a: Any) -> tuple:
        rows = turn(a.T.reshape(*split, *a.T.shape[1:]), back)
        return (rows.reshape(*rows.shape, 1, 1) if rows.ndim == 2 else rows,)

    return Kind(f"interleaved({heads}, {kind_first})", load, write)


def rules(module: UNet, config: Config) -> list[Rule]:
    """The rules of a module; names have the resolution of the level."""
    net, is_song = module, given(module.block)[1].get("project", False)
    at = lambda way, i, name: f"model.{way}.{config['img_resolution'] >> i}x{config['img_resolution'] >> i}_{name}"
    found = layer("code/time/hidden", "model.map_layer0") + layer("code/time/out", "model.map_layer1")
    if isinstance(net.frequencies, kept_fourier):
        found.append(Rule("code/time/frequencies", ("model.map_noise.freqs",), same))
    if net.num_classes:
        found += layer("code/label", "model.map_label", bias=is_song)
    if net.vector_size:
        found += layer("code/vector", "model.map_augment", bias=False)
    found += layer("in", at("enc", 0, "conv"), conv)
    before, last = net.stem or net.widths[0], len(net.widths) - 1
    for i, width in enumerate(net.widths):
        if i:
            found += block_rules(net, f"halve_{i}", at("enc", i, "down"), skip=is_song)
            if net.pyramid_in is not None:
                name = "aux_residual" if net.pyramid_in is input_residual else "aux_skip"
                found += layer(f"halve_{i}_pyramid", at("enc", i, name), conv)
        for j in range(net.blocks):
            heads = net.heads_of(i) if i in net.attention else 0
            found += block_rules(net, f"down_{i}_{j}", at("enc", i, f"block{j}"), skip=before != width, heads=heads)
            before = width
    for j, attends in enumerate(middle_of(net)):
        found += block_rules(net, f"middle_{j}", at("dec", last, f"in{j}"), heads=net.heads_of(last) if attends else 0)
    for i in range(last, -1, -1):
        if i < last:
            found += block_rules(net, f"double_{i}", at("dec", i, "up"), skip=is_song)
        for j in range(net.blocks + 1):
            heads = net.heads_of(i) if i in net.attention and (j == net.blocks or not net.late) else 0
            found += block_rules(net, f"up_{i}_{j}", at("dec", i, f"block{j}"), skip=True, heads=heads)
        if i == 0 or net.pyramid_out is not None:
            level = f"_{i}" if i else ""
            theirs = (
                (at("dec", i, "aux_norm"), at("dec", i, "aux_conv"))
                if is_song
                else ("model.out_norm", "model.out_conv")
            )
            found += norm(f"norm_out{level}", theirs[0]) + layer(f"out{level}", theirs[1], conv)
    return found


def block_rules(net: UNet, ours: str, theirs: str, *, skip: bool = False, heads: int = 0) -> list[Rule]:
    """The rules of a residual block, and of its attention."""
    found = norm(f"{ours}/norm_in", f"{theirs}.norm0") + layer(f"{ours}/conv_in", f"{theirs}.conv0", conv)
    found += norm(f"{ours}/norm_out", f"{theirs}.norm1") + layer(f"{ours}/conv_out", f"{theirs}.conv1", conv)
    kind = chunks((1, 0)) if given(net.block)[1]["modulation"] is film else dense  # theirs are scale and shift
    found += [Rule(f"{ours}/film/{a}", (f"{theirs}.affine.{b}",), kind) for a, b in PAIR.items()]
    if skip:
        found += layer(f"{ours}/skip", f"{theirs}.skip", conv1x1)
    if heads:
        found += norm(f"{ours}/norm_attention", f"{theirs}.norm2")
        kind = interleaved(heads)
        found += [Rule(f"{ours}/attention/qkv/{a}", (f"{theirs}.qkv.{b}",), kind) for a, b in PAIR.items()]
        found += layer(f"{ours}/attention/out", f"{theirs}.proj", conv1x1)
    return found


def filters(module: UNet, config: Config) -> dict[str, np.ndarray]:
    """The filters of their resampling layers, which are in their files."""
    resize = given(module.down)[1]["resize"]
    f = np.array([1, 3, 3, 1] if resize is fir_halve else [1, 1], np.float32)
    f = (np.outer(f, f) / f.sum() ** 2)[None, None]
    size = config["img_resolution"]
    found: dict[str, np.ndarray] = {}
    for i in range(len(module.widths)):
        at = f"{size >> i}x{size >> i}"
        ways = ([f"enc.{at}_down"] if i else []) + ([f"dec.{at}_up"] if i < len(module.widths) - 1 else [])
        found |= {f"model.{way}.{part}.resample_filter": f for way in ways for part in ("conv0", "skip")}
        if i and module.pyramid_in is not None:
            name = "aux_residual" if module.pyramid_in is input_residual else "aux_down"
            found[f"model.enc.{at}_{name}.resample_filter"] = f
        if i < len(module.widths) - 1 and module.pyramid_out is not None:
            found[f"model.dec.{at}_aux_up.resample_filter"] = f
    return found
