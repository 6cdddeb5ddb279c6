"""`diffjax pretrained`: what a folder with weights of another library holds, and whether it can be loaded."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import tyro

from diffjax import interop
from diffjax.cli import console
from diffjax.interop import Inspection


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Show what a local folder with weights of another library holds; no array is read, nothing is downloaded."""

    folder: Annotated[str, tyro.conf.Positional]
    """folder with config.json and safetensors"""
    weights: tuple[str, ...] = ()
    """file in the folder, or several shards, if there are variants"""


def lines(found: Inspection) -> list[str]:
    """The report as lines."""
    fields = {name: value for name, value in found.config.items() if not name.startswith("_")}
    report = {
        "class": found.kind,
        "parameters": f"{found.parameters:,} ({', '.join(found.dtypes)}, {found.size:,} bytes)",
        "licence": found.licence,
        "origin": found.origin,
        "scheduler": (found.scheduler or {}).get("_class_name", "none"),
        "loads": "yes" if not found.problem else f"no\n{found.problem}",
    }
    options = [f"  {name} = {json.dumps(value)}" for name, value in sorted(fields.items())]
    return [*(f"{name:11s} {value}" for name, value in report.items()), "configuration", *options]


def main(args: Pretrained) -> int:
    """Run the command: 0 if the folder can be loaded, else 2."""
    found = interop.inspect(args.folder, weights=list(args.weights) or None)
    for line in lines(found):
        console.show(line)
    return 2 if found.problem else 0
