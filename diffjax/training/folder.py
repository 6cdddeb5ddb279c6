"""The folder of a run's checkpoints: steps, what is set aside, what failed saves have left, and whether there is room."""

from __future__ import annotations

import json
import pathlib
import shutil
import time

TEMPORARY = ".orbax-checkpoint-tmp*"  # what follows the step in the name of an unfinished one
SHRINKS = 0.5  # no state that has been trained is compressed to less; saved in vain, it would fill the disk first
PATIENCE = 50  # tries to remove what a failed save has left


def steps(folder: pathlib.Path) -> list[int]:
    """The committed steps, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def unfinished(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where the files of a step are before they get their name."""
    (found,) = folder.glob(f"{step}{TEMPORARY}")
    return found


def set_aside(folder: pathlib.Path, step: int) -> None:
    """Move a step to `set_aside`, beside what is there already."""
    target, n = folder / "set_aside" / str(step), 1
    while target.exists():
        target, n = folder / "set_aside" / f"{step}-{n}", n + 1
    target.parent.mkdir(exist_ok=True)
    shutil.move(folder / str(step), target)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Remove unfinished steps; what is still being written makes a first try leave something."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        for _ in range(PATIENCE):
            shutil.rmtree(leftover, ignore_errors=True)
            if not leftover.exists():
                break
            time.sleep(0.1)


def no_room(folder: pathlib.Path, size: int) -> str | None:
    """Why a state of `size` bytes cannot be saved there, or None."""
    free = shutil.disk_usage(folder).free
    if free >= size * SHRINKS:
        return None
    return f"No space left on device: {free / 1e6:.3g} MB are free, the state has {size / 1e6:.3g} MB"


def has_bad_metrics(folder: pathlib.Path, step: int) -> bool:
    """Whether a step has metrics that Orbax cannot read."""
    try:
        return not isinstance(json.loads((folder / str(step) / "metrics" / "metrics").read_text()), dict)
    except FileNotFoundError:
        return False
    except ValueError:
        return True
