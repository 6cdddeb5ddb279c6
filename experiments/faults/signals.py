"""SIGTERM and SIGINT at random moments, each time resumed.

One run is stopped by a signal and resumed again and again, from the first batch on: while the step is compiled, while the
device works, while a checkpoint is written. Each time the process must end by itself with exit code 143 or 130, and the newest
checkpoint must be undamaged and hold the step that was reached. At the end the run must have the state of one that was
never stopped, bit for bit.
"""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from diffjax.training import CheckpointError, CheckpointStore
from experiments.faults import Row, job

TITLE = "SIGTERM and SIGINT"
SAVE_EVERY, WIDTH = 16, 64
MOMENTS = {
    "starting": 2.0,
    "working": 2.0,
}  # seconds after the first batch, and after the first steps, in which signals fall
FIRST = 33  # the batch whose taking shows that steps have been done
PATIENCE = 120.0  # seconds after which a process that did not stop counts as hung
ENDLESS = 10**6


class Announced:
    """Batches that say when the first one is taken, and when steps have been done."""

    def __init__(self, batches: Any) -> None:
        self._batches, self._taken = batches, 0

    def __iter__(self) -> Announced:
        return self

    def __next__(self) -> Any:
        self._taken += 1
        if self._taken in (1, FIRST):
            print("starting" if self._taken == 1 else "working", flush=True)
        return next(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def stop(folder: pathlib.Path, number: int, moment: str, delay: float) -> tuple[int, float, int]:
    """Start the run, send it a signal `delay` seconds after a moment.   Returns: exit code, seconds, step reached."""
    words = [sys.executable, "-m", "experiments.faults.signals", str(folder)]
    with (folder / "log").open("a") as log:
        child = subprocess.Popen(words, env=job.environment(), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            while (line := child.stdout.readline().strip()) and line != moment:
                continue
            if line != moment:
                raise RuntimeError(f"the run did not start:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(delay)
            began = time.perf_counter()
            child.send_signal(number)
            out, _ = child.communicate(timeout=PATIENCE)
        finally:
            child.kill()
            child.wait()
    return child.returncode, time.perf_counter() - began, int(out.split()[-1]) if out.split() else -1


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Stop one run 20 times (quick: 2) and compare it with an uninterrupted one."""
    made, rng = job.make(WIDTH), np.random.default_rng(0)
    stopped = folder / "stopped"
    stopped.mkdir()
    count, good, seconds, at_once, last = (2 if quick else 20), 0, [], 0, 0
    for i in range(count):
        number, moment = (signal.SIGTERM, signal.SIGINT)[i % 2], "working" if i % 3 else "starting"
        code, took, reached = stop(stopped, number, moment, float(rng.uniform(0, MOMENTS[moment])))
        messages: list[str] = []
        try:
            found = CheckpointStore(stopped / "checkpoints", say=messages.append).restore(made.state)
            kept, where = found.step, found.page["data"]["batches"]
        except CheckpointError as error:
            messages.append(str(error))
            kept, where = -1, -1
        good += code == 128 + number and kept == where == reached and not messages
        at_once += reached - last <= SAVE_EVERY  # the signal came while the first call was compiled, or ran
        last = max(last, reached)
        seconds.append(took)
    yield Row(
        "SIGTERM, SIGINT at random moments", count, good,
        f"0 steps lost; exit after {np.median(seconds):.2f} s, at most {max(seconds):.2f} s; "
        f"{at_once} in the first call of the device",
    )  # fmt: skip
    end = last + SAVE_EVERY
    whole = folder / "whole"
    whole.mkdir()
    digests = [job.digest(job.train(made, f, end, save_every=SAVE_EVERY).state) for f in (stopped, whole)]
    same = digests[0] == digests[1]
    yield Row("resume to the end after all signals", 1, int(same), f"state of step {end} equal bit for bit: {same}")


def main(folder: str) -> int:
    """The run that is stopped."""
    made = job.make(WIDTH)
    announced = made._replace(batches=lambda: Announced(made.batches()))
    result = job.train(announced, folder, ENDLESS, save_every=SAVE_EVERY)
    print(result.step, flush=True)
    return result.exit_code


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1]))
