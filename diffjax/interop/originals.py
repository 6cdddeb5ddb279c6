"""Single files of weights in the formats of their authors."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from diffjax.interop import dit_original, guided, tensors
from diffjax.interop.documents import read_documents
from diffjax.interop.pretrained import Pretrained, from_tensors


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
    return dataclasses.replace(model, documents=documents_beside(path))


def load_guided(path: Any, flags: Mapping[str, Any], *, dtype: Any = None) -> Pretrained:
    """ADM from a safetensors file with the names of guided diffusion, and the flags with which that repository makes it.

    Its scheduler is that of the flags, so that `.denoiser()` and `save_pretrained` need no more.

    Args:
        path: the file.
        flags: such as `{"image_size": 64, "num_channels": 192, "class_cond": True}`, see `guided`.
        dtype: of the parameters; default as in the file.

    Raises:
        CheckpointError: no such file, a pickle, damaged, or tensors that do not fit the flags.
        ValueError: a flag that is unknown or has no counterpart.
    """
    scheduler = guided.scheduler(flags)
    model = from_tensors(tensors.open_tensors(path), {"_class_name": guided.KIND, **flags}, dtype)
    return dataclasses.replace(model, scheduler=scheduler, documents=documents_beside(path))


def documents_beside(path: Any) -> dict[str, str]:
    """Licence and model card in the folder of a file."""
    place = pathlib.Path(path)
    return read_documents(place if place.is_dir() else place.parent)
