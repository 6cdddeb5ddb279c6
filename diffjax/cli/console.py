"""What the command line prints: tables and progress, on a terminal as bars, elsewhere as plain lines.

Of several processes the first prints for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffjax.training.hosts import leader

OUT = Console(soft_wrap=True)
NOTES = Console(stderr=True, soft_wrap=True)


def note(text: str, *, everywhere: bool = False) -> None:
    """One line for people, on stderr, so that stdout holds results alone.   everywhere: from every process."""
    if everywhere or leader():
        NOTES.print(text, markup=False, highlight=False)


def show(thing: Any) -> None:
    """A result: a line of text as it is; a rich table with rules on a terminal, as aligned columns elsewhere."""
    if not leader():
        return
    if isinstance(thing, str):
        OUT.print(thing, markup=False, highlight=False)
    elif OUT.is_terminal:
        OUT.print(thing, highlight=False)
    else:  # rich would cut tables at 80 columns, and logs are read by programs and in odd encodings
        thing.box, thing.title_justify, thing.caption_justify = None, "left", "left"
        plain = Console(width=400)
        plain.width = max(80, plain.measure(thing).maximum, len(str(thing.title)), len(str(thing.caption or "")))
        plain.print(thing, highlight=False)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """`advance(done)` inside; a bar on a terminal, one line at each tenth elsewhere."""
    if NOTES.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=NOTES, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    told = [0]

    def advance(done: int) -> None:
        if done * 10 // total > told[0]:
            told[0] = done * 10 // total
            note(f"{title} {done}/{total}")

    yield advance
