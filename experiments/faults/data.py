"""Corrupted and missing data files, before and in the middle of a run.

A picture that is truncated, overwritten or deleted while a run reads the folder must end it with an error that names the file,
with nothing lost; once the file is back the run goes on and ends with the state of a run that never met it, bit for bit.
Before a run, such files are refused by name, or left out and counted with `on_error="skip"`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from PIL import Image

from diffjax import cli, data, training
from diffjax.data import DataError
from diffjax.training import CheckpointStore, FitResult
from experiments.faults import Row, job

TITLE = "corrupted and missing data files"
STEPS, BATCH, PICTURES = 24, 16, 400
DAMAGE: dict[str, Callable[[pathlib.Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "overwritten": lambda path: path.write_bytes(np.random.default_rng(0).bytes(200)),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}
TINY = (
    "--model.network=mlp --model.width=16 --model.depth=1 --training.steps=12 --training.batch-size=16 --no-scores "
    "--training.save-every=4 --training.sample-every=12 --sampler.steps=2 --training.augment=none"
).split()  # fmt: skip


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Small pictures of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:04d}.png" for i in range(PICTURES)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return paths


def loss(key: Any, mean: Any, x0: Any, cond: Any, items: Any = None) -> tuple[Any, dict]:
    """The squared distance to one picture, which learns the mean: what is at stake is the reading."""
    return ((x0 - mean[None]) ** 2).mean((1, 2, 3)), {}


def train(
    dataset: Any, folder: pathlib.Path, at: int | None = None, then: Callable[[], Any] | None = None
) -> FitResult:
    """Train on a folder that is read while training; `then()` happens before batch `at` is taken."""
    optimizer = optax.adam(0.1)
    state = training.init_state(np.zeros((8, 8, 3), np.float32), optimizer, 0)
    train_step = training.make_train_step(lambda mean: mean, loss, optimizer)

    class Watched:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            if self._stream.batches_done == at:
                then()
            return next(self._stream)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

    with (
        CheckpointStore(folder / "checkpoints", say=lambda text: None) as store,
        data.batches(dataset, "train", BATCH, seed=0) as stream,
    ):
        return training.fit(
            state, train_step, Watched(stream), steps=STEPS, store=store, save_every=8, per_dispatch=2,
            resume=bool(store.steps()), stream=io.StringIO(), devices=jax.devices()[:1],
        )  # fmt: skip


def while_training(folder: pathlib.Path, kinds: list[str]) -> Row:
    """Damage a picture that the run has yet to read."""
    pictures = draw(folder / "pictures")
    contents = {path: path.read_bytes() for path in pictures}
    dataset = data.images.folder(folder / "pictures", in_memory=0)
    whole = job.digest(train(dataset, folder / "whole").state)
    with data.batches(dataset, "train", BATCH, seed=0, prefetch=0) as stream:
        order = [pictures[int(next(stream)["index"][0])] for _ in range(STEPS)]  # the first picture of every batch
    good, lost = 0, []
    for kind in kinds:
        # Batch 14 is far enough ahead of batch 6 that no thread has read it.
        victim, where = order[14], folder / kind
        text = ""
        try:
            train(dataset, where, 6, functools.partial(DAMAGE[kind], victim))
        except DataError as error:
            text = str(error)
        lost.append(14 - max(CheckpointStore(where / "checkpoints").steps()))
        victim.write_bytes(contents[victim])
        again = job.digest(train(dataset, where).state)
        good += victim.name in text and "unreadable image" in text and again == whole
    return Row(
        f"picture {', '.join(kinds)} while training", len(kinds), good,
        f"named in the error, at most {max(lost)} steps lost; after repair equal bit for bit",
    )  # fmt: skip


def before_training(folder: pathlib.Path, kinds: list[str]) -> Row:
    """Damage a picture before the folder is read: refused by name, or left out and counted."""
    pictures = draw(folder / "before")
    good, kinds = 0, [kind for kind in kinds if kind != "deleted"]
    for i, kind in enumerate(kinds):
        DAMAGE[kind](pictures[7 * i])
        text = ""
        try:
            data.images.folder(folder / "before")
        except DataError as error:
            text = str(error)
        found = data.images.folder(folder / "before", on_error="skip")
        damaged = {pictures[7 * k].name for k in range(i + 1)}
        listed = {pathlib.Path(name).name for name in found.skipped} == damaged
        good += any(name in text for name in damaged) and listed and len(found) == PICTURES - i - 1
    return Row("picture damaged before training", len(kinds), good, "named when refused; listed and left out with skip")


def command(*words: Any) -> tuple[int, str]:
    """Exit code and messages of the command line."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([str(word) for word in words])
    return code, err.getvalue()


def arrays(folder: pathlib.Path, kinds: list[str]) -> Row:
    """An .npz that is gone or damaged when a run is started or continued."""
    path = folder / "points.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(320, 2)).astype(np.float32))
    content, good = path.read_bytes(), 0
    code, text = command("train", f"arrays:{path}", "--run", folder / "run", *TINY)
    started = code == 0 and reached(folder / "run", 12)
    for kind in kinds:
        DAMAGE[kind](path)
        fresh, said = command("train", f"arrays:{path}", "--run", folder / f"no-{kind}", *TINY)
        more, told = command("train", "--resume", folder / "run", "--training.steps", 16)
        named = all("points.npz" in text and "Traceback" not in text for text in (said, told))
        good += fresh == more == 2 and named and not (folder / f"no-{kind}").exists() and reached(folder / "run", 12)
        path.write_bytes(content)
    code, text = command("train", "--resume", folder / "run", "--training.steps", 16)
    ended = started and code == 0 and reached(folder / "run", 16)
    return Row(
        f".npz {', '.join(kinds)}", len(kinds), good if ended else 0,
        "exit code 2, the file named, no folder made, the run as it was; continued when the file was back",
    )  # fmt: skip


def reached(folder: pathlib.Path, step: int) -> bool:
    """Whether the newest checkpoint of a run is that of `step`."""
    return CheckpointStore(folder / "checkpoints").steps()[-1] == step


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Every kind of damage in every place; quick: two kinds."""
    kinds = ["truncated", "deleted"] if quick else list(DAMAGE)
    yield while_training(folder, kinds)
    yield before_training(folder, kinds)
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield arrays(folder, kinds)
    finally:
        os.chdir(here)
