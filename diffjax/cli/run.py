"""Run folders: self-contained, readable, and enough to re-create the run.

RUN/config.json   the configuration, every option
RUN/model.json    what the data were: transform, shape, labels, licence; versions
RUN/checkpoints/  states, with checksums
RUN/autoencoder.safetensors  of a run in latents
RUN/metrics.jsonl one line per log interval
RUN/samples/      a PNG for each interval
RUN/metrics.json  scores
RUN/ema/          snapshots of averages, and averages made from them
RUN/export/       weights for other libraries
RUN/loss.png      the loss over time, where matplotlib is installed
RUN/profile/      a trace of some steps, if asked for: `xprof --logdir RUN/profile`, or its .trace.json.gz at ui.perfetto.dev
RUN/hang-STEP.txt what the run was waiting for when it stood still
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax import adapters as adapters_
from diffjax import networks, training
from diffjax.cli import build, config, hinted, latents
from diffjax.cli import model as models
from diffjax.data import DataTransform
from diffjax.training import CheckpointStore, ema, partial
from diffjax.training.tensors import SUFFIX
from diffjax.types import Denoiser

FORMAT = 2  # 1: the columns of q, k and v were not sorted by head
POSTHOC = "posthoc_"  # names of averages made after the run


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model and all that belongs to it. Made by `diffjax.load`."""

    denoiser: Denoiser
    transform: DataTransform
    shape: tuple[int, ...]
    num_classes: int | None
    labels: tuple[str, ...] | None
    config: config.Train
    step: int
    folder: pathlib.Path
    weights: str
    space: Any = None  # of a run in latents
    # adapters that read a condition under these names
    told: Mapping[str, Told] = dataclasses.field(default_factory=dict)

    @property
    def process(self) -> Any:
        """The process of the denoiser."""
        return self.denoiser.process

    def view(self, x: Any) -> np.ndarray:
        """Samples in model coordinates of the data: themselves, or what latents stand for."""
        return np.asarray(x) if self.space is None else self.space.decode_all(x)

    def decode(self, x: Any) -> np.ndarray:
        """Samples in the raw range of the data: pixels, or coordinates."""
        return np.asarray(self.transform.decode(self.view(x)))


class Told(NamedTuple):
    """An adapter that reads a condition, and the hint that it was trained with, if that is known."""

    adapter: Any
    hint: hinted.Hint | None


class Failed(RuntimeError):
    """What went wrong while running, although the input was right."""


def write_whole(path: pathlib.Path, write: Callable[[Any], Any]) -> pathlib.Path:
    """Call `write(file)` on a binary file that gets its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_text(path: pathlib.Path, text: str) -> pathlib.Path:
    """Write a file whole or not at all."""
    return write_whole(path, lambda file: file.write(text.encode()))


def start(folder: pathlib.Path, files: dict[str, str], fill: Callable[[pathlib.Path], Any] | None = None) -> None:
    """Make the folder of a new run with these files; if that fails nothing is left, and the name stays free.

    fill: writes what must be there before the configuration says that it is a run.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if fill is not None:
            fill(folder)
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError:
        for name in (*files, latents.FILE):
            (folder / name).unlink(missing_ok=True)
        if made:
            folder.rmdir()
        raise


def new_folder(asked: str | None, data: str) -> pathlib.Path:
    """The folder of a new run: the one asked for, which must not hold a run, or the next free runs/DATA-N.

    Raises: ValueError: it exists and is not empty.
    """
    if asked is None:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", data).strip("-.")[-60:] or "run"
        n = 1
        while (folder := pathlib.Path("runs") / f"{stem}-{n}").exists():
            n += 1
        return folder
    folder = pathlib.Path(asked)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"run folder {folder} exists and is not empty; continue it with --resume {folder}, or give another --run"
        )
    return folder


def describe(dataset: Any, parameters: int, pixels: Any = None) -> str:
    """The text of model.json.   pixels: the data set whose latents `dataset` holds"""
    import diffjax

    return json.dumps(
        {
            "format": FORMAT,
            "diffjax": diffjax.__version__,
            "jax": jax.__version__,
            "data": dataset.name,
            "shape": list(dataset.shape),
            **({} if pixels is None else {"pixels": list(pixels.shape)}),
            "num_classes": dataset.num_classes,
            "labels": list(dataset.labels) if dataset.labels else None,
            "licence": dataset.licence,
            "transform": (pixels or dataset).transform.to_dict(),
            "parameters": parameters,
        },
        indent=2,
    ) + "\n"  # fmt: skip


def read_config(path: pathlib.Path) -> config.Train:
    """The configuration in a file, or in a run folder.   Raises: ValueError: damaged, or of a newer version."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the config.json of a run")
    try:
        return config.from_json(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def read(folder: pathlib.Path) -> tuple[config.Train, dict[str, Any]]:
    """The configuration and model.json of a run.   Raises: ValueError: no run there, damaged, or of a newer version."""
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}; `diffjax train` makes one")
    missing = [name for name in ("config.json", "model.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no run folder: it lacks {' and '.join(missing)}")
    path = folder / "model.json"
    try:
        about = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged, it is not JSON: {e}") from None
    version = about.get("format") if isinstance(about, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is damaged: its format must be an integer; got {version!r}")
    if version > FORMAT:
        raise ValueError(f"{folder} has run format {version}; this diffjax reads up to {FORMAT}. Upgrade diffjax")
    settings = read_config(folder)
    if version < 2 and (settings.model.network == "dit" or models.fields(settings.model).get("attention")):
        raise ValueError(
            f"{folder} was made when the columns of attention's q, k and v had another order, which this diffjax does not "
            f"read; train it again: diffjax train --config {folder}"
        )
    lacks = [k for k in ("shape", "num_classes", "labels", "transform") if k not in about]
    if lacks:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(lacks)}")
    return settings, about


def check_steps(folder: pathlib.Path) -> list[int]:
    """The steps on disk.   Raises: ValueError: training was stopped before the first was written."""
    steps = CheckpointStore(folder / "checkpoints").steps()
    if not steps:
        raise ValueError(
            f"{folder} has no checkpoint: training stopped before the first was written. Train again in a new folder: "
            f"diffjax train --config {folder}"
        )
    return steps


def initialiser(
    settings: config.Train, shape: tuple[int, ...], num_classes: int | None, base: Any = None
) -> Callable[[Any], Any]:
    """`key -> parameters` of a run, pure: `jax.eval_shape` of it gives their shapes without the numbers.

    base: parameters of the network that an adapter is put beside, default fresh ones.
    """
    vector = build.vector_size(settings.training)
    fn = networks.from_linen(models.network(settings.model, shape, num_classes, vector))
    inputs = build.zeros(shape, num_classes, vector)
    if settings.adapter.kind == "none":
        return lambda key: build.trained(settings.objective, fn.init(key, *inputs))
    chosen, hint = build.adapters(settings.adapter), hinted.of(settings.adapter)
    whole, own = adapters_.adapt(fn, **chosen), {}
    if hint is not None:
        zero = np.zeros((1, *hint.shape(shape)), np.float32)
        own = {name: hinted.told(adapter, zero) for name, adapter in chosen.items()}
    alone, inputs = inputs, build.zeros(shape, num_classes, vector, own)

    def beside(key: Any) -> Any:
        return whole.init(jax.random.fold_in(key, 1), fn.init(key, *alone) if base is None else base, *inputs)

    return beside


class Weights(NamedTuple):
    """Parameters of a run's network, and what is known of them: `average`, as a checkpoint describes it, or `sigma_rel`."""

    name: str
    params: Any
    step: int
    about: dict[str, Any]


def weights_of(folder: pathlib.Path, weights: str | None, step: int | None) -> Weights:
    """The parameters of a run's network under that name; 'ema' is the first average, 'posthoc_...' made by `diffjax ema`.

    Raises: ValueError: unknown weights, no usable checkpoint.
    """
    settings, about = read(folder)
    template = jax.eval_shape(initialiser(settings, tuple(about["shape"]), about["num_classes"]), jax.random.key(0))
    if weights in made_afterwards(folder):
        like = build.of_network(settings.objective, template)
        return _read_average(folder / "ema" / f"{weights}{SUFFIX}", like, step)
    averages = tuple(build.averages(settings.training))
    choices = (*averages, "params")
    if weights is None or weights == "ema" and averages:
        weights = choices[0]
    if weights not in choices:
        hint = f"; `diffjax ema {folder} --sigma-rel 0.07` makes others" if settings.training.ema_power else ""
        raise ValueError(
            f"weights must be one of {', '.join((*choices, *made_afterwards(folder)))}; got {weights!r}{hint}"
        )
    check_steps(folder)
    part = weights if weights == "params" else f"ema/{weights}"
    with CheckpointStore(folder / "checkpoints") as store:
        found = restored(store, template, part, step, settings)
    average = found.page.get("ema", {}).get(weights)
    known = {} if average is None else {"average": average}
    if known and average["kind"] == "power":
        known["sigma_rel"] = f"{ema.exp_to_std(average['gamma']):.6g}"
    return Weights(weights, build.of_network(settings.objective, found.tree), found.step, known)


def restored(store: CheckpointStore, template: Any, part: str, step: int | None, settings: config.Train) -> Any:
    """Parameters of a checkpoint, an average of what was trained together with what was not."""
    if part == "params" or settings.adapter.kind == "none":
        return store.restore_part(template, part, step)
    trained, rest = training.split(template, build.TRAINED)
    found = store.restore_part(trained, part, step)
    return found._replace(
        tree=training.join(found.tree, store.restore_part(rest, "params", found.step, strict=False).tree)
    )


def start_from(source: str, template: Any) -> Any:
    """The network's parameters of `source`, RUN or RUN:WEIGHTS or FILE.safetensors, in the shapes of `template`.

    Raises: ValueError: nothing there, or weights that do not fit, naming them.
    """
    path, colon, weights = source.rpartition(":")
    if not colon or pathlib.Path(source).exists():
        path, weights = source, None
    try:
        if path.endswith(".safetensors"):
            return training.load_safetensors(path, template).params
        found = weights_of(pathlib.Path(path), weights, None)
        partial.match(partial.outline(found.params), template, source=f"{found.name} of step {found.step} of {path}")
    except ValueError as error:
        reason = str(error).replace(partial.WAY_OUT, "\nuse the --model options and the kind of data of that run")
        raise ValueError(f"--init {source}: {reason}") from None
    return found.params


def put_beside(
    settings: config.Train, base: Any, files: Sequence[tuple[Any, float]]
) -> tuple[dict[str, Any], Any, dict[str, Told]]:
    """The adapters of files by names, the parameters of a network with theirs and their weights, and which are told what."""
    if settings.adapter.kind != "none":
        raise ValueError(
            f"this run has an adapter of its own, beside the network of {settings.init}; put files beside that run, this one as "
            "the file that `diffjax export` makes of it"
        )
    loaded = {f"file_{i}": adapters_.load_adapter(path, base) for i, (path, _) in enumerate(files)}
    weights = {name: jax.numpy.float32(weight) for name, (_, weight) in zip(loaded, files, strict=True)}
    params = {"base": base, "adapters": {name: own for name, (_, own, _) in loaded.items()}, "weights": weights}
    told = {
        name: Told(adapter, _trained_with(about))
        for name, (adapter, _, about) in loaded.items()
        if getattr(adapter, "told", True)
    }
    return {name: adapter for name, (adapter, *_) in loaded.items()}, params, told


def _trained_with(about: Mapping[str, str]) -> hinted.Hint | None:
    """The hint of the run that a file is of, None for a file that is of none."""
    try:
        return hinted.of(config.from_json(about["config"]).adapter)
    except (KeyError, ValueError):
        return None


def made_afterwards(folder: pathlib.Path) -> list[str]:
    """The names of the averages that `diffjax ema` has made of a run."""
    return sorted(p.stem for p in (folder / "ema").glob(f"{POSTHOC}*{SUFFIX}"))


def _read_average(path: pathlib.Path, like: Any, step: int | None) -> Weights:
    """What `diffjax ema` wrote.

    Raises: ValueError: damaged, of another network, or of another step than the one asked for.
    """
    try:
        found = training.load_safetensors(path, like)
        at = int(found.metadata["step"])
    except (training.CheckpointError, KeyError) as error:
        raise ValueError(f"{error}; make it again with `diffjax ema {path.parent.parent}`") from None
    if step not in (None, at):
        raise ValueError(
            f"{path} is of step {at}; got --checkpoint {step}. Make another with `diffjax ema --step {step}`"
        )
    return Weights(path.stem, found.params, at, {"sigma_rel": found.metadata["sigma_rel"]})


def load(
    run: str | os.PathLike[str],
    *,
    weights: str | None = None,
    step: int | None = None,
    adapters: Sequence[tuple[str | os.PathLike[str], float]] = (),
) -> Run:
    """A trained model from its run folder, which is self-contained.

    Args: run: the folder.   weights: name of an average such as 'ema_0.999', of one that `diffjax ema` made such as
    'posthoc_0.07', or 'params'; default the first average.   step: which checkpoint, default the newest undamaged one.
    adapters: files of adapters to put beside the network, with their weights.
    Returns: a `Run`: `denoiser` (its condition is a label [B] where there are labels; `denoiser.null` hides it; where `told`
    names adapters a dict with `label` and these names), `process`, `transform`, `labels`, `decode(x)`.
    Raises: ValueError: no run there, unknown weights, no usable checkpoint, an adapter for another network.
    """
    folder = pathlib.Path(run)
    settings, about = read(folder)
    shape, classes = tuple(about["shape"]), about["num_classes"]
    found = weights_of(folder, weights, step)
    others, params, told = None, found.params, {}
    if adapters:
        others, params, told = put_beside(settings, params, adapters)
    elif settings.adapter.hint is not None:
        told = {name: Told(own, hinted.of(settings.adapter)) for name, own in build.adapters(settings.adapter).items()}
    made = build.model(settings, shape, classes, training=False, others=others)
    return Run(
        made(params), DataTransform.from_dict(about["transform"]), shape, classes,
        tuple(about["labels"]) if about["labels"] else None, settings, found.step, folder,
        found.name, latents.of_run(folder, settings), told,
    )  # fmt: skip
