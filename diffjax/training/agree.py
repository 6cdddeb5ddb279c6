"""What the processes of a run must know alike before any of them acts on it. With one process everything is free.

Every process calls these functions at the same place; a failure that one process keeps to itself leaves the others
waiting for it.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import jax
import numpy as np

TEXT = 300  # bytes of a message that is told to the others


def shared(value: Any) -> Any:
    """The JSON-able `value` of process 0, on every process.

    Example:
        >>> shared([1, 2])
        [1, 2]
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(text, size))).decode())


def agreed(problem: str | None) -> str | None:
    """The problems of all processes in one line, on every process; None if there is none. Also a barrier.

    Example:
        >>> agreed("disk full"), agreed(None)
        ('disk full', None)
    """
    if jax.process_count() == 1:
        return problem
    from jax.experimental import multihost_utils

    text = (problem or "").encode()[:TEXT]
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(TEXT, b"\0"), np.uint8))
    told = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(rows)]
    return "; ".join(f"process {i}: {text}" for i, text in enumerate(told) if text) or None


class Barriers:
    """The barriers of the saves that Orbax writes in the background, which a process that has failed attends as well.

    Orbax lets a process that cannot write its part skip the barriers of the commit, where the others wait for it until
    they time out. Here it catches up at its next barrier: it says that it has failed and joins those that it missed.
    The others read that, and give the save up instead of committing it.
    """

    ORDER = ("set_value_start", "set_value_end", "async_write_complete", "async_commit_complete") + (
        "set_value_start", "set_value_end",
    )  # fmt: skip

    def __init__(self) -> None:
        from jax._src import distributed  # the coordination service has no public name

        self._client = distributed.global_state.client
        self._lock = threading.Lock()
        self._save = self._next = 0

    def begin(self) -> None:
        """A save begins; every process counts them alike."""
        self._save, self._next = self._save + 1, 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the others at barrier `key`.   Raises: OSError: a process has failed to write its part."""
        with self._lock:
            due = next((i for i in range(self._next, len(self.ORDER)) if self.ORDER[i] in key), None)
            if due is None:
                raise RuntimeError(f"the checkpoint library waits at {key!r}, which is not a part of a save")
            missed, self._next = range(self._next, due), due + 1
        folder = f"diffjax_save_{self._save}_failed/"
        if missed:
            self._client.key_value_set(f"{folder}{jax.process_index()}", "1")
        for i in (*missed, due):
            self._client.wait_at_barrier(f"diffjax_save_{self._save}_{i}", timeout_ms)
        if self.ORDER[due].startswith("async_") and (failed := self._client.key_value_dir_get(folder)):
            numbers = ", ".join(sorted(name.rpartition("/")[2] for name, _ in failed))
            raise OSError(f"process {numbers} could not write its part")
