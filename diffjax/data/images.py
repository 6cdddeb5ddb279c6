"""Pictures in files: a folder of PNG and JPEG as a data set, and grids of samples written as PNG."""

from __future__ import annotations

import concurrent.futures
import io
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from diffjax.data.dataset import DataError, Dataset, fit_transform, from_arrays, permutation, split_indices
from diffjax.types import Scalar

SUFFIXES = (".png", ".jpg", ".jpeg")
IN_MEMORY = 2**30  # bytes of decoded pixels up to which a folder is held in memory
FIT_ITEMS = 4096  # how many train pictures give the mean and deviation of a folder that is read lazily


class ImageFiles:
    """Files that are decoded when they are asked for.   source[i] -> {'x': uint8 [H, W, C]}"""

    def __init__(self, files: list[pathlib.Path], image_size: int | None, channels: int) -> None:
        self.files, self.image_size, self.channels = files, image_size, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        try:
            return {"x": read_image(self.files[i], self.image_size, self.channels)}
        except Exception as error:
            raise DataError(_unreadable(self.files[i], error)) from None


def read_image(path: str | os.PathLike[str], image_size: int | None = None, channels: int = 3) -> np.ndarray:
    """One picture as uint8 [H, W, channels]: turned as its EXIF says, transparency on white, centre crop, resized.

    Args: image_size: side in pixels after the centre crop; None keeps the picture whole.   channels: 1 or 3.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        picture.load()
    if picture.mode.startswith(("I", "F")):  # 16-bit grey: convert() would clip it, not scale it
        picture = Image.fromarray((np.asarray(picture, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB" if channels == 3 else "L")
    if image_size is not None:
        picture = centre_crop(picture, image_size)
    pixels = np.array(picture)
    return pixels[..., None] if channels == 1 else pixels


def centre_crop(picture: Any, image_size: int) -> Any:
    """The largest centred square of a PIL picture, resized; cropped first, so that nothing outside bleeds in."""
    from PIL import Image

    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.LANCZOS)


def folder(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    on_error: str = "stop",
    image_size: int | None = None,
    in_memory: int = IN_MEMORY,
) -> Dataset:
    """A data set from a folder of PNG and JPEG files of any size; subfolders, if there are any, are the classes.

    Every file is decoded once, so that a bad one is known before training. Pixels are held in memory up to `in_memory`
    bytes and decoded on demand beyond. Pictures are grey if all of them are.
    Args: on_error: 'stop' at an unreadable file, or 'skip' it and list it in `skipped`.   image_size: centre crop and
        resize to this side; None if all pictures have one size.
    Raises: DataError: no such folder, no pictures in it, an unreadable file (named), sizes that differ.
    """
    root = pathlib.Path(path).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"no such folder: {root}; give a folder with PNG or JPEG files, as in images:data/faces")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1 pixel; got {image_size}")
    files = _list(root)
    with concurrent.futures.ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        headers, bad = _keep(files, pool.map(_header, files), on_error, pool)
        channels = 1 if headers and all(mode in ("1", "L", "LA", "I", "I;16", "F") for mode, _ in headers) else 3
        files = [f for f in files if f not in bad]
        width, height = (image_size, image_size) if image_size else max((s for _, s in headers), default=(0, 0))
        hold = len(files) * width * height * channels <= in_memory
        decoded = pool.map(lambda f: _decode(f, image_size, channels, hold), files)
        pixels, late = _keep(files, decoded, on_error, pool)
    bad, files = bad | late, [f for f in files if f not in late]
    if not files:
        raise DataError(f"no readable picture in {root}: all {len(bad)} files are damaged, first {min(bad)}")
    _check_sizes(files, [p.shape if hold else p for p in pixels])
    label, labels = _classes(root, files)
    skipped = tuple(str(f) for f in sorted(bad))
    if hold:
        name = f"images:{root.name}"
        return from_arrays(np.stack(pixels), label, name=name, seed=seed, labels=labels, skipped=skipped)
    source = ImageFiles(files, image_size, channels)
    splits = split_indices(len(files), label, seed=seed)
    some = splits["train"][permutation((seed, 3), len(splits["train"]))[:FIT_ITEMS]]
    return Dataset(
        f"images:{root.name}",
        {} if label is None else {"label": label},
        splits,
        fit_transform(np.stack([source[int(i)]["x"] for i in some])),
        source=source,
        num_classes=len(labels) if labels else None,
        labels=labels,
        skipped=skipped,
    )


def _list(root: pathlib.Path) -> list[pathlib.Path]:
    """The picture files below `root` in a fixed order; either all directly inside or all in subfolders."""
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file() and f.name[0] != ".")
    if not files:
        raise DataError(
            f"the folder {root} holds no pictures; {', '.join(SUFFIXES)} are read, also in subfolders (classes)"
        )
    flat = [f for f in files if f.parent == root]
    if flat and len(flat) != len(files):
        raise DataError(
            f"{root} holds pictures both directly ({flat[0].name}) and in subfolders; subfolders are classes, so "
            "move all pictures into subfolders, or none"
        )
    return files


def _classes(root: pathlib.Path, files: list[pathlib.Path]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels from the first subfolder of each file, or none for a flat folder."""
    if files[0].parent == root:
        return None, None
    names = [f.relative_to(root).parts[0] for f in files]
    labels = tuple(sorted(set(names)))
    index = {name: i for i, name in enumerate(labels)}
    return np.array([index[name] for name in names], np.int32), labels


def _header(path: pathlib.Path) -> Any:
    """`(mode, size)` from the head of a file, or the error."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.mode, file.size
    except Exception as error:
        return error


def _decode(path: pathlib.Path, image_size: int | None, channels: int, hold: bool) -> Any:
    """The pixels (their shape if they are not to be held), or the error."""
    try:
        pixels = read_image(path, image_size, channels)
        return pixels if hold else pixels.shape
    except Exception as error:
        return error


def _keep(
    files: list[pathlib.Path], results: Any, on_error: str, pool: concurrent.futures.Executor
) -> tuple[list[Any], set[pathlib.Path]]:
    """The good results and the files of the others; stops `pool` and all at the first bad one unless told to skip."""
    good, bad = [], set()
    for path, result in zip(files, results, strict=True):
        if not isinstance(result, Exception):
            good.append(result)
        elif on_error == "skip":
            bad.add(path)
        else:
            pool.shutdown(wait=False, cancel_futures=True)
            raise DataError(_unreadable(path, result))
    return good, bad


def _unreadable(path: pathlib.Path, error: Exception) -> str:
    return f"unreadable image {path}: {error}. Remove or repair it, or pass on_error='skip' to leave such files out"


def _check_sizes(files: list[pathlib.Path], shapes: list[tuple[int, ...]]) -> None:
    other = next((i for i, s in enumerate(shapes) if s != shapes[0]), None)
    if other is not None:
        (h, w, _), (h2, w2, _) = shapes[0], shapes[other]
        raise DataError(
            f"pictures differ in size: {files[0].name} is {w}x{h}, {files[other].name} is {w2}x{h2}; pass image_size="
        )


# ------------------------------------------------------------------------------------------------------------- grids


def grid(
    images: Any,
    columns: int | None = None,
    *,
    low: Scalar = None,
    high: Scalar = None,
    scale: int | None = None,
    gap: int = 2,
) -> np.ndarray:
    """Pictures side by side, uint8 [H, W, 3], each enlarged by the integer `scale` and parted by `gap` white pixels.

    Args: images: [N, H, W, 1 or 3]; uint8, or floats between `low` and `high` (default their own range).
        columns: default about the square root of N.   scale: default brings small pictures to at least 32 pixels.
    Raises: ValueError: another rank or number of channels, no pictures, or columns or scale below 1.

    Example:
        >>> grid(np.zeros((4, 8, 8, 1), np.uint8)).shape
        (66, 66, 3)
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise ValueError(f"images must be [N, H, W, C] with N >= 1 and C 1 or 3; got shape {images.shape}")
    count, height, width, _ = images.shape
    columns = int(np.ceil(np.sqrt(count))) if columns is None else columns
    scale = max(1, -(-32 // min(height, width))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1; got {columns} and {scale}")
    columns = min(columns, count)
    rows = -(-count // columns)
    tiles = np.broadcast_to(_bytes(images, low, high), (count, height, width, 3))
    tiles = tiles.repeat(scale, 1).repeat(scale, 2)
    tiles = np.pad(tiles, ((0, rows * columns - count), (0, gap), (0, gap), (0, 0)), constant_values=255)
    tiles = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    out = tiles.reshape(rows * tiles.shape[1], columns * tiles.shape[3], 3)
    return np.ascontiguousarray(out[: out.shape[0] - gap, : out.shape[1] - gap])


def _bytes(images: np.ndarray, low: Scalar, high: Scalar) -> np.ndarray:
    """Values in [low, high] as bytes; values that are not finite become black."""
    if images.dtype == np.uint8:
        return images
    finite = np.isfinite(images)
    images = np.where(finite, images, 0.0).astype(np.float64)
    low = float(images.min(where=finite, initial=np.inf)) if low is None else low
    high = float(images.max(where=finite, initial=-np.inf)) if high is None else high
    if not low < high:  # constant, or nothing finite
        return np.zeros(images.shape, np.uint8)
    return np.where(finite, (images - low) / (high - low) * 255, 0).round().clip(0, 255).astype(np.uint8)


def scatter(points: Any, bins: int = 256, extent: Scalar = None) -> np.ndarray:
    """Points of the plane as a picture of their histogram, uint8 [bins, bins, 3], dark where points are; y upwards.

    Args: points: [N, 2].   extent: the picture spans [-extent, extent] on both axes, default the largest value.

    Example:
        >>> scatter(np.array([[0.0, 0.0], [1.0, 1.0]]), bins=8).shape
        (8, 8, 3)
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be [N, 2]; got shape {points.shape}")
    points = points[np.isfinite(points).all(1)]
    extent = float(np.abs(points).max(initial=0.0)) or 1.0 if extent is None else extent
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins, [[-extent, extent]] * 2)
    ink = 1 - np.exp(-counts / max(1.0, float(np.quantile(counts[counts > 0], 0.9)) if counts.any() else 1.0) * 2)
    grey = (255 * (1 - ink[::-1])).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


def save_png(
    path: str | os.PathLike[str],
    images: Any,
    columns: int | None = None,
    *,
    low: Scalar = None,
    high: Scalar = None,
    scale: int | None = None,
) -> pathlib.Path:
    """Write samples as one PNG: pictures [N, H, W, 1 or 3] as a grid, points [N, 2] as a scatter plot.

    The file appears whole or not at all (a temporary file is renamed).   Returns: the path.
    Raises: ValueError: samples of another shape.
    """
    from PIL import Image

    images, path = np.asarray(images), pathlib.Path(path)
    if images.ndim == 2:
        picture = scatter(images)
    else:
        picture = grid(images, columns, low=low, high=high, scale=scale)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getvalue())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
