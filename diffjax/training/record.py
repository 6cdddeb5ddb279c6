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
from diffjax.training.watch import Call, Watch, device_bytes, host_bytes, say

AHEAD = 2  # calls of the device that may be unfinished before the loop waits: it bounds the memory of queued batches
LATEST = ("learning_rate", "skipped", "consecutive")  # logged as they are at the end of a window, not as means
MEASURED = (  # entries of a line that tell of the machine: all others are the same whenever a run is repeated
    "seconds", "steps_per_second", "examples_per_second", "compile_seconds", "input_stall", "mfu", "host_bytes",
    "device_peak_bytes",
)  # fmt: skip
STALL = 0.02  # share of the time without data from which progress mentions it
KEPT = 2**20  # bytes of lines that wait for a full disk


class Recorder(contextlib.AbstractContextManager):
    """Collects the metrics of steps as the device delivers them; only process 0 writes.

    `bad_at` is the first step at which `limit` updates in a row had been refused; None before. It becomes known `AHEAD`
    calls later, or by `drain`, at the same step on every process however fast its devices are.
    """

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
        limit: int | None = None,
        events: int = 0,
        watch: Watch | None = None,
        flops: float | int | None = None,
        peak_flops: float | int | None = None,
    ) -> None:
        self.means: dict[str, float] = {}  # the last window
        self.compiled: float | None = None  # seconds, for the next line
        self.failures: list[str] = []
        self._steps, self._every, self._batch, self._limit = steps, log_every, batch, limit
        self._watch, self._flops, self._peak = watch, flops, peak_flops
        self._queue: collections.deque = collections.deque()
        self._clock = time.perf_counter()
        self._file = None
        self._path = None
        self._display = None
        if jax.process_index() == 0:
            if file is not None:
                self._path = pathlib.Path(file)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                keep_lines(self._path, start, events)
                self._file = _File(self._path)
            self._display = _Bar(start, steps, stream) if getattr(stream, "isatty", lambda: False)() else _Lines(stream)
        self._begin(start, examples, carried or {})

    def _begin(self, start: int, examples: int, carried: dict) -> None:
        """Take up the log at `start`, with what a checkpoint of that step carried."""
        self.consecutive, self.bad_at = 0, None
        self._start, self._examples, self._seen, self._latest = start, examples, start, {}
        self._bad: int | None = None
        self._ends: collections.deque = collections.deque()  # of the last calls, which need not have arrived everywhere
        self._sums: dict[str, list] = {name: list(pair) for name, pair in carried.get("window", {}).items()}
        self._before = carried.get("seconds", 0.0) - (time.perf_counter() - self._clock)
        self._mark: float | None = None  # end of the last window; None until a call of the device has ended
        self._marked = self._taken = 0

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self.failures += self._file.close()
        if self._display is not None:
            self._display.close()

    def add(self, first: int, n: int, metrics: dict, call: Call | None = None) -> None:
        """Queue the metrics of the steps after `first`; handle those that have arrived, and wait for very old ones."""
        self._queue.append((first, n, metrics, call))
        self._ends.append(first + n)
        while len(self._queue) > AHEAD or (self._queue and _arrived(self._queue[0][2])):
            self._take()
        if len(self._ends) > AHEAD:  # it has been waited for, on every process
            self._judge(self._ends.popleft())

    def drain(self, *, finish: bool = False) -> None:
        """Wait for everything queued.   `finish`: also close a window that is not full."""
        while self._queue:
            self._take()
        self._ends.clear()
        self._judge(self._seen)
        if finish and self._sums:
            self._line(self._seen, self._taken)

    def note(self, step: int, name: str, numbers: dict) -> None:
        """A line of its own for what a hook measured."""
        self._write({"step": step, "hook": name, **numbers})

    def rewind(self, step: int, examples: int, carried: dict, event: dict) -> None:
        """Go back to `step`: drop what was logged after it, write `event` as a line of its own, and go on."""
        self._queue.clear()
        self._begin(step, examples, carried)
        if self._file is not None:
            self.failures += self._file.close()
            with contextlib.suppress(OSError):  # on a full disk the dropped lines stay
                keep_lines(self._path, step, event["rewind"])
            self._file = _File(self._path)
        self._write({"step": step, **event})

    def carried(self) -> dict:
        """What a checkpoint must hold so that a resumed log continues in the middle of a window."""
        # A copy: checkpoints are written in the background, while the sums grow.
        return {"window": {name: list(pair) for name, pair in self._sums.items()}, "seconds": self._seconds()}

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._clock

    def _judge(self, known: int) -> None:
        if self._bad is not None and self._bad <= known:
            self.bad_at = self._bad

    def _take(self) -> None:
        first, n, metrics, call = self._queue.popleft()
        values = {name: np.asarray(value) for name, value in metrics.items()}
        now, before = time.perf_counter(), self._taken
        now = self._taken = now if call is None or call.done is None else call.done
        for i in range(n):
            row = {name: float(value[i]) for name, value in values.items()}
            self._latest, self._seen = row, first + i + 1
            self.consecutive = int(row.get("consecutive", 0))
            if self._limit is not None and self._bad is None and self.consecutive >= self._limit:
                self._bad = self._seen
            for name, value in row.items():
                if name not in LATEST and math.isfinite(value):
                    pair = self._sums.setdefault(name, [0.0, 0])
                    pair[0] += value
                    pair[1] += 1
            self._sums.setdefault("loss", [0.0, 0])
            if self._seen % self._every == 0:  # the steps of one call took equal times
                self._line(self._seen, before + (now - before) * (i + 1) / n)
        if self._mark is None:  # the first call holds the compilation: speed is measured from its end
            self._mark, self._marked = now, self._seen
        if self._display is not None:
            self._display.advance(self._seen)

    def _line(self, step: int, now: float) -> None:
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        self.means = summarise(means, max((count for _, count in self._sums.values()), default=0) * self._batch)
        self._sums = {}
        line = {
            "step": step,
            **{name: self.means.get(name) for name in {"loss": 0, **self.means}},
            **{name: self._latest[name] for name in LATEST if name in self._latest},
            "examples": self._examples + (step - self._start) * self._batch,
            "seconds": round(self._seconds(), 3),
            **self._speed(step, now),
            **{
                name: count
                for name, count in (("host_bytes", host_bytes()), ("device_peak_bytes", device_bytes()))
                if count
            },
        }
        for name in ("skipped", "consecutive"):
            if name in line:
                line[name] = int(line[name])
        self._write(line)
        if self._display is not None:
            self._display.line(step, self._steps, line)

    def _speed(self, step: int, now: float) -> dict[str, float]:
        """How fast the window was: from the end of its predecessor's last call of the device to the end of its own."""
        found = {} if self.compiled is None else {"compile_seconds": round(self.compiled, 3)}
        self.compiled = None
        if self._mark is None or step <= self._marked or now <= self._mark:
            return found
        seconds, rate = now - self._mark, (step - self._marked) / (now - self._mark)
        found |= {"steps_per_second": round(rate, 4), "examples_per_second": round(rate * self._batch, 2)}
        if self._watch is not None:
            found["input_stall"] = round(min(self._watch.starved(self._mark, now) / seconds, 1.0), 4)
        if self._flops and self._peak:
            found["mfu"] = round(self._flops * rate / self._peak, 4)
        self._mark, self._marked = now, step
        return found

    def _write(self, line: dict) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, default=float) + "\n")


class _File:
    """A file of lines that a full disk does not stop: what it refuses waits, and is written where it would have stood."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._waiting, self._lost, self._error = path, b"", 0, None
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, text: str) -> None:
        """Append a line, now or when there is room."""
        line = text.encode()
        if len(self._waiting) + len(line) > KEPT:
            self._lost += 1
        else:
            self._waiting += line
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._handle, self._waiting) :]
        except OSError as error:
            if self._error is None:
                say(f"the log {self._path} cannot be written: {error}; training goes on, and the lines wait for room")
            self._error = error

    def close(self) -> list[str]:
        """Close; returns what could not be written, as one line of text."""
        with contextlib.suppress(OSError):
            self.write("")
        with contextlib.suppress(OSError):
            os.close(self._handle)
        lost = self._lost + self._waiting.count(b"\n")
        return [f"{lost} lines of {self._path} could not be written: {self._error}"] if lost else []


def keep_lines(path: pathlib.Path, step: int, events: int = 0) -> None:
    """Drop the lines of a JSONL file after `step`, rewinds after the first `events`, and a last line left unfinished."""
    if not path.exists():
        return
    found = path.read_text().splitlines(keepends=True)
    kept = []
    for text in found:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            if line["step"] <= step and not line.get("rewind", 0) > events and text.endswith("\n"):
                kept.append(text)
    if kept == found:  # nothing is written where nothing changes: the disk may be full
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class _Lines:
    """Progress where there is no terminal: one plain line per window."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def advance(self, step: int) -> None:
        pass

    def line(self, step: int, steps: int, numbers: dict) -> None:
        rate = numbers.get("steps_per_second")
        left = f"  ETA {_clock((steps - step) / rate)}" if rate else ""
        with contextlib.suppress(OSError):  # a full disk behind it must not stop the run
            print(f"step {step}/{steps}  {_words(numbers, left)}", file=self._stream, flush=True)

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
        self._bar.update(self._task, completed=step, numbers=_words(numbers))

    def close(self) -> None:
        self._bar.stop()


def _arrived(metrics: dict) -> bool:
    return all(value.is_ready() for value in metrics.values())


def _words(numbers: dict, left: str = "") -> str:
    """Loss and speed, and what deserves attention: an idle device, refused updates."""
    text = f"loss {_short(numbers['loss'])}"
    if "steps_per_second" in numbers:  # unknown while only one call has ended
        text += (
            f"  {_short(numbers['steps_per_second'])} it/s  {_short(numbers['examples_per_second'])} examples/s{left}"
        )
    if "mfu" in numbers:
        text += f"  MFU {numbers['mfu']:.1%}"
    if numbers.get("input_stall", 0.0) > STALL:
        text += f"  waiting for data {numbers['input_stall']:.0%}"
    return text + (f"  skipped {numbers['skipped']}" if numbers.get("skipped") else "")


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
