"""Trainable copies of a network's first half, and what it computes with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.adapters.core import Site
from diffjax.adapters.told import form_of
from diffjax.networks.dit import DiT, patches
from diffjax.networks.functional import from_linen
from diffjax.networks.mmdit import MMDiT
from diffjax.networks.taps import per_layer
from diffjax.numerics import PyTree

DECODER = re.compile(r"(up_\d+_\d+|double_\d+|norm_out|out)(_|$)")  # parts of a U-Net after its middle


def encoder(base: PyTree) -> dict[str, Any]:
    """The parameters of a U-Net up to its middle.

    Raises: ValueError: they are not those of a U-Net.

    Example:
        >>> sorted(encoder({"in": 1, "middle_0": 2, "up_0_0": 3, "norm_out": 4, "out": 5}))
        ['in', 'middle_0']
    """
    if "middle_0" not in base or "in" not in base:
        raise ValueError(
            f"a copy of an encoder needs the parameters of a UNet (in, down_0_0 .. middle_1); got {sorted(base)[:8]}. "
            "For DiT and MMDiT take control_transformer"
        )
    return {name: p for name, p in base.items() if not DECODER.match(name)}


def outputs(copy: Mapping[str, Any]) -> tuple[str, ...]:
    """The taps of what the first half hands to the second: `skip_0` .. `skip_n`, `bottleneck`.

    Example:
        >>> outputs({"in": 1, "down_0_0": 1, "down_1_0": 1})
        ('skip_0', 'skip_1', 'skip_2', 'skip_3', 'bottleneck')
    """
    downs = [re.fullmatch(r"down_(\d+)_\d+", name) for name in copy]
    levels = [int(found[1]) for found in downs if found]
    # the first convolution, every block, and the way down from every level but the last
    return (*(f"skip_{k}" for k in range(1 + len(levels) + max(levels))), "bottleneck")


def features(site: Site, copy: Mapping[str, Any], around: Mapping[str, Callable]) -> dict[str, Any]:
    """What a U-Net with the encoder `copy` hands to its second half, which is not computed.   {tap: value}"""
    skipped = {}
    for name, p in site.base.items():
        if re.fullmatch(r"up_\d+_\d+", name):
            width = p["conv_out"]["kernel"].shape[-1]
            skipped[name] = lambda call, h, *_, width=width: _wide(h, width)
    return site.read(*outputs(copy), base={**site.base, **copy}, around={**around, **skipped})


def _wide(h: Any, width: int) -> Any:
    """`h` with `width` channels, the shape alone of what is not computed."""
    return jnp.zeros((*h.shape[:-1], width), h.dtype)


class Blocks(NamedTuple):
    """The first blocks of a transformer as a network of their own."""

    net: Any  # (params, x, t, cond, key, mutable=)
    count: int
    patch: int
    scanned: bool

    @classmethod
    def of(cls, site: Site, count: int) -> Blocks:
        """The first `count` of the network at a site.   Raises: ValueError: not a DiT or plain MMDiT, or fewer blocks."""
        module = getattr(site.net, "module", None)
        joint = isinstance(module, MMDiT) and not module.single and not module.alone
        if not isinstance(module, DiT) and not joint:
            raise ValueError(
                "a copy of a transformer's blocks needs from_linen(DiT(...)), or MMDiT without `single` and `alone`; got "
                f"{type(module or site.net).__name__}. For a U-Net take controlnet"
            )
        if count > module.depth - joint:
            raise ValueError(f"blocks must be at most {module.depth - joint} for this network; got {count}")
        # the last block of an MMDiT, without an output of text, stays the frozen one, and nothing reads what it gives
        return cls(from_linen(module.clone(depth=count + joint)), count, module.patch, module.scan_layers)

    def copied(self, base: PyTree) -> dict[str, Any]:
        """The parameters of these blocks and of what comes before them."""
        kept = {name: p for name, p in base.items() if name not in ("film", "out", "last")}
        if self.scanned:
            return kept | {"blocks": jax.tree.map(lambda a: a[: self.count], base["blocks"])}
        first = [f"block_{i}" for i in range(self.count)]
        return {name: p for name, p in kept.items() if name in first or not name.startswith("block_")}

    def read(self, site: Site, copy: PyTree, around: Mapping[str, Callable]) -> jax.Array:
        """The outputs of the blocks with the parameters `copy`.   [count, B, N, width]"""
        base = {name: p for name, p in site.base.items() if name in ("film", "out", "last")}
        names = ["blocks/block"] if self.scanned else [f"block_{i}/block" for i in range(self.count)]
        found = site._replace(net=self.net).read(*names, base={**base, **copy}, around=around)
        return found["blocks/block"] if self.scanned else jnp.stack([found[name] for name in names])

    def writers(self, more: Any) -> dict[str, Any]:
        """Writers that add `more` [count, B, N, width] to the outputs of the first blocks."""
        if not self.scanned:
            return {f"block_{i}/block": lambda z, i=i: z + more[i] for i in range(self.count)}
        last = self.count - 1

        def add(z: Any, layer: Any) -> Any:
            return z + jnp.where(layer <= last, more[jnp.minimum(layer, last)], jnp.zeros((), more.dtype))

        return {"blocks/block": per_layer(add)}


def patched(site: Site, patch: int, numbers: int | None = None) -> jax.Array:
    """The picture that an adapter was given, cut as the state is: [B, N, c], whole multiples of the state's axes.

    Args: numbers: c that the adapter was made for.
    Raises: ValueError: another shape or type.
    """
    own, x = site.own, site.x
    shape = getattr(own, "shape", ())
    times = shape[1] // x.shape[1] if len(shape) == 4 else 0
    fits = times and shape[:3] == (x.shape[0], times * x.shape[1], times * x.shape[2])
    if not fits or not jnp.issubdtype(own.dtype, jnp.floating):
        raise ValueError(
            "this adapter reads a picture of floats in the condition under the adapter's name, of the state's batch and axes or a "
            f"whole multiple of them: [{x.shape[0]}, {x.shape[1]}, {x.shape[2]}, channels]; got {form_of(own)}"
        )
    if numbers not in (None, shape[-1] * (patch * times) ** 2):
        raise ValueError(
            f"this adapter was made for pictures with {numbers} numbers beside each patch of the state; got {form_of(own)} "
            f"with {shape[-1]} channels x {patch * times}^2. Give pictures of the size and channels of `init`"
        )
    return patches(jnp.asarray(own).astype(x.dtype), patch * times)
