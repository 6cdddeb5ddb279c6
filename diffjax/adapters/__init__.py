"""Adapters: small trees of parameters beside a frozen network, several at once, each with a weight.

`fn = adapt(from_linen(net), edge=..., style=lora(4))`, `params = fn.init(key, base, x, t, cond)`; then `fn(params, x, t,
cond)` is the changed network. A fresh adapter changes nothing, to the bit. What adapters can compute once for all steps of a
sampler, `fn.cache(params, x, t, cond)` puts into the condition.
"""

from __future__ import annotations

from diffjax.adapters.attention import ParallelAttention, ValueMixing, parallel_attention, value_mixing
from diffjax.adapters.concatenation import Concatenation, concatenation
from diffjax.adapters.control import ControlNet, ControlTransformer, control_transformer, controlnet
from diffjax.adapters.control_next import ControlNext, control_next, cross_normalised
from diffjax.adapters.control_norm import ControlNorm, RegionBias, control_norm, region_bias
from diffjax.adapters.core import Adapted, Adapter, Change, Site, adapt, added, strength
from diffjax.adapters.difference import Difference, difference
from diffjax.adapters.diversion import Diversion, diversion
from diffjax.adapters.easy_control import EasyControl, easy_control
from diffjax.adapters.files import fingerprint, load_adapter, save_adapter
from diffjax.adapters.grounding import GroundedControl, Grounding, grounded_control, grounding
from diffjax.adapters.inversion import LabelInversion, TextualInversion, label_inversion, textual_inversion
from diffjax.adapters.lora import LoRA, lora
from diffjax.adapters.pair import JointNet, UniCon, jointnet, unicon
from diffjax.adapters.skip_tuner import SkipTuner, skip_tuner
from diffjax.types import Card

__all__ = [
    "Adapted",
    "Adapter",
    "CATALOGUE",
    "Change",
    "Concatenation",
    "ControlNet",
    "ControlNext",
    "ControlNorm",
    "ControlTransformer",
    "Difference",
    "Diversion",
    "EasyControl",
    "GroundedControl",
    "Grounding",
    "JointNet",
    "LabelInversion",
    "LoRA",
    "ParallelAttention",
    "RegionBias",
    "Site",
    "SkipTuner",
    "TextualInversion",
    "UniCon",
    "ValueMixing",
    "adapt",
    "added",
    "concatenation",
    "control_next",
    "control_norm",
    "control_transformer",
    "controlnet",
    "cross_normalised",
    "difference",
    "diversion",
    "easy_control",
    "fingerprint",
    "grounded_control",
    "grounding",
    "jointnet",
    "label_inversion",
    "load_adapter",
    "lora",
    "parallel_attention",
    "region_bias",
    "save_adapter",
    "skip_tuner",
    "strength",
    "textual_inversion",
    "unicon",
    "value_mixing",
]

# name -> card; `build(**fields)` makes the adapter, and a file names it so
CATALOGUE: dict[str, Card] = {
    "lora": Card(lora, "arXiv:2106.09685#Eq.3", "W + w (alpha / r) A B"),
    "controlnet": Card(controlnet, "arXiv:2302.05543", "a copy of the encoder adds through zero convolutions"),
    "control_transformer": Card(control_transformer, "arXiv:2401.05252", "a copy of the first blocks adds likewise"),
    "control_next": Card(
        control_next, "arXiv:2408.06070", "a few convolutions add once, with the statistics of what is there"
    ),
    "skip_tuner": Card(skip_tuner, "arXiv:2312.11392", "bottlenecks on the skips, which may read pictures"),
    "control_norm": Card(control_norm, "arXiv:2306.00964", "one copy for any subset of pictures scales and shifts"),
    "region_bias": Card(region_bias, "arXiv:2306.00964", "attention to tokens drawn to regions"),
    "difference": Card(difference, "", "theta + w delta of chosen arrays"),
    "diversion": Card(diversion, "xie2026divcontrol#Eq.4", "control_transformer in rank-one parts, some gated"),
    "textual_inversion": Card(textual_inversion, "arXiv:2208.01618", "learned tokens for new words"),
    "label_inversion": Card(label_inversion, "arXiv:2208.01618", "learned rows for new labels"),
    "parallel_attention": Card(parallel_attention, "arXiv:2312.03556", "A V + w A' V' of tokens of its own"),
    "easy_control": Card(easy_control, "arXiv:2503.07027", "a picture's keys and values in every attention, cached"),
    "grounding": Card(grounding, "arXiv:2301.07093", "gated attention to tokens of objects and their boxes"),
    "grounded_control": Card(
        grounded_control, "arXiv:2501.09194", "a copy of the encoder reads objects and their boxes"
    ),
    "value_mixing": Card(value_mixing, "arXiv:2412.20800", "A (V + w V') under the attention map A of the network"),
    "concatenation": Card(concatenation, "arXiv:2407.15886", "state and reference on one canvas"),
    "jointnet": Card(jointnet, "arXiv:2310.06347", "a frozen and a trained branch that add to each other"),
    "unicon": Card(unicon, "arXiv:2410.11439", "two branches of one network that attend to each other"),
}
