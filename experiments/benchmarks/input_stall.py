"""How long training waits for its data: the main job's digits, and PNG pictures read and decoded from a folder.

`input_stall` of the log is the share of the time in which the loop waited for data while the device had nothing to do; its
mean over the run after the first window, which holds the compilation. Limit: <= 2 % with prefetching. Calls of the
device are queued, which hides much of the reading even without it. To see that waiting is noticed, the digits are also read
by a stream that sleeps before every batch, longer than a step takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from diffjax import data, training
from diffjax.cli import build, config
from diffjax.cli import run as runs
from diffjax.data.images import save_png

LOG = 20  # steps of a window


def folder_of_pictures(path: pathlib.Path, n: int, side: int) -> None:
    """`n` noisy gradients as PNG files in two classes."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side)[:, None, None]
    for i in range(n):
        picture = ramp + rng.integers(0, 55, (side, side, 3))
        save_png(path / f"class{i % 2}" / f"{i:05d}.png", picture.astype(np.uint8)[None])


class Late:
    """A stream of batches, each after a sleep."""

    def __init__(self, stream: Any, seconds: float) -> None:
        self._stream, self._seconds = stream, seconds

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self._stream, name)

    def __iter__(self) -> Late:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next batch, late."""
        time.sleep(self._seconds)
        return next(self._stream)


def stall(settings: config.Train, steps: int, prefetch: int, late: float = 0.0) -> float:
    """The mean share of waiting, weighted by time; `late`: seconds of sleep before every batch."""
    dataset = data.load(settings.data, image_size=settings.image_size, seed=settings.seed)
    shape, classes = build.shape_of(dataset), dataset.num_classes
    optimizer, _ = build.optimiser(settings.training)
    born = functools.partial(
        training.init_sharded, runs.initialiser(settings, shape, classes), optimizer, settings.seed,
        emas=build.averages(settings.training),
    )  # fmt: skip
    t = settings.training
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(data.batches(dataset, "train", t.batch_size, seed=0, prefetch=prefetch)) as stream,
    ):
        log = pathlib.Path(folder) / "log.jsonl"
        training.fit(
            born, build.train_step(settings, shape, classes), Late(stream, late) if late else stream, steps=steps,
            log_every=LOG, metrics_file=log, stream=io.StringIO(),
        )  # fmt: skip
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    windows = [(LOG / line["steps_per_second"], line["input_stall"]) for line in lines[1:] if "input_stall" in line]
    seconds, waited = (sum(w[0] for w in windows), sum(w[0] * w[1] for w in windows))
    return round(waited / seconds, 4)


def pictures(folder: str) -> config.Train:
    """The preset of pictures at 32 x 32 with a network that a CPU trains in tens of milliseconds a step."""
    settings = config.preset(f"images:{folder}")
    model = dataclasses.replace(settings.model, width=16, multipliers=(1, 2), attention=())
    schedule = dataclasses.replace(settings.training, batch_size=32)
    return dataclasses.replace(settings, image_size=32, model=model, training=schedule)


def run(quick: bool = False) -> dict[str, Any]:
    """Shares of waiting.   `quick`: few steps."""
    report: dict[str, Any] = {}
    steps = 60 if quick else 1600
    with tempfile.TemporaryDirectory() as folder:
        folder_of_pictures(pathlib.Path(folder), 64 if quick else 2000, 48)
        cases = {"digits": (config.preset("digits"), steps), "folder": (pictures(folder), max(steps // 8, 60))}
        for name, (settings, n) in cases.items():
            report[name] = {f"prefetch {k}": stall(settings, n, k) for k in (2, 0)}
        report["digits, each batch 0.1 s late"] = stall(config.preset("digits"), 60, 2, late=0.1)
    return report


if __name__ == "__main__":
    from experiments.benchmarks import measure

    measure.record("input_stall", run())
