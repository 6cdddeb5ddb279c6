"""FreeU: reweight the backbone and the skip connections of a trained U-Net, through its taps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffjax.networks.unet import UNet


def freeu(net: UNet, backbone: Mapping[int, Any], skip: Mapping[int, Any], *, radius: int = 1) -> dict[str, Any]:
    """Writers for `tapped` that scale half of the backbone and the low frequencies of the skips of some levels.

    h[..., : C / 2] <- b h[..., : C / 2],   skip <- ifft(m fft(skip)),  m = s for frequencies -radius .. radius - 1, else 1

    A level is that of the backbone which meets the skip: the published b1, s1 belong to the deepest level, b2, s2 to the one
    above it. With every factor 1 the network does not change.

    Args: net: the module.   backbone: level -> factor b.   skip: level -> factor s.   radius: of the low frequencies, >= 1.
    Returns: `{tap: writer}`: `tapped(net.apply, write=freeu(net, {1: 1.1}, {1: 0.9}))`.
    Raises: ValueError: a level that the network does not have, a radius below 1.

    Example:
        >>> sorted(freeu(UNet(widths=(8, 16)), {1: 1.2}, {1: 0.9}))
        ['bottleneck', 'skip_1', 'skip_2', 'skip_3', 'up_0', 'up_1_0/block']

    Reference: Si et al. 2024, arXiv:2309.11497, Section 3.2; all channels alike within a half, as first published.
    """
    levels = len(net.widths)
    bad = sorted({*backbone, *skip} - set(range(levels)))
    if bad or radius < 1:
        raise ValueError(f"freeu needs levels 0 to {levels - 1} and radius >= 1; got levels {bad} and radius {radius}")
    writers: dict[str, Any] = {}
    source, level, index = "bottleneck", levels - 1, levels * (net.blocks + 1) - 1
    for i in reversed(range(levels)):
        for j in range(net.blocks + 1):  # the tap `source` feeds block up_i_j, whose skip is `index`
            if level in backbone:
                writers[source] = ScaleHalf(backbone[level])
            if level in skip:
                writers[f"skip_{index}"] = ScaleLow(skip[level], radius)
            source, level, index = f"up_{i}_{j}/block", i, index - 1
        source = f"up_{i - 1}"  # enlarged
    return writers


@dataclasses.dataclass(frozen=True)
class ScaleHalf:
    """The first half of the channels times a factor."""

    factor: Any

    def __call__(self, h: Any) -> Any:
        """Scale."""
        half = jnp.arange(h.shape[-1]) < h.shape[-1] // 2
        return h * jnp.where(half, self.factor, 1.0).astype(h.dtype)[(None,) * (h.ndim - 1)]


@dataclasses.dataclass(frozen=True)
class ScaleLow:
    """The low spatial frequencies times a factor."""

    factor: Any
    radius: int

    def __call__(self, h: Any) -> Any:
        """Scale."""
        low = lambda n: (f := jnp.fft.fftfreq(n, 1 / n).round(), (f >= -self.radius) & (f < self.radius))[1]
        both = low(h.shape[1])[:, None] & low(h.shape[2])[None]
        m = jnp.where(both, self.factor, 1.0)[None, :, :, None]
        out = jnp.fft.ifft2(jnp.fft.fft2(h.astype(jnp.float32), axes=(1, 2)) * m, axes=(1, 2)).real
        return out.astype(h.dtype)
