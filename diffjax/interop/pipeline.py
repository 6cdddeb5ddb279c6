"""Pipelines of diffusers: a folder with `model_index.json`, a network, a scheduler and perhaps an autoencoder."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from diffjax.interop.classes import CLASSES
from diffjax.interop.pretrained import SCHEDULER, Pretrained, load_pretrained, read_json, save_pretrained
from diffjax.interop.schedule import Schedule, read_schedule
from diffjax.latent import LatentSpace
from diffjax.training import CheckpointError
from diffjax.types import Cond, Denoiser, Process

INDEX = "model_index.json"
NETWORKS = ("unet", "transformer", "prior")  # the part that is a denoiser
AUTOENCODERS = ("vae", "vqvae", "movq")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The parts of a pipeline that have a counterpart here, its schedule, and the names of the others.

    `kind` is the name of its class, `parts` the networks by name, `others` the classes of parts that were not read (tokenizers,
    text encoders, safety checkers), by name.
    """

    kind: str
    parts: Mapping[str, Pretrained]
    schedule: Schedule
    others: Mapping[str, str]
    index: Mapping[str, Any]  # as found

    @property
    def network(self) -> Pretrained:
        """The network that denoises."""
        return _one("network that denoises", NETWORKS, self.parts, self.others)

    @property
    def process(self) -> Process:
        """The process of its schedule."""
        return self.schedule.process

    def denoiser(self, *, null: Cond = None, guide: Any = None) -> Denoiser:
        """Its network with its schedule as a denoiser; see `Schedule.denoiser`."""
        return self.network.denoiser(self.schedule, null=null, guide=guide)

    def latent_space(self) -> LatentSpace:
        """The latent space of its autoencoder.   Raises: ValueError: it has none."""
        return _one("autoencoder", AUTOENCODERS, self.parts, self.others).latent_space()

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {part!r}" for name, part in self.parts.items())
        others = f", not read: {', '.join(self.others)}" if self.others else ""
        return f"Pipeline({self.kind}, {parts}, {self.schedule!r}{others})"


def _one(what: str, names: tuple[str, ...], parts: Mapping[str, Pretrained], others: Mapping[str, str]) -> Pretrained:
    for name in names:
        if name in parts:
            return parts[name]
        if name in others:
            raise ValueError(f"the {what} of this pipeline is a {others[name]}, which has no counterpart here")
    raise ValueError(f"this pipeline has no {what}; it has {', '.join([*parts, *others]) or 'nothing'}")


def load_pipeline(folder: Any, dtype: Any = None) -> Pipeline:
    """A pipeline from a local folder: every network that has a counterpart here, and the scheduler.

    Args: folder: with `model_index.json` and a folder for each part.   dtype: of the parameters, default as in the files.
    Raises: CheckpointError: no such folder or index, a part that is missing or does not fit.   ValueError: a scheduler or an
    option that has no counterpart.

    Example:
        `pipe = load_pipeline(folder)`, then
        `diffjax.sample(key, pipe.denoiser(), pipe.schedule.solver(50), pipe.process.prior(key, shape))`.
    """
    folder = pathlib.Path(folder)
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} has no {INDEX}, so that it is no pipeline. Nothing is downloaded; of a single network give its folder "
            "to load_pretrained"
        )
    index = read_json(folder / INDEX)
    parts: dict[str, Pretrained] = {}
    others: dict[str, str] = {}
    for name, entry in index.items():
        if name.startswith("_") or name == "scheduler" or not _is_part(entry):
            continue
        if entry[1] not in CLASSES:
            others[name] = entry[1]
        elif not (folder / name).is_dir():
            raise CheckpointError(f"{folder} lacks the folder {name} of its {entry[1]} that {INDEX} names")
        else:
            parts[name] = load_pretrained(folder / name, dtype)
    path = folder / "scheduler" / SCHEDULER
    if not path.is_file():
        raise CheckpointError(f"{folder} has no scheduler/{SCHEDULER}, which says what noise levels its network knows")
    return Pipeline(str(index.get("_class_name")), parts, read_schedule(read_json(path)), others, index)


def _is_part(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(a, str) for a in entry)


def save_pipeline(folder: Any, pipeline: Pipeline) -> None:
    """Write a pipeline as the other library reads it, without the parts that were not read.

    Args: folder: a new one, which appears when it is complete.
    Raises: ValueError: the folder is there already.   OSError: it could not be written; then there is none.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new.chmod(0o755)
        for name, part in pipeline.parts.items():
            save_pretrained(new / name, dataclasses.replace(part, scheduler=None))
        (new / "scheduler").mkdir()
        _write(new / "scheduler" / SCHEDULER, pipeline.schedule.config)
        _write(new / INDEX, {name: entry for name, entry in pipeline.index.items() if name not in pipeline.others})
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _write(path: pathlib.Path, page: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(page), indent=2, sort_keys=True) + "\n")
