"""The log of a run: means over windows of steps, a JSONL file with every window once, and progress for people."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from diffjax.training.dynamics import summarise

AHEAD = 2  # calls of the device that may be unfinished before the loop waits: it bounds the memory of queued batches
LATEST = ("learning_rate", "skipped", "consecutive")  # logged as they are at the end of a window, not as means


class Recorder(contextlib.AbstractContextManager):
    """Collects the metrics of steps as the device delivers them; only process 0 writes."""

    def __init__(
        self,
        start: int,
        steps: int,
        *,
        log_every: int,
        file: Any,
        stream: Any,
        examples: int = 0,
        batch: int = 0,
        carried: dict | None = None,
    ) -> None:
        carried = carried or {}
        self.means: dict[str, float] = {}  # the last window
        self.consecutive = 0
        self._start, self._steps, self._every, self._examples, self._batch = start, steps, log_every, examples, batch
        self._queue: collections.deque = collections.deque()
        self._sums: dict[str, list] = {name: list(pair) for name, pair in carried.get("window", {}).items()}
        self._before = carried.get("seconds", 0.0)
        self._clock = self._mark = self._taken = time.perf_counter()
        self._marked = self._seen = start
        self._latest: dict[str, float] = {}
        self._file = None
        self._display = None
        if jax.process_index() == 0:
            if file is not None:
                path = pathlib.Path(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                keep_lines(path, start)
                self._file = path.open("a")
            self._display = _Bar(start, steps, stream) if getattr(stream, "isatty", lambda: False)() else _Lines(stream)

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
        if self._display is not None:
            self._display.close()

    def add(self, first: int, n: int, metrics: dict) -> None:
        """Queue the metrics of the steps after `first`; handle those that have arrived, and wait for very old ones."""
        self._queue.append((first, n, metrics))
        # Processes that stop after too many refused updates must see them at the same step, so that none looks ahead.
        early = jax.process_count() == 1
        while self._queue and (len(self._queue) > AHEAD or (early and _arrived(self._queue[0][2]))):
            self._take()

    def drain(self, *, finish: bool = False) -> None:
        """Wait for everything queued.   `finish`: also close a window that is not full."""
        while self._queue:
            self._take()
        if finish and self._sums:
            self._line(self._seen, time.perf_counter())

    def note(self, step: int, name: str, numbers: dict) -> None:
        """A line of its own for what a hook measured."""
        self.drain()
        self._write({"step": step, "hook": name, **numbers})

    def carried(self) -> dict:
        """What a checkpoint must hold so that a resumed log continues in the middle of a window."""
        return {"window": self._sums, "seconds": self._seconds()}

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._clock

    def _take(self) -> None:
        first, n, metrics = self._queue.popleft()
        values = {name: np.asarray(value) for name, value in metrics.items()}
        now, before = time.perf_counter(), self._taken
        self._taken = now
        for i in range(n):
            row = {name: float(value[i]) for name, value in values.items()}
            self._latest, self._seen = row, first + i + 1
            self.consecutive = int(row.get("consecutive", 0))
            for name, value in row.items():
                if name not in LATEST and math.isfinite(value):
                    pair = self._sums.setdefault(name, [0.0, 0])
                    pair[0] += value
                    pair[1] += 1
            self._sums.setdefault("loss", [0.0, 0])
            if self._seen % self._every == 0:  # the steps of one call took equal times
                self._line(self._seen, before + (now - before) * (i + 1) / n)
        if self._display is not None:
            self._display.advance(self._seen)

    def _line(self, step: int, now: float) -> None:
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        self.means = summarise(means, max((count for _, count in self._sums.values()), default=0) * self._batch)
        self._sums = {}
        rate = (step - self._marked) / max(now - self._mark, 1e-9)
        self._mark, self._marked = now, step
        line = {
            "step": step,
            **{name: self.means.get(name) for name in {"loss": 0, **self.means}},
            **{name: self._latest[name] for name in LATEST if name in self._latest},
            "examples": self._examples + (step - self._start) * self._batch,
            "seconds": round(self._seconds(), 3),
            "steps_per_second": round(rate, 4),
            "examples_per_second": round(rate * self._batch, 2),
        }
        for name in ("skipped", "consecutive"):
            if name in line:
                line[name] = int(line[name])
        self._write(line)
        if self._display is not None:
            self._display.line(step, self._steps, line)

    def _write(self, line: dict) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, default=float) + "\n")
            self._file.flush()


def keep_lines(path: pathlib.Path, step: int) -> None:
    """Drop the lines of a JSONL file after `step`, and a last line that a killed run left unfinished."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


class _Lines:
    """Progress where there is no terminal: one plain line per window."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def advance(self, step: int) -> None:
        pass

    def line(self, step: int, steps: int, numbers: dict) -> None:
        left = (steps - step) / max(numbers["steps_per_second"], 1e-9)
        skipped = f"  skipped {numbers['skipped']}" if numbers.get("skipped") else ""
        print(
            f"step {step}/{steps}  loss {_short(numbers['loss'])}  {_short(numbers['steps_per_second'])} it/s  "
            f"{_short(numbers['examples_per_second'])} examples/s  ETA {_clock(left)}{skipped}",
            file=self._stream,
            flush=True,
        )

    def close(self) -> None:
        pass


class _Bar:
    """Progress on a terminal: a bar with loss, speed and the time left."""

    def __init__(self, start: int, steps: int, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(file=stream), refresh_per_second=4)
        self._task = self._bar.add_task("train", total=steps, completed=start, numbers="compiling")
        self._bar.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def line(self, step: int, steps: int, numbers: dict) -> None:
        skipped = f"  skipped {numbers['skipped']}" if numbers.get("skipped") else ""
        text = (
            f"loss {_short(numbers['loss'])}  {_short(numbers['steps_per_second'])} it/s  "
            f"{_short(numbers['examples_per_second'])} examples/s{skipped}"
        )
        self._bar.update(self._task, completed=step, numbers=text)

    def close(self) -> None:
        self._bar.stop()


def _arrived(metrics: dict) -> bool:
    return all(value.is_ready() for value in metrics.values())


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
