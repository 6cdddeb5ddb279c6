"""Networks of other libraries with random weights, written by these libraries: outputs, gradient, and the file written back.

experiments/interop/goldens.py makes the goldens.
"""

import pathlib

import numpy as np
import pytest

from diffjax import interop
from experiments.interop.case import errors, families, our_values
from experiments.interop.goldens import FOLDER, VALUES

CASES = {case.name: case for cases in families().values() for case in cases if case.golden}


def test_every_golden_has_a_case_and_every_case_its_golden():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden(name, tmp_path):
    case, folder = CASES[name], FOLDER / name
    values = interop.open_tensors(folder / VALUES)
    part = lambda kind: {n.removeprefix(kind): np.array(a) for n, a in values.items() if n.startswith(kind)}
    model = case.load(str(folder))
    forward, gradient = errors(our_values(case, model, part("inputs/")), part("outputs/"))
    assert forward < 1e-4
    assert gradient is None or gradient < 1e-4
    case.save(str(tmp_path / "back"), model)
    theirs, ours = (interop.open_tensors(path) for path in (weights(folder), weights(tmp_path / "back")))
    assert set(theirs) == set(ours)
    for name, a in theirs.items():
        assert a.dtype == ours[name].dtype and a.tobytes() == ours[name].tobytes(), name


def weights(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.safetensors"))
