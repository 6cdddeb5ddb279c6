"""The classes of other libraries that have a counterpart here, by the `_class_name` of their configurations."""

from __future__ import annotations

from diffjax.interop import autoencoders, control, guided, text_unets, unets
from diffjax.interop.peer import Peer

CLASSES: dict[str, Peer] = {
    "AutoencoderKL": autoencoders.KL,
    "VQModel": autoencoders.VQ,
    "UNet2DModel": unets.PEER,
    "UNet2DConditionModel": text_unets.PEER,
    "GuidedDiffusion": guided.PEER,
    "ControlNetModel": control.PEER,
}
