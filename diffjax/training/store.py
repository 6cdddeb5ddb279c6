"""Checkpoints: asynchronous and atomic through Orbax, with our own checksums, and a way back when one is damaged.

A step is a folder with the state, a JSON page (position of the data iterator, examples seen, shapes of the state) and
`manifest.json` (see `manifest`), written before the folder gets its final name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffjax.numerics import PyTree
from diffjax.training import files, folder, manifest
from diffjax.training.barriers import Barriers
from diffjax.training.hosts import agreed, first
from diffjax.training.manifest import first_line
from diffjax.training.partial import outline
from diffjax.training.reading import Checkpoints, words


class CheckpointStore(Checkpoints):
    """The checkpoints of one run, in one folder.

    Args:
        directory: made if needed.
        keep_latest: newest steps kept; 2, so that there is a way back.
        keep_best: steps kept beside them, for the smallest `best`.
        best: name of the metric given to `save`.
        say: where messages go, default stderr.

    A save that fails (a full disk) is reported, kept in `failures` and leaves the earlier steps alone; it never raises.
    With several processes every one calls every method, in the same order, on a folder that all of them see; process 0
    alone moves, checks and names, all learn its verdict, and a save that fails on one has failed on all.
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        best: str = "loss",
        say: Callable[[str], None] | None = None,
    ) -> None:
        if keep_latest < 1 or keep_best < 0:
            raise ValueError(
                f"keep_latest must be at least 1 and keep_best at least 0; got {keep_latest} and {keep_best}"
            )
        super().__init__(directory, say)
        self.failures: list[str] = []
        self._keep = (keep_latest, keep_best, best)
        self._saving: int | None = None  # the step in flight
        self._manager = None
        self._barriers: Barriers | None = None  # with several processes

    # ------------------------------------------------------------------------------------------------------- saving

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data: Any = None,
        examples: int = 0,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """Start saving `state` as `step`; return once the arrays are copied, the files are written in the background.

        Args: data: the iterator's JSON-able position.   examples: seen so far.   extra: more entries of the JSON page.
        Returns: False if the save could not be started (reported). A failure in the background is reported by `wait`.
        """
        self.wait()
        if step in self._ours and step in first(self.steps):
            return True
        page = {
            "format": manifest.FORMAT,
            "step": step,
            "examples": examples,
            "data": data,
            "leaves": outline(state),
            **(extra or {}),
        }
        # Those of process 0, since every process decides by them what is kept, and a hook may have measured on one alone.
        numbers = first(lambda: {name: float(v) for name, v in (metrics or {}).items() if math.isfinite(v)})
        self._saving = step
        problem = self._clear(step, sum(a.nbytes for a in jax.tree.leaves(state)))
        if problem is None:
            try:
                manager = self._open()
                if self._barriers is not None:
                    self._barriers.begin()
                files.start(manager, step, state, page, numbers)
            except Exception as error:
                problem = first_line(error)
            problem = agreed(problem)
        if problem is not None:
            self._failed(problem)
        return problem is None

    def wait(self) -> bool:
        """Wait for the save in flight.   Returns: False if it failed (reported once, earlier steps are intact)."""
        if self._saving is None:
            return True
        problem = agreed(self._finished())
        if problem is not None:
            self._failed(problem)
            return False
        self._ours.add(self._saving)
        self._saving = None
        return True

    def close(self) -> None:
        """Finish the save in flight and release the threads."""
        self.wait()
        self._shut()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and jax.process_count() > 1:  # the other processes may not be here: nothing to agree on
            self._finished()
            self._shut()
        else:
            self.close()

    # ----------------------------------------------------------------------------------------------------- internals

    def _open(self) -> Any:
        """The Orbax manager, made when first needed."""
        if self._manager is None:
            if jax.process_count() > 1:
                self._barriers = Barriers()
            self._manager = files.manager(self.directory, *self._keep, self._write_manifest, self._barriers)
        return self._manager

    def _write_manifest(self) -> None:
        """Checksums of the finished files, written into the folder before it is renamed: both appear, or neither."""
        if jax.process_index() != 0:
            return
        manifest.write(folder.unfinished(self.directory, self._saving), self._saving)

    def _clear(self, step: int, size: int) -> str | None:
        """Make the folder, and move away what is in the place of `step` or after it, and what is damaged.

        Orbax reads the metrics of every step before it saves, and a damaged step would count as one that is kept.
        Nothing is deleted.   Returns: what went wrong, or None; also if the disk has no room for `size` bytes.
        """
        told, problem = [], None
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                stale = [s for s in self.steps() if s >= step]
                damaged = [s for s in self.steps() if s < step and self._is_damaged(s)]
                for why, steps in {"belong to another course of the run": stale, "are damaged": damaged}.items():
                    for s in steps:
                        self._shut()
                        folder.set_aside(self.directory, s)
                    if steps:
                        told.append((why, steps))
                problem = folder.no_room(self.directory, size)
            except OSError as error:
                problem = first_line(error)
        problem, told = agreed(problem), first(lambda: told)
        for why, steps in told:
            self._shut()
            self._ours -= set(steps)
            self._damaged -= set(steps)
            self._tell(f"checkpoints {words(steps)} {why}: moved to {self.directory / 'set_aside'}")
        return problem

    def _is_damaged(self, step: int) -> bool:
        """Whether a step was found damaged, or has metrics that Orbax cannot read."""
        if step in self._damaged or self._manager is not None:
            return step in self._damaged
        return folder.has_bad_metrics(self.directory, step)

    def _finished(self) -> str | None:
        """Wait for the save in flight.   Returns: what went wrong on this process, or None."""
        if self._saving is None or self._manager is None:
            return None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            return first_line(error)
        return None

    def _failed(self, problem: str) -> None:
        """Report a save that failed, remove what it left, and start afresh with the next one."""
        step, self._saving = self._saving, None
        self._shut()
        if jax.process_index() == 0:
            folder.remove_leftovers(self.directory)
        good = first(self.steps)
        kept = f"the checkpoints {words(good)} are intact" if good else "there is no earlier checkpoint"
        message = f"checkpoint {step} could not be saved to {self.directory}: {problem}; {kept}"
        self.failures.append(message)
        self._tell(message)

    def _shut(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # it repeats the failure of the save, which has been reported
                manager.close()
