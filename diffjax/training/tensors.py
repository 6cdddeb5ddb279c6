"""One file of tensors (.safetensors): its header checked, its arrays mapped from the disk, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diffjax.training.manifest import CheckpointError

SUFFIX = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
HEADER = 100_000_000  # bytes of a header at most
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
    for name, (dtype, shape) in forms(arrays).items():
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say of which file
            error.filename = str(path)
        raise


def forms(arrays: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The dtypes and shapes of arrays by name."""
    return {name: (np.dtype(a.dtype), tuple(a.shape)) for name, a in arrays.items()}
