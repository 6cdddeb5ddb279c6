"""Folders with weights of other libraries: a configuration, tensors and what they say of licence and origin."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax

from diffjax.interop import rules, tensors
from diffjax.interop.classes import CLASSES
from diffjax.interop.documents import licence_of, origin_of, read_documents
from diffjax.interop.peer import Peer
from diffjax.interop.schedule import Schedule, read_schedule
from diffjax.latent import LatentSpace
from diffjax.networks import parameter_count
from diffjax.numerics import PyTree
from diffjax.training import CheckpointError, partial
from diffjax.types import Cond, Denoiser

CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network of another library with its weights, its configuration, its licence and its origin.

    `kind` is the name of its class there, `config` the configuration as found, `scheduler` that of its scheduler or None,
    `documents` the texts found beside the weights (licence, model card), by file name.
    """

    kind: str
    module: Any
    params: PyTree
    config: dict[str, Any]
    scheduler: dict[str, Any] | None = None
    documents: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fn(self) -> Any:
        """The network with their conventions of time and condition: `fn(params, x, t, cond)`; of an autoencoder `fn(params)`."""
        return CLASSES[self.kind].fn(self.module, self.config)

    @property
    def licence(self) -> str:
        """The licence that the documents name."""
        return licence_of(self.documents)

    @property
    def origin(self) -> str:
        """Where the weights are from, as far as they say."""
        return origin_of(self.config, self.documents)

    def latent_space(self) -> LatentSpace:
        """The latent space of an autoencoder, in which their diffusion models work.   z = (E(x) - shift_factor) scaling_factor

        Raises: ValueError: it is no autoencoder.
        """
        scale_of = CLASSES[self.kind].latent
        if scale_of is None:
            raise ValueError(f"{self.kind} is no autoencoder, so that it has no latent space")
        shift, scale = scale_of(self.module, self.config)
        return LatentSpace(self.fn(self.params), shift, scale)

    def schedule(self) -> Schedule:
        """What the scheduler beside it, or its own configuration, means: the process, the grid and the solver.

        Raises: ValueError: none was found, or it has no counterpart here.
        """
        own = CLASSES[self.kind].pieces
        if self.scheduler is None and own is not None:
            return Schedule(self.kind, self.config, own(self.config))
        if self.scheduler is None:
            raise ValueError(
                f"no {SCHEDULER} was found beside this {self.kind}, so that its noise levels are not known; give "
                "denoiser(read_schedule({'_class_name': ..., ...}))"
            )
        return read_schedule(self.scheduler)

    def denoiser(self, schedule: Schedule | None = None, *, null: Cond = None, guide: Any = None) -> Denoiser:
        """The network as a denoiser, to be bound to a condition and sampled.

        Args: schedule: default that of the scheduler beside it.   null, guide: see `Schedule.denoiser`.
        """
        unit = CLASSES[self.kind].unit
        return (schedule or self.schedule()).denoiser(self.fn, self.params, null=null, guide=guide, unit=unit)

    def __repr__(self) -> str:
        return (
            f"Pretrained({self.kind}, {parameter_count(self.params):,} parameters, licence: {self.licence}, "
            f"origin: {self.origin})"
        )


def as_pretrained(kind: str, module: Any, params: PyTree, **fields: Any) -> Pretrained:
    """A network of ours as one of another library, to be written by `save_pretrained`.

    Args: kind: name of the class there.   fields: of its configuration that the module does not decide.
    Raises: ValueError: no such class, or a module that it cannot express.
    """
    config = {"_class_name": kind, **peer_of(kind).config(module), **fields}
    made = Pretrained(kind, module, params, config)
    _check(made)
    return made


def load_pretrained(folder: Any, dtype: Any = None, *, weights: Any = None) -> Pretrained:
    """A network from a local folder with `config.json` and safetensors. Nothing is downloaded, nothing is executed.

    Args:
        folder: the folder; of a pipeline, that of one of its networks.
        dtype: of the parameters, such as `jnp.float32`; default as in the file. Computing is in `module.dtype`, float32.
        weights: a file in the folder, or a list of shards, if there are several variants.

    Raises:
        CheckpointError: nothing there, a pickle, damaged files, tensors that do not fit; nothing is half loaded.
        ValueError: a class or an option that has no counterpart here.

    Example:
        >>> import numpy as np
        >>> from diffjax import networks
        >>> net = networks.KLAutoencoder(widths=(8, 8), blocks=1, groups=4)
        >>> params = networks.autoencoder(net).init(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(f"{folder}/vae", as_pretrained("AutoencoderKL", net, params))
        ...     load_pretrained(f"{folder}/vae")
        Pretrained(AutoencoderKL, 15,223 parameters, licence: not stated, origin: not stated)
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    peer_of(config["_class_name"])
    model = from_tensors(open_weights(folder, weights), config, dtype)
    return dataclasses.replace(model, scheduler=read_scheduler(folder), documents=read_documents(folder))


def from_tensors(found: Any, config: Mapping[str, Any], dtype: Any = None) -> Pretrained:
    """A network from tensors at hand and its configuration, whose `_class_name` is the class.

    Args: found: `Tensors`, or a mapping of names to arrays.   config, dtype: see `load_pretrained`.
    Raises: as `load_pretrained`.
    """
    module, template, table, options = plan(config, found)
    params = rules.load(table, found, template, dtype=dtype, **options)
    return Pretrained(config["_class_name"], module, params, dict(config))


def plan(config: Mapping[str, Any], found: Any) -> tuple[Any, PyTree, list[rules.Rule], dict[str, Any]]:
    """How tensors become a network: the module, the shapes of its parameters, the rules, and options of `rules.load`."""
    peer = peer_of(config["_class_name"])
    module = peer.fit(peer.network(config), config, found)
    fixed = tuple(f"^{re.escape(name)}$" for name in peer.buffers(module, config))
    options = dict(ignored=(*peer.ignored, *fixed), renames=peer.renames)
    return module, template_of(peer, module, config), peer.table(module, config), options


def save_pretrained(folder: Any, model: Pretrained, *, shard: int = tensors.SHARD) -> None:
    """Write a network as `config.json` and safetensors, as the other library reads them, with its licence and model card.

    Args: folder: a new one, which appears when it is complete.   shard: bytes of a file at most.
    Raises: ValueError: the folder is not empty, or the configuration is not that of the module.   OSError: it could not be
    written; then there is none.
    """
    folder = pathlib.Path(folder)
    _check(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; give a new folder, so that no file of another model stays in it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new.chmod(0o755)
        peer = CLASSES[model.kind]
        table, buffers = (of(model.module, model.config) for of in (peer.table, peer.buffers))
        arrays = rules.save(table, model.params, buffers)
        tensors.write_folder(new, arrays, {"format": "pt"}, shard=shard)
        _write_json(new / CONFIG, {**model.config, "_class_name": model.kind})
        if model.scheduler is not None:
            _write_json(new / SCHEDULER, model.scheduler)
        for name, text in model.documents.items():
            (new / name).write_bytes(text.encode(errors="surrogateescape"))
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _write_json(path: pathlib.Path, page: Any) -> None:
    path.write_text(json.dumps(page, indent=2, sort_keys=True) + "\n")


def _check(model: Pretrained) -> None:
    """The configuration must be that of the module: other numbers would be computed there."""
    peer = peer_of(model.kind)
    wanted = peer.network(model.config)
    theirs, ours = peer.config(wanted), peer.config(model.module)
    odd = [f"{name}={theirs.get(name)!r} instead of {a!r}" for name, a in ours.items() if theirs.get(name) != a]
    if odd:
        raise ValueError(f"the configuration is not that of the module: it has {', '.join(odd)}")
    shapes = dict(partial.named(template_of(peer, wanted, model.config)))
    for name, a in partial.named(model.params):
        if name in shapes and shapes[name].shape != a.shape:
            raise ValueError(
                f"{name} has shape {list(a.shape)}, in the configuration {list(shapes[name].shape)}; give the fields that "
                f"decide it (channels, for example), as in as_pretrained({model.kind!r}, module, params, in_channels=1)"
            )


# ---------------------------------------------------------------------------------------------- what is in a folder


def peer_of(kind: str) -> Peer:
    """The class of this name.   Raises: ValueError: it has no counterpart here."""
    if kind not in CLASSES:
        raise ValueError(f"the class {kind!r} has no counterpart here; there are {', '.join(CLASSES)}")
    return CLASSES[kind]


def template_of(peer: Peer, module: Any, config: Mapping[str, Any]) -> PyTree:
    """The shapes of the module's parameters; computes nothing."""
    return jax.eval_shape(module.init, jax.random.key(0), *peer.example(module, config))["params"]


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The configuration of a folder.   Raises: CheckpointError: there is none, or it names no class."""
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder}. Nothing is downloaded: get the files where you trust them, for example by "
            f"`hf download {folder} --local-dir FOLDER`, and give that folder"
        )
    if not (folder / CONFIG).is_file():
        parts = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        if parts:
            raise CheckpointError(f"{folder} is a pipeline; give the folder of one of its networks: {', '.join(parts)}")
        raise CheckpointError(f"{folder} has no {CONFIG}, which says what network its tensors are of")
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("_class_name"), str):
        raise CheckpointError(
            f"{folder / CONFIG} has no _class_name; known classes are {', '.join(CLASSES)}. Configurations of transformers "
            "and of original repositories are others"
        )
    return config


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object.   Raises: CheckpointError: it is none."""
    try:
        page = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(page, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds a {type(page).__name__}")
    return page


def read_scheduler(folder: pathlib.Path) -> dict[str, Any] | None:
    """The configuration of the scheduler in a folder, or in that of its pipeline; None if there is none."""
    for path in (folder / SCHEDULER, folder.parent / "scheduler" / SCHEDULER):
        if path.is_file():
            return read_json(path)
    return None


def open_weights(folder: pathlib.Path, weights: Any) -> tensors.Tensors:
    """The tensors of a folder: all, or those of the file or the shards of this name."""
    if weights is None:
        return tensors.open_tensors(folder)
    if isinstance(weights, (str, os.PathLike)):
        return tensors.open_tensors(folder / weights)
    return tensors.open_tensors([folder / name for name in weights])
