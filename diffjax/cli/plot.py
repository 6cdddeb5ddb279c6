"""The loss of a run over time, as a picture, where matplotlib (extra `plot`) is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib

from diffjax.cli import run as runs


def loss(folder: pathlib.Path) -> pathlib.Path | None:
    """Draw RUN/metrics.jsonl as RUN/loss.png; None where there is no matplotlib, or nothing to draw."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a full disk may have cut the last line
            rows.append(json.loads(line))
    points = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    if not points or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    if all(value > 0 for _, value in points):
        axes.set_yscale("log")
    axes.plot(*zip(*points, strict=True), lw=1, marker="." if len(points) < 50 else None)
    axes.grid(alpha=0.3)
    return runs.write_whole(folder / "loss.png", lambda file: figure.savefig(file, format="png", dpi=120))
