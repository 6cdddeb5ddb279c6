"""ControlNet: a trainable copy of a network's first half reads a picture, and adds to what the frozen one computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.adapters.copies import Blocks, encoder, features, outputs, patched
from diffjax.adapters.core import Change, Site, strength
from diffjax.adapters.maps import dense, fresh_hint, hint, picture_of, zero
from diffjax.numerics import PyTree


@dataclasses.dataclass(frozen=True)
class ControlNet:
    """See `controlnet`."""

    widths: tuple[int, ...]
    scales: tuple[float, ...]

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"copy": of the encoder, "hint": of `maps.hint`, "zero": {tap: 1x1 convolution}}`."""
        copy = encoder(site.base)
        picture, _ = picture_of(site.own, site.x, len(self.widths) - 1, name="controlnet")
        shapes = site.shapes(*outputs(copy))
        if self.scales and len(self.scales) != len(shapes):
            raise ValueError(f"scales must be {len(shapes)} numbers, of {', '.join(shapes)}; got {len(self.scales)}")
        stem = shapes["skip_0"].shape[-1]
        return {
            "copy": jax.tree.map(jnp.array, copy),
            "hint": fresh_hint(key, self.widths, picture.ndim - 2, picture.shape[-1], stem),
            "zero": {name: zero(a.shape[-1], a.shape[-1]) for name, a in shapes.items()},
        }

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """y' = y + w s Z(y_copy) for the skips and the bottleneck y."""
        channels = params["hint"]["in"]["kernel"].shape[-2]
        picture, halvings = picture_of(site.own, site.x, len(self.widths) - 1, name="controlnet", channels=channels)
        seen = hint(params["hint"], picture, halvings)
        joined = lambda call, x: (lambda h: h + seen.astype(h.dtype))(call(x))
        found = features(site, params["copy"], {"in": joined})
        scales = dict(zip(found, self.scales, strict=True)) if self.scales else {}
        write = {}
        for name, value in found.items():
            more = strength(dense(params["zero"][name], value), weight)
            more = more * scales[name] if name in scales else more
            write[name] = lambda value, more=more: value + more
        return Change(write=write)


def controlnet(widths: tuple[int, ...] = (16, 32, 96, 256), *, scales: tuple[float, ...] = ()) -> ControlNet:
    """A trainable copy of a U-Net's encoder that sees a picture.   y' = y + w Z_2(F(x + Z_1(hint); copy)), Z from zero

    It reads a picture in the condition under its name, of the state's axes, or 2, 4 .. 2^(len(widths) - 1) times as long. An
    encoder of convolutions takes it to the first features of the copy; 1x1 convolutions from zero take what the copy hands
    to its decoder, which is neither run nor stored, to the skips and the bottleneck of the frozen network. Several nets add.
    Args: widths: channels of the picture's encoder, the default is published for latents.   scales: a factor for each skip
        in the order in which they were made, and the bottleneck; the published guess mode, which leaves out the text, has
        0.825^(n - k) for the k-th of n + 1.
    Raises: ValueError: out of range; at init and later, not a U-Net, a wrong number of scales, a picture that does not fit.

    Example:
        >>> controlnet((8,)).widths
        (8,)

    Reference: Zhang et al. 2023, arXiv:2302.05543.
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be channels >= 1 of the picture's encoder, one at least; got {widths}")
    return ControlNet(tuple(widths), tuple(map(float, scales)))


@dataclasses.dataclass(frozen=True)
class ControlTransformer:
    """See `control_transformer`."""

    blocks: int
    scales: tuple[float, ...]

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"copy": of what comes before the blocks and the first of them, "in": of the picture's patches, "zero": by block}`."""
        net = Blocks.of(site, self.blocks)
        width = site.base["in"]["kernel"].shape[-1]
        picture = patched(site, net.patch)
        return {
            "copy": jax.tree.map(jnp.array, net.copied(site.base)),
            "in": zero(picture.shape[-1], width),
            "zero": jax.tree.map(lambda a: jnp.zeros((self.blocks, *a.shape)), zero(width, width)),
        }

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """z_i' = z_i + w s_i Z_i(z_i of the copy) after block i."""
        net = Blocks.of(site, self.blocks)
        seen = dense(params["in"], patched(site, net.patch, params["in"]["kernel"].shape[-2]))
        joined = lambda call, z: (lambda h: h + seen.astype(h.dtype))(call(z))
        found = net.read(site, params["copy"], {"in": joined})
        more = strength(jax.vmap(dense)(params["zero"], found), weight)
        if self.scales:
            more = more * jnp.asarray(self.scales, more.dtype).reshape(-1, 1, 1, 1)
        return Change(write=net.writers(more))


def control_transformer(blocks: int, *, scales: tuple[float, ...] = ()) -> ControlTransformer:
    """A trainable copy of a transformer's first blocks that sees a picture.   z_i' = z_i + w Z_i(z_i of the copy), Z from zero

    For DiT, and MMDiT without blocks of one stream, looped or scanned. It reads a picture in the condition under its name, of
    the state's axes or a whole multiple, whose patches are added to those of the state in the copy by a linear map from zero.
    Args: blocks: how many are copied; of an MMDiT at most all but the last.   scales: a factor for each of them.
    Raises: ValueError: out of range; at init and later, another network, a picture that does not fit.

    Example:
        >>> control_transformer(2).blocks
        2

    Reference: Chen et al. 2024, arXiv:2401.05252; Zhang et al. 2023, arXiv:2302.05543.
    """
    if blocks < 1 or len(scales) not in (0, blocks):
        raise ValueError(
            f"control_transformer needs blocks >= 1 and scales for none or all of them; got {blocks} and {scales}"
        )
    return ControlTransformer(blocks, tuple(map(float, scales)))
