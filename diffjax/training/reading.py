"""Reading checkpoints: the newest undamaged one or a part of it, into any layout; every process learns the same verdict."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from diffjax.numerics import PyTree
from diffjax.training import files, folder, manifest, memory, partial
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


class Checkpoints:
    """The checkpoints in a folder, to read; `CheckpointStore` writes them too.

    Args: directory: the folder.   say: where messages go, default stderr.
    """

    def __init__(self, directory: Any, say: Callable[[str], None] | None = None) -> None:
        self.directory = pathlib.Path(directory).resolve()
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._ours: set[int] = set()  # steps that this process wrote or restored
        self._damaged: set[int] = set()  # steps that were passed over

    def wait(self) -> bool:
        """Wait for the save in flight; here there is none."""
        return True

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

    def _newest(self, step: int | None, verify: bool, read: Callable[[int, dict], PyTree]) -> Restored:
        """What `read(step, page)` gives for the newest undamaged step, or for `step`."""
        self.wait()
        steps = first(self.steps)
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}; train first, or give the folder of another run")
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {words(steps)}")
        report: list[str] = []
        for candidate in [step] if step is not None else steps[::-1]:
            verdict = first(lambda c=candidate: self._verdict(c, verify))
            if verdict["refused"]:
                raise CheckpointError(verdict["refused"])
            problem, page = verdict["problem"], verdict["page"]
            if problem is None:
                try:
                    found = read(candidate, page)
                except CheckpointError:  # it does not fit the template, as every process finds
                    raise
                except Exception as error:
                    problem = f"it cannot be read ({first_line(error)})"
                problem = agreed(problem)
                if problem is not None and memory.EXHAUSTED in problem:  # not the fault of the files
                    raise RuntimeError(f"checkpoint {candidate} in {self.directory}: {problem}")
            if problem is None:
                if report:
                    self._tell("\n".join([*report, f"continuing from checkpoint {candidate}"]))
                return Restored(candidate, found, page, tuple(report))
            if step is None and first(lambda c=candidate: c not in self.steps()):
                continue  # a run that is being trained has removed it since
            if verdict["problem"] is not None:
                self._damaged.add(candidate)
            report.append(f"checkpoint {candidate} in {self.directory} is damaged: {problem}")
        if step is None and set(first(self.steps)) - set(steps):
            return self._newest(step, verify, read)
        others = [s for s in steps if s != step]
        way_out = f"; the other steps are {words(others)}" if others and step is not None else ""
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

    def _tell(self, text: str) -> None:
        if jax.process_index() == 0:
            self._say(text)


def words(steps: list[int]) -> str:
    """The steps, for people."""
    return ", ".join(map(str, steps))
