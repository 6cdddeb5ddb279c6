"""Write the goldens: tiny random networks of other libraries with their inputs, outputs and gradient.

    python -m experiments.interop.goldens [PATTERN]      needs PyTorch and diffusers; writes tests/interop/goldens/<case>/

tests/interop/test_goldens.py compares with them without the other libraries.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import sys

import numpy as np

from diffjax import interop
from experiments.interop.case import Case, families, randomise, their_values

FOLDER = pathlib.Path(__file__).parents[2] / "tests" / "interop" / "goldens"
VALUES = "values.tensors"  # in the format of safetensors, under a name that no reader of weights takes
LARGEST = 300_000  # bytes of a folder


def record(case: Case) -> int:
    """One golden; returns its bytes."""
    model = case.build(case)
    randomise(model, case.seed)
    inputs = case.inputs(np.random.default_rng(case.seed))
    values = {f"inputs/{name}": a for name, a in inputs.items()}
    values |= {f"outputs/{name}": a for name, a in their_values(case, model, inputs).items()}
    folder = FOLDER / case.name
    shutil.rmtree(folder, ignore_errors=True)
    case.write(case, model, str(folder))
    interop.write(folder / VALUES, values)
    return sum(path.stat().st_size for path in folder.iterdir())


def main(pattern: str = "") -> int:
    """Write those whose family or name has the pattern."""
    for family, cases in families().items():
        for case in cases:
            if case.golden and re.search(pattern, f"{family}/{case.name}"):
                size = record(case)
                print(f"{case.name:44s} {size:>8,} bytes")
                if size > LARGEST:
                    raise ValueError(f"{case.name} has {size} bytes; make it smaller than {LARGEST}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
