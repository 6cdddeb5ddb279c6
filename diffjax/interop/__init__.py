"""Weights of other libraries: local folders with a configuration and safetensors, read into networks here and written back.

`load_pretrained(folder)` and `save_pretrained(folder, pretrained)` know the classes of `CLASSES`; `load_pipeline(folder)` reads
a pipeline, with its scheduler as a process, a time code and a solver (`read_schedule`). Files of other formats are read by
`open_tensors` and a table of `Rule`s. Nothing is downloaded, and no pickle is opened.
"""

from __future__ import annotations

from diffjax.interop.classes import CLASSES
from diffjax.interop.inspection import Inspection, inspect
from diffjax.interop.kinds import Kind
from diffjax.interop.lora import load_lora, save_lora
from diffjax.interop.originals import load_dit, load_guided
from diffjax.interop.peer import Peer
from diffjax.interop.pipeline import Pipeline, load_pipeline, save_pipeline
from diffjax.interop.pretrained import Pretrained, as_pretrained, from_tensors, load_pretrained, save_pretrained
from diffjax.interop.rules import Rule, compare, load, save
from diffjax.interop.schedule import KINDS as SCHEDULERS
from diffjax.interop.schedule import Schedule, read_schedule, schedule_config
from diffjax.interop.tensors import Tensors, open_tensors, write, write_folder

__all__ = [
    "CLASSES",
    "Inspection",
    "Kind",
    "Peer",
    "Pipeline",
    "Pretrained",
    "Rule",
    "SCHEDULERS",
    "Schedule",
    "Tensors",
    "as_pretrained",
    "compare",
    "from_tensors",
    "inspect",
    "load",
    "load_dit",
    "load_guided",
    "load_lora",
    "load_pipeline",
    "load_pretrained",
    "open_tensors",
    "read_schedule",
    "save",
    "save_lora",
    "save_pipeline",
    "save_pretrained",
    "schedule_config",
    "write",
    "write_folder",
]
