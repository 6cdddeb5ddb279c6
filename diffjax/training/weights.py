"""Weights as one safetensors file, which other libraries read too; and back into the parameters of a model."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.numerics import PyTree
from diffjax.training import hosts, partial, tensors
from diffjax.training.manifest import CheckpointError, first_line

FORMAT = 1  # of the metadata


class Weights(NamedTuple):
    """What a safetensors file gives back.   `missing` kept the template's values, `unused` found no place in it."""

    params: PyTree
    metadata: dict[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def export_safetensors(
    params: PyTree, path: Any, metadata: Mapping[str, Any] | None = None, *, dtype: Any = None
) -> pathlib.Path:
    """Write `params` under the names `a/b/c`; the file gets its name only when it is complete.

    With several processes all of them must call; process 0 collects the arrays, one after the other, and writes.

    Args:
        params: pytree of arrays, of any sharding.
        path: the file.
        metadata: strings, or JSON-able values; `format`, `library` and `sha256` join.
        dtype: for floating-point arrays, such as `jnp.bfloat16`; default as they are. Others keep theirs.

    Raises:
        ValueError: no arrays, or a dtype that is not floating point.
        OSError: the file could not be written; then there is none, on every process alike.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = export_safetensors({"out": {"w": np.ones((2, 3), np.float32)}}, folder + "/a.safetensors")
        ...     load_safetensors(file).params["out/w"].shape
        (2, 3)
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be of floating point, such as float32 or bfloat16; got {np.dtype(dtype)}")
    leaves = dict(partial.named(params))
    if not leaves:
        raise ValueError("params must hold at least one array; got none")
    arrays = {}
    for name in sorted(leaves):
        a = hosts.gather(leaves[name])
        if hosts.leader():
            arrays[name] = np.asarray(_cast(a, dtype), order="C")
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    text |= {"format": str(FORMAT), "library": "diffjax"}
    path = pathlib.Path(path)
    hosts.first(lambda: _write(path, arrays, text))
    return path


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray], text: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors.write(path, arrays, text | {"sha256": _digest(arrays.items(), text)})


class WeightsFile:
    """An open safetensors file of any library, whose arrays stay on disk until they are read.

    `shapes` of the arrays by name, `metadata`, and `ours`: whether it says that diffjax wrote it.

    Args: verify: compare the checksum of a file of ours.
    Raises: CheckpointError: no such file, damaged, or of a newer version.
    """

    def __init__(self, path: Any, *, verify: bool = True) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"there is no file {self.path}")
        try:
            entries, metadata = tensors.read_header(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {first_line(error)}") from None
        except CheckpointError as error:
            why = str(error).removeprefix(f"{self.path} ")
            raise CheckpointError(f"{self.path} is no safetensors file, or damaged: it {why}") from None
        self._arrays = tensors.Tensors(dict(sorted(entries.items())), metadata, str(self.path))
        self.metadata: dict[str, str] = dict(metadata)
        self.shapes = self._arrays.shapes
        self.ours = self.metadata.get("library") == "diffjax"
        if self.ours:
            digest = self.metadata.pop("sha256", None)
            if verify and digest != _digest(((name, self.read(name)) for name in self.shapes), self.metadata):
                raise CheckpointError(f"{self.path} is damaged: it has changed since it was written (SHA-256 differs)")
            if int(self.metadata["format"]) > FORMAT:
                raise CheckpointError(
                    f"{self.path} has format {self.metadata['format']}, written by a newer diffjax; this one reads format "
                    f"{FORMAT}. Update diffjax to use it"
                )

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """A copy of one array, or of the part of it at `index`, a tuple of slices."""
        return np.array(self._arrays[name][index], order="C")

    def outline(self) -> dict[str, str]:
        """`name -> "dtype[shape]"` of every array, see `partial.outline`; reads nothing."""
        return partial.outline(
            {name: jax.ShapeDtypeStruct(e.shape, e.dtype) for name, e in self._arrays.entries.items()}
        )


def load_safetensors(
    path: Any, template: PyTree | None = None, *, renames: Mapping[str, str] | None = None, strict: bool = True
) -> Weights:
    r"""The arrays of a safetensors file, in the shapes, dtypes and shardings of `template`.

    Args:
        path: the file, of any library.
        template: parameters, or `ShapeDtypeStruct`s; default none, which gives a flat dict of NumPy arrays.
        renames: regular expression -> replacement on the names in the file, such as `{r"\.": "/"}`; applied in turn.
        strict: see `partial.match`.

    Raises:
        CheckpointError: no such file, damaged, of a newer version, or arrays that do not fit the template.
    """
    file = WeightsFile(path)
    if template is None:
        return Weights({name: file.read(name) for name in file.shapes}, file.metadata, (), ())
    match = partial.match(file.outline(), template, renames=renames, strict=strict, source=str(path))

    def leaf(name: str, target: Any) -> Any:
        if name not in match.found:
            return target
        a = _cast(file.read(match.found[name]), target.dtype)
        sharding = getattr(target, "sharding", None)
        if sharding is None:
            return a
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    leaves = [leaf(name, target) for name, target in partial.named(template)]
    return Weights(jax.tree.unflatten(jax.tree.structure(template), leaves), file.metadata, match.missing, match.unused)


def _cast(a: np.ndarray, dtype: Any) -> np.ndarray:
    return a if dtype is None or not jnp.issubdtype(a.dtype, jnp.floating) else a.astype(dtype)


def _digest(arrays: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of the metadata, and of names, dtypes, shapes and values, in the order of the names."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, a in arrays:
        found.update(f"{name} {a.dtype} {a.shape}\n".encode())
        found.update(np.asarray(a, order="C").reshape(-1).view(np.uint8))
    return found.hexdigest()
