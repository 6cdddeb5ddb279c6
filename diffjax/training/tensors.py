"""One file of named arrays in the safetensors format, written leaf by leaf, whole or not at all, with its own checksum.

For snapshots of sharded averages: neither the writer nor the reader ever holds more than one leaf, and the leaves may lie
on several processes, where `training.weights` takes and gives whole trees of one process.

The file is `length of the header (8 bytes) | header (JSON) | data`. The header's metadata hold the SHA-256 of header and
data, taken with zeros in its own place, so that any changed byte is found. Any reader of safetensors reads the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.numerics import PyTree

FORMAT = 1
SUFFIX = ".safetensors"
DTYPES = {  # safetensors' names
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(d): name for name, d in DTYPES.items()}
BLANK = "0" * 64
CHUNK = 1 << 24


class DamagedError(ValueError):
    """A file of arrays that is cut off, changed, or of a newer version."""


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from `path -> leaf` with "/" between the parts of a path.

    Example:
        >>> nested({"a/w": 1, "a/b": 2})
        {'a': {'w': 1, 'b': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return tree


def whole(a: Any) -> np.ndarray:
    """The values of an array on the host; where its parts lie on other processes, all of them must call this."""
    if isinstance(a, jax.Array) and not a.is_fully_addressable:
        if a.is_fully_replicated:
            return np.asarray(a.addressable_data(0))
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(a, tiled=True))
    return np.asarray(a)


def write(path: pathlib.Path, leaves: Mapping[str, Any], meta: Mapping[str, str], *, dtype: Any = None) -> None:
    """Write named arrays; only process 0 writes, one leaf at a time in its memory, but every process must call.

    Args: leaves: name -> array, of any sharding.   meta: strings kept in the header.   dtype: of floating arrays; default
        their own.
    Raises: OSError: the file could not be written, a full disk for example; then there is no file.
    """
    kind = lambda a: np.dtype(dtype if dtype is not None and jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)
    header, end = {}, 0
    for name, a in leaves.items():
        start, end = end, end + int(np.prod(a.shape, dtype=np.int64)) * kind(a).itemsize
        header[name] = {"dtype": NAMES[kind(a)], "shape": list(a.shape), "data_offsets": [start, end]}
    header = {"__metadata__": {**meta, "format": str(FORMAT), "sha256": BLANK}, **header}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, failure, file = hashlib.sha256(text), None, None
    temporary = path.with_name(f".{path.name}.tmp")
    if jax.process_index() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("wb")
            file.write(struct.pack("<Q", len(text)) + text)
        except OSError as error:
            failure = error
    for a in leaves.values():
        host = whole(a)  # after a failure too: the other processes take part
        if file is not None and failure is None:
            try:
                data = np.ascontiguousarray(host.astype(kind(a), copy=False)).tobytes()
                digest.update(data)
                file.write(data)
            except OSError as error:
                failure = error
    if jax.process_index() != 0:
        return
    try:
        if failure is not None:
            raise failure
        file.seek(8 + text.index(BLANK.encode()))
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
    except OSError:
        try:
            if file is not None:
                file.close()  # writes what is buffered, and may fail like the rest
        except OSError as error:
            failure = failure or error
        temporary.unlink(missing_ok=True)
        raise


class TensorFile:
    """A file that `write` made: `meta`, `shapes`, and `read(name, index)`; the data stay on disk until they are read.

    Raises: DamagedError: no such file, or a header that cannot be right.
    """

    def __init__(self, path: Any):
        self.path = pathlib.Path(path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size:
                    raise ValueError("the header is longer than the file")
                self._text = file.read(length)
            header = json.loads(self._text)
            self.meta: dict[str, str] = dict(header.pop("__metadata__"))
            self._where = {
                name: (np.dtype(DTYPES[e["dtype"]]), tuple(e["shape"]), 8 + length + e["data_offsets"][0])
                for name, e in header.items()
            }
            self.size = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
            version = int(self.meta["format"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise DamagedError(f"{self.path} cannot be read: {error}") from None
        if version > FORMAT:
            raise DamagedError(f"{self.path} has format {version}; this diffjax reads up to {FORMAT}. Upgrade diffjax")
        if size != self.size:
            raise DamagedError(f"{self.path} has {size} bytes instead of {self.size}")
        self._data = np.memmap(self.path, np.uint8, "r")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        return {name: shape for name, (_, shape, _) in self._where.items()}

    def check(self) -> None:
        """Compare the checksum.   Raises: DamagedError: a byte has changed."""
        stored = self.meta.get("sha256", "")
        digest = hashlib.sha256(self._text.replace(stored.encode(), BLANK.encode()) if len(stored) == 64 else b"")
        for start in range(8 + len(self._text), self.size, CHUNK):
            digest.update(self._data[start : min(start + CHUNK, self.size)])
        if digest.hexdigest() != stored:
            raise DamagedError(f"{self.path} has changed since it was written (SHA-256 differs)")

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """A copy of (a part of) one array.   Raises: KeyError: there is none of that name."""
        dtype, shape, start = self._where[name]
        count = int(np.prod(shape, dtype=np.int64))
        return np.array(self._data[start : start + count * dtype.itemsize].view(dtype).reshape(shape)[index])


def assemble(like: PyTree, leaf: Callable[[str, Any, Any], Any]) -> PyTree:
    """A tree of `like`'s shapes, dtypes and shardings from `leaf(name, index, shape)`, which makes parts on the host."""

    def make(path: Any, a: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        part = lambda index: np.asarray(leaf(name, index, a.shape)).astype(a.dtype)
        sharding = getattr(a, "sharding", None)
        return part(...) if sharding is None else jax.make_array_from_callback(a.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(make, like)
