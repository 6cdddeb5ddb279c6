"""The classes of other libraries that have a counterpart here, by the `_class_name` of their configurations."""

from __future__ import annotations

from diffjax.interop import autoencoders
from diffjax.interop.peer import Peer

CLASSES: dict[str, Peer] = {
    "AutoencoderKL": autoencoders.KL,
    "VQModel": autoencoders.VQ,
}
