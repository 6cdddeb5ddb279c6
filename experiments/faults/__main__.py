"""`python -m experiments.faults [NAME ...] [--quick]`: inject faults and print what held."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import pkgutil
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments import recipe
from experiments.faults import Row, job

RESULTS = recipe.RESULTS / "faults"


def modules() -> dict[str, Any]:
    """The faults by name: the modules of this folder that have a `TITLE`."""
    names = sorted(m.name for m in pkgutil.iter_modules([str(pathlib.Path(__file__).parent)]) if m.name != "__main__")
    found = {name: importlib.import_module(f"experiments.faults.{name}") for name in names}
    return {name: module for name, module in found.items() if hasattr(module, "TITLE")}


def inject(module: Any, quick: bool) -> Iterator[Row]:
    """The rows of one module as they come; one that breaks off is a fault that did not hold."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        yield from module.run(folder, quick)
    except Exception as error:  # the other faults must still be seen
        traceback.print_exc()
        yield Row(module.TITLE, 1, 0, f"broke off: {type(error).__name__}: {error}".splitlines()[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def markdown(page: dict) -> str:
    """The table as a page, from what is stored."""
    lines = [
        "# Faults that were injected",
        "",
        "`python -m experiments.faults` writes this page. Each fault was injected that often into real runs, and everything",
        "that must hold held that often.",
        "",
        "| fault | injected | held | measured |",
        "|---|---|---|---|",
    ]
    for name in sorted(page["faults"]):
        lines += [
            f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in page["faults"][name]["rows"]
        ]
    return "\n".join(lines) + "\n"


def store(name: str, rows: Sequence[Row], seconds: float) -> None:
    """Put the rows of one module into the stored table; the others stay."""
    path = RESULTS / "table.json"
    page = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"faults": {}}
    page["faults"][name] = {
        "rows": [list(row) for row in rows], "minutes": round(seconds / 60, 2), "cores": os.cpu_count(),
        "jax": jax.__version__,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(page, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(page), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.   Returns: 0, or 1 if something did not hold, 2 for an unknown name."""
    known = modules()
    parser = argparse.ArgumentParser(prog="python -m experiments.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="few faults of each kind; nothing is stored")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in known]:
        print(f"error: there is no fault {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    job.cache()
    print(f"{'fault':44s} {'injected':>8s} {'held':>5s}  measured", flush=True)
    held = True
    for name in args.names or known:
        start = time.perf_counter()
        rows = []
        for row in inject(known[name], args.quick):
            rows.append(row)
            mark = "" if row.held >= row.injected else "  FAILS"
            print(f"{row.fault:44s} {row.injected:8d} {row.held:5d}  {row.measured}{mark}", flush=True)
            held = held and not mark
        if not args.quick:
            store(name, rows, time.perf_counter() - start)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
