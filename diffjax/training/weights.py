"""Weights as one safetensors file, which other libraries read too; and back into the parameters of a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.numerics import PyTree
from diffjax.training import partial
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

    Args:
        params: pytree of arrays, all of them on this process's devices.
        path: the file.
        metadata: strings, or JSON-able values; `format` and `sha256` join.
        dtype: for floating-point arrays, such as `jnp.bfloat16`; default as they are. Others keep theirs.

    Raises: ValueError: no arrays; arrays that other processes hold; a dtype that is not floating point.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = export_safetensors({"out": {"w": np.ones((2, 3), np.float32)}}, folder + "/a.safetensors")
        ...     load_safetensors(file).params["out/w"].shape
        (2, 3)
    """
    from safetensors.numpy import save_file

    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be of floating point, such as float32 or bfloat16; got {np.dtype(dtype)}")
    leaves = dict(partial.named(params))
    if not leaves:
        raise ValueError("params must hold at least one array; got none")
    far = [name for name, a in leaves.items() if isinstance(a, jax.Array) and not a.is_fully_addressable]
    if far:
        raise ValueError(
            f"{far[0]} and {len(far) - 1} more arrays lie on other processes; export from a checkpoint with one process"
        )
    arrays = {name: np.asarray(_cast(np.asarray(leaves[name]), dtype), order="C") for name in sorted(leaves)}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    text |= {"format": str(FORMAT), "library": "diffjax"}
    text["sha256"] = _digest(arrays, text)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(arrays, temporary, text)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if type(error).__name__ == "SafetensorError":  # of the file system: it knows no other
            raise OSError(f"{path} could not be written: {first_line(error)}") from None
        raise
    return path


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
    path = pathlib.Path(path)
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    if metadata.get("library") == "diffjax":
        digest = metadata.pop("sha256", None)
        if digest != _digest(arrays, metadata):
            raise CheckpointError(f"{path} is damaged: it has changed since it was written (SHA-256 differs)")
        if int(metadata["format"]) > FORMAT:
            raise CheckpointError(
                f"{path} has format {metadata['format']}, written by a newer diffjax; this one reads format {FORMAT}. "
                "Update diffjax to use it"
            )
    if template is None:
        return Weights(arrays, metadata, (), ())
    match = partial.match(partial.outline(arrays), template, renames=renames, strict=strict, source=str(path))

    def leaf(name: str, target: Any) -> Any:
        if name not in match.found:
            return target
        a = _cast(arrays[match.found[name]], target.dtype)
        sharding = getattr(target, "sharding", None)
        if sharding is None:
            return a
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    leaves = [leaf(name, target) for name, target in partial.named(template)]
    return Weights(jax.tree.unflatten(jax.tree.structure(template), leaves), metadata, match.missing, match.unused)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """The open file, with our errors."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or damaged: {first_line(error)}") from None


def _cast(a: np.ndarray, dtype: Any) -> np.ndarray:
    return a if dtype is None or not jnp.issubdtype(a.dtype, jnp.floating) else a.astype(dtype)


def _digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of names, dtypes, shapes and values, and of the metadata."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, a in arrays.items():
        found.update(f"{name} {a.dtype} {a.shape}\n".encode())
        found.update(np.asarray(a, order="C").reshape(-1).view(np.uint8))
    return found.hexdigest()
