"""Files of tensors in folders: alone, or in shards with their index."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffjax.training import CheckpointError
from diffjax.training.tensors import EXPORT, PICKLES, SUFFIX, Entry, Tensors, forms, read_header, write

INDEX = SUFFIX + ".index.json"
SHARD = 10 * 1000**3  # bytes of a file
STEM = "diffusion_pytorch_model"  # of the files in a folder


def open_tensors(source: Any) -> Tensors:
    """The arrays of a .safetensors file, of a folder with one or with shards and their index, or of several files.

    Args: source: a path, or a sequence of the paths of shards.
    Raises: CheckpointError: nothing there, a pickle, a damaged or truncated file, a shard that is missing, a name in two
    shards, several files and no index.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(f"{folder}/a.safetensors", {"w": np.ones((2, 3), np.float32)})
        ...     open_tensors(folder)["w"].shape
        (2, 3)
    """
    if not isinstance(source, (str, os.PathLike)):
        return _joined([pathlib.Path(path) for path in source], ", ".join(map(str, source)))
    path = pathlib.Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file or folder {path}")
    return _joined([path], str(path))


def _folder(folder: pathlib.Path) -> Tensors:
    indices = sorted(folder.glob(f"*{INDEX}"))
    files = sorted(folder.glob(f"*{SUFFIX}"))
    main = [p for p in (folder / f"{STEM}{SUFFIX}", folder / f"model{SUFFIX}") if p in files]
    if main:
        return _joined(main[:1], str(folder))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} has several indices of shards: {', '.join(p.name for p in indices)}; give the files of one of them"
        )
    if indices:
        return _indexed(indices[0])
    if len(files) == 1:
        return _joined(files, str(folder))
    if files:
        raise CheckpointError(
            f"{folder} has several files and no index (*{INDEX}): {', '.join(p.name for p in files)}. Give one of them, "
            "or all if they are shards"
        )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{folder} has pickles alone ({', '.join(pickles)}), no {SUFFIX} file. {EXPORT}")
    raise CheckpointError(f"{folder} has no {SUFFIX} file; it has {', '.join(_names(folder)) or 'nothing'}")


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())[:10]


def _indexed(index: pathlib.Path) -> Tensors:
    """The shards that an index names, which must hold what it says and no more."""
    try:
        places = dict(json.loads(index.read_bytes())["weight_map"])
        shards = sorted(set(places.values()))
        outside = [name for name in shards if pathlib.PurePath(name).name != name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards: {type(error).__name__} {error}") from None
    if outside:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(outside)}")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards that {index.name} names: {', '.join(missing)}. "
            "Get them from where the others are from"
        )
    found = _joined([index.parent / name for name in shards], str(index.parent))
    wrong = [name for name in places if name not in found or found.entries[name].path.name != places[name]]
    wrong += [name for name in found if name not in places]
    if wrong:
        raise CheckpointError(
            f"{index} does not fit its shards, beginning with {', '.join(sorted(wrong)[:6])}: they are of different models"
        )
    return found


def _joined(paths: Iterable[pathlib.Path], source: str) -> Tensors:
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        own, about = read_header(path)
        for name in own:
            if name in entries:
                raise CheckpointError(f"{name} is in two shards: {entries[name].path.name} and {path.name} of {source}")
        entries |= own
        metadata |= about
    return Tensors(entries, metadata, source)


def write_folder(
    folder: Any, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None, *, shard: int = SHARD
) -> None:
    """Write `diffusion_pytorch_model.safetensors` into a folder, or its shards and their index if it is longer than `shard`.

    Args: folder: it must exist.   shard: bytes; a longer array has a file for itself.
    """
    if shard < 1:
        raise ValueError(f"shard must be a positive number of bytes; got {shard}")
    groups: list[list[str]] = [[]]
    filled = total = 0
    for name, (dtype, shape) in forms(arrays).items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > shard:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled, total = filled + size, total + size
    folder = pathlib.Path(folder)
    if len(groups) == 1:
        write(folder / f"{STEM}{SUFFIX}", arrays, metadata)
        return
    files = [f"{STEM}-{i:05d}-of-{len(groups):05d}{SUFFIX}" for i in range(1, len(groups) + 1)]
    for file, names in zip(files, groups, strict=True):
        write(folder / file, _Part(arrays, names), metadata)
    places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{STEM}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class _Part(Mapping):
    """Some names of a mapping, without asking for their values."""

    whole: Mapping[str, Any]
    names: list[str]

    def __getitem__(self, name: str) -> Any:
        return self.whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
