"""`diffjax sample`: draw samples of a run into a PNG and an .npz."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from diffjax import data as data_
from diffjax import guidance, sampling
from diffjax.cli import build, check, console, hinted
from diffjax.cli import run as runs
from diffjax.cli.config import Sampler
from diffjax.types import Denoiser, Solver

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw samples of a trained run: a PNG grid and an .npz."""

    run: Annotated[str, tyro.conf.Positional]
    """run folder"""
    n: int = 64
    """number of samples"""
    label: tuple[int, ...] | None = None
    """labels to draw, repeated in turn; default all in turn"""
    solver: str | None = None
    """see `diffjax list solvers`; default that of the run"""
    steps: int | None = None
    """steps of the solver; default those of the run"""
    grid: str | None = None
    """see `diffjax list grids`; default that of the run"""
    guidance: float | None = None
    """weight of classifier-free guidance; 1 is the conditional model, 0 the unconditional one"""
    interval: tuple[float, float] | None = None
    """noise levels sigma / alpha between which guidance acts"""
    clip: float | None = None
    """clip the predicted data to this many standard deviations"""
    weights: str | None = None
    """ema_0.999, ..., posthoc_0.07 (see `diffjax ema`) or params; default the first average"""
    checkpoint: int | None = None
    """step to load; default the newest"""
    adapter: tuple[str, ...] = ()
    """files of adapters made beside this run by `diffjax export`, each as FILE or FILE:WEIGHT"""
    hint: tuple[str, ...] = ()
    """what adapters are told, one for each that reads a hint: .npy [h, w, c] or [k, h, w, c], or a picture; default hints of
    held-out items of the run's data"""
    seed: int = 0
    chunk: int = 256
    """samples per call of the device; the result does not depend on it"""
    out: str | None = None
    """folder for the files; default RUN/samples"""


def draw(
    key: Any, denoiser: Denoiser, solver: Solver, n: int, shape: tuple[int, ...], labels: Any = None,
    *, own: Mapping[str, Any] | None = None, chunk: int = 256, title: str | None = "sampling",
) -> np.ndarray:  # fmt: skip
    """n samples in model coordinates, with a progress bar unless `title` is None.

    Args: labels: [n] or None.   own: what adapters are told, of n items.
    """
    labels = None if labels is None else jnp.asarray(labels, jnp.int32)
    bound = denoiser.bind(hinted.condition(labels, own or {}))
    if title is None:
        return sampling.sample_chunks(key, bound, solver, (n, *shape), chunk=chunk)
    with console.progress(title, n) as advance:
        return sampling.sample_chunks(
            key, bound, solver, (n, *shape), chunk=chunk, on_chunk=lambda done, _: advance(done)
        )


def choose_labels(asked: tuple[int, ...] | None, n: int, num_classes: int | None) -> np.ndarray | None:
    """Labels [n].   Raises: ValueError: a label that the run does not have, or labels for a run without."""
    if not num_classes:
        if asked is not None:
            raise ValueError(f"--label {' '.join(map(str, asked))} was given, but the run has no labels; leave it out")
        return None
    if asked is None:
        return np.arange(n, dtype=np.int32) % num_classes
    bad = [c for c in asked if not 0 <= c < num_classes]
    if bad or not asked:
        raise ValueError(f"--label must be in 0..{num_classes - 1}; got {', '.join(map(str, bad)) or 'nothing'}")
    return np.resize(np.asarray(asked, np.int32), n)


def save_npz(path: pathlib.Path, **arrays: Any) -> None:
    """Write an .npz whole or not at all."""
    runs.write_whole(path, lambda file: np.savez(file, format=FORMAT, **arrays))


def save_grid(path: pathlib.Path, run_transform: Any, x: np.ndarray, columns: int | None = None) -> pathlib.Path:
    """A PNG of samples in model coordinates; vectors that are no points of the plane have none."""
    raw = np.asarray(run_transform.decode(x))
    return data_.save_png(path, raw, columns, low=run_transform.low, high=run_transform.high)


def drawable(shape: tuple[int, ...]) -> bool:
    """Whether items are pictures of 1 or 3 channels or points of the plane."""
    return shape == (2,) or (len(shape) == 3 and shape[-1] in (1, 3))


def sampler_of(args: Any, stored: Sampler) -> Sampler:
    """The sampler of a run with the options that were given in its place.   Raises: ValueError: out of range."""
    names = [f.name for f in dataclasses.fields(Sampler)]
    given = {k: getattr(args, k) for k in names if getattr(args, k, None) is not None}
    for name, value in given.items():
        if f"sampler.{name}" in check.RULES:
            check.number(
                name, value, check.RULES[f"sampler.{name}"]
            )  # the option is --steps here, --sampler.steps in train
    if given.get("solver") == "recommended":  # it brings a grid, which is better than that of the run's other solver
        given.setdefault("grid", "auto")
    return dataclasses.replace(stored, **given)


def stem(args: Sample, sampler: Sampler) -> str:
    """The name of the files: what was asked for, so that other options give other files."""
    parts = [sampler.solver, str(sampler.steps), f"w{sampler.guidance:g}", f"seed{args.seed}", f"n{args.n}"]
    if args.label is not None:
        few = "_".join(map(str, args.label[:8]))
        parts.append("label" + few + (f"_{zlib.crc32(repr(args.label).encode()):08x}" if len(args.label) > 8 else ""))
    if args.interval is not None:
        parts.append("interval{:g}_{:g}".format(*args.interval))
    parts += [f"{path.stem}{weight:g}" for path, weight in map(parse_adapter, args.adapter)]
    parts += [f"hint_{pathlib.Path(path).stem}" for path in args.hint]
    given = {"grid": args.grid, "clip": args.clip, "weights": args.weights, "step": args.checkpoint}
    return "-".join([*parts, *(f"{k}_{v}" for k, v in given.items() if v is not None)])


def parse_adapter(text: str) -> tuple[pathlib.Path, float]:
    """`FILE:WEIGHT`, by default with weight 1.   Raises: ValueError: no such file, or a weight that is no number."""
    path, colon, weight = text.rpartition(":")
    if not colon or pathlib.Path(text).exists():
        path, weight = text, "1"
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"--adapter takes FILE or FILE:WEIGHT with a finite number; got {text!r}")
    if not pathlib.Path(path).is_file():
        raise ValueError(
            f"--adapter {text}: there is no file {path}; `diffjax export RUN` makes one of a run with an adapter"
        )
    return pathlib.Path(path), value


def hints(args: Sample, run: Any, settings: Any, labels: Any) -> dict[str, Any]:
    """What the adapters of a run are told for n samples: from files, or of held-out items of its data.

    Raises: ValueError: hints that nobody reads, too few or too many, or that do not fit.
    """
    if not run.told and args.hint:
        raise ValueError(
            "--hint is for an adapter that reads one; add --adapter FILE of such an adapter, or leave it out"
        )
    if args.hint and len(args.hint) != len(run.told):
        raise ValueError(
            f"--hint needs a file for each of {len(run.told)} adapters that read one; got {len(args.hint)}"
        )
    from diffjax.cli import evaluate  # which draws by this module

    files = dict(zip(run.told, map(pathlib.Path, args.hint), strict=False))
    made, dataset = {}, None
    for name, (adapter, hint) in run.told.items():
        if name in files:
            shape = None if hint is None else hint.shape(run.shape)
            found = hinted.read(files[name], args.n, shape, run.transform, hint is not None and hint.signed)
        elif hint is None:  # what it reads is not known here; it says itself whether it can do without
            made[name] = None
            continue
        else:
            dataset = evaluate.load_data(settings) if dataset is None else dataset
            found = hinted.held_out(hint, dataset, args.n, labels)
        made[name] = hinted.told(adapter, found)
    return made


def main(args: Sample) -> int:
    """Run the command."""
    began = time.monotonic()
    for name in ("n", "chunk"):
        check.number(name, getattr(args, name), check.COUNT)
    check.number("seed", args.seed, check.SEED)
    check.number("clip", args.clip, check.POSITIVE)
    files = [parse_adapter(text) for text in args.adapter]
    settings, about = runs.read(pathlib.Path(args.run))
    sampler = sampler_of(args, settings.sampler)
    labels = choose_labels(args.label, args.n, about["num_classes"])
    check.guidance("guidance", sampler.guidance, about["num_classes"], settings.objective.label_drop)
    if args.interval is not None and not 0 <= args.interval[0] < args.interval[1]:
        raise ValueError(
            f"--interval must be two noise levels 0 <= low < high; got {args.interval[0]} {args.interval[1]}"
        )
    if args.interval is not None and sampler.guidance == 1.0:
        raise ValueError("--interval says where guidance acts, and needs a --guidance other than 1")
    solver = build.solver(sampler, build.process(settings.process))  # bad names are refused before anything is loaded
    run = runs.load(args.run, weights=args.weights, step=args.checkpoint, adapters=files)
    denoiser = build.guided(run.denoiser, sampler.guidance, args.interval)
    if args.clip is not None:
        denoiser = guidance.clip_x0(args.clip)(denoiser)
    own = hints(args, run, settings, labels)
    x = draw(jax.random.key(args.seed), denoiser, solver, args.n, run.shape, labels, own=own, chunk=args.chunk)
    bad = int((~np.isfinite(x).reshape(args.n, -1).all(1)).sum())
    if bad:
        raise runs.Failed(f"{bad} of {args.n} samples are not finite; try another --solver, --grid, or more --steps")
    folder, name = pathlib.Path(args.out) if args.out else run.folder / "samples", stem(args, sampler)
    pictures = run.view(x)
    fields = {"x": np.asarray(run.transform.decode(pictures)), **({} if labels is None else {"label": labels})}
    save_npz(folder / f"{name}.npz", **fields)
    console.show(f"samples  {folder / f'{name}.npz'}")
    if drawable(pictures.shape[1:]):
        console.show(f"grid     {save_grid(folder / f'{name}.png', run.transform, pictures)}")
    console.show(
        f"weights  {run.weights} of step {run.step}, {sampler.solver} on {build.grid_name(sampler)}, "
        f"{solver.evaluations} evaluations a sample, guidance {sampler.guidance:g}  ({time.monotonic() - began:.0f} s)"
    )
    return 0
