"""Splits, transforms, the sets that come along, and what bad input gets."""

import hashlib
import inspect
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import data
from diffjax.data.dataset import permutation
from diffjax.data.embedded import BLOCK_SHARES


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def digest(indices):
    return hashlib.sha256(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest()[:16]


def test_digit_splits_are_fixed_disjoint_and_balanced(digits):
    assert {k: digest(v) for k, v in digits.splits.items()} == {
        "train": "e1c493352a65cfd3",
        "validation": "0b182ec67df3ae48",
        "classifier": "8bbef624a9803c14",
        "test": "29e11176afd1c54e",
    }
    assert sorted(np.concatenate(list(digits.splits.values()))) == list(range(1797))
    whole = np.bincount(digits.arrays["label"]) / 1797
    for indices in digits.splits.values():
        counts = np.bincount(digits.arrays["label"][indices], minlength=10)
        assert np.abs(counts - whole * len(indices)).max() < 2.5
    other = data.load("digits", seed=5)
    assert all((other.splits[k] == v).all() for k, v in digits.splits.items())


def test_digits_are_the_real_ones(digits):
    assert digits.arrays["x"].shape == (1797, 8, 8, 1) and digits.arrays["x"].dtype == np.float32
    assert (digits.arrays["x"].min(), digits.arrays["x"].max()) == (0, 16)
    assert "CC BY" in digits.licence and digits.labels == tuple("0123456789")
    encoded = digits.read("train")["x"]
    assert abs(encoded.mean()) < 1e-5 and abs(encoded.std() - 1) < 1e-5


def test_a_classifier_of_the_third_split_knows_the_test_split(digits):
    from sklearn.svm import SVC

    train, test = digits.read("classifier"), digits.read("test")
    model = SVC(gamma=0.01, C=10).fit(train["x"].reshape(360, -1), train["label"])
    assert model.score(test["x"].reshape(360, -1), test["label"]) >= 0.95  # a network with augmentation reaches more


def test_split_indices_with_and_without_labels():
    label = np.repeat([0, 1, 2], [600, 300, 100])
    splits = data.split_indices(1000, label, seed=3)
    assert {k: len(v) for k, v in splits.items()} == {"train": 750, "validation": 50, "classifier": 100, "test": 100}
    assert np.bincount(label[splits["test"]]).tolist() == [60, 30, 10]
    assert np.abs(np.bincount(label[splits["test"][:50]]) - [30, 15, 5]).max() <= 1  # so is every prefix
    plain = data.split_indices(1000, seed=3)
    assert sorted(np.concatenate(list(plain.values()))) == list(range(1000))
    assert not (plain["test"] == data.split_indices(1000, seed=4)["test"]).all()
    with pytest.raises(data.DataError, match="3 items are too few .* at least 4"):
        data.split_indices(3)


def test_permutation_never_changes():
    assert permutation(0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation((7, 3), 8).tolist() == [7, 1, 6, 0, 4, 2, 3, 5]


def test_photo_crops_share_no_pixel_between_splits():
    photos = data.load("photos", size=200, seed=1)
    assert photos.arrays["x"].shape == (200, 32, 32, 3) and photos.arrays["x"].dtype == np.uint8
    assert photos.num_classes == 2 and "danielbuechele" in photos.licence and "vultilion" in photos.licence
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    owner = [np.full(p.shape[:2], -1) for p in pictures]
    for s, (_, indices) in enumerate(photos.splits.items()):
        for i in indices:
            k, crop = photos.arrays["label"][i], photos.arrays["x"][i]
            # the place of a crop is found by looking for it, independently of how it was cut
            rows, columns = np.nonzero((pictures[k][:396, :609] == crop[0, 0]).all(-1))
            match = [
                (r, c)
                for r, c in zip(rows, columns, strict=True)
                if (pictures[k][r : r + 32, c : c + 32] == crop).all()
            ]
            if len(match) == 1:  # flat sky matches in several places
                window = owner[k][match[0][0] : match[0][0] + 32, match[0][1] : match[0][1] + 32]
                assert np.isin(window, (-1, s)).all()
                window[:] = s
    assert {int(v) for o in owner for v in np.unique(o)} == {-1, 0, 1, 2, 3}
    assert len(photos.splits["test"]) == round(BLOCK_SHARES["test"] * 200)


def test_photos_refuse_large_crops_and_few():
    with pytest.raises(data.DataError, match=r"image_size must be in 1\.\.71 .* got 72"):
        data.load("photos", image_size=72)
    with pytest.raises(data.DataError, match="at least 32 crops; got 5"):
        data.load("photos", size=5)


# --------------------------------------------------------------------------------------------------------- transform


def test_transform_round_trip_and_json():
    raw = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    for transform in (
        data.DataTransform(100.0, 50.0, 0.0, 255.0, (4, 4, 3), "uint8"),
        data.DataTransform([1, 2.0, np.float32(3)], (50.0, 60.0, 70.0), 0.0, 255.0, (4, 4, 3), "uint8"),
    ):
        again = data.DataTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
        assert again == transform
        x = transform.encode(raw)
        assert x.dtype == np.float32 and (transform.decode(x) == raw).all()
        on_device = jax.jit(transform.decode)(jnp.asarray(x))
        assert on_device.dtype == jnp.uint8 and (np.asarray(on_device) == raw).all()
        np.testing.assert_allclose(jax.jit(transform.encode)(jnp.asarray(raw)), x, rtol=1e-6, atol=1e-6)
        assert transform.decode(100 * x).max() == 255 and transform.decode(x[0]).shape == (4, 4, 3)
        assert transform.decode(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.uint8


def test_transform_refuses():
    transform = data.DataTransform(shape=(8, 8, 1))
    with pytest.raises(ValueError, match=r"items of shape \(8, 8, 1\) .* got an array of shape \(2, 8, 8, 3\)"):
        transform.encode(np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match="got an array of shape"):
        transform.decode(jnp.zeros((8, 1)))
    with pytest.raises(ValueError, match="format 9; this version reads 1"):
        data.DataTransform.from_dict({"format": 9})
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        data.DataTransform.from_dict({"format": 1, "colour": 3})
    with pytest.raises(ValueError, match="std must be positive"):
        data.DataTransform(std=0.0)
    with pytest.raises(ValueError, match="2 channels but an item has shape"):
        data.DataTransform(mean=(1.0, 2.0), shape=(4, 3))
    with pytest.raises(ValueError, match="dtype must be"):
        data.DataTransform(dtype="int8")


# ------------------------------------------------------------------------------------------------------------ arrays


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"arrays:{path}"


def test_arrays_from_npz(tmp_path):
    rng = np.random.default_rng(0)
    x, label = 3 + 2 * rng.normal(size=(200, 5)), np.arange(200) % 4
    weight = rng.normal(size=(200, 2))
    name = save(tmp_path / "a.npz", x=x, label=label, labels=np.array(list("abcd")), weight=weight)
    own = data.load(name)
    assert own.arrays["x"].dtype == np.float32 and own.num_classes == 4 and own.labels == ("a", "b", "c", "d")
    rows = own.rows(np.array([3, 5]))
    np.testing.assert_allclose(rows["weight"], weight[[3, 5]], rtol=1e-6)
    assert rows["label"].tolist() == [3, 1]
    batch = own.read("train")
    assert abs(batch["x"].std() - 1) < 1e-5 and (batch["index"] == own.splits["train"]).all()
    np.testing.assert_allclose(own.transform.decode(batch["x"]), x[own.splits["train"]], rtol=1e-5, atol=1e-5)
    pictures = data.load(save(tmp_path / "b.npz", x=rng.integers(0, 256, (50, 4, 4, 1), np.uint8)))
    assert pictures.transform.dtype == "uint8" and pictures.transform.high == 255 and pictures.num_classes is None


class Payload:
    """Writes a file if it is ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_arrays_refuse_pickle(tmp_path):
    mark = tmp_path / "ran"
    x = np.array([[Payload(str(mark))]] * 4, dtype=object)
    np.savez(tmp_path / "p.npz", x=x, allow_pickle=True)
    with pytest.raises(data.DataError, match="array 'x' in .*p.npz holds Python objects .* pickle.*refused"):
        data.load(f"arrays:{tmp_path / 'p.npz'}")
    x.dump(tmp_path / "q.npz")
    with pytest.raises(
        data.DataError, match=r"cannot be read as .npz: it is a pickle or no NumPy file; pickles are refused"
    ):
        data.load(f"arrays:{tmp_path / 'q.npz'}")
    assert not mark.exists()


def test_arrays_bad_input(tmp_path):
    x = np.zeros((8, 2))
    for arrays, message in (
        ({"y": x}, r"no array 'x'; it has \['y'\]"),
        ({"x": np.zeros(8)}, r"at least two axes; got shape \(8,\)"),
        ({"x": x, "label": np.zeros(7, int)}, r"label .* shape \(7,\), but x has 8 items"),
        ({"x": x, "label": np.zeros(8)}, "label .* must be integers"),
        ({"x": x, "label": np.arange(8) - 1}, r"labels .* must be in \[0, 7\); got -1..6"),
        ({"x": x, "label": np.arange(8), "labels": np.array(["a", "b"])}, r"must be in \[0, 2\); got 0..7"),
        ({"x": x, "note": np.array(["n"] * 8)}, "note .* real numbers are needed"),
        ({"x": np.zeros((3, 2))}, "3 items are too few"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.load(save(tmp_path / "bad.npz", **arrays))
    with pytest.raises(data.DataError, match="no such file: .*nowhere.npz"):
        data.load("arrays:nowhere.npz")
    np.save(tmp_path / "one.npy", x)
    with pytest.raises(data.DataError, match="single array, not an .npz"):
        data.load(f"arrays:{tmp_path / 'one.npy'}")
    save(tmp_path / "cut.npz", x=np.random.default_rng(0).normal(size=(100, 50)))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.DataError, match="cut.npz cannot be read as .npz"):
        data.load(f"arrays:{tmp_path / 'cut.npz'}")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flip.npz").write_bytes(flipped)
    with pytest.raises(data.DataError, match="flip.npz cannot be read as .npz: Bad CRC"):
        data.load(f"arrays:{tmp_path / 'flip.npz'}")


def test_nan_stops_or_is_skipped(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 3))
    x[7, 1], x[21, 0] = np.nan, np.inf
    name = save(tmp_path / "nan.npz", x=x, label=np.arange(40) % 2)
    with pytest.raises(data.DataError, match="field 'x' .* NaN or an infinity, first at index 7"):
        data.load(name)
    kept = data.load(name, on_error="skip")
    assert len(kept) == 38 and kept.skipped == ("item 7", "item 21") and kept.arrays["label"][7] == 0
    with pytest.raises(data.DataError, match="first at index 7"):
        data.from_arrays(x)


# --------------------------------------------------------------------------------------------------------------- load


def test_load_names_what_is_close():
    with pytest.raises(
        data.DataError, match="no data set is called 'digit'. Did you mean digits.* There are digits, photos"
    ):
        data.load("digit")
    with pytest.raises(data.DataError, match="give what follows the colon, as in 'images:FOLDER'"):
        data.load("images:")
    with pytest.raises(data.DataError, match="no data set is called 'arrays'"):
        data.load("arrays")
    with pytest.raises(
        data.DataError, match="'digits' takes no image_size; got 9. It is for photos, images:FOLDER, tfds:NAME"
    ):
        data.load("digits", image_size=9)
    with pytest.raises(data.DataError, match="seed must be at least 0; got -1"):
        data.load("moons", seed=-1)
    with pytest.raises(data.DataError, match="on_error must be 'stop' or 'skip'; got 'go'"):
        data.load("digits", on_error="go")


def test_every_card_tells_its_licence_and_gives_four_splits():
    for name, card in data.CATALOGUE.items():
        assert "licence" in card.summary and card.build.__doc__
        if ":" not in name:
            small = {"size": 200} if "size" in inspect.signature(card.build).parameters else {}
            found = data.load(name, **small)
            assert tuple(found.splits) == data.SPLITS and all(v.size for v in found.splits.values())
            assert found.licence != "not stated"
            assert np.isfinite(found.read("train", 8)["x"]).all()


def test_dataset_checks_itself(digits):
    with pytest.raises(data.DataError, match="needs a field 'x'"):
        data.Dataset("d", {"y": np.zeros(3)}, {}, data.DataTransform())
    with pytest.raises(data.DataError, match="differ in length"):
        data.Dataset("d", {"x": np.zeros((3, 1)), "y": np.zeros(2)}, {}, data.DataTransform())
    with pytest.raises(data.DataError, match=r"split 'train' .* outside \[0, 3\)"):
        data.Dataset("d", {"x": np.zeros((3, 1))}, {"train": np.array([3])}, data.DataTransform())
    with pytest.raises(data.DataError, match="no split 'dev'; it has train, validation"):
        digits.split("dev")
    with pytest.raises(data.DataError, match=r"n must be in 1..360"):
        digits.read("test", 361)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, diffjax.data; heavy = {'grain', 'tensorflow', 'tensorflow_datasets', 'sklearn', 'PIL'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
