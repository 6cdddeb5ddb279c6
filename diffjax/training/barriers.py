"""The barriers of saves with several processes: those of Orbax leave the others waiting for a process that has failed."""

from __future__ import annotations

import threading

import jax


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
