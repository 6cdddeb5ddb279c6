"""What a run is doing: when calls of the device end, how long it starves for data, and a report when nothing moves."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import os
import pathlib
import queue
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from diffjax.training.signals import TEMPORARY, Signals

LEAST = 120.0  # seconds without a finished step that are never worth a report
CALLS = 20  # the default limit in median times of a call
PATIENCE = 10  # times as long while compiling, saving or in a hook, which take as long as they take
WORDS = {
    "start": "being placed on the devices",
    "data": "waiting for data: the iterator of batches has not delivered",
    "compile": "waiting for the compiler",
    "device": "waiting for the device",
    "checkpoint": "waiting for a checkpoint to be written",
}


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """When to report that no step finishes, where, and whether to give up.

    Args: seconds: without a finished step; default the larger of 120 and 20 times the median call of the device. Ten times
        that before the first step is done, and inside a hook or a save.   folder: for `hang-STEP.txt`; without, stderr
        alone.   abort: end the process with exit code 75, so that a scheduler starts it again; a run of
        one process that waits for data is saved first.
    Raises: ValueError: seconds not positive.
    """

    seconds: float | int | None = None
    folder: Any = None
    abort: bool = False

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"watchdog seconds must be positive; got {self.seconds}. Pass watchdog=None to have none")


BY_RULE = Watchdog()


@dataclasses.dataclass(eq=False)
class Call:
    """A call of the device.   `done`: when its results were there, None before."""

    metrics: dict
    began: float
    done: float | None = None


class Watch(contextlib.AbstractContextManager):
    """The loop says what it is `doing`; two threads note when calls end, and look whether anything moves.

    After a signal the second thread counts `grace` seconds: then it leaves a wait for data or a hook, and says what else
    holds up the stop.
    """

    def __init__(
        self,
        watchdog: Watchdog | None,
        signals: Signals,
        *,
        step: int,
        grace: float | int = 10.0,
        saved: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.doing, self.step = "start", step
        self.hung = False  # given up because nothing moved
        self.failed = "start"  # what the loop was doing when an error came
        self.queued = 0  # calls of the device that were made
        self._watchdog, self._signals, self._grace, self._saved = watchdog, signals, grace, saved
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._finished = 0
        self._moved = self._since = time.perf_counter()  # when a step last ended; since when the loop does what it does
        self._seconds: collections.deque = collections.deque(maxlen=64)  # of the last calls
        self._starved: collections.deque = collections.deque()  # (from, to) without work for the device
        self._reports = self._told = 0
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._note_ends, "diffjax-clock"), (self._look, "diffjax-watchdog"))
        ]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._calls.put(None)
        for thread in self._threads:  # the clock may hang with the device
            thread.join(timeout=5.0)

    # ------------------------------------------------------------------------------------------------ told by the loop

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """The loop is doing `what` inside."""
        before, began = self.doing, time.perf_counter()
        self.doing, self._since = what, began
        try:
            yield
        except Exception:
            self.failed = self.failed if self.failed != "start" else what  # the innermost
            raise
        finally:
            now = time.perf_counter()
            if what == "data" and self._finished and self._finished == self.queued:
                self._starved.append((max(began, self._moved), now))
            elif what not in ("data", "device"):
                self._moved, self._reports = now, 0
            self.doing, self._since = before, now

    def called(self, step: int, metrics: dict) -> Call:
        """A call of the device was made that leads to `step`, with these results to come."""
        self.step, call = step, Call(metrics, time.perf_counter())
        self.queued += 1
        self._calls.put(call)
        return call

    def starved(self, start: float, end: float) -> float:
        """Seconds in `[start, end]` in which the loop waited for data while the device had nothing to do."""
        total = sum((max(0.0, min(b, end) - max(a, start)) for a, b in self._starved), 0.0)
        while self._starved and self._starved[0][1] <= end:
            self._starved.popleft()
        return total

    # ----------------------------------------------------------------------------------------------------- the threads

    def _note_ends(self) -> None:
        while (call := self._calls.get()) is not None:
            with contextlib.suppress(Exception):  # the loop meets the same error, and reports it
                jax.block_until_ready(call.metrics)
            now = time.perf_counter()
            if self._finished:  # the first call holds the compilation
                self._seconds.append(now - max(call.began, self._moved))
            self._moved, self._reports, call.done = now, 0, now
            self._finished += 1

    def limit(self) -> float | int | None:
        """Seconds without a finished step after which to report, now; None without a watchdog."""
        if self._watchdog is None:
            return None
        typical = statistics.median(self._seconds) if self._seconds else 0.0
        seconds = self._watchdog.seconds or max(LEAST, CALLS * typical)
        return seconds if self._finished and self.doing in ("data", "device") else PATIENCE * seconds

    def _look(self) -> None:
        tick = min(1.0, self._grace / 4, (self._watchdog and self._watchdog.seconds or LEAST) / 4)
        while not self._stop.wait(max(tick, 0.02)):
            now = time.perf_counter()
            if self._signals.caught is not None and now - self._signals.at > self._grace * (self._told + 1):
                self._told += 1
                self._hurry(now)
            limit = self.limit()
            if limit is not None and now - self._moved > limit * 2**self._reports:  # again after twice the time
                self._reports += 1
                self._report(now)

    def _hurry(self, now: float) -> None:
        """The stop that a signal asked for is late: leave what can be left, and say what cannot."""
        what, saved = self.words(), self._saved()
        kept = "nothing is saved yet" if saved is None else f"the last checkpoint is step {saved}"
        say(f"{now - self._signals.at:.0f} s after the signal the run is still {what}; {kept}")
        if self.doing == "data" or self.doing.startswith("hook"):
            self._leave()

    def _leave(self) -> None:
        """Leave a wait for data or a hook; not where other processes would wait for this one."""
        if jax.process_count() == 1:
            self._signals.abandon()

    def _report(self, now: float) -> None:
        text = self.report(now)
        say(text)
        if self._watchdog.folder is not None:
            part = f"-process{jax.process_index()}" if jax.process_count() > 1 else ""
            path = pathlib.Path(self._watchdog.folder) / f"hang-{self.step}{part}.txt"
            try:
                with path.open("a") as file:
                    file.write(text + "\n")
            except OSError as error:
                say(f"the report could not be written: {error}")
        if self._watchdog.abort:
            self.hung = True
            if self.doing == "data":
                self._leave()
                if self._stop.wait(self._grace) or self.doing != "data":  # it was left, and the state is being saved
                    return
            say(f"nothing moves: stopping with exit code {TEMPORARY}")
            os._exit(TEMPORARY)

    def words(self) -> str:
        """What the loop is doing, for people."""
        doing = self.doing
        if doing == "data" and self.queued > self._finished:  # it would get a batch that the device cannot take
            doing = "device"
        return WORDS.get(doing, f"in the {doing}")

    def report(self, now: float) -> str:
        """Everything that helps to find out why a run stands still."""
        typical = f"{statistics.median(self._seconds):.3g} s" if self._seconds else "unknown"
        load = " ".join(f"{v:.1f}" for v in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
        lines = [
            f"no step finished for {now - self._moved:.0f} s: the run is {self.words()}, for {now - self._since:.0f} s",
            f"step {self.step}; process {jax.process_index()} of {jax.process_count()}, pid {os.getpid()}; "
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}",
            f"calls of the device: {self._finished} finished, {self.queued - self._finished} unfinished, median {typical}",
            f"last checkpoint: {self._saved()}; host memory {_mib(host_bytes())}; load {load}",
            *(f"{device}: {_device(device)}" for device in jax.local_devices()[:16]),
            stacks(),
        ]
        return "\n".join(lines)


def say(text: str) -> None:
    """A line for people, on stderr; a full disk behind it must not stop the run."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def stacks() -> str:
    """The Python stack of every thread, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)


def host_bytes() -> int | None:
    """Resident memory of this process in bytes; None where the system does not say.

    Example:
        >>> host_bytes() is None or host_bytes() > 2**20
        True
    """
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def trim() -> None:
    """Give freed memory back to the system: glibc keeps it in pieces, which grew by 0.3 MiB with every checkpoint."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def device_bytes() -> int | None:
    """The largest memory in use so far on any device of this process, in bytes; None where devices do not say (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((p for p in peaks if p is not None), default=None)


def _device(device: Any) -> str:
    stats = device.memory_stats() or {}
    names = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    return ", ".join(f"{name} {_mib(stats[name])}" for name in names if name in stats) or "no memory statistics"


def _mib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.0f} MiB"
