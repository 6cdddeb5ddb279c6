"""Networks by their published names and sizes."""

from __future__ import annotations

import difflib
from typing import Any

import flax.linen as nn

from diffjax.networks import dimr, dit, edm2, masked_dit, mmdit, task_routing, unet_presets, uvit

# name -> (network, fields); each family keeps its own beside its network, with the source of the sizes
PRESETS: dict[str, tuple[Any, dict[str, Any]]] = {
    **dit.PRESETS,
    **edm2.PRESETS,
    **unet_presets.PRESETS,
    **mmdit.PRESETS,
    **uvit.PRESETS,
    **task_routing.PRESETS,
    **dimr.PRESETS,
    **masked_dit.PRESETS,
}


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
    make, given = PRESETS[name]
    return make(**given | fields)
