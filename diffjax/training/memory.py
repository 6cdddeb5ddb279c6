"""Running out of device memory: what was tried, and what takes less."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffjax.numerics import PyTree

WORDS = {
    "start": "placing the state on the devices",
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
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all leaves together; also of abstract ones, and of arrays that were donated."""
    return sum(int(np.prod(a.shape)) * getattr(a.dtype, "itemsize", 4) for a in jax.tree.leaves(tree))


def explain(error: BaseException, doing: str, state: Any, batch: int, driver: Any, saved: int | None) -> OutOfMemory:
    """The error to raise: what was done, with what sizes, and the ways out.

    Args: doing: what the run was doing.   state: whose sizes count; its arrays may be gone.   batch: of all devices.
        driver: the `Driver` that ran.   saved: the last step on disk.
    """
    mib = lambda tree: f"{tree_bytes(tree) / 2**20:.1f} MiB"
    ways = ["a smaller batch"]
    if driver.accumulate < batch // max(driver.devices, 1):
        ways.append(f"accumulate above {driver.accumulate}")
    if driver.per_dispatch > 1:
        ways.append(f"per_dispatch below {driver.per_dispatch}")
    ways += ["remat", "bfloat16 arithmetic", "a layout that shares the state between devices (fsdp)"]
    kept = "nothing was saved" if saved is None else f"checkpoint {saved} is on disk, go on from it"
    return OutOfMemory(
        f"the device is out of memory: {str(error).splitlines()[0]}\n"
        f"  while: {WORDS.get(doing, doing)}\n"
        f"  tried: batches of {batch}, {batch / driver.devices:g} on each of {driver.devices} device(s) in "
        f"{driver.accumulate} part(s), {driver.per_dispatch} step(s) per call; parameters {mib(state.params)}, "
        f"state {mib(state)}\n"
        f"  ways out: {', '.join(ways)}\n"
        f"  state: {kept}"
    )
