"""TFDS sets without TensorFlow: mocked, really prepared, missing, misspelt; and preparing without a network."""

import importlib.util
import pathlib
import sys
import time

import numpy as np
import pytest

from diffjax import data
from diffjax.data import tfds as tfds_sets

PACKAGE = """
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(6, 6, 1)), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), license="CC0")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 40), "test": self._generate_examples(40, 50)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            file = io.BytesIO()  # an encoded picture: TFDS encodes arrays with TensorFlow
            Image.fromarray(np.full((6, 6), i, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a set that was really written as ArrayRecord."""
    folder = tmp_path_factory.mktemp("tfds")
    package = folder / "tiny_pictures"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tiny_pictures_dataset_builder.py").write_text(PACKAGE.replace("TinyPictures", "Builder"))
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("tiny_pictures.tiny_pictures_dataset_builder")
        builder = module.Builder(data_dir=str(folder / "data"), file_format="array_record")
        builder.download_and_prepare()
    finally:
        sys.path.remove(str(folder))
    return folder / "data"


def test_mocked_set_needs_no_tensorflow():
    import tensorflow_datasets as tfds

    before = "tensorflow" in sys.modules
    with tfds.testing.mock_data(num_examples=40):
        found = data.load("tfds:mnist")
        assert len(found) == 40 and found.shape == (28, 28, 1) and found.num_classes == 10
        assert found.labels == tuple("0123456789") and tuple(found.splits) == data.SPLITS
        with data.batches(found, "train", 8, seed=0) as stream:
            batch = next(stream)
        assert batch["x"].shape == (8, 28, 28, 1) and batch["label"].dtype == np.int32
        small = data.load("tfds:mnist", image_size=7)
        assert small.read("test")["x"].shape[1:] == (7, 7, 1)
    assert ("tensorflow" in sys.modules) == before


def test_prepared_set_is_read_from_its_files(prepared):
    found = data.load("tfds:tiny_pictures", directory=prepared)
    assert len(found) == 50 and found.labels == ("a", "b") and found.licence == "CC0"
    rows = found.rows(np.arange(50))
    values = rows["x"][:, 0, 0, 0]
    assert (values[:40] < 40).all() and sorted(values) == list(range(50)) and (rows["label"] == values % 2).all()
    # The set's own test split is kept, and only that; nothing is in two splits.
    assert sorted(rows["x"][found.splits["test"], 0, 0, 0]) == list(range(40, 50))
    assert sorted(np.concatenate(list(found.splits.values()))) == list(range(50))
    transform = data.load("tfds:tiny_pictures", directory=prepared).transform
    train = values[found.splits["train"]].astype(float)
    assert abs(transform.mean - train.mean()) < 1e-5 and abs(transform.std - train.std()) < 1e-5
    assert data.prepare("tfds:tiny_pictures", prepared) == prepared / "tiny_pictures" / "1.0.0"  # nothing to do
    with pytest.raises(data.DataError, match="tiny_pictures has no configuration|tiny_pictures:red cannot be opened"):
        data.load("tfds:tiny_pictures:red", directory=prepared)


def test_missing_and_misspelt_sets_fail_at_once_and_briefly(tmp_path):
    start = time.monotonic()
    for name, message in (
        (
            "tfds:mnist",
            r"tfds:mnist is not prepared under .*mnist; run: pip install 'diffjax\[tf\]' and diffjax data prepare",
        ),
        ("tfds:mnisst", "no TFDS set is called 'mnisst'; did you mean tfds:mnist"),
        ("tfds:qqqqqq", "no TFDS set is called 'qqqqqq'; see the TFDS catalogue"),
        ("tfds:imagenet_resized:8x9", "imagenet_resized has no configuration '8x9'; close are 8x8"),
        ("tfds:", "give what follows the colon"),
    ):
        with pytest.raises(data.DataError, match=message) as error:
            data.load(name, directory=tmp_path)
        assert len(str(error.value)) < 500
    assert time.monotonic() - start < 5


def test_prepare_names_what_is_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "tensorflow" else find(n, *a))
    with pytest.raises(data.DataError, match=r"needs TensorFlow, which is not installed: pip install 'diffjax\[tf\]'"):
        data.prepare("mnist", tmp_path)
    with pytest.raises(data.DataError, match="did you mean tfds:mnist"):
        data.prepare("tfds:mnisst", tmp_path)
    assert data.prepare("digits") is None and data.prepare("images:anything") is None


def test_prepare_without_network_ends_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: True)
    monkeypatch.setattr(tfds_sets.urllib.request, "getproxies", dict)

    def refuse(address, timeout):
        raise OSError("network is unreachable")

    monkeypatch.setattr(tfds_sets.socket, "create_connection", refuse)
    with pytest.raises(
        data.DataError, match=r"mnist cannot be downloaded: .* not reachable \(network is unreachable\)"
    ):
        data.prepare("mnist", tmp_path)


def test_prepare_reports_the_failure_of_the_download_and_stops_a_long_one(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: True)
    monkeypatch.setattr(tfds_sets, "_check_network", lambda *a: None)
    fail = "import sys; sys.exit(print('OSError: the mirror is down') or 1)"
    monkeypatch.setattr(tfds_sets, "PREPARE", fail)
    with pytest.raises(data.DataError, match="preparing tfds:mnist failed: OSError: the mirror is down"):
        data.prepare("mnist", tmp_path)
    monkeypatch.setattr(tfds_sets, "PREPARE", "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(data.DataError, match="took more than 0 s and was stopped"):
        data.prepare("mnist", tmp_path, timeout=0.3)
    assert time.monotonic() - start < 20
    assert not any(pathlib.Path(tmp_path).rglob("*.array_record*"))


def test_the_preparing_program_writes_what_load_reads(prepared, tmp_path):
    import subprocess

    # the same program that `prepare` runs, on a set that needs neither network nor TensorFlow
    program = "import tiny_pictures.tiny_pictures_dataset_builder\n" + tfds_sets.PREPARE
    command = [sys.executable, "-c", program, "tiny_pictures", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=prepared.parent)
    assert done.returncode == 0, done.stdout
    assert len(data.load("tfds:tiny_pictures", directory=tmp_path)) == 50
    command[3] = "no_such_set"
    done = subprocess.run(command, capture_output=True, text=True, cwd=prepared.parent)
    assert done.returncode == 1 and done.stdout.startswith("DatasetNotFoundError:")
    assert len(done.stdout.splitlines()) == 1
