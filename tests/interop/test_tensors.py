"""Files of tensors: what is read is what another reader reads, and damaged or dangerous files are refused by name."""

import contextlib
import json
import os
import pathlib
import pickle
import struct
import weakref
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffjax.interop import open_tensors, write, write_folder
from diffjax.interop.tensors import read_header
from diffjax.training import CheckpointError

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.standard_normal((3, 4)).astype("float32"),
    "b": np.arange(6, dtype="int64").reshape(1, 2, 3),
    "c": RNG.standard_normal(5).astype(ml_dtypes.bfloat16),
    "d": np.array(True),
    "e": np.zeros((0, 3), "float16"),
    "f": RNG.standard_normal((2, 1)),
}


def same(a, b):
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in b
    )


def header(path):
    """The header of a file as a dict."""
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(path, page, body=b""):
    text = json.dumps(page).encode() if isinstance(page, dict) else page
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


# ------------------------------------------------------------------------------------------------------ what is read


def test_the_library_of_the_format_reads_what_we_write_and_we_what_it_writes(tmp_path):
    write(tmp_path / "ours.safetensors", ARRAYS, {"format": "pt"})
    save_file({n: a for n, a in ARRAYS.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert same(load_file(tmp_path / "ours.safetensors"), ARRAYS)
    found = open_tensors(tmp_path / "theirs.safetensors")
    assert same(found, ARRAYS) and found.metadata == {"format": "pt"}
    assert found.shapes == {n: a.shape for n, a in ARRAYS.items()}
    assert found.size == sum(a.nbytes for a in ARRAYS.values())


def test_arrays_are_mapped_when_asked_for_and_released_when_dropped(tmp_path):
    write(tmp_path / "a.safetensors", ARRAYS)
    mapped = lambda: pathlib.Path("/proc/self/maps").read_text().count(str(tmp_path / "a.safetensors"))
    found = open_tensors(tmp_path)
    assert mapped() == 0
    a = found["a.weight"]
    assert mapped() == 1
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 1
    del a
    assert mapped() == 0


def test_shards_hold_at_most_the_limit_and_read_as_one(tmp_path):
    write_folder(tmp_path, ARRAYS, {"format": "pt"}, shard=60)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors" and len(files) == 3
    assert same(open_tensors(tmp_path), ARRAYS) and same(open_tensors(files), ARRAYS)
    page = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert page["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    assert set(page["weight_map"]) == set(ARRAYS)
    with pytest.raises(ValueError, match="shard must be a positive"):
        write_folder(tmp_path, ARRAYS, shard=0)


def test_the_main_file_is_taken_before_its_variants(tmp_path):
    write(tmp_path / "diffusion_pytorch_model.fp16.safetensors", {"x": np.zeros(1, "float16")})
    assert list(open_tensors(tmp_path)) == ["x"]
    write(tmp_path / "diffusion_pytorch_model.safetensors", {"y": np.zeros(1, "float32")})
    assert list(open_tensors(tmp_path)) == ["y"]


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("place", ["0", "5", "8", "header", "end of header", "data", "last"])
def test_truncated(tmp_path, place):
    path = tmp_path / "model.safetensors"
    write(path, ARRAYS)
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    at = {"header": start // 2, "end of header": start, "data": start + 40, "last": len(data) - 1}
    path.write_bytes(data[: at[place] if place in at else int(place)])
    with pytest.raises(CheckpointError, match="model.safetensors is truncated"):
        open_tensors(path)


def test_a_file_that_changes_while_it_is_open(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, ARRAYS)
    found = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="a.safetensors has changed since it was opened"):
        found["f"]
    path.unlink()
    with pytest.raises(CheckpointError, match="a.safetensors has changed since it was opened"):
        found["b"]


def test_too_long(tmp_path):
    write(tmp_path / "a.safetensors", ARRAYS)
    with (tmp_path / "a.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="damaged: its arrays end at byte"):
        open_tensors(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ({"w": {**ENTRY, "dtype": "F3"}}, "w has dtype 'F3'; known are F64, F32"),
        ({"w": {**ENTRY, "shape": [3]}}, "w has 8 bytes for shape .3. of float32"),
        ({"w": {**ENTRY, "shape": [-2]}}, "w has shape .-2. from 0 to 8"),
        ({"w": {**ENTRY, "shape": [2.0]}}, "w has shape .2.0. from"),
        ({"w": {**ENTRY, "data_offsets": [4, 12]}}, "gap or an overlap before w"),
        ({"v": ENTRY, "w": ENTRY}, "gap or an overlap before w"),
        ({"w": {"dtype": "F32"}}, "not of .safetensors: 'shape'"),
        ({"w": ENTRY, "__metadata__": {"a": 1}}, "metadata that are not strings"),
        (b'{"w": 1, "w": 2}', "a name that comes twice"),
        (b"[1, 2]", "not of .safetensors"),
        (b"[" * 20_000, "not of .safetensors"),
        (b"\xff\xfe\xfd", "not of .safetensors"),
    ],
)
def test_headers_that_are_none(tmp_path, page, message):
    with pytest.raises(CheckpointError, match=message):
        open_tensors(with_header(tmp_path / "a.safetensors", page, bytes(8)))


def test_random_damage_is_always_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, ARRAYS, {"format": "pt"})
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(0, start, rng.integers(1, 4)):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            {n: a.sum() for n, a in open_tensors(path).items() if a.dtype != bool}
        except CheckpointError:
            refused += 1
    assert refused > 200  # the others have another name, or other metadata


class Bomb:
    """A pickle that would make a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mknod, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_are_named_and_never_opened(tmp_path, protocol):
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps({"w": Bomb(exploded)}, protocol=protocol)
    for name in ("pytorch_model.bin", "a.ckpt", "a.pt", "a.pth", "a.pkl"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(CheckpointError, match=f"{name} is a pickle.*never opened.*save_file"):
            open_tensors(tmp_path / name)
    with pytest.raises(CheckpointError, match="has pickles alone .a.ckpt, .*save_pretrained"):
        open_tensors(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="is a pickle in spite of its name|no .safetensors file"):
        open_tensors(tmp_path)
    assert not exploded.exists()
    with contextlib.suppress(FileExistsError):
        pickle.loads(bomb)
    assert exploded.exists()  # so it would have


def test_an_archive_of_pytorch_with_another_name(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="a pickle in spite of its name"):
        open_tensors(tmp_path)


def test_shards_that_do_not_fit(tmp_path):
    write_folder(tmp_path, ARRAYS, shard=60)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    page = json.loads(index.read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    second = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of 3 shards that {index.name} names: {files[1].name}"):
        open_tensors(tmp_path)
    files[1].write_bytes(second[:-1])
    with pytest.raises(CheckpointError, match=f"{files[1].name} is truncated"):
        open_tensors(tmp_path)
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(CheckpointError, match="is in two shards"):
        open_tensors(tmp_path)
    files[1].write_bytes(second)
    name = next(iter(page["weight_map"]))
    index.write_text(json.dumps({"weight_map": {**page["weight_map"], name: files[-1].name}}))
    with pytest.raises(CheckpointError, match=f"does not fit its shards, beginning with {name}"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in page["weight_map"].items() if n != "c"}}))
    with pytest.raises(CheckpointError, match="does not fit its shards, beginning with c"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {name: "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="names files outside its folder: ../secret"):
        open_tensors(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="is no index of shards"):
        open_tensors(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="several indices"):
        open_tensors(tmp_path)


def test_folders_without_an_answer(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file or folder .*nowhere"):
        open_tensors(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no .safetensors file; it has nothing"):
        open_tensors(tmp_path)
    for name in "ab":
        write(tmp_path / f"{name}.safetensors", {name: np.zeros(1)})
    with pytest.raises(CheckpointError, match="several files and no index .*a.safetensors, b.safetensors. Give one"):
        open_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="there is no file"):
        read_header(tmp_path / "c.safetensors")


# -------------------------------------------------------------------------------------------------------- writing


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path, full_disk):
    path = tmp_path / "a.safetensors"
    write(path, {"old": np.ones(3)})
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        write(path, {"new": np.zeros(10_000)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and list(open_tensors(path)) == ["old"]


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match="no dtype complex64, that of w; it has float64, float32"):
        write(tmp_path / "a.safetensors", {"w": np.zeros(2, "complex64")})
    assert list(tmp_path.iterdir()) == []


class Made(Mapping):
    """Arrays made when asked for, and how many of them lived at a time."""

    def __init__(self, names):
        self.names, self.living, self.most = names, [], 0

    def __getitem__(self, name):
        a = np.full((2, 2), ord(name), "float32")
        self.living = [r for r in self.living if r() is not None] + [weakref.ref(a)]
        self.most = max(self.most, len(self.living))
        return a

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def test_arrays_are_asked_for_one_after_the_other(tmp_path):
    made = Made("abcdefg")
    write_folder(tmp_path, made, shard=40)
    assert {n: a.mean() for n, a in open_tensors(tmp_path).items()} == {n: ord(n) for n in "abcdefg"}
    assert made.most <= 2
