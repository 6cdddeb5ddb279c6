"""kill -9 at random moments of starting, training and saving, each time resumed.

One job is killed and resumed again and again. After every kill the newest checkpoint must be undamaged, must not be older
than one that was known to be complete, and must be bit for bit the state that an uninterrupted run has at that step. At
the end the job runs to its last step and must have the parameters of the uninterrupted run.

A server that has imported everything, but started no device, forks the processes that are killed.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator

import numpy as np

from diffjax.training import CheckpointError, CheckpointStore, Hook
from experiments.faults import Row, job

TITLE = "kill -9"
SAVE_EVERY = 16
STARTING, WORKING = 0.2, 1.5  # share of the kills before the first step; seconds after it in which the others fall
ENDLESS = 10**6
COMPILED = 16  # batches taken when the first call of the device has surely begun to run


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Kill one job 50 times (quick: 3) and compare it with an uninterrupted run."""
    kills, rng = (3 if quick else 50), np.random.default_rng(0)
    killed, whole, warm = (folder / name for name in ("killed", "whole", "warm"))
    for made in (killed, whole, warm):
        made.mkdir(parents=True)
    template = job.make().state
    good, saving, starting, lost, found = 0, 0, 0, [], []
    with _server() as ask:
        startup = 0.0
        for made in () if quick else (warm, killed):  # fills the cache of compiled programs, then measures the start
            began = time.perf_counter()
            ask(made, steps=ENDLESS, delay=0.0, after_first=True)
            startup = time.perf_counter() - began
        while len(found) < kills:
            early = rng.uniform() < STARTING and not quick
            delay = rng.uniform(0, startup if early else WORKING)
            died = ask(killed, steps=ENDLESS, delay=float(delay), after_first=not early)
            if not died:
                raise RuntimeError(f"the job ended by itself:\n{(killed / 'log').read_text()[-2000:]}")
            taken, reached, known = _progress(killed)
            saving += any((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
            starting += taken <= COMPILED
            step, state = 0, None
            messages: list[str] = []
            try:
                restored = CheckpointStore(killed / "checkpoints", say=messages.append).restore(template)
                step, state = restored.step, job.digest(restored.state)
            except CheckpointError as error:
                if known or "no checkpoint in" not in str(error):
                    messages.append(str(error))
            found.append((step, state, not messages and step >= known))
            if taken:
                lost.append(reached - step)
        last = max(found)[0] + SAVE_EVERY
        ended = not ask(killed, steps=last) and not ask(whole, steps=last)
    exact = dict(line.split() for line in (whole / "digests").read_text().splitlines())
    good = sum(ok and (state is None or exact.get(str(step)) == state) for step, state, ok in found)
    yield Row(
        "kill -9 while starting, training, saving", kills, good,
        f"{starting} before the first step, {saving} with a save in flight; at most {max(lost, default=0)} steps lost, "
        f"saved every {SAVE_EVERY}; {last} steps in all",
    )  # fmt: skip
    states = [CheckpointStore(made / "checkpoints").restore(template, last).state for made in (killed, whole)]
    same = ended and job.digest(states[0]) == job.digest(states[1])
    yield Row("resume to the end after all kills", 1, int(same), f"state of step {last} equal bit for bit: {same}")


def _progress(folder: pathlib.Path) -> tuple[int, int, int]:
    """Batches taken by the last process, the last of them counted from the beginning, the last step known to be saved."""
    lines = [line.split() for line in (folder / "progress").read_text().splitlines()]
    start = max(i for i, (kind, _) in enumerate(lines) if kind == "start")
    taken = [int(n) for kind, n in lines[start:] if kind == "batch"]
    return len(taken), max(taken, default=0), max([int(n) for kind, n in lines if kind == "known"], default=0)


class _Watched:
    """The batches of a job, which notes every one that is taken."""

    def __init__(self, batches, note) -> None:
        self._batches, self._note = batches, note
        self.get_state, self.set_state, self.close = batches.get_state, batches.set_state, batches.close

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._batches)
        self._note("batch", self._batches.batches_done)
        return batch


def _work(folder: pathlib.Path, steps: int) -> None:
    """The process that is killed: it notes what it has done where a kill cannot take it back."""
    file = os.open(folder / "progress", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(kind: str, n: int) -> None:
        os.write(file, f"{kind} {n}\n".encode())

    made = job.make()
    made = made._replace(batches=lambda batches=made.batches: _Watched(batches(), note))
    wait = CheckpointStore.wait

    def noted_wait(store):
        step, done = store._saving, wait(store)
        if step is not None and done:
            note("known", step)
        return done

    CheckpointStore.wait = noted_wait
    hooks = []
    if folder.name == "whole":
        digests = (folder / "digests").open("a")
        hooks = [Hook(SAVE_EVERY, lambda step, state: print(step, job.digest(state), file=digests, flush=True))]
    every = ENDLESS if hooks else SAVE_EVERY  # the uninterrupted run saves at its end alone
    job.train(made, folder, steps, save_every=every, hooks=hooks)


class _server:
    """A process that forks jobs.   `ask(folder, steps, delay, after_first) -> whether the job was killed`"""

    def __enter__(self):
        code = "from experiments.faults import kill; kill.serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=job.environment(),
        )
        return self._ask

    def _ask(self, folder: pathlib.Path, steps: int, delay: float | None = None, after_first: bool = False) -> bool:
        self._process.stdin.write(json.dumps([str(folder), steps, delay, after_first]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if answer not in ("killed", "ended"):
            raise RuntimeError(f"the job failed:\n{(folder / 'log').read_text()[-2000:]}")
        return answer == "killed"

    def __exit__(self, *_):
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.stdout.close()


def serve() -> None:
    """Fork a job for every line `[folder, steps, delay, after_first]`.

    It is killed after `delay` seconds, counted from its start or from its first step, unless that is None.
    """
    from orbax.checkpoint import checkpoint_managers  # noqa: F401 (imported before the forks, as everything is)

    for line in sys.stdin:
        folder, steps, delay, after_first = json.loads(line)
        with (pathlib.Path(folder) / "progress").open("a") as progress:
            print("start 0", file=progress)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                log = os.open(pathlib.Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                _work(pathlib.Path(folder), steps)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if delay is not None:
            while after_first and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if _progress(pathlib.Path(folder))[0] > COMPILED:
                    break
                time.sleep(0.02)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("killed" if killed else "ended" if status == 0 else "failed", flush=True)
