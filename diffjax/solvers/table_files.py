"""Tables as files, and the reading of `.npz` files that are never to run code."""

from __future__ import annotations

import json
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax.solvers.rows import Rows, Start, newest, step
from diffjax.solvers.stacking import check_table, real_rows
from diffjax.types import Solver

FORMAT = 1  # version of a saved table
ABOUT = "about"  # the entry of a saved table that is text


def save_table(path: str | pathlib.Path, solver: Solver, about: Mapping[str, Any] | None = None) -> None:
    """Write a table as `.npz`, float64: its format version, its constants, which must be single arrays, and what is to be
    known `about` it, as JSON. The padding of a padded table is left out.

    Raises: ValueError: the solver is no table, or applies its rows in a way of its own.
    """
    if check_table(solver, "save_table").step is not step or solver.read is not newest:
        raise ValueError("this solver's own way to apply its rows would be lost; save the table that it was made from")
    n = int(real_rows(solver))
    rows = jax.tree.map(lambda a: np.asarray(a)[:n], solver.rows)
    steps = solver.steps if solver.count is None else int(np.sum(rows.accept))
    arrays = {k: v for k, v in rows._asdict().items() if v is not None}
    arrays |= {f"constant_{i}": np.asarray(c) for i, c in enumerate(solver.constants)}
    text = {} if about is None else {ABOUT: np.asarray(json.dumps(dict(about)))}
    with open(path, "wb") as f:  # np.savez would add a suffix to a path without one
        np.savez(f, format=FORMAT, grid=np.asarray(solver.grid)[: steps + 1], **arrays, **text)


def load_about(path: str | pathlib.Path) -> dict[str, Any]:
    """What `save_table` was told about a table; empty if nothing.   Raises: ValueError: as `load_table`."""
    text = _read(path).get(ABOUT)
    return {} if text is None else json.loads(str(text))


def load_table(path: str | pathlib.Path) -> Solver:
    """Read a table written by `save_table`.

    Raises: ValueError: not a table, damaged, or written by a newer version of diffjax.
    """
    arrays = _read(path)
    constants = tuple(arrays[f"constant_{i}"] for i in range(arrays["pc"].shape[1]))
    rows = Rows(**{name: arrays[name] for name in Rows._fields if name in arrays})
    init = Start(rows.px.shape[1], rows.pd.shape[1])
    return Solver(rows=rows, grid=arrays["grid"], constants=constants, init=init, step=step, read=newest)


def _read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a saved table."""
    arrays = read_arrays(path, "save_table", FORMAT)
    needed = {"grid", *Rows._fields} - set(Rows._field_defaults)
    needed |= {f"constant_{i}" for i in range(arrays["pc"].shape[1] if np.ndim(arrays.get("pc")) > 1 else 0)}
    if needed - set(arrays):
        raise ValueError(f"{path} is not a file written by save_table; it lacks {sorted(needed - set(arrays))}")
    return arrays


def read_arrays(path: str | pathlib.Path, writer: str, newest_format: int) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` but its format version, without ever unpickling.

    Raises: ValueError: not a file written by the function named `writer`, damaged, or of a newer format.
    """
    try:
        with open(path, "rb") as opened:  # NumPy leaves a damaged file open
            file = np.load(opened, allow_pickle=False)
            arrays = dict(file) if isinstance(file, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path} is not a file written by {writer}, or is damaged: {e}") from e
    version = arrays.pop("format", np.asarray(-1))
    if version.shape != () or not np.issubdtype(version.dtype, np.integer) or version < 0:
        raise ValueError(f"{path} is not a file written by {writer}; it holds {sorted(arrays)}")
    if version > newest_format:
        raise ValueError(f"{path} has format {version}; this diffjax reads up to {newest_format}. Upgrade diffjax")
    return arrays
