"""Files of tensors (.safetensors), alone or in shards: read array by array from the disk, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diffjax.training import CheckpointError

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
HEADER = 100_000_000  # bytes of a header at most
SHARD = 10 * 1000**3  # bytes of a file
STEM = "diffusion_pytorch_model"  # of the files in a folder
EXPORT = (
    "Pickles can run any code, so they are never opened. Export it where it is trusted, in Python with PyTorch: "
    'safetensors.torch.save_file(torch.load("FILE", weights_only=True), "FILE.safetensors"), or '
    "model.save_pretrained(folder, safe_serialization=True)"
)


class Entry(NamedTuple):
    """Where an array is."""

    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file


@dataclasses.dataclass(frozen=True)
class Tensors(Mapping):
    """Names and arrays of files, lazily: an array is mapped from the disk when asked for, and released when dropped.

    Arrays are read-only views of the file; copy what is to stay. bfloat16 and float8 have the types of `ml_dtypes`.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    source: str  # for messages

    def __getitem__(self, name: str) -> np.ndarray:
        path, dtype, shape, offset = self.entries[name]
        if math.prod(shape) == 0:
            return np.zeros(shape, dtype)
        try:
            return np.asarray(np.memmap(path, dtype, "r", offset, shape))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} has changed since it was opened: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by name; reads nothing."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(e.shape) * e.dtype.itemsize for e in self.entries.values())


# ------------------------------------------------------------------------------------------------------------ reading


def open_tensors(source: Any) -> Tensors:
    """The arrays of a .safetensors file, of a folder with one or with shards and their index, or of several files.

    Args: source: a path, or a sequence of the paths of shards.
    Raises: CheckpointError: nothing there, a pickle, a damaged or truncated file, a shard that is missing, a name in two
    shards, several files and no index.

    Example:
        >>> import tempfile
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


def read_header(path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where the arrays of one file are, and its metadata; all of it checked against the length of the file.

    Raises: CheckpointError: no such file, a pickle, truncated, or no safetensors file.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle, not {SUFFIX}. {EXPORT}")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", begin):
            raise CheckpointError(f"{path} is a pickle in spite of its name. {EXPORT}")
        if len(begin) < 8:
            raise CheckpointError(f"{path} is truncated: it has {size} bytes")
        length = struct.unpack("<Q", begin)[0]
        if length > min(size - 8, HEADER):
            raise CheckpointError(
                f"{path} is truncated or no {SUFFIX} file: its header has {length} bytes, the file {size}. Get it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {}) or {}
        if not all(isinstance(a, str) for pair in metadata.items() for a in pair):
            raise ValueError("metadata that are not strings")
        entries = {name: _entry(path, name, about, 8 + length) for name, about in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not of {SUFFIX}: {error}") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if entry.offset != end:
            raise CheckpointError(f"{path} has a gap or an overlap before {name}, so it is damaged")
        end += math.prod(entry.shape) * entry.dtype.itemsize
    if end != size:
        what = "truncated" if end > size else "damaged"
        raise CheckpointError(f"{path} is {what}: its arrays end at byte {end}, the file at {size}. Get it again")
    return entries, metadata


def _entry(path: pathlib.Path, name: str, about: Any, start: int) -> Entry:
    shape, (begin, end) = about["shape"], about["data_offsets"]
    if about["dtype"] not in DTYPES:
        raise ValueError(f"{name} has dtype {about['dtype']!r}; known are {', '.join(DTYPES)}")
    numbers = [*shape, begin, end]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name} has shape {shape} from {begin} to {end}")
    dtype = np.dtype(DTYPES[about["dtype"]])
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for shape {shape} of {dtype}")
    return Entry(path, dtype, tuple(shape), start + begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that comes twice")
    return found


# ------------------------------------------------------------------------------------------------------------ writing


def write(path: Any, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write one file, which gets its name only when it is complete; arrays are asked for one after the other.

    Raises: OSError: it could not be written; then there is none.   ValueError: an array of a dtype that the format lacks.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in _outline(arrays).items():
        if dtype not in NAMES:
            raise ValueError(f"{SUFFIX} has no dtype {dtype}, that of {name}; it has {', '.join(map(str, NAMES))}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that arrays begin at multiples of eight bytes
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in arrays:
                file.write(np.asarray(arrays[name], order="C").reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    for name, (dtype, shape) in _outline(arrays).items():
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


def _outline(arrays: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (np.dtype(a.dtype), tuple(a.shape)) for name, a in arrays.items()}


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
