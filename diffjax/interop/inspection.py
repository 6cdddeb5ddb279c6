"""What a folder of weights holds, read from its configuration and the headers of its files."""

from __future__ import annotations

import math
import pathlib
from typing import Any, NamedTuple

from diffjax.interop import rules
from diffjax.interop.documents import licence_of, origin_of, read_documents
from diffjax.interop.pretrained import open_weights, plan, read_config, read_scheduler


class Inspection(NamedTuple):
    """What a folder holds, without its arrays. `problem`: why it cannot be loaded; empty if it can."""

    kind: str
    config: dict[str, Any]
    parameters: int  # numbers in the files
    size: int  # bytes of them
    dtypes: tuple[str, ...]
    scheduler: dict[str, Any] | None
    licence: str
    origin: str
    problem: str


def inspect(folder: Any, *, weights: Any = None) -> Inspection:
    """What `load_pretrained` would find, and whether it would load it; reads no array.

    Raises: CheckpointError: no configuration, no tensors, damaged files.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    found = open_weights(folder, weights)
    try:
        _, template, table, options = plan(config, found)
        problem = str(rules.compare(table, found.shapes, template, **options))
    except ValueError as error:
        problem = str(error)
    documents = read_documents(folder)
    return Inspection(
        config["_class_name"], config, sum(math.prod(s) for s in found.shapes.values()), found.size,
        tuple(sorted({str(e.dtype) for e in found.entries.values()})), read_scheduler(folder), licence_of(documents),
        origin_of(config, documents), problem,
    )  # fmt: skip
