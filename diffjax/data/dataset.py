"""What a data set is: named arrays or a source that reads items, fixed splits, and a transform to model coordinates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.types import Scalar

SPLITS = ("train", "validation", "classifier", "test")
FRACTIONS = {"test": 0.1, "classifier": 0.1, "validation": 0.05}  # the rest is `train`
TRANSFORM_FORMAT = 1


class DataError(ValueError):
    """A data set that cannot be found, read or used, said in one line that names the way out."""


# --------------------------------------------------------------------------------------------------------- transform


@dataclasses.dataclass(frozen=True)
class DataTransform:
    """Between raw values and model coordinates of zero mean and unit deviation.   x = (raw - mean) / std

    Args: mean, std: one number, or one per channel.   low, high: range of raw values, or None.   shape: of a raw item.
        dtype: of the raw items, "uint8" or "float32".
    Raises: ValueError: `std` not positive, or per-channel numbers that do not match the last axis of `shape`.

    Example:
        >>> transform = DataTransform(mean=8.0, std=4.0, low=0.0, high=16.0, shape=(2,))
        >>> transform.encode(np.array([[4.0, 8.0]])).tolist()
        [[-1.0, 0.0]]
        >>> transform.decode(np.array([[-1.0, 9.0]])).tolist()
        [[4.0, 16.0]]
    """

    mean: Scalar = 0.0  # or a tuple, one number per channel; so is std
    std: Scalar = 1.0
    low: Scalar = None
    high: Scalar = None
    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = np.asarray(getattr(self, name), np.float64)
            value = tuple(map(float, value)) if value.ndim else float(value)  # plain numbers: hashable, and JSON
            object.__setattr__(self, name, value)
            if isinstance(value, tuple) and self.shape[-1:] != (len(value),):
                raise ValueError(f"{name} has {len(value)} channels but an item has shape {self.shape}")
        if not np.all(np.asarray(self.std) > 0):
            raise ValueError(f"std must be positive; got {self.std}")
        if self.dtype not in ("uint8", "float32"):
            raise ValueError(f"dtype must be 'uint8' or 'float32'; got {self.dtype!r}")

    def encode(self, raw: Any) -> Any:
        """Raw values [..., *shape] to model coordinates, float32.   (raw - mean) / std

        Raises: ValueError: the trailing axes are not `shape`, for example a wrong number of channels.
        """
        raw = raw if isinstance(raw, jax.Array) else np.asarray(raw)
        self._check(raw)
        mean, std = self._numbers(raw.ndim)
        return (raw.astype(np.float32) - mean) / std

    def decode(self, x: Any) -> Any:
        """Model coordinates [..., *shape] to raw values: clipped to the range, rounded if raw items are uint8."""
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        self._check(x)
        xp = jnp if isinstance(x, jax.Array) else np
        mean, std = self._numbers(x.ndim)
        raw = x.astype(np.float32) * std + mean
        if self.low is not None or self.high is not None:
            raw = xp.clip(raw, self.low, self.high)
        return xp.clip(xp.round(raw), 0, 255).astype(np.uint8) if self.dtype == "uint8" else raw

    def _numbers(self, rank: int) -> tuple[Any, Any]:
        """`(mean, std)` in float32, shaped so that channels meet the last of `rank` axes."""
        return tuple(
            np.asarray(v, np.float32).reshape((1,) * (rank - 1) + (-1,)) if isinstance(v, tuple) else np.float32(v)
            for v in (self.mean, self.std)
        )

    def _check(self, x: Any) -> None:
        rank = len(self.shape)
        if tuple(x.shape[x.ndim - rank :]) != self.shape or x.ndim < rank:
            raise ValueError(
                f"items of shape {self.shape} were expected (batch axes first, channels last); got an array of shape "
                f"{tuple(x.shape)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """This transform as plain JSON values, with a format version."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"format": TRANSFORM_FORMAT, **fields}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> DataTransform:
        """The transform that `to_dict` wrote.   Raises: ValueError: an unknown format version or field."""
        if fields.get("format") != TRANSFORM_FORMAT:
            raise ValueError(
                f"the data transform has format {fields.get('format')!r}; this version reads {TRANSFORM_FORMAT}"
            )
        names = {f.name for f in dataclasses.fields(DataTransform)}
        unknown = sorted(set(fields) - names - {"format"})
        if unknown:
            raise ValueError(f"the data transform has unknown fields {unknown}; known are {sorted(names)}")
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "format"}
        return DataTransform(**given)


def fit_transform(x: np.ndarray, low: Scalar = None, high: Scalar = None) -> DataTransform:
    """The transform with the global mean and deviation of raw items `x`; constant data keep the deviation 1.

    Args: x: [N, ...] uint8 or float32.   low, high: range of the raw values; uint8 defaults to 0 and 255.

    Example:
        >>> fit_transform(np.array([[1.0], [3.0]], np.float32)).mean
        2.0
    """
    if x.dtype == np.uint8:
        low, high = (0.0 if low is None else low), (255.0 if high is None else high)
    mean, std = float(np.mean(x, dtype=np.float64)), float(np.std(x, dtype=np.float64))
    return DataTransform(mean, std if std > 0 else 1.0, low, high, tuple(x.shape[1:]), str(x.dtype))


# ---------------------------------------------------------------------------------------------------------- data set


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Named data with fixed splits and the transform of its items.

    `arrays` holds what is in memory, each field [N, ...]; `source`, where given, reads the rest: `source[i]` is a dict
    of the fields of item `i`. One of them gives `x`, raw, channels last; `label` is int32. `splits` are index arrays.
    `skipped` names the items that were unreadable and left out because that was asked for. The 2-D densities know their
    exact `log_density(x)` and `score(x)` in model coordinates, and `sample(key, n) -> (x, label)` draws fresh points.
    """

    name: str
    arrays: dict[str, np.ndarray]
    splits: dict[str, np.ndarray]
    transform: DataTransform
    source: Any = None
    num_classes: int | None = None
    labels: tuple[str, ...] | None = None
    licence: str = "not stated"
    skipped: tuple[str, ...] = ()
    log_density: Callable[..., Any] | None = None
    score: Callable[..., Any] | None = None
    sample: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        sizes = {k: len(v) for k, v in self.arrays.items()}
        if self.source is not None:
            sizes["source"] = len(self.source)
        if self.source is None and "x" not in self.arrays:
            raise DataError(f"data set {self.name!r} needs a field 'x'; got {sorted(self.arrays)}")
        if len(set(sizes.values())) != 1:
            raise DataError(f"the fields of data set {self.name!r} differ in length: {sizes}")
        for split, indices in self.splits.items():
            if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
                raise DataError(f"split {split!r} of {self.name!r} has an index outside [0, {len(self)})")
        for field, values in self.arrays.items():
            check_finite(self.name, field, values)
        self._check_labels()

    def __len__(self) -> int:
        return len(self.source) if self.source is not None else len(self.arrays["x"])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one item."""
        return self.transform.shape

    def split(self, name: str) -> np.ndarray:
        """The indices of a split.   Raises: DataError: no such split, or an empty one."""
        if name not in self.splits:
            raise DataError(f"data set {self.name!r} has no split {name!r}; it has {', '.join(self.splits)}")
        if self.splits[name].size == 0:
            raise DataError(f"split {name!r} of data set {self.name!r} is empty; give it at least one item")
        return self.splits[name]

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Raw items at `indices` [n], each field [n, ...].   Raises: DataError: an item is unreadable or not finite."""
        out = {k: v[indices] for k, v in self.arrays.items()}
        if self.source is not None:
            items = [self.source[int(i)] for i in indices]
            read = {k: np.stack([item[k] for item in items]) for k in items[0]}
            for field, values in read.items():
                check_finite(self.name, field, values, indices)
            out |= read
        return out

    def read(self, split: str, n: int | None = None) -> dict[str, np.ndarray]:
        """The first `n` items of a split, `x` in model coordinates.   Raises: DataError: fewer than `n` items."""
        indices = self.split(split)
        if n is not None and not 0 < n <= indices.size:
            raise DataError(f"n must be in 1..{indices.size}, the size of split {split!r} of {self.name!r}; got {n}")
        rows = self.rows(indices[:n])
        return rows | {"x": self.transform.encode(rows["x"]), "index": indices[:n].astype(np.int32)}

    def _check_labels(self) -> None:
        label = self.arrays.get("label")
        if label is None:
            return
        if label.dtype != np.int32 or label.ndim != 1:
            raise DataError(f"the labels of {self.name!r} must be int32 [N]; got {label.dtype} {label.shape}")
        if label.size and (label.min() < 0 or (self.num_classes is not None and label.max() >= self.num_classes)):
            raise DataError(
                f"the labels of {self.name!r} must be in [0, {self.num_classes}); got {label.min()}..{label.max()}"
            )


def check_finite(name: str, field: str, values: np.ndarray, indices: np.ndarray | None = None) -> None:
    """Raise a DataError that names the field and the first item which holds a NaN or an infinity."""
    if not np.issubdtype(values.dtype, np.floating):
        return
    for start in range(0, len(values), 4096):  # in chunks, so that the mask stays small
        finite = np.isfinite(values[start : start + 4096].reshape(len(values[start : start + 4096]), -1)).all(1)
        if not finite.all():
            first = start + int(np.argmin(finite))
            first = first if indices is None else int(indices[first])
            raise DataError(
                f"field {field!r} of data set {name!r} has a NaN or an infinity, first at index {first}; clean it, or "
                "pass on_error='skip' to leave such items out of an .npz"
            )


def from_arrays(
    x: np.ndarray,
    label: np.ndarray | None = None,
    *,
    name: str = "arrays",
    seed: int = 0,
    labels: tuple[str, ...] | None = None,
    licence: str = "not stated",
    low: Scalar = None,
    high: Scalar = None,
    splits: Mapping[str, np.ndarray] | None = None,
    fields: Mapping[str, np.ndarray] | None = None,
    skipped: tuple[str, ...] = (),
) -> Dataset:
    """A data set in memory with stratified splits, standardised by the mean and deviation of its train split.

    Args: x: [N, ...] channels last; uint8 stays, other numbers become float32.   label: [N] integers from 0.
        splits: name -> indices, default `split_indices` in the fractions `FRACTIONS`.   fields: further arrays [N, ...].
    Raises: DataError: too few items, fields of different length, NaN or infinity, negative labels.

    Example:
        >>> data = from_arrays(np.arange(40.0)[:, None], np.arange(40) % 2)
        >>> {k: len(v) for k, v in data.splits.items()}
        {'train': 30, 'validation': 2, 'classifier': 4, 'test': 4}
    """
    x = np.asarray(x)
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    check_finite(name, "x", x)
    arrays = {"x": x, **(fields or {})}
    if label is not None:
        arrays["label"] = np.asarray(label).astype(np.int32)
    count = len(labels) if labels else None
    if label is not None and count is None:
        count = int(arrays["label"].max(initial=-1)) + 1
    splits = split_indices(len(x), arrays.get("label"), seed=seed) if splits is None else dict(splits)
    transform = fit_transform(x[splits["train"]], low, high)
    return Dataset(name, arrays, splits, transform, num_classes=count, labels=labels, licence=licence, skipped=skipped)


# ------------------------------------------------------------------------------------------------------------ splits


def permutation(seed: Any, n: int) -> np.ndarray:
    """A permutation of `range(n)` that depends on `seed` (an integer or several) alone, for every NumPy version.

    Sorting raw bits of a counter-based generator is stable between versions; `Generator.permutation` need not be.

    Example:
        >>> permutation(0, 5).tolist() == permutation(0, 5).tolist(), sorted(permutation((0, 1), 3).tolist())
        (True, [0, 1, 2])
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(n), kind="stable")


def split_indices(
    n: int, label: np.ndarray | None = None, *, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Four disjoint splits that cover `range(n)`, each with the class proportions of the whole.

    `train` is what a model is trained on, `validation` chooses settings, `classifier` trains feature networks, and
    `test` only scores. Every prefix of a split is as balanced as the whole.
    Raises: DataError: too few items for the splits.
    """
    sizes = {k: max(1, round(f * n)) for k, f in FRACTIONS.items()} if sizes is None else dict(sizes)
    taken = sum(sizes.values())
    if n <= taken:
        raise DataError(
            f"{n} items are too few for the splits train, {', '.join(sizes)}: at least {taken + 1} are needed; add data"
        )
    order = permutation(seed, n)
    if label is not None:
        # The r-th of m members of a class gets the place (r + offset) / m: equal spacing makes every slice balanced.
        place = np.empty(n)
        for c in np.unique(label):
            members = order[label[order] == c]
            place[members] = (np.arange(len(members)) + (0.618034 * (int(c) + 1)) % 1.0) / len(members)
        order = np.argsort(place, kind="stable")
    splits, start = {}, 0
    for k in ("test", "classifier", "validation"):
        splits[k], start = order[start : start + sizes[k]], start + sizes[k]
    splits["train"] = order[start:]
    return {k: splits[k] for k in SPLITS}
