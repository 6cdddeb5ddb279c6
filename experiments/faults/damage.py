"""Truncation, deletion and random bit flips of every file of a checkpoint.

Each time the damaged step must be refused with the name of the file, and the step before it restored bit for bit; a file
that holds nothing of the state may be damaged, but then the step must load bit for bit.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from diffjax.training import CheckpointStore, manifest
from experiments.faults import Row, job

TITLE = "damaged checkpoints"
STEPS = (4, 8)


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Damage each file of the newest checkpoint: cut, removed, and 20 bits flipped, one at a time (quick: 1)."""
    flips, rng = (1 if quick else 20), np.random.default_rng(0)
    made = job.make(32)
    job.train(made, folder, STEPS[1], save_every=STEPS[0])
    newest = folder / "checkpoints" / str(STEPS[1])
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    messages: list[str] = []
    store = CheckpointStore(folder / "checkpoints", say=messages.append)
    template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), made.state)
    exact = {step: job.digest(store.restore(template, step).state) for step in STEPS}

    def holds(path: pathlib.Path) -> tuple[bool, bool]:
        """Whether what must hold holds, and whether the damage was noticed."""
        messages.clear()
        found = store.restore(template)
        name = path.relative_to(newest).as_posix()
        right = job.digest(found.state) == exact[found.step]
        if found.step == STEPS[1]:
            return right and name in manifest.LATER, False
        return right and found.step == STEPS[0] and name in found.report[0] and len(messages) == 1, True

    kinds = {
        "cut to half": lambda data: data[: len(data) // 2],
        "last byte lost": lambda data: data[:-1],
        "emptied": lambda data: b"",
        "removed": lambda data: None,
        "one random bit flipped": lambda data: _flip(data, int(rng.integers(8 * len(data)))),
    }
    for kind, damage in kinds.items():
        injected = held = noticed = 0
        for path in files:
            before = path.read_bytes()
            for _ in range(flips if "random" in kind else 1):
                after = damage(before)
                if after is None:
                    path.unlink()
                else:
                    path.write_bytes(after)
                good, seen = holds(path)
                injected, held, noticed = injected + 1, held + good, noticed + seen
                path.write_bytes(before)
        yield Row(
            f"file of a checkpoint: {kind}", injected, held,
            f"{len(files)} files; {noticed} noticed, step before used; {injected - noticed} in files without state, "
            "step loads bit for bit",
        )  # fmt: skip
    restored = store.restore(template)
    assert restored.step == STEPS[1] and job.digest(restored.state) == exact[STEPS[1]], "the repair was not exact"


def _flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
