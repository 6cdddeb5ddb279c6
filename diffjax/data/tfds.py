"""Any prepared TensorFlow Datasets set, read without TensorFlow: `tfds:NAME[:config]`; and preparing one."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
import pathlib
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffjax.data.dataset import DataError, Dataset, check_finite, fit_transform, permutation, split_indices
from diffjax.data.images import centre_crop
from diffjax.types import Scalar

FIT_ITEMS = 4096  # how many train items give the mean and deviation
X_FEATURES = ("image", "features", "x")  # looked for in this order
PREPARE = (  # runs in a process of its own, so that it can be stopped
    "import sys, tensorflow_datasets as tfds\n"
    "name, directory = sys.argv[1:]\n"
    "try:\n"
    "    tfds.builder(name, data_dir=directory or None, file_format='array_record').download_and_prepare()\n"
    "except Exception as error:\n"
    "    sys.exit(print(f'{type(error).__name__}: {error}'.replace(chr(10), ' ')) or 1)\n"
)


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """TFDS logs a warning for every set that is not prepared; our own error says it better."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Records:
    """Items of several TFDS splits one after another.   source[i] -> {'x': ..., 'label': ...}"""

    def __init__(self, parts: list[Any], x: str, label: str | None, image_size: int | None) -> None:
        self.parts, self.x, self.label, self.image_size = parts, x, label, image_size
        self.ends = np.cumsum([len(p) for p in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        part = int(np.searchsorted(self.ends, i, side="right"))
        record = self.parts[part][int(i - (self.ends[part - 1] if part else 0))]
        x = np.asarray(record[self.x])
        if self.image_size is not None:
            x = _fit(x, self.image_size)
        item = {"x": x if x.dtype == np.uint8 else x.astype(np.float32)}
        return item if self.label is None else item | {"label": np.int32(record[self.label])}


def records(
    name: str, *, seed: int = 0, directory: str | os.PathLike[str] | None = None, image_size: int | None = None
) -> Dataset:
    """A prepared TFDS set, `NAME` or `NAME:config`, read on demand and standardised by up to 4096 train items.

    The set's own train, test and validation splits are kept; the splits that it lacks are cut from train. `x` is the
    feature 'image', else 'features' or 'x'; `label` is kept where it is a class label.
    Args: directory: where TFDS sets lie, default that of TFDS.   image_size: centre crop and resize to this side.
    Raises: DataError: unknown name (with close matches), not prepared (with the command), no usable feature.
    """
    builder = _builder(name, directory)
    features = builder.info.features
    known = [k for k in X_FEATURES if k in features and _is_numeric(features[k])]
    if not known:
        raise DataError(f"tfds:{name} has none of the features {', '.join(X_FEATURES)}; it has {', '.join(features)}")
    field = known[0]
    shape = tuple(features[field].shape)
    if image_size is not None and len(shape) != 3:
        raise DataError(f"image_size is for pictures, but feature {field!r} of tfds:{name} has shape {shape}")
    if None in shape and image_size is None:
        raise DataError(f"the pictures of tfds:{name} differ in size ({shape}); pass image_size=")
    label = "label" if "label" in features and hasattr(features["label"], "num_classes") else None
    own = list(builder.info.splits) or ["train"]
    main = "train" if "train" in own else own[0]
    named = [main] + [s for s in ("test", "validation") if s in own and s != main]
    parts = {s: _open(builder, name, s, directory) for s in named}
    source = Records(list(parts.values()), field, label, image_size)
    splits = _splits({s: len(p) for s, p in parts.items()}, main, seed)
    some = splits["train"][permutation((seed, 3), len(splits["train"]))[:FIT_ITEMS]]
    sample = np.stack([source[int(i)]["x"] for i in some])
    check_finite(f"tfds:{name}", "x", sample, some)
    classes = features["label"].num_classes if label else None
    names = getattr(features["label"], "names", None) if label else None
    return Dataset(
        f"tfds:{name}",
        {},
        splits,
        fit_transform(sample),
        source=source,
        num_classes=classes,
        labels=tuple(names) if names else None,
        licence=_licence(builder),
    )


def prepare(name: str, directory: str | os.PathLike[str] | None = None, *, timeout: Scalar = 3600) -> pathlib.Path:
    """Download a TFDS set and write it as ArrayRecord files, which are read without TensorFlow afterwards.

    Args: name: 'mnist', 'tfds:mnist' or 'mnist:config'.   directory: default that of TFDS.   timeout: seconds until the
        download is given up.
    Returns: the folder of the prepared set.
    Raises: DataError: unknown name, TensorFlow missing, no network, the download failed or took too long.
    """
    name = name.removeprefix("tfds:")
    builder = _builder(name, directory)
    path = pathlib.Path(builder.data_dir)
    with _only_errors():
        if builder.is_prepared():
            return path
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"preparing tfds:{name} needs TensorFlow, which is not installed: pip install 'diffjax[tf]'. Reading a "
            "prepared set does not need it"
        )
    _check_network(name, list(getattr(builder, "url_infos", None) or {}))
    command = [sys.executable, "-c", PREPARE, name.replace(":", "/"), str(directory or "")]
    try:
        # Standard error is passed on, for its progress bars; the last line of standard output says why it failed.
        done = subprocess.run(command, timeout=timeout, stdout=subprocess.PIPE, text=True, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(
            f"preparing tfds:{name} took more than {timeout:.0f} s and was stopped; pass a longer timeout= to go on"
        ) from None
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no message"]
        raise DataError(f"preparing tfds:{name} failed: {lines[-1][:400]}")
    return path


@_only_errors()
def _builder(name: str, directory: str | os.PathLike[str] | None) -> Any:
    """The TFDS builder of `NAME[:config]`, with short errors."""
    import tensorflow_datasets as tfds

    base, _, config = name.partition(":")
    if not base:
        raise DataError("give a name, as in tfds:mnist or tfds:NAME:config")
    data_dir = None if directory is None else os.fspath(directory)
    try:
        return tfds.builder(name.replace(":", "/"), data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        close = difflib.get_close_matches(base, tfds.list_builders(with_community_datasets=False), 4, 0.5)
        hint = f"did you mean {', '.join(f'tfds:{c}' for c in close)}?" if close else "see the TFDS catalogue for names"
        raise DataError(f"no TFDS set is called {base!r}; {hint}") from None
    except ValueError as error:
        if not config:
            raise DataError(f"tfds:{name} cannot be opened: {str(error)[:400]}") from None
        configs = sorted(getattr(tfds.builder_cls(base), "builder_configs", {}))
        close = difflib.get_close_matches(config, configs, 4, 0.4) or configs[:8]
        raise DataError(
            f"tfds:{base} has no configuration {config!r}; close are {', '.join(close) or 'none'}"
        ) from None
    except ImportError as error:
        raise DataError(f"tfds:{name} needs a package that is missing: {error}; pip install 'diffjax[tf]'") from None


@_only_errors()
def _open(builder: Any, name: str, split: str, directory: Any) -> Any:
    """The random-access source of one split, without any download."""
    try:
        source = builder.as_data_source(split)
        len(source)
        return source
    except (AssertionError, OSError, ValueError, KeyError, NotImplementedError) as error:
        if builder.is_prepared() and isinstance(error, NotImplementedError):
            raise DataError(
                f"tfds:{name} under {builder.data_dir} was prepared in a format without random access; remove that "
                f"folder and run: diffjax data prepare {name}"
            ) from None
        if builder.is_prepared():
            raise DataError(f"split {split!r} of tfds:{name} cannot be read: {str(error)[:300]}") from None
        where = f" --directory {os.fspath(directory)}" if directory is not None else ""
        raise DataError(
            f"tfds:{name} is not prepared under {_root(builder)}; run: pip install 'diffjax[tf]' and "
            f"diffjax data prepare {name}{where} (needs network)"
        ) from None


def _is_numeric(feature: Any) -> bool:
    """Whether a feature is one array of numbers, not text or a nested structure."""
    return not isinstance(feature.np_dtype, dict) and np.dtype(feature.np_dtype).kind in "uif"


def _root(builder: Any) -> pathlib.Path:
    """The folder that holds the versions of a set."""
    return pathlib.Path(builder.data_dir).parent


def _splits(sizes: dict[str, int], main: str, seed: int) -> dict[str, np.ndarray]:
    """The set's own splits, and the missing ones cut from its train items, which come first."""
    cut = split_indices(sizes[main], seed=seed)
    start = sizes[main]
    for split, size in list(sizes.items())[1:]:
        cut["train"] = np.concatenate([cut["train"], cut[split]])
        cut[split], start = np.arange(start, start + size), start + size
    return cut


def _fit(x: np.ndarray, image_size: int) -> np.ndarray:
    """Centre crop and resize of one uint8 picture [H, W, C]."""
    from PIL import Image

    if x.dtype != np.uint8 or x.shape[-1] not in (1, 3):
        raise DataError(f"only uint8 pictures with 1 or 3 channels are resized; got {x.dtype} {x.shape}")
    picture = Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
    out = np.array(centre_crop(picture, image_size))
    return out[..., None] if x.shape[-1] == 1 else out


def _licence(builder: Any) -> str:
    text = str(getattr(builder.info.redistribution_info, "license", "") or "").strip()
    return text or f"see {builder.info.homepage}" if builder.info.homepage else text or "not stated"


def _check_network(name: str, urls: list[str]) -> None:
    """Fail within seconds where no server of the set can be reached; TFDS itself would retry for minutes."""
    hosts = {(p.hostname, p.port or (443 if p.scheme == "https" else 80)) for p in map(urllib.parse.urlparse, urls)}
    hosts = sorted((h, p) for h, p in hosts if h)
    if not hosts or any(k in urllib.request.getproxies() for k in ("http", "https", "all")):
        return  # nothing to ask, or a proxy stands between
    for address in hosts[:3]:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except OSError as error:
            reason = error
    raise DataError(f"tfds:{name} cannot be downloaded: {hosts[0][0]} is not reachable ({reason}); check the network")
