"""A process of a job on several is killed or falls silent: the launcher notices, stops the rest and says how to resume; the
job ends as if nothing had happened.

The job is `diffjax launch -n N -- train gaussians` over loopback. At a random moment after the first checkpoint a random
process of the N gets SIGKILL, or SIGSTOP, after which it holds its connections but says nothing more: JAX misses its
heartbeats and aborts the others. It held if within 30 seconds the launcher named the process (after SIGSTOP: the one that JAX
aborted), left no process behind and printed a command, and that command ended the run with exactly the parameters of a run
that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

import diffjax
from experiments.faults import Row

TITLE = "a peer process is killed"
STEPS, SAVE_EVERY, LOG_EVERY, BOUND = 1000, 100, 10, 30.0
OPTIONS = (
    f"--model.width=16 --model.depth=1 --training.steps={STEPS} --training.batch-size=16 --training.log-every={LOG_EVERY} "
    f"--training.save-every={SAVE_EVERY} --training.sample-every={STEPS} --sampler.steps=3 --no-scores"
).split()
LIMIT = 600.0  # seconds for a job that is disturbed, from its start to its end
MARK = "DIFFJAX_PEER_TRIAL"  # in the environment of every process of a trial, to look for those left behind


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Kill one of 2 and one of 4, and stop one of 2, once or several times."""
    folder, rng = pathlib.Path(folder), random.Random(0)
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    for n, number, times in [(2, kill, 1)] if quick else [(2, kill, 2), (2, stop, 1), (4, kill, 1)]:
        whole = folder / f"whole-{n}"
        if not whole.exists():
            start(n, ["train", "gaussians", "--run", str(whole), *OPTIONS], whole).communicate(timeout=600)
        held, noticed, lost = 0, [], []
        for i in range(times):
            good, seconds, steps = trial(folder / f"{number.name}-{n}-{i}", whole, n, number, rng)
            held += good
            noticed.append(seconds)
            lost.append(steps)
        figures = f"noticed after <= {max(noticed):.1f} s, <= {max(lost)} steps done again, ended bit-equal"
        yield Row(f"{number.name} to one of {n} processes", times, held, figures)


def trial(
    folder: pathlib.Path, whole: pathlib.Path, n: int, signal_: signal.Signals, rng: random.Random
) -> tuple[bool, float, int]:
    """(everything held, seconds until the launcher noticed, steps that were lost)"""
    launcher = start(n, ["train", "gaussians", "--run", str(folder), *OPTIONS], folder)
    limit = threading.Timer(LIMIT, launcher.kill)  # its guard then ends the processes
    limit.start()
    try:
        when = rng.randint(SAVE_EVERY, STEPS - 2 * SAVE_EVERY)
        while reached(folder) < when or not saved(folder):
            if launcher.poll() is not None:
                raise RuntimeError(f"the job ended by itself: {launcher.communicate()[1]}")
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        victim = rng.randrange(n)
        killed = time.monotonic()
        os.kill(number_of(launcher.pid, victim), signal_)
        text = ""
        for line in launcher.stderr:
            text += line
            if "stopping the others" in line:
                break
        seconds = time.monotonic() - killed
        text += launcher.communicate(timeout=120)[1]
    finally:
        limit.cancel()
        launcher.kill()
    if "resume with: " not in text:
        raise RuntimeError(f"the launcher said nothing of how to resume: {text[-2000:]}")
    killed_by = f"process {victim} of {n} was killed by SIGKILL; stopping the others"
    named = (killed_by if signal_ == signal.SIGKILL else "was killed by SIGABRT (JAX") in text
    alone = not left_behind(folder)
    words = shlex.split(text.splitlines()[-1].removeprefix("resume with: diffjax launch -n "))
    steps = reached(folder) - saved(folder)
    again = start(n, words[2:], folder)
    again.communicate(timeout=600)
    a, b = (jax.tree.leaves(diffjax.load(f, weights="params").denoiser.leaves) for f in (folder, whole))
    equal = all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))
    good = named and alone and seconds < BOUND and launcher.returncode in (134, 137) and again.returncode == 0 and equal
    return good, seconds, steps


def start(n: int, words: list[str], folder: pathlib.Path) -> subprocess.Popen:
    """`diffjax launch -n N -- WORDS`"""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", MARK: str(folder)}
    root = str(pathlib.Path(diffjax.__file__).parents[1])
    environ["PYTHONPATH"] = os.pathsep.join([root, environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "diffjax", "launch", "-n", str(n), "--", *words]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environ, **pipes)


def environments() -> Iterator[tuple[int, list[bytes]]]:
    """The number and the variables of every process that may be looked at."""
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            yield int(path.parent.name), path.read_bytes().split(b"\0")
        except OSError:  # it has ended, or is not ours
            continue


def number_of(launcher: int, process: int) -> int:
    """The number that the system gave to a process of the job."""
    threads = pathlib.Path(f"/proc/{launcher}/task").iterdir()
    children = {int(word) for thread in threads for word in (thread / "children").read_text().split()}
    variable = f"DIFFJAX_PROCESS={process}".encode()
    (found,) = [number for number, words in environments() if number in children and variable in words]
    return found


def left_behind(folder: pathlib.Path) -> list[int]:
    """Processes of a trial whose launcher has ended; the guard needs a moment to go."""
    for _ in range(50):
        found = [number for number, words in environments() if f"{MARK}={folder}".encode() in words]
        if not found:
            return []
        time.sleep(0.1)
    return found


def reached(folder: pathlib.Path) -> int:
    """The last step in the log, 0 without one."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def saved(folder: pathlib.Path) -> int:
    """The last step on disk, 0 without one."""
    path = folder / "checkpoints"
    return max((int(p.name) for p in path.iterdir() if p.name.isdecimal()), default=0) if path.exists() else 0
