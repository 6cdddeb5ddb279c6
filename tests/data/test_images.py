"""Folders of pictures of every kind, and grids written as PNG."""

import numpy as np
import pytest
from PIL import Image

from diffjax import data
from diffjax.data import images


def write(path, size=(20, 30), mode="RGB", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, {"RGB": 3, "RGBA": 4, "L": 1}[mode])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode=None).save(path, **options)
    return pixels


@pytest.fixture
def zoo(tmp_path):
    for i in range(6):
        write(tmp_path / "cat" / f"{i}.png", (20 + i, 30), seed=i)
        write(tmp_path / "dog" / "deep" / f"{i}.JPEG", (40, 25 + i), seed=10 + i)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "._0.png").write_bytes(b"no picture")
    return tmp_path


def test_folder_with_classes_and_any_size(zoo):
    found = data.load(f"images:{zoo}", image_size=16)
    assert found.arrays["x"].shape == (12, 16, 16, 3) and found.arrays["x"].dtype == np.uint8
    assert found.labels == ("cat", "dog") and found.arrays["label"].tolist() == [0] * 6 + [1] * 6
    assert tuple(found.splits) == data.SPLITS and found.transform.high == 255
    lazy = images.folder(zoo, image_size=16, in_memory=0)
    assert lazy.source is not None and len(lazy) == 12
    for split in data.SPLITS:
        a, b = found.read(split), lazy.read(split)
        np.testing.assert_allclose(a["x"], b["x"], rtol=1e-5, atol=1e-5)
        assert (a["label"] == b["label"]).all()
    with data.batches(lazy, "train", 4, seed=0) as one, data.batches(found, "train", 4, seed=0) as other:
        for _ in range(3):
            a, b = next(one), next(other)
            assert (a["index"] == b["index"]).all()
            np.testing.assert_allclose(a["x"], b["x"], rtol=1e-5, atol=1e-5)


def test_flat_folder_keeps_pixels(tmp_path):
    pixels = [write(tmp_path / f"{i}.png", (7, 9), seed=i) for i in range(5)]
    found = data.load(f"images:{tmp_path}")
    np.testing.assert_array_equal(found.arrays["x"], pixels)
    assert found.num_classes is None and "label" not in found.arrays


def test_grey_deep_transparent_and_turned(tmp_path):
    grey = write(tmp_path / "g.png", (6, 6), "L")
    np.testing.assert_array_equal(images.read_image(tmp_path / "g.png", channels=1), grey)
    deep = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800
    Image.fromarray(deep).save(tmp_path / "d.png")
    got = images.read_image(tmp_path / "d.png", channels=1)[..., 0]
    np.testing.assert_array_equal(got, np.round(deep / 257))
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "t.png")
    assert (images.read_image(tmp_path / "t.png") == 255).all()  # transparent shows white, not its hidden colour
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "e.jpg", exif=exif)
    assert images.read_image(tmp_path / "e.jpg").shape == (30, 20, 3)
    for name in ("t.png", "e.jpg"):
        (tmp_path / name).unlink()
    for i in range(4):
        write(tmp_path / f"m{i}.png", (6, 6), "L", seed=i)
    assert data.load(f"images:{tmp_path}").shape == (6, 6, 1)  # all are grey, so is the set
    write(tmp_path / "c.png", (6, 6))
    assert data.load(f"images:{tmp_path}").shape == (6, 6, 3)


def test_centre_crop(tmp_path):
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert (images.read_image(tmp_path / "a.png", 5) == 200).all()
    assert images.read_image(tmp_path / "a.png", 40).shape == (40, 40, 3)


def test_unreadable_files_stop_or_are_skipped(zoo):
    whole = (zoo / "cat" / "3.png").read_bytes()
    (zoo / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])  # its head is fine
    (zoo / "dog" / "x.jpg").write_bytes(b"not a picture")
    with pytest.raises(data.DataError, match=r"unreadable image .*x.jpg: .* on_error='skip'"):
        data.load(f"images:{zoo}", image_size=8)
    for in_memory in (images.IN_MEMORY, 0):
        found = images.folder(zoo, image_size=8, on_error="skip", in_memory=in_memory)
        assert len(found) == 11 and [s[-9:] for s in found.skipped] == ["cat/3.png", "dog/x.jpg"]
        assert found.arrays["label"].tolist() == [0] * 5 + [1] * 6
    (zoo / "dog" / "x.jpg").unlink()
    with pytest.raises(data.DataError, match=r"unreadable image .*3.png: .*truncated"):
        data.load(f"images:{zoo}", image_size=8)
    (zoo / "cat" / "3.png").write_bytes(whole)
    lazy = images.folder(zoo, image_size=8, in_memory=0)
    (zoo / "cat" / "0.png").unlink()  # after the check
    with pytest.raises(data.DataError, match="unreadable image .*0.png"):
        lazy.rows(np.arange(3))


def test_folder_refuses(tmp_path, zoo):
    with pytest.raises(data.DataError, match="no such folder: /nowhere"):
        data.load("images:/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="empty holds no pictures; .png, .jpg, .jpeg are read"):
        data.load(f"images:{tmp_path / 'empty'}")
    with pytest.raises(data.DataError, match=r"differ in size: 0.png is 30x20, 1.png is 30x21; pass image_size="):
        data.load(f"images:{zoo}")
    with pytest.raises(data.DataError, match="image_size must be at least 1 pixel; got 0"):
        data.load(f"images:{zoo}", image_size=0)
    write(zoo / "top.png")
    with pytest.raises(data.DataError, match="both directly .top.png. and in subfolders"):
        data.load(f"images:{zoo}", image_size=8)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"x")
    with pytest.raises(data.DataError, match="no readable picture in .*bad: all 1 files"):
        data.load(f"images:{bad}", on_error="skip")


# ------------------------------------------------------------------------------------------------------------- grids


def test_grid_places_every_picture():
    pictures = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 4, 6, 3), np.uint8)
    out = data.grid(pictures, columns=3, scale=2, gap=1)
    assert out.shape == (2 * 8 + 1, 3 * 12 + 2, 3) and out.dtype == np.uint8
    for i in range(5):
        top, left = 9 * (i // 3), 13 * (i % 3)
        assert (out[top : top + 8, left : left + 12] == i).all()
    assert (out[8] == 255).all() and (out[9:, 26:] == 255).all()  # the gap, and the missing sixth picture
    floats = data.grid(np.array([0.0, 8.0, 16.0, 99.0, np.nan]).reshape(5, 1, 1, 1), 5, low=0, high=16, scale=1, gap=0)
    assert floats[0, :, 0].tolist() == [0, 128, 255, 255, 0]
    assert (data.grid(np.ones((1, 2, 2, 1))) == 0).all() and data.grid(np.zeros((1, 8, 8, 1))).shape == (32, 32, 3)


def test_grid_refuses():
    for shape in ((4, 8, 8), (4, 8, 8, 2), (0, 8, 8, 1)):
        with pytest.raises(ValueError, match=r"images must be \[N, H, W, C\]"):
            data.grid(np.zeros(shape))
    with pytest.raises(ValueError, match="columns and scale must be at least 1; got 0 and 4"):
        data.grid(np.zeros((4, 8, 8, 1)), 0)
    with pytest.raises(ValueError, match=r"points must be \[N, 2\]; got shape \(5, 3\)"):
        data.save_png("never.png", np.zeros((5, 3)))


def test_png_is_whole_or_absent(tmp_path, monkeypatch):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), np.uint8)
    path = data.save_png(tmp_path / "new" / "grid.png", pictures)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), data.grid(pictures))
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(images.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        data.save_png(path, 255 - pictures)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_scatter_shows_points_where_they_are(tmp_path):
    points = np.array([[0.9, 0.9]] * 50 + [[-0.9, -0.9]] * 50 + [[np.nan, 0.0]])
    picture = data.scatter(points, bins=10, extent=1.0)
    dark = np.argwhere(picture[..., 0] < 128).tolist()
    assert dark == [[0, 9], [9, 0]]  # upper right and lower left
    assert np.asarray(Image.open(data.save_png(tmp_path / "p.png", points))).shape == (256, 256, 3)
    assert (data.scatter(np.zeros((0, 2)), 4) == 255).all()
