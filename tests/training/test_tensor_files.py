"""One reader and writer of tensors serves weights of ours and of others, without the package of the format."""

import sys

import numpy as np
import pytest

from diffjax import interop, training
from diffjax.training import CheckpointError, tensors, weights

PARAMS = {"out": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float16)}}


@pytest.fixture
def alone(monkeypatch):
    """Without the package: an import of it fails."""
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)


def test_weights_go_out_and_in_without_the_package(alone, tmp_path):
    path = training.export_safetensors(PARAMS, tmp_path / "new" / "a.safetensors", {"step": 3})
    again = training.load_safetensors(path, PARAMS)
    np.testing.assert_array_equal(again.params["out"]["w"], PARAMS["out"]["w"])
    assert again.metadata["step"] == "3" and again.params["out"]["b"].dtype == np.float16


def test_both_sides_call_the_same_functions(tmp_path):
    path = training.export_safetensors(PARAMS, tmp_path / "a.safetensors")
    found = interop.open_tensors(path)
    assert type(found) is tensors.Tensors and interop.write is tensors.write
    np.testing.assert_array_equal(found["out/w"], PARAMS["out"]["w"])
    interop.write(tmp_path / "b", {"w": np.eye(2, dtype=np.float32)})
    loaded = training.load_safetensors(tmp_path / "b").params["w"]
    loaded += 1.0  # a copy, so that it may be changed, and the file stays
    np.testing.assert_array_equal(interop.open_tensors(tmp_path / "b")["w"], np.eye(2))


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    path = training.export_safetensors(PARAMS, tmp_path / "a.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="damaged: it is truncated: its arrays end at byte") as caught:
        weights.WeightsFile(path)
    assert str(caught.value).count("a.safetensors") == 1
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="it is a pickle, not .safetensors.*never opened.*save_file"):
        training.load_safetensors(tmp_path / "b.pt")


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, full_disk):
    path = training.export_safetensors(PARAMS, tmp_path / "a.safetensors")
    good = path.read_bytes()
    with full_disk(10_000), pytest.raises(OSError, match="File too large.*a.safetensors"):
        training.export_safetensors({"w": np.zeros(100_000)}, path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_arrays_that_a_template_does_not_want_are_not_read(tmp_path, monkeypatch):
    interop.write(tmp_path / "a", {"w": np.ones(2, np.float32), "more": np.ones(2, np.float32)})
    seen, read = [], weights.WeightsFile.read
    monkeypatch.setattr(
        weights.WeightsFile, "read", lambda self, name, *index: (seen.append(name), read(self, name))[1]
    )
    found = training.load_safetensors(tmp_path / "a", {"w": np.zeros(2, np.float32)}, strict=False)
    assert found.unused == ("more",) and seen == ["w"]
