"""Networks by their published names and sizes."""

from __future__ import annotations

import difflib
from typing import Any

import flax.linen as nn

from diffjax.networks import autoencoders, dimr, dit, edm2, hdit, masked_dit, mmdit, task_routing, unet_presets, uvit

# name -> (network, fields); each family keeps its own beside its network, with the source of the sizes
PRESETS: dict[str, tuple[Any, dict[str, Any]]] = {
    **dit.PRESETS,
    **edm2.PRESETS,
    **unet_presets.PRESETS,
    **mmdit.PRESETS,
    **uvit.PRESETS,
    **hdit.PRESETS,
    **task_routing.PRESETS,
    **dimr.PRESETS,
    **masked_dit.PRESETS,
}
AUTOENCODER_PRESETS: dict[str, tuple[Any, dict[str, Any]]] = {**autoencoders.PRESETS}


def preset(name: str, **fields: Any) -> nn.Module:
    """The network, or the autoencoder, of a published name.

    Args: name: such as `dit-xl/2` (size/patch), see `PRESETS` and
        `AUTOENCODER_PRESETS`.   fields: any field of the network, such as num_classes.
    Raises: ValueError: unknown name.

    Example:
        >>> net = preset("dit-b/4", num_classes=1000)
        >>> net.width, net.depth, net.heads, net.patch
        (768, 12, 12, 4)
    """
    known = PRESETS | AUTOENCODER_PRESETS
    if name not in known:
        close = difflib.get_close_matches(name, known, 3, 0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"unknown network {name!r}.{hint} There are {', '.join(known)}")
    make, given = known[name]
    return make(**given | fields)
