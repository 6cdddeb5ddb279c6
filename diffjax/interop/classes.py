"""The classes of other libraries that have a counterpart here, by the `_class_name` of their configurations."""

from __future__ import annotations

from diffjax.interop import autoencoders, control, dit, dit_original, edm, edm2, guided, mmdit, text_unets, unets
from diffjax.interop.peer import Peer

CLASSES: dict[str, Peer] = {
    "AutoencoderKL": autoencoders.KL,
    **edm.PEERS,
    "Precond": edm2.PEER,
    "DiT": dit_original.DIT,
    "DiTTransformer2DModel": dit.PEER,
    "FluxTransformer2DModel": mmdit.FLUX_PEER,
    "SD3Transformer2DModel": mmdit.SD3_PEER,
    "SiT": dit_original.SIT,
    "Transformer2DModel": dit.TRANSFORMER,
    "VQModel": autoencoders.VQ,
    "UNet2DModel": unets.PEER,
    "UNet2DConditionModel": text_unets.PEER,
    "GuidedDiffusion": guided.PEER,
    "ControlNetModel": control.PEER,
}
