"""Five minutes of everything at once: train, save every few seconds, draw samples, and evaluate what is on disk.

`diffjax train` runs with checkpoints and samples every few seconds while `diffjax sample` and `diffjax eval` read the same run
from another thread, in one process, until SIGTERM stops it. The time begins when everything was done twice, and so compiled;
resident memory, threads and open files are read every second. After a warm-up of 40 % of the time nothing may grow: the memory
by less than `GROWTH` of its size between the medians of the first and the last fifth of what follows, the most threads and
files at a time by no more than `SPARE` from one half to the other, and no temporary file may be left.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator

from diffjax import cli
from diffjax.training import CheckpointStore
from diffjax.training.watch import host_bytes
from experiments.faults import Row, job

TITLE = "soak"
SECONDS, QUICK = 300.0, 20.0
WARM = 0.4  # share of the time before anything is compared
GROWTH = (
    0.02  # share of the memory, over the time that is compared; QUICK_GROWTH in the short one, which is all warm-up
)
QUICK_GROWTH = 0.10
SPARE = 2  # threads or files: how many there are depends on what happens to run when they are counted
TRAIN = (
    "train gaussians --model.width=64 --model.depth=2 --training.steps=100000000 --training.batch-size=64 --no-scores "
    "--training.log-every=500 --sampler.steps=4 --sampler.seeds=1 --training.decay=constant"
).split()  # fmt: skip


def read() -> tuple[int, int, int]:
    """Resident bytes, threads and open files of this process."""
    return host_bytes() or 0, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def observe(folder: pathlib.Path, done: threading.Event, counts: dict, errors: list) -> None:
    """Sample and evaluate the run on disk, again and again."""
    while not done.is_set():
        if not CheckpointStore(folder / "checkpoints").steps():
            done.wait(0.5)
            continue
        for words in (
            ["sample", folder, "--n", 64, "--steps", 4, "--out", folder / "drawn"],
            ["eval", folder, "--n", 64, "--seeds", 1],
        ):
            code = cli.main([str(word) for word in words])
            counts[words[0]] = counts.get(words[0], 0) + 1
            if code:
                errors.append(f"{words[0]} ended with {code}")
            if done.wait(1.0):
                return


def soak(folder: pathlib.Path, seconds: float, every: int) -> tuple[list, dict, list, int]:
    """Run everything for `seconds`.   Returns: the readings, how often things were done, errors, the exit code."""
    readings, counts, errors, done = [], {}, [], threading.Event()

    def watch() -> None:
        while counts.get("eval", 0) < 2:  # the time begins when everything is compiled
            if done.wait(0.5):
                return
        began = time.perf_counter()
        while not done.wait(1.0):
            readings.append((time.perf_counter() - began, *read()))
            if readings[-1][0] > seconds:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threads = [
        threading.Thread(target=watch, daemon=True),
        threading.Thread(target=observe, args=(folder, done, counts, errors), daemon=True),
    ]
    words = [*TRAIN, "--run", str(folder), f"--training.save-every={every}", f"--training.sample-every={every}"]
    for thread in threads:
        thread.start()
    code = cli.main(words)
    done.set()
    for thread in threads:
        thread.join(timeout=120)
    return readings, counts, errors, code


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Five minutes (quick: 20 seconds) of training, saving, sampling and evaluating at once."""
    job.cache()
    seconds, growth = (QUICK, QUICK_GROWTH) if quick else (SECONDS, GROWTH)
    place, temporary = folder / "run", folder / "temporary"
    temporary.mkdir()
    before = tempfile.tempdir
    tempfile.tempdir = str(temporary)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            readings, counts, errors, code = soak(place, seconds, 500 if quick else 2000)
    finally:
        tempfile.tempdir = before
    steps = CheckpointStore(place / "checkpoints").steps()
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    saves = len([line for line in lines if line["step"] % (500 if quick else 2000) == 0])
    failed = [line for line in said.getvalue().splitlines() if "could not" in line or "damaged" in line]
    yield Row(
        f"{seconds:.0f} s of training, sampling, evaluating", 1, int(code == 143 and not errors and not failed),
        f"{steps[-1]} steps, {saves} saves and drawings, {counts.get('sample', 0)} times sampled and "
        f"{counts.get('eval', 0)} times evaluated from disk; {len(errors) + len(failed)} errors{''.join(failed[:1])}",
    )  # fmt: skip

    flat = [row for row in readings if row[0] > WARM * seconds]
    fifth = max(len(flat) // 5, 1)
    early, late = flat[:fifth], flat[-fifth:]
    memory = [statistics.median(row[1] for row in part) / 2**20 for part in (early, late)]
    slope = statistics.linear_regression([row[0] / 60 for row in flat], [row[1] / 2**20 for row in flat]).slope
    yield Row(
        "resident memory after warm-up", 1, int(memory[1] <= memory[0] * (1 + growth)),
        f"{memory[0]:.0f} -> {memory[1]:.0f} MiB, slope {slope:+.2f} MiB a minute; bound +{growth:.0%}",
    )  # fmt: skip
    half = len(flat) // 2
    most = {
        name: [max(row[i] for row in part) for part in (flat[:half], flat[half:])]
        for i, name in ((2, "threads"), (3, "files"))
    }
    left = [path.name for path in temporary.iterdir()]
    left += [path.name for path in (place / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
    left += [name for name in (thread.name for thread in threading.enumerate()) if name.startswith("diffjax-")]
    same = all(b <= a + SPARE for a, b in most.values())
    yield Row(
        "threads, files, temporary files", 1, int(same and not left),
        f"at most {most['threads'][0]} then {most['threads'][1]} threads, {most['files'][0]} then {most['files'][1]} open "
        f"files; {len(left)} left behind",
    )  # fmt: skip
