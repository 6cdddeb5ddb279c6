"""`diffjax eval`: scores of a run's samples beside their real-against-real floors."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.table import Table

from diffjax import data as data_
from diffjax import metrics
from diffjax.cli import build, check, console, hinted
from diffjax.cli import run as runs
from diffjax.cli.config import Train
from diffjax.cli.sample import draw, sampler_of
from diffjax.types import Denoiser

FORMAT = 1
LARGEST = 2000  # items for the scores: exact transport and neighbours grow with the square


@dataclasses.dataclass(frozen=True)
class Eval:
    """Score a run's samples against the test split; write and print RUN/metrics.json."""

    run: Annotated[str, tyro.conf.Positional]
    """run folder"""
    n: int | None = None
    """samples a set; default the size of the test split, at most 2000"""
    seeds: int | None = None
    """sets of samples; default that of the run"""
    solver: str | None = None
    """see `diffjax list solvers`; default that of the run"""
    steps: int | None = None
    """steps of the solver; default those of the run"""
    grid: str | None = None
    """see `diffjax list grids`; default that of the run"""
    guidance: float | None = None
    """weight of classifier-free guidance; 1 is the conditional model"""
    weights: str | None = None
    """ema_0.999, ..., posthoc_0.07 (see `diffjax ema`) or params; default the first average"""
    checkpoint: int | None = None
    """step to load; default the newest"""
    seed: int = 1000
    """seed of the first set"""
    all: bool = False
    """print every score; metrics.json holds them all in any case"""


def load_data(settings: Train) -> Any:
    """The data set of a configuration, read the way the run read it."""
    return data_.load(
        settings.data, seed=settings.seed, directory=settings.data_directory, image_size=settings.image_size,
        on_error=settings.on_error,
    )  # fmt: skip


def same_data(settings: Train, dataset: Any, about: dict[str, Any]) -> None:
    """Refuse other data than those that a run was trained on.   about: model.json of the run

    Raises: ValueError: items of another shape, or another number of classes.
    """
    shape = about.get("pixels", about["shape"])
    if list(dataset.shape) != shape or dataset.num_classes != about["num_classes"]:
        raise ValueError(
            f"data set {settings.data} now has items of shape {tuple(dataset.shape)} and {dataset.num_classes} classes; the "
            f"run was trained on {tuple(shape)} and {about['num_classes']}. Put the data back that it was trained on"
        )


def scores(
    denoiser: Denoiser, settings: Train, dataset: Any, *, n: int | None = None, seed: int = 1000, space: Any = None
) -> dict[str, Any]:
    """Scores of a model over several sample seeds, against the test split, which training never sees.

    The reference and every set have the same size n; a floor is the mean over up to four disjoint sets of n items of the
    train split; the classifier is trained on the classifier split. With a latent `space` samples are decoded first; the data
    set is that of the pictures. An adapter is told the hints of the test items. Returns: plain data for metrics.json.
    """
    sampler = settings.sampler
    most = min(len(dataset.split("test")), len(dataset.split("train")))
    size = min(most, LARGEST) if n is None else n
    if not 2 <= size <= most:
        raise ValueError(f"--n must be in 2..{most}, the size of the test split; got {size}")
    test = dataset.read("test", size)
    real, labels = test["x"], test["label"] if dataset.num_classes else None
    other = dataset.read("train", size * min(4, len(dataset.split("train")) // size))["x"]
    pictures = len(dataset.shape) == 3 and min(dataset.shape[:2]) >= 4
    extractors = [metrics.pixels()]
    classifier = None
    if pictures:
        extractors.append(metrics.random_convolution())
        if labels is not None:
            third = dataset.read("classifier")
            if len(np.unique(third["label"])) == dataset.num_classes > 1:
                console.note(f"training a classifier on {len(third['x'])} other items for the scores")
                classifier = metrics.classifier(third["x"], third["label"])
                extractors.append(classifier.extractor())
    solver = build.solver(sampler, denoiser.process)
    guided = build.guided(denoiser, sampler.guidance)
    results, more = [], []
    train = dataset.read("train", min(len(dataset.split("train")), 20_000))["x"]
    shape = tuple(dataset.shape)
    if space is not None:
        shape = jax.eval_shape(space.encode, jax.ShapeDtypeStruct((1, *shape), real.dtype)).shape[1:]
    hint = hinted.of(settings.adapter)
    asked = None if hint is None else np.asarray(hint(real))
    own = {name: hinted.told(a, asked) for name, a in build.adapters(settings.adapter).items()} if hint else {}
    for i in range(sampler.seeds):
        fake = draw(
            jax.random.key(seed + i), guided, solver, size, shape, labels, own=own,
            title=f"samples for the scores, seed {i + 1} of {sampler.seeds}",
        )  # fmt: skip
        fake = fake if space is None else space.decode_all(fake)
        bad = int((~np.isfinite(fake).reshape(size, -1).all(1)).sum())
        if bad:
            raise runs.Failed(
                f"{bad} of {size} samples are not finite; the model diverged, or the solver does not fit it"
            )
        results.append(
            metrics.distribution_scores(real, other, fake, extractors, floors=results[0] if results else None)
        )
        extra = metrics.score(metrics.memorisation(train, real), fake)
        if hint is not None:
            extra |= hinted.errors(np.asarray(hint(fake)), asked)
        if classifier is not None:
            extra["label_accuracy"] = classifier.accuracy(fake, labels)
        more.append(extra)
    found = metrics.average(results)
    mean = {k: float(np.mean([m[k] for m in more])) for k in more[0]}
    if classifier is not None:
        mean["classifier_test_accuracy"] = classifier.accuracy(real, labels)
    return {
        "format": FORMAT, "seeds": sampler.seeds, "sampler": dataclasses.asdict(sampler), **found, "other": mean,
        "each": {k: [float(m[k]) for m in more] for k in more[0]},
    }  # fmt: skip


SHORT = ("frechet_", "fid_", "precision_", "recall_")  # what the table shows of each feature space
MORE = {  # of `other`: what it is called, and what a faithful model gives
    "nn": ("nearest training item, to held-out's", 1.0),
    "near": ("share close to training items", 0.05),
    "near_copies": ("copies of training items", None),
    "hint_error": ("error of the samples' hints, to those of others", "hint_error_of_others"),
    "label_accuracy": ("label accuracy", "classifier_test_accuracy"),
    "classifier_test_accuracy": ("classifier test accuracy", None),
}


def table(found: dict[str, Any]) -> Table:
    """The scores that matter most, each with its spread over seeds, its floor and the ratio of the two."""
    out = Table(title=f"{found['n']} samples against {found['reference']} test items, mean of {found['seeds']} seed(s)")
    for i, column in enumerate(("", "score", "+-", "floor", "ratio")):
        out.add_column(column, justify="right" if i else "left", no_wrap=True)
    show = lambda v: "" if v is None else f"{v:.4g}"
    for name, entry in found["scores"].items():
        if name.startswith(SHORT):
            out.add_row(name.replace("_", " "), *(show(entry[k]) for k in ("score", "std", "floor", "ratio")))
    other = found["other"]
    for name, (words, floor) in MORE.items():
        if name in other:
            floor = other.get(floor) if isinstance(floor, str) else floor
            spread = float(np.std(found["each"][name])) if name in found["each"] else None
            out.add_row(words, *map(show, (other[name], spread, floor, other[name] / floor if floor else None)))
    out.caption = "floor: the same score of other real items"
    return out


def report(found: dict[str, Any], *, everything: bool = False) -> None:
    """Print scores as a table, a short one or all of them."""
    if everything:
        console.show(metrics.table(found))
        for name, value in found["other"].items():
            console.show(f"{name:28s} {value:.4g}")
    else:
        console.show(table(found))


def save(found: dict[str, Any], path: pathlib.Path) -> None:
    """Write scores as JSON; a score that is not a number becomes null."""
    plain = lambda v: {k: plain(u) for k, u in v.items()} if isinstance(v, dict) else numbers(v)
    numbers = lambda v: [plain(u) for u in v] if isinstance(v, (list, tuple)) else finite(v)
    finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    runs.write_text(path, json.dumps(plain(found), indent=2, allow_nan=False) + "\n")


def main(args: Eval) -> int:
    """Run the command."""
    check.number("seed", args.seed, check.SEED)
    stored, about = runs.read(pathlib.Path(args.run))
    settings = dataclasses.replace(stored, sampler=sampler_of(args, stored.sampler))
    build.solver(settings.sampler, build.process(settings.process))  # bad names are refused before anything is loaded
    check.guidance("guidance", settings.sampler.guidance, about["num_classes"], settings.objective.label_drop)
    runs.check_steps(pathlib.Path(args.run))
    dataset = load_data(settings)
    same_data(settings, dataset, about)
    run = runs.load(args.run, weights=args.weights, step=args.checkpoint)
    found = scores(run.denoiser, settings, dataset, n=args.n, seed=args.seed, space=run.space)
    found |= {"step": run.step, "weights": run.weights}
    save(found, run.folder / "metrics.json")
    report(found, everything=args.all)
    console.show(f"scores   {run.folder / 'metrics.json'}")
    return 0
