"""Five minutes of everything at once: train, save every few seconds, draw samples, and evaluate what is on disk.

`diffjax train` runs with checkpoints and samples every few seconds while another process does `diffjax sample` and `diffjax
eval` of the same run, until SIGTERM stops it. The time begins when everything was done twice, and so compiled;
resident memory, threads and open files are read every second. After a warm-up of 40 % of the time nothing may grow: the memory
by less than `GROWTH` of its size between the medians of the first and the last fifth of what follows, the most threads and
files at a time by no more than `SPARE` from one half to the other, and no temporary file may be left.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import signal
import statistics
import subprocess
import sys
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
# Share of the memory, over the time that is compared; QUICK_GROWTH in the short one, which is all warm-up.
GROWTH = 0.02
QUICK_GROWTH = 0.10
WARM_CALLS = 4  # readings of the run from disk before the time begins
# Threads or files: how many there are depends on what happens to run when they are counted, a few times in the short one.
SPARE, QUICK_SPARE = 2, 10
TRAIN = (
    "train gaussians --model.width=64 --model.depth=2 --training.steps=100000000 --training.batch-size=64 --no-scores "
    "--training.log-every=500 --sampler.steps=4 --sampler.seeds=1 --training.decay=constant"
).split()  # fmt: skip


def read() -> tuple[int, int, int]:
    """Resident bytes, threads and open files of this process."""
    return host_bytes() or 0, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def observe(folder: pathlib.Path) -> None:
    """Sample and evaluate the run on disk, again and again; one line on stdout for each."""
    while True:
        for words in (
            ["sample", folder, "--n", 64, "--steps", 4, "--out", folder / "drawn"],
            ["eval", folder, "--n", 64, "--seeds", 1],
        ):
            if CheckpointStore(folder / "checkpoints").steps():
                with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
                    code = cli.main([str(word) for word in words])
                lines = said.getvalue().splitlines()
                noise = [line for line in lines if "damaged" in line or "could not" in line or "error" in line]
                print(words[0], f"failed: {noise or lines[-1:]}" if code or noise else "done", flush=True)
            time.sleep(0.5)


def soak(folder: pathlib.Path, seconds: float, every: int) -> tuple[list, list, int]:
    """Run everything for `seconds`.   Returns: the readings, what the other process did, the exit code of the training."""
    readings, lines, done = [], [], threading.Event()
    words = [sys.executable, "-m", "experiments.faults.soak", str(folder)]
    child = subprocess.Popen(words, env=job.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def listen() -> None:
        lines.extend(iter(child.stdout.readline, ""))

    def watch() -> None:
        while len(lines) < WARM_CALLS:  # the time begins when everything is compiled
            if done.wait(0.5):
                return
            if child.poll() is not None:  # it reads no more: without it there is nothing to measure
                os.kill(os.getpid(), signal.SIGTERM)
                return
        began = time.perf_counter()
        while not done.wait(1.0):
            readings.append((time.perf_counter() - began, *read()))
            if readings[-1][0] > seconds:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threads = [threading.Thread(target=target, daemon=True) for target in (listen, watch)]
    for thread in threads:
        thread.start()
    try:
        code = cli.main(
            [*TRAIN, "--run", str(folder), f"--training.save-every={every}", f"--training.sample-every={every}"]
        )
    finally:
        done.set()
        child.kill()
        child.wait()
    for thread in threads:
        thread.join(timeout=60)
    child.stdout.close()
    return readings, lines, code


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Five minutes (quick: 20 seconds) of training, saving, sampling and evaluating at once."""
    job.cache()
    seconds, growth, spare = (QUICK, QUICK_GROWTH, QUICK_SPARE) if quick else (SECONDS, GROWTH, SPARE)
    every = 500 if quick else 2000
    place, temporary = folder / "run", folder / "temporary"
    temporary.mkdir()
    before = tempfile.tempdir
    tempfile.tempdir = str(temporary)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            readings, lines, code = soak(place, seconds, every)
    finally:
        tempfile.tempdir = before
    step = CheckpointStore(place / "checkpoints").steps()[-1]
    failed = [line for line in said.getvalue().splitlines() if "could not" in line or "damaged" in line]
    failed += [line for line in lines if "failed" in line]
    count = {name: sum(line.startswith(name) for line in lines) for name in ("sample", "eval")}
    yield Row(
        f"{seconds:.0f} s of training, sampling, evaluating", 1, int(code == 143 and not failed),
        f"{step} steps, {step // every} times saved and drawn, from disk {count['sample']} times sampled and "
        f"{count['eval']} times evaluated; {len(failed)} errors{''.join(failed[:1]).rstrip()}",
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
    same = all(b <= a + spare for a, b in most.values())
    yield Row(
        "threads, files, temporary files", 1, int(same and not left),
        f"at most {most['threads'][0]} then {most['threads'][1]} threads, {most['files'][0]} then {most['files'][1]} open "
        f"files; {len(left)} left behind",
    )  # fmt: skip


if __name__ == "__main__":
    observe(pathlib.Path(sys.argv[1]))
