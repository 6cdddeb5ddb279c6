"""A disk that is really full during a save: a small file system of its own, filled to the brim by another file.

Each time training must go on to its last step, say that the save failed and why, and leave the earlier checkpoints intact;
after room was made the next save must succeed, or, if the disk stayed full to the end, `fit` must report the step that is
on disk and a resumed run must end with the state of one that never saw a full disk. Where no file system can be mounted,
a limit on the size of files takes its place.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np

from diffjax.training import CheckpointStore, Hook
from experiments.faults import Row, job

TITLE = "full disk"
MEGABYTES = 24  # of the file system; a checkpoint of the job has about 3
STEPS, SAVE_EVERY, FULL, FREED = 40, 8, 16, 24  # the disk is full for the saves from step FULL up to FREED
WIDTH = 96


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Fill the disk 2 x 10 times, with other amounts of room left (quick: 2 x 1), and once under the command line."""
    mounted = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={MEGABYTES}m none "$0" && exec "$@"', str(folder)]
    own = subprocess.run([*mounted, "true"], capture_output=True).returncode == 0
    code = "import sys; from experiments.faults import disk; disk.work(sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'True')"
    command = [*(mounted if own else []), sys.executable, "-c", code, str(folder), str(1 if quick else 10), str(own)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=job.environment())
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    where = f"a file system of {MEGABYTES} MB" if own else "files limited in size, no file system could be mounted"
    for line in out.stdout.splitlines():
        if line.startswith("ROW "):
            fault, injected, held, measured = json.loads(line[4:])
            yield Row(fault, injected, held, f"{measured}; {where}")


def work(folder: str, times: int, own: bool) -> None:
    """The process inside the small file system: it prints the rows."""
    root = pathlib.Path(folder)
    made = job.make(WIDTH)
    whole = job.digest(job.train(made, root / "whole", STEPS, save_every=STEPS).state)
    _remove(root / "whole")
    size = sum(a.nbytes for a in jax.tree.leaves(made.state))
    room = size * (np.linspace(0, 0.8, times) if times > 1 else np.array([0.8]))  # bytes left: none, up to most of it
    for freed in (True, False):
        found = [_one(made, root / "run", int(free), freed, whole, own) for free in room]
        fault = "disk full during a save, later freed" if freed else "disk full up to the end, resumed with room"
        before, during = (sum(row[i] for row in found) for i in (1, 2))
        _row(
            fault, times, sum(row[0] for row in found),
            f"{room[0]:,.0f} to {room[-1]:,.0f} bytes left for {size:,}; {before} saves refused at once, {during} failed "
            "while writing",
        )  # fmt: skip
    good, text = _command_line(root, own)
    _row("disk full under `diffjax train`", 1, int(good), text)


def _one(made: job.Job, folder: pathlib.Path, free: int, freed: bool, whole: str, own: bool) -> tuple[bool, int, int]:
    """One run with a full disk.   Returns: whether everything held; saves that failed at once, and while writing."""
    fill, clear = _filler(folder.parent / "ballast", own)
    actions = {FULL - 1: lambda: fill(free), **({FREED + 1: clear} if freed else {})}

    def act(store: CheckpointStore, step: int) -> None:
        if step in actions:
            store.wait()  # the save before is over
            actions[step]()

    said: list[str] = []
    result = job.train(
        made,
        folder,
        STEPS,
        save_every=SAVE_EVERY,
        hooks=lambda store: [Hook(1, lambda step, state: act(store, step))],
        say=said.append,
    )
    with contextlib.closing(CheckpointStore(folder / "checkpoints", say=said.append)) as store:
        intact = [store.check(step) is None for step in store.steps()]
        failed = len(result.failures) == (2 if freed else 4)
        good = result.step == STEPS and job.digest(result.state) == whole and all(intact) and failed
        good = good and list(result.failures) == said and result.saved == (STEPS if freed else SAVE_EVERY)
        good = good and (freed or store.steps() == [SAVE_EVERY]) and not list(folder.rglob("*.orbax-checkpoint-tmp*"))
    clear()
    resumed = job.train(made, folder, STEPS, save_every=SAVE_EVERY)
    good = good and resumed.saved == STEPS and not resumed.failures and job.digest(resumed.state) == whole
    _remove(folder)
    named = all("No space left on device" in text or "File too large" in text for text in result.failures)
    before = sum("MB are free" in text for text in result.failures)
    return good and named, before, len(result.failures) - before


def _command_line(root: pathlib.Path, own: bool) -> tuple[bool, str]:
    """`diffjax train` on a disk that is full for its last save: exit code 1; with room, `--resume` ends with 0."""
    from diffjax.cli import main, train

    run = root / "run"
    words = "--training.steps=16 --training.save-every=8 --training.log-every=8 --training.sample-every=99 --no-scores "
    words += "--model.width=96 --model.depth=2"
    fill, clear = _filler(root / "ballast", own)
    fit, codes, text = train.training.fit, [], io.StringIO()

    def filling(*args, store, **options):
        full = lambda step, state: store.wait() and fill(0) if step == 9 else None
        return fit(*args, **{**options, "store": store, "hooks": [Hook(9, full)]})

    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        train.training.fit = filling
        codes.append(main(["train", "gaussians", "--run", str(run), *words.split()]))
        train.training.fit = fit
        clear()
        codes.append(main(["train", "--resume", str(run)]))
    steps = CheckpointStore(run / "checkpoints").steps()
    _remove(run)
    return codes == [1, 0] and steps[-1] == 16, f"exit code {codes[0]}, then {codes[1]} with --resume"


def _filler(path: pathlib.Path, own: bool) -> tuple[Callable[[int], None], Callable[[], None]]:
    """`fill(free)` leaves so many bytes of the disk, `clear()` makes room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(free: int) -> None:
        if not own:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(free // 4, 4096), limits[1]))
            return
        with path.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            file.truncate(max(os.fstat(file.fileno()).st_size - free, 0))

    def clear() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        path.unlink(missing_ok=True)

    return fill, clear


def _remove(folder: pathlib.Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def _row(fault: str, injected: int, held: int, measured: str) -> None:
    print("ROW", json.dumps([fault, injected, held, measured]), flush=True)
