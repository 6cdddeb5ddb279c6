"""Data sets by name: `load` finds the function, checks the options that it takes, and calls it."""

from __future__ import annotations

import difflib
import inspect
import os
import pathlib
from typing import Any

from diffjax.data import densities, embedded, images, npz, tfds
from diffjax.data.dataset import DataError, Dataset
from diffjax.types import Card, Scalar

CATALOGUE: dict[str, Card] = {
    "digits": Card(embedded.digits, summary="1797 digits 8x8x1, 10 classes; licence: UCI, CC BY 4.0 there"),
    "photos": Card(embedded.photos, summary="crops 32x32x3 of two photographs; licence: CC BY 2.0, attribution"),
    "gaussians": Card(densities.gaussians, summary="8 Gaussians on a ring, exact score; licence: none needed"),
    "moons": Card(densities.moons, summary="two half circles, exact score; licence: none needed"),
    "checkerboard": Card(densities.checkerboard, summary="8 blurred squares, exact score; licence: none needed"),
    "swiss_roll": Card(densities.swiss_roll, summary="a spiral in the plane, exact score; licence: none needed"),
    "pinwheel": Card(densities.pinwheel, summary="5 curved arms, exact score; licence: none needed"),
    "arrays:FILE.npz": Card(npz.arrays, summary="your arrays: x, optionally label and others; licence: yours"),
    "images:FOLDER": Card(images.folder, summary="your PNG and JPEG files, classes are subfolders; licence: yours"),
    "tfds:NAME": Card(tfds.records, summary="a prepared TFDS set, read without TensorFlow; licence: the set's own"),
}


def load(
    name: str,
    *,
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
    on_error: str = "stop",
    image_size: int | None = None,
    size: int | None = None,
) -> Dataset:
    """The data set called `name`: an entry of `CATALOGUE`, 'arrays:FILE.npz', 'images:FOLDER' or 'tfds:NAME[:config]'.

    Args: seed: of random draws and of the splits, except those of the digits, which never change.   directory: where
        TFDS sets lie.   on_error: 'stop' at an unreadable item, or 'skip' it.   image_size: side of pictures in pixels.
        size: number of random draws.
    Raises: DataError: an unknown name (with close ones), an option that the set does not take, unusable data.

    Example:
        >>> data = load("digits")
        >>> data.shape, data.num_classes, {k: len(v) for k, v in data.splits.items()}
        ((8, 8, 1), 10, {'train': 997, 'validation': 80, 'classifier': 360, 'test': 360})
    """
    if on_error not in ("stop", "skip"):
        raise DataError(f"on_error must be 'stop' or 'skip'; got {on_error!r}")
    if seed < 0:
        raise DataError(f"seed must be at least 0; got {seed}")
    build, rest = _find(name)
    options = {"directory": directory, "image_size": image_size, "size": size}
    given = {k: v for k, v in options.items() if v is not None}
    takes = inspect.signature(build).parameters
    refused = [k for k in given if k not in takes]
    if refused:
        sets = [k for k, card in CATALOGUE.items() if refused[0] in inspect.signature(card.build).parameters]
        raise DataError(
            f"data set {name!r} takes no {refused[0]}; got {given[refused[0]]!r}. It is for {', '.join(sets)}"
        )
    always = {k: v for k, v in {"seed": seed, "on_error": on_error}.items() if k in takes}
    return build(*rest, **always, **given)


def prepare(
    name: str, directory: str | os.PathLike[str] | None = None, *, timeout: Scalar = 3600
) -> pathlib.Path | None:
    """What `diffjax data prepare NAME` does: download a TFDS set once. Sets that need nothing return None.

    Args: timeout: seconds until the download is given up.   Returns: the folder of the prepared set.
    Raises: DataError: unknown name, TensorFlow missing, no network, the download failed or took too long.
    """
    if name in CATALOGUE or name.startswith(("arrays:", "images:")):
        _find(name)
        return None
    return tfds.prepare(name, directory, timeout=timeout)


def _find(name: str) -> tuple[Any, tuple[str, ...]]:
    """The function of a name and what stands behind its colon."""
    prefix, colon, rest = name.partition(":")
    for key, card in CATALOGUE.items():
        kind, is_prefix, placeholder = key.partition(":")
        if prefix == kind and bool(colon) == bool(is_prefix):
            if is_prefix and (not rest or rest == placeholder):
                raise DataError(f"give what follows the colon, as in {key!r}; got {name!r}")
            return card.build, (rest,) * bool(is_prefix)
    known = [k.partition(":")[0] for k in CATALOGUE]
    close = difflib.get_close_matches(prefix, known, 3, 0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise DataError(f"no data set is called {name!r}.{hint} There are {', '.join(CATALOGUE)}")
