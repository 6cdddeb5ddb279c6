"""`diffjax list` and `diffjax cite`: the catalogues as tables, and where methods come from."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro
from rich.table import Table

from diffjax import references
from diffjax.cli import build, console
from diffjax.types import Card


@dataclasses.dataclass(frozen=True)
class List:
    """Show a catalogue as a table, or all their names."""

    catalogue: Annotated[str | None, tyro.conf.Positional] = None
    """processes, grids, laws, weights, losses, couplings, solvers, guidance, networks, metrics or data"""


@dataclasses.dataclass(frozen=True)
class Cite:
    """Print BibTeX of methods by their catalogue names."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]


def table(name: str, cards: dict[str, Card]) -> Table:
    """A catalogue as a table; columns that no card fills are left out."""
    columns = {
        "order": lambda c: "" if c.order is None else str(c.order),
        "evaluations": lambda c: "" if c.evals is None else str(c.evals),
        "noise": lambda c: "yes" if c.noise else "",
        "what": lambda c: c.summary,
        "paper": lambda c: c.paper,
    }
    used = {k: f for k, f in columns.items() if any(f(c) for c in cards.values())}
    out = Table(title=name)
    for column in ("name", *used):
        out.add_column(column, no_wrap=True)
    for key, card in cards.items():
        out.add_row(key, *(f(card) for f in used.values()))
    return out


def main(args: List) -> int:
    """Run `diffjax list`."""
    found = references.catalogues()
    if args.catalogue is None:
        for name, cards in found.items():
            console.show(f"{name:10s} {', '.join(cards)}")
        return 0
    console.show(table(args.catalogue, build.entry(found, args.catalogue, "catalogue")))
    return 0


def cite(args: Cite) -> int:
    """Run `diffjax cite`."""
    found = references.cite(*args.names)
    if found:
        console.show(found)
    cards = {name: card for catalogue in references.catalogues().values() for name, card in catalogue.items()}
    for name in args.names:
        if name in cards and not cards[name].paper:
            console.note(f"{name} has no paper")
    return 0
