"""Single files of weights in the formats of their authors."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from diffjax.interop import dit_original, tensors
from diffjax.interop.pretrained import Pretrained, from_tensors, read_documents


def load_dit(path: Any, kind: str = "DiT", *, num_heads: int | None = None, dtype: Any = None) -> Pretrained:
    """DiT or SiT from a safetensors file in the format of their authors, whose names and shapes say its sizes.

    Args:
        path: the file, with the tensors of one network (of a training state, export `model` or `ema`).
        kind: "DiT" or "SiT": the files do not differ, what the networks are given and give does, see `dit_original`.
        num_heads: default that of the published network of this width.
        dtype: of the parameters; default as in the file.

    Raises:
        CheckpointError: no such file, a pickle, damaged, or tensors of something else.
        ValueError: another kind; a width without a published network, and no `num_heads`.
    """
    if kind not in ("DiT", "SiT"):
        raise ValueError(f"kind must be 'DiT' or 'SiT'; got {kind!r}")
    found = tensors.open_tensors(path)
    config = {"_class_name": kind, **dit_original.config_of(found, num_heads=num_heads)}
    model = from_tensors(found, config, dtype)
    place = pathlib.Path(path)
    return dataclasses.replace(model, documents=read_documents(place if place.is_dir() else place.parent))
