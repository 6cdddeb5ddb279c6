"""Checkpoints: asynchronous and atomic through Orbax, with our own checksums, and a way back when one is damaged.

A step is a folder with the state, a JSON page (position of the data iterator, examples seen, shapes of the state) and
`manifest.json`: the SHA-256 of every file, written before the folder gets its final name. Without it, one flipped bit in
a data file loads without an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from diffjax.numerics import PyTree
from diffjax.training import hosts

FORMAT = 1
MANIFEST = "manifest.json"
LATER = ("commit_success.txt", "_CHECKPOINT_METADATA")  # top-level files that Orbax still touches after the manifest
TEMPORARY = "*.orbax-checkpoint-tmp*"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another model, or written by a newer version."""


class Restored(NamedTuple):
    """What a checkpoint gives back.   `report`: one line per newer step that was passed over, and why."""

    step: int
    state: PyTree
    page: dict  # what `save` was given beside the state: data, examples, and the entries of extra
    report: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        directory: made if needed.
        keep_latest: newest steps kept; 2, so that there is a way back.
        keep_best: steps kept beside them, for the smallest `best`.
        best: name of the metric given to `save`.
        say: where messages go, default stderr.

    A save that fails (a full disk) is reported, kept in `failures` and leaves the earlier steps alone; it never raises.
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
        self._manager = None

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
        import orbax.checkpoint as ocp

        self.wait()
        if step in self._ours and step in self.steps():
            return True
        page = {
            "format": FORMAT,
            "step": step,
            "examples": examples,
            "data": data,
            "leaves": outline(state),
            **(extra or {}),
        }
        self._saving = step
        try:
            self._set_aside(step)
            numbers = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), page=ocp.args.JsonSave(page))
            if not self._open().save(step, args=args, metrics=numbers, force=True):
                raise OSError("the checkpoint library refused the step")
        except Exception as error:
            self._failed(error)
            return False
        return True

    def wait(self) -> bool:
        """Wait for the save in flight.   Returns: False if it failed (reported once, earlier steps are intact)."""
        if self._saving is None:
            return True
        try:
            self._open().wait_until_finished()
        except Exception as error:
            self._failed(error)
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

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------- restoring

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir())

    def restore(self, template: PyTree, step: int | None = None, *, verify: bool = True) -> Restored:
        """The newest undamaged step (or `step`), in the shapes and shardings of `template`.

        Args: template: a state, or `abstract(state, shardings)`; the number of devices may differ from the saved one.
            verify: check every file against its SHA-256 first.
        Raises: CheckpointError: nothing there, nothing undamaged, another model's state, or a newer format.
        """
        import orbax.checkpoint as ocp

        self.wait()
        steps = hosts.first(self.steps)
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}; train first, or give the folder of another run")
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {_words(steps)}")
        template = jax.tree.map(_abstract_leaf, template)
        report: list[str] = []
        for candidate in [step] if step is not None else steps[::-1]:
            problem = hosts.first(lambda c=candidate: self.check(c, contents=verify))  # all must choose the same step
            if problem is None:
                try:
                    difference = _difference(self.page(candidate)["leaves"], outline(template))
                    if not difference:
                        args = ocp.args.Composite(state=ocp.args.StandardRestore(template), page=ocp.args.JsonRestore())
                        found = self._open().restore(candidate, args=args)
                except Exception as error:
                    problem = f"it cannot be read ({_first_line(error)})"
                else:
                    if difference:
                        raise CheckpointError(
                            f"checkpoint {candidate} in {self.directory} holds another state; use the configuration "
                            f"it was trained with.\n  {difference}"
                        )
                    self._ours = {s for s in self._ours if s < candidate} | {candidate}
                    if report:
                        self._say("\n".join([*report, f"continuing from checkpoint {candidate}"]))
                    return Restored(candidate, found.state, dict(found.page), tuple(report))
            report.append(f"checkpoint {candidate} in {self.directory} is damaged: {problem}")
        others = [s for s in steps if s != step]
        way_out = f"; the other steps are {_words(others)}" if others and step is not None else ""
        raise CheckpointError("\n".join(report) + (way_out or "\nno undamaged checkpoint is left"))

    def check(self, step: int, *, contents: bool = True) -> str | None:
        """What is wrong with the files of `step`, naming the first bad one, or None.

        Raises: CheckpointError: written in a newer format.
        """
        folder = self.directory / str(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            files, version = dict(manifest["files"]), int(manifest["format"])
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (ValueError, KeyError, TypeError, OSError) as error:
            return f"{MANIFEST} cannot be read ({_first_line(error)})"
        _check_format(version, folder)
        for name, (size, digest) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            try:
                if contents and _sha256(path) != digest:
                    return f"{name} has changed since it was written (SHA-256 differs)"
            except OSError as error:
                return f"{name} cannot be read ({_first_line(error)})"
        return None

    def page(self, step: int) -> dict:
        """The JSON page of `step`: data position, examples, shapes, and what else was saved."""
        return json.loads((self.directory / str(step) / "page" / "metadata").read_text())

    # ----------------------------------------------------------------------------------------------------- internals

    def _open(self) -> Any:
        """The Orbax manager, made when first needed."""
        if self._manager is None:
            import orbax.checkpoint as ocp
            from orbax.checkpoint import checkpoint_managers as policies

            logging.getLogger("absl").addFilter(_no_tracebacks)
            latest, n_best, best = self._keep
            score = lambda metrics: (metrics or {}).get(best, float("inf"))
            # Orbax's own max_to_keep with best_fn deletes the newest step; and without best_fn it forgets the metrics.
            keep = [policies.LatestN(latest)]
            if n_best:
                best_n = {"n": n_best, "get_metric_fn": score, "reverse": True}  # reverse: smaller is better
                keep.append(policies.BestN(**best_n, keep_checkpoints_without_metrics=False))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                best_fn=score,
                best_mode="min",
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _write_manifest(self) -> None:
        """Checksums of the finished files, written into the folder before it is renamed: both appear, or neither."""
        if jax.process_index() != 0:
            return
        (folder,) = self.directory.glob(f"{self._saving}.{TEMPORARY[2:]}")
        files = {
            path.relative_to(folder).as_posix(): (path.stat().st_size, _sha256(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.relative_to(folder).as_posix() not in LATER
        }
        manifest = {"format": FORMAT, "step": self._saving, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))

    def _set_aside(self, step: int) -> None:
        """Move away what is in the place of `step` or after it: damaged, or an abandoned future. Nothing is deleted."""
        stale = hosts.first(lambda: [s for s in self.steps() if s >= step])
        if not stale:
            return
        self._shut()
        self._ours -= set(stale)
        hosts.first(lambda: self._move(stale))

    def _move(self, stale: list[int]) -> None:
        for s in stale:
            target = self.directory / "set_aside" / str(s)
            n = 1
            while target.exists():
                target, n = self.directory / "set_aside" / f"{s}-{n}", n + 1
            target.parent.mkdir(exist_ok=True)
            shutil.move(self.directory / str(s), target)
        self._say(f"checkpoints {_words(stale)} belong to another course of the run: moved to {target.parent}")

    def _failed(self, error: Exception) -> None:
        """Report a save that failed, remove what it left, and start afresh with the next one."""
        step, self._saving = self._saving, None
        self._shut()
        for leftover in self.directory.glob(TEMPORARY):
            shutil.rmtree(leftover, ignore_errors=True)
        good = self.steps()
        kept = f"the checkpoints {_words(good)} are intact" if good else "there is no earlier checkpoint"
        message = f"checkpoint {step} could not be saved to {self.directory}: {_first_line(error)}; {kept}"
        self.failures.append(message)
        self._say(message)

    def _shut(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as error:  # it repeats the failure of the save, which has been reported
                self._closing_error = error


def outline(state: PyTree) -> dict[str, str]:
    """`path -> "dtype[shape]"` of every leaf.

    Example:
        >>> import numpy as np
        >>> outline({"w": np.ones((2, 3), np.float32)})
        {'w': 'float32[2,3]'}
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{a.dtype}[{','.join(map(str, a.shape))}]"
        for path, a in leaves
    }


def _difference(saved: dict[str, str], wanted: dict[str, str]) -> str:
    """What differs, in a few lines. Found before loading: Orbax casts dtypes silently, and drowns the rest in noise."""
    lines = [f"{name}: not saved, expected {wanted[name]}" for name in wanted if name not in saved]
    lines += [f"{name}: saved as {saved[name]}, not expected" for name in saved if name not in wanted]
    both = [name for name in wanted if name in saved and saved[name] != wanted[name]]
    lines += [f"{name}: saved as {saved[name]}, expected {wanted[name]}" for name in both]
    return "\n  ".join(lines[:6] + ([f"and {len(lines) - 6} more"] if len(lines) > 6 else []))


def _abstract_leaf(a: Any) -> Any:
    sharding = getattr(a, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _check_format(version: int, folder: pathlib.Path) -> None:
    if version > FORMAT:
        raise CheckpointError(
            f"the checkpoint {folder} has format {version}, written by a newer diffjax; this one reads format "
            f"{FORMAT}. Update diffjax to use it"
        )


def _no_tracebacks(record: logging.LogRecord) -> bool:
    """Drop the tracebacks that Orbax logs for failures which the store reports in one line."""
    return not (record.exc_info and "orbax" in record.pathname)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _words(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
