"""Networks by their published names and sizes."""

from __future__ import annotations

import difflib
from typing import Any

import flax.linen as nn

from diffjax.networks.dit import DiT

# width, depth, heads: Table 1 of arXiv:2212.09748; arXiv:2401.08740 (SiT) has the same four networks
DIT = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
PATCHES = (2, 4, 8)


def dit(size: str, patch: int, **fields: Any) -> DiT:
    """A diffusion transformer of a published size; 256 sinusoidal time features, as there."""
    width, depth, heads = DIT[size]
    return DiT(**{"width": width, "depth": depth, "heads": heads, "patch": patch, "sinusoids": 256, **fields})


PRESETS = {f"dit-{size}/{patch}": (dit, (size, patch)) for size in DIT for patch in PATCHES}


def preset(name: str, **fields: Any) -> nn.Module:
    """The network of a published name.

    Args: name: such as `dit-xl/2` (size/patch), see `PRESETS`.   fields: any field of the network, such as num_classes.
    Raises: ValueError: unknown name.

    Example:
        >>> net = preset("dit-b/4", num_classes=1000)
        >>> net.width, net.depth, net.heads, net.patch
        (768, 12, 12, 4)
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 3, 0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"unknown network {name!r}.{hint} There are {', '.join(PRESETS)}")
    make, args = PRESETS[name]
    return make(*args, **fields)
