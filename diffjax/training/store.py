"""Checkpoints: asynchronous and atomic through Orbax, with our own checksums, and a way back when one is damaged.

A step is a folder with the state, a JSON page (position of the data iterator, examples seen, shapes of the state) and
`manifest.json` (see `manifest`), written before the folder gets its final name.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from diffjax.numerics import PyTree
from diffjax.training import files, folder, manifest, partial
from diffjax.training.barriers import Barriers
from diffjax.training.hosts import agreed, first
from diffjax.training.manifest import CheckpointError, first_line
from diffjax.training.partial import outline


class Restored(NamedTuple):
    """What a checkpoint gives back.   `report`: one line per newer step that was passed over, and why."""

    step: int
    state: PyTree
    page: dict  # what `save` was given beside the state: data, examples, and the entries of extra
    report: tuple[str, ...]


class Part(NamedTuple):
    """Some of what a checkpoint holds.   `missing` kept the template's values, `unused` were saved but not asked for."""

    step: int
    tree: PyTree
    page: dict
    report: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


class CheckpointStore:
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
        self.directory = pathlib.Path(directory).resolve()
        self.failures: list[str] = []
        self._keep = (keep_latest, keep_best, best)
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._saving: int | None = None  # the step in flight
        self._ours: set[int] = set()  # steps that this process wrote or restored
        self._damaged: set[int] = set()  # steps that were passed over
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

    # ---------------------------------------------------------------------------------------------------- restoring

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return folder.steps(self.directory)

    def restore(self, template: PyTree, step: int | None = None, *, verify: bool = True) -> Restored:
        """The newest undamaged step (or `step`), in the shapes and shardings of `template`.

        Args: template: a state, or `abstract(state, shardings)`; the number of devices may differ from the saved one.
            verify: check every file against its SHA-256 first.
        Raises: CheckpointError: nothing there, nothing undamaged, another model's state, or a newer format.
        """
        template = jax.tree.map(files.target, template)

        def read(candidate: int, page: dict) -> PyTree:
            difference = partial.difference(page["leaves"], outline(template))
            if difference:
                raise CheckpointError(
                    f"checkpoint {candidate} in {self.directory} holds another state; use the configuration "
                    f"it was trained with.\n  {difference}"
                )
            return files.read(self.directory / str(candidate) / "state", template)

        found = self._newest(step, verify, read)
        self._ours = {s for s in self._ours if s < found.step} | {found.step}
        return found

    def restore_part(
        self,
        template: PyTree,
        part: str = "params",
        step: int | None = None,
        *,
        renames: Mapping[str, str] | None = None,
        strict: bool = True,
        verify: bool = True,
    ) -> Part:
        """One part of the newest undamaged step (or of `step`), such as its parameters: no optimiser is needed.

        Only the arrays of that part are read. The check of the files reads all of them once.

        Args: template: arrays or `ShapeDtypeStruct`s in the shapes, dtypes and shardings wanted, of any mesh.
            part: path of the part in the saved state: 'params', 'ema/NAME', 'opt_state', ...
            renames: regular expression -> replacement on the saved paths inside the part, applied in turn.
            strict: refuse arrays that are missing or left over; else they are listed in the result, and what is missing
                keeps the values of the template.
            verify: as for `restore`.

        Floating-point arrays are converted to the dtypes of the template, everything else must be as it was saved.
        Raises: CheckpointError: as `restore`; no such part; arrays that do not fit (see `partial.match`).
        """
        match = None

        def read(candidate: int, page: dict) -> PyTree:
            nonlocal match
            start = f"{part.strip('/')}/"
            saved = {name[len(start) :]: text for name, text in page["leaves"].items() if name.startswith(start)}
            source = f"{start[:-1]} of checkpoint {candidate} in {self.directory}"
            if not saved:
                parts = sorted({"/".join(n.split("/")[: 2 if n.startswith("ema/") else 1]) for n in page["leaves"]})
                raise CheckpointError(f"there is no {source}; it holds {', '.join(parts)}")
            match = partial.match(saved, template, renames=renames, strict=strict, source=source)
            leaves = dict(partial.named(template))
            wanted = {start + old: files.target(leaves[new]) for new, old in match.found.items()}
            arrays = files.read_some(self.directory / str(candidate) / "state", wanted)
            new = [arrays[start + match.found[n]] if n in match.found else own for n, own in leaves.items()]
            return jax.tree.unflatten(jax.tree.structure(template), new)

        found = self._newest(step, verify, read)
        return Part(found.step, found.state, found.page, found.report, match.missing, match.unused)

    def check(self, step: int, *, contents: bool = True) -> str | None:
        """What is wrong with the files of `step`, naming the first bad one, or None.

        Raises: CheckpointError: written in a newer format.
        """
        return manifest.problem(self.directory / str(step), contents=contents)

    def page(self, step: int) -> dict:
        """The JSON page of `step`: data position, examples, shapes, and what else was saved."""
        return json.loads((self.directory / str(step) / "page" / "metadata").read_text())

    # ----------------------------------------------------------------------------------------------------- internals

    def _newest(self, step: int | None, verify: bool, read: Callable[[int, dict], PyTree]) -> Restored:
        """What `read(step, page)` gives for the newest undamaged step, or for `step`."""
        self.wait()
        steps = first(self.steps)
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}; train first, or give the folder of another run")
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {_words(steps)}")
        report: list[str] = []
        for candidate in [step] if step is not None else steps[::-1]:
            verdict = first(lambda c=candidate: self._verdict(c, verify))
            if verdict["refused"]:
                raise CheckpointError(verdict["refused"])
            problem, page = verdict["problem"], verdict["page"]
            if problem is not None:
                self._damaged.add(candidate)
            else:
                try:
                    found = read(candidate, page)
                except CheckpointError:  # it does not fit the template, as every process finds
                    raise
                except Exception as error:
                    problem = f"it cannot be read ({first_line(error)})"
                problem = agreed(problem)
            if problem is None:
                if report:
                    self._tell("\n".join([*report, f"continuing from checkpoint {candidate}"]))
                return Restored(candidate, found, page, tuple(report))
            report.append(f"checkpoint {candidate} in {self.directory} is damaged: {problem}")
        others = [s for s in steps if s != step]
        way_out = f"; the other steps are {_words(others)}" if others and step is not None else ""
        raise CheckpointError("\n".join(report) + (way_out or "\nno undamaged checkpoint is left"))

    def _verdict(self, step: int, verify: bool) -> dict:
        """The JSON page of a step, or what is wrong with it, or why it must not be read."""
        verdict = {"problem": None, "page": None, "refused": None}
        try:
            verdict["problem"] = self.check(step, contents=verify)
            if verdict["problem"] is None:
                page = verdict["page"] = self.page(step)
                manifest.check_format(page["format"], self.directory / str(step))
        except CheckpointError as error:
            verdict["refused"] = str(error)
        except Exception as error:
            verdict["problem"] = f"it cannot be read ({first_line(error)})"
        return verdict

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
            self._tell(f"checkpoints {_words(steps)} {why}: moved to {self.directory / 'set_aside'}")
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
        kept = f"the checkpoints {_words(good)} are intact" if good else "there is no earlier checkpoint"
        message = f"checkpoint {step} could not be saved to {self.directory}: {problem}; {kept}"
        self.failures.append(message)
        self._tell(message)

    def _tell(self, text: str) -> None:
        if jax.process_index() == 0:
            self._say(text)

    def _shut(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as error:  # it repeats the failure of the save, which has been reported
                self._closing_error = error


def _words(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
