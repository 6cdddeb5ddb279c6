"""Versions of the format: older checkpoints load, newer ones say so, and a flipped bit is never taken for a version."""

import io
import json
import pathlib
import zipfile

import jax
import pytest
import toy

from diffjax.training import CheckpointError, CheckpointStore, fit, manifest

OLD = pathlib.Path(__file__).with_name("checkpoint_format_1.zip")  # two steps of the toy, saved by format 1


def save(path, state, monkeypatch, **versions):
    with monkeypatch.context() as patch, CheckpointStore(path) as store:
        for name, version in versions.items():
            patch.setattr(manifest, name, version)
        assert store.save(1, state) and store.wait()
    return path


@pytest.fixture(scope="module")
def toys():
    return toy.make()


def test_a_checkpoint_of_format_1_loads_and_goes_on(tmp_path, toys):
    with zipfile.ZipFile(OLD) as file:
        file.extractall(tmp_path)
    assert json.loads((tmp_path / "2" / "manifest.json").read_text())["format"] == 1
    state, train_step = toys
    options = {"devices": jax.devices()[:1], "stream": io.StringIO(), "per_dispatch": 4}
    with CheckpointStore(tmp_path) as store:
        resumed = fit(state, train_step, toy.Batches(), steps=4, store=store, resume=True, **options)
        assert store.restore(state, 2).page["data"] == {"next": 2} and store.steps() == [2, 4]
    toy.assert_close(resumed.state, fit(state, train_step, toy.Batches(), steps=4, **options).state, rtol=1e-5)


def test_a_newer_format_is_refused_with_the_way_out(tmp_path, toys, monkeypatch):
    state, _ = toys
    save(tmp_path, state, monkeypatch, FORMAT=99)
    store = CheckpointStore(tmp_path)
    message = "format 99, written by a newer diffjax; this one reads format 2. Update diffjax"
    for use in (store.restore, lambda s: store.restore_part(s.params), lambda s: store.check(1)):
        with pytest.raises(CheckpointError, match=message):
            use(state)


def test_a_newer_page_is_refused(tmp_path, toys, monkeypatch):
    """The page alone newer: as if only what it holds had changed."""
    state, _ = toys
    write = manifest.write

    def written_by_this_version(folder, step):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest, "FORMAT", 2)
            write(folder, step)

    monkeypatch.setattr(manifest, "write", written_by_this_version)
    save(tmp_path, state, monkeypatch, FORMAT=99)
    assert CheckpointStore(tmp_path).check(1) is None
    with pytest.raises(CheckpointError, match="format 99, written by a newer diffjax"):
        CheckpointStore(tmp_path).restore(state)


def test_a_flipped_bit_of_a_manifest_is_damage(tmp_path, toys, monkeypatch):
    """Also in the number of its format, which would otherwise look newer or older, and in names of its entries."""
    folder = save(tmp_path, toys[0], monkeypatch) / "1"
    path = folder / manifest.MANIFEST
    good = path.read_bytes()
    assert manifest.problem(folder) is None
    monkeypatch.setattr(manifest, "sha256", lambda path: pytest.fail("only the manifest is at stake"))
    n = 8 * len(good)
    for i in [*range(480), *range(480, n - 800, 23), *range(n - 800, n)]:  # the entries all, the files in part
        data = bytearray(good)
        data[i // 8] ^= 1 << i % 8
        path.write_bytes(data)
        assert manifest.problem(folder, contents=False) is not None, (i, bytes(data[i // 8 - 20 : i // 8 + 20]))
