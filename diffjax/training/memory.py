"""Running out of device memory: what was tried, and what takes less."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from diffjax.numerics import PyTree

EXHAUSTED = "RESOURCE_EXHAUSTED"  # the word of JAX's errors
WORDS = {
    "start": "making, reading or placing the state on the devices",
    "compile": "compiling the step, or in its first call",
    "device": "running the step",
    "checkpoint": "copying the state for a checkpoint",
}


class OutOfMemory(RuntimeError):
    """The device has not enough memory for the training; checkpoints on disk are as they were."""


def exhausted(error: BaseException) -> bool:
    """Whether an error says that a device is out of memory, while compiling or while running.

    Example:
        >>> exhausted(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")), exhausted(ValueError("x"))
        (True, False)
    """
    return isinstance(error, RuntimeError) and EXHAUSTED in str(error)


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all leaves together; also of abstract ones, and of arrays that were donated."""
    return sum(int(np.prod(a.shape)) * getattr(a.dtype, "itemsize", 4) for a in jax.tree.leaves(tree))


@contextlib.contextmanager
def explained(situation: Callable[[], tuple]) -> Iterator[None]:
    """Turns an error inside that says so into an `OutOfMemory`.   situation: gives the arguments of `explain` after it."""
    try:
        yield
    except RuntimeError as error:
        if not exhausted(error):
            raise
        raise explain(error, *situation()) from error


def explain(
    error: BaseException, doing: str, state: Any, batch: int | None, driver: Any, saved: int | None
) -> OutOfMemory:
    """The error to raise: what was done, with what sizes, and the ways out.

    Args: doing: what the run was doing.   state: whose sizes count; its arrays may be gone.   batch: of all devices; None
        where there was none yet.   driver: the `Driver` that ran.   saved: the last step on disk.
    """
    mib = lambda tree: f"{tree_bytes(tree) / 2**20:.1f} MiB"
    tried, ways = [], ["bfloat16 arithmetic", "a layout that shares the state between devices (fsdp)"]
    if batch is not None:
        tried.append(
            f"batches of {batch}, {batch / driver.devices:g} on each of {driver.devices} device(s) in "
            f"{driver.accumulate} part(s), {driver.per_dispatch} step(s) per call"
        )
        if driver.per_dispatch > 1:
            ways.insert(0, f"per_dispatch below {driver.per_dispatch}")
        if driver.accumulate < batch // max(driver.devices, 1):
            ways.insert(0, f"accumulate above {driver.accumulate}")
        ways = ["a smaller batch", *ways, "remat"]
    tried.append(f"parameters {mib(state.params)}, state {mib(state)}")
    kept = "nothing was saved" if saved is None else f"checkpoint {saved} is on disk, go on from it"
    return OutOfMemory(
        f"the device is out of memory: {str(error).splitlines()[0]}\n"
        f"  while: {WORDS.get(doing, doing)}\n"
        f"  tried: {'; '.join(tried)}\n"
        f"  ways out: {', '.join(ways)}\n"
        f"  state: {kept}"
    )
