"""A table as a picture, where matplotlib (extra `plot`) is installed."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from diffjax.types import Solver

PARTS = {"px": "y <- x", "pd": "y <- d", "pc": "y <- c", "u": "d <- x0, eps", "qx": "x+ <- x", "qd": "x+ <- d",
         "qc": "x+ <- c", "qn": "x+ <- new d", "noise": "x+ <- z'", "pz": "y <- z", "qz": "x+ <- z"}  # fmt: skip


def plot_table(solver: Solver, path: str | os.PathLike[str] | None = None, *, title: str = "") -> Any:
    """Draw a table: the coefficients of every row as colours, and the times at which the network is asked.

    Coefficients are shown as sign(c) log(1 + |c| / 0.01), so that small and large ones are both seen; registers that no
    row reads are left out.

    Args: solver: a linear table with concrete scalar coefficients.   path: PNG, PDF or SVG to write, or None.   title: above.
    Returns: the matplotlib figure.
    Raises: ValueError: the solver is no linear table, or its coefficients are arrays.   ImportError: no matplotlib.
    """
    rows = solver.rows
    if not hasattr(rows, "_asdict") or "qn" not in rows._asdict():
        raise ValueError(
            "plot_table draws linear tables; this solver has a step of its own, and no coefficients to draw"
        )
    columns, names = [], []
    for part, words in PARTS.items():
        leaf = getattr(rows, part)
        if leaf is None:
            continue
        leaf = np.asarray(leaf, np.float64)
        if leaf.ndim > 2:
            raise ValueError(
                f"plot_table draws scalar coefficients; {part} has shape {leaf.shape}, [rows, registers, ...]"
            )
        leaf = leaf.reshape(len(leaf), -1)
        for j in range(leaf.shape[1]):
            if part == "u" or np.any(leaf[:, j]):
                columns.append(leaf[:, j])
                names.append(words if leaf.shape[1] == 1 else f"{words} [{j}]")
    try:
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    except ImportError as e:
        raise ImportError("plot_table needs matplotlib: python -m pip install 'diffjax[plot]'") from e
    values = np.stack(columns)
    colours = np.sign(values) * np.log1p(np.abs(values) / 0.01)
    limit = max(float(np.abs(colours).max()), 1e-9)
    n = values.shape[1]
    figure = Figure(figsize=(max(5.0, 0.22 * n + 2.5), 0.26 * len(names) + 2.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(len(names), 5), sharex=True)
    upper.imshow(colours, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    upper.set_yticks(range(len(names)), names, fontsize=7)
    upper.set_title(title or f"{n} evaluations")
    for i, j in zip(*np.nonzero(values), strict=True) if values.size <= 240 else ():
        upper.text(j, i, f"{values[i, j]:.2g}", ha="center", va="center", fontsize=5)
    lower.plot(np.arange(n), np.asarray(rows.t), ".-", lw=1)
    lower.set(xlabel="row", ylabel="t")
    lower.grid(alpha=0.3)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
