"""Faults, really injected into real runs: `python -m experiments.faults` prints a table of what was done and what held.

Every module of this folder with a fault has `TITLE`, a line, and `run(folder, quick) -> Iterator[Row]`; `quick` injects
few faults of every kind, for tests, and the whole thing what the table claims. `job` is the run that they share.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    fault: str  # what was done, such as "kill -9"
    injected: int  # how often
    held: int  # how often everything that must hold held
    measured: str  # figures: steps lost, seconds until noticed, ...
