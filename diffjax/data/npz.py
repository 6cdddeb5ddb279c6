"""Arrays that a user brings: `arrays:FILE.npz` with `x`, optionally `label`, `labels` and further fields."""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib

import numpy as np

from diffjax.data.dataset import DataError, Dataset, from_arrays


def arrays(path: str | os.PathLike[str], *, seed: int = 0, on_error: str = "stop") -> Dataset:
    """A data set from an `.npz` file, split at random (stratified by label) and standardised.

    Keys: `x` [N, ...] numbers, channels last; `label` [N] integers from 0; `labels` [K] names; others [N, ...] are kept
    as further fields. With `on_error='skip'` items with a NaN or an infinity are left out and listed in `skipped`.
    Raises: DataError: no such file, not an .npz, a field that needs pickle, no `x`, lengths or types that do not fit.
    """
    path = pathlib.Path(path).expanduser()
    fields = _read(path)
    if "x" not in fields:
        raise DataError(
            f"{path} has no array 'x'; it has {sorted(fields)}. Write it with np.savez(file, x=..., label=...)"
        )
    x = fields.pop("x")
    if x.ndim < 2:
        raise DataError(f"x in {path} must be [N, ...] with at least two axes; got shape {x.shape}. Use x[:, None]")
    names = fields.pop("labels", None)
    label = fields.get("label")
    if label is not None and (not np.issubdtype(label.dtype, np.integer) or label.ndim != 1):
        raise DataError(f"label in {path} must be integers [N]; got {label.dtype} of shape {label.shape}")
    for key, value in {"x": x, **fields}.items():
        if not (
            np.issubdtype(value.dtype, np.integer) or np.issubdtype(value.dtype, np.floating) or value.dtype == bool
        ):
            raise DataError(f"{key} in {path} has type {value.dtype}; real numbers are needed")
        if value.shape[:1] != x.shape[:1]:
            raise DataError(f"{key} in {path} has shape {value.shape}, but x has {len(x)} items: lengths must agree")
    kept, skipped = _finite({"x": x, **fields}, on_error)
    x, fields = kept.pop("x"), kept
    label = fields.pop("label", None)
    extra = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in fields.items()}
    return from_arrays(
        x,
        label,
        name=f"arrays:{path.name}",
        seed=seed,
        labels=None if names is None else tuple(map(str, names.tolist())),
        fields=extra,
        skipped=skipped,
    )


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the file, without ever unpickling."""
    if not path.is_file():
        raise DataError(f"no such file: {path}; give the path of an .npz, as in arrays:data/points.npz")
    try:
        with open(path, "rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DataError(f"{path} is a single array, not an .npz; write it with np.savez(file, x=array)")
            fields = {}
            for key in file.files:
                try:
                    fields[key] = file[key]
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
                    raise DataError(
                        f"array {key!r} in {path} holds Python objects and would need pickle, which can run code: "
                        "refused. Save plain numbers (a dtype other than object)"
                    ) from None
            return fields
    except DataError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        needs_pickle = "pickle" in str(error)
        reason = "it is a pickle or no NumPy file; pickles are refused" if needs_pickle else str(error)
        raise DataError(
            f"{path} cannot be read as .npz: {reason}. Write it with np.savez(file, x=..., label=...)"
        ) from None


def _finite(fields: dict[str, np.ndarray], on_error: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The fields without items that are not finite, and what was left out; only if `on_error` is 'skip'."""
    if on_error != "skip":
        return fields, ()
    good = np.ones(len(fields["x"]), bool)
    for value in fields.values():
        if np.issubdtype(value.dtype, np.floating):
            good &= np.isfinite(value.reshape(len(value), -1)).all(1)
    return {k: v[good] for k, v in fields.items()}, tuple(f"item {i}" for i in np.flatnonzero(~good))
