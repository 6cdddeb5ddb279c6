"""Clusters of a data set: found once, saved, and cut out, so that an expert is trained on each in isolation."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax.data.dataset import DataError, Dataset

FORMAT = 1
CHUNK = 4096  # items that are read at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each item of a data set belongs to.

    Args: dataset: its name.   centers: [K, d], in the space of the features.   assignment: [N] int32 in 0..K-1, one for
    every item of every split.
    Raises: DataError: an assignment to no cluster.

    Example:
        >>> Clusters("toy", np.zeros((2, 1)), np.array([0, 1, 1], np.int32)).sizes.tolist()
        [1, 2]
    """

    dataset: str
    centers: np.ndarray
    assignment: np.ndarray

    def __post_init__(self) -> None:
        a = self.assignment
        if a.ndim != 1 or a.dtype != np.int32 or (a.size and not 0 <= a.min() <= a.max() < self.count):
            raise DataError(
                f"an assignment to {self.count} clusters is int32 [N] in 0..{self.count - 1}; got {a.dtype} {a.shape}"
                + (f" in {a.min()}..{a.max()}" if a.size else "")
            )

    @property
    def count(self) -> int:
        """The number of clusters."""
        return len(self.centers)

    @property
    def sizes(self) -> np.ndarray:
        """The items of each cluster, [K]."""
        return np.bincount(self.assignment, minlength=self.count)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file that `load_clusters` reads, whole or not at all."""
        whole = os.fspath(path)
        part = f"{whole}.{os.getpid()}.part"
        try:
            with open(part, "wb") as file:
                np.savez(file, format=FORMAT, dataset=self.dataset, centers=self.centers, assignment=self.assignment)
            os.replace(part, whole)
        finally:
            if os.path.exists(part):
                os.unlink(part)


def load_clusters(path: str | os.PathLike[str]) -> Clusters:
    """What `Clusters.save` wrote.   Raises: DataError: another kind of file, or a newer format."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as page:
            fields = {name: page[name] for name in ("format", "dataset", "centers", "assignment")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{os.fspath(path)} holds no clusters ({error}); write it with Clusters.save") from error
    if int(fields.pop("format")) != FORMAT:
        raise DataError(f"{os.fspath(path)} has another format of clusters; this version reads {FORMAT}")
    return Clusters(str(fields["dataset"]), fields["centers"], fields["assignment"])


def clusters(
    dataset: Dataset,
    count: int,
    *,
    features: Callable[[np.ndarray], Any] | None = None,
    split: str = "train",
    seed: int = 0,
) -> Clusters:
    """K-means of the features of a split (scikit-learn, the best of ten starts); every item goes to its nearest center.

    Clusters differ in size, as the data do: experts are trained for equally many steps all the same, and a router that was
    trained on the whole set knows their shares.

    Args: count: K in 1..items of the split.   features: `x [n, ...] -> [n, d]` of model coordinates, e.g. the features of
    a classifier; default the coordinates themselves.   split: what the centers are fitted to.   seed: of the starts.
    Returns: the same clusters for the same arguments.
    Raises: DataError: count out of range, features that are not [n, d] or not finite.

    Example:
        >>> from diffjax import data
        >>> found = clusters(data.load("moons", size=200), 2)
        >>> found.centers.shape, int(found.sizes.sum())
        ((2, 2), 200)
    """
    from sklearn.cluster import KMeans

    indices = dataset.split(split)
    if isinstance(count, bool) or not 1 <= count <= len(indices):
        raise DataError(f"count must be in 1..{len(indices)}, the items of split {split!r}; got {count!r}")
    parts = [np.arange(i, min(i + CHUNK, len(dataset))) for i in range(0, len(dataset), CHUNK)]
    found = np.concatenate([_features(dataset, features, part) for part in parts])
    means = KMeans(count, n_init=10, random_state=seed).fit(found[indices])
    return Clusters(dataset.name, means.cluster_centers_, means.predict(found).astype(np.int32))


def _features(dataset: Dataset, features: Callable[[np.ndarray], Any] | None, indices: np.ndarray) -> np.ndarray:
    x = dataset.transform.encode(dataset.rows(indices)["x"])
    out = np.asarray(x.reshape(len(x), -1) if features is None else features(x), np.float64)
    if out.ndim != 2 or len(out) != len(x) or not np.isfinite(out).all():
        raise DataError(f"features of {len(x)} items must be finite and [{len(x)}, d]; got shape {out.shape}")
    return out


def restrict(dataset: Dataset, found: Clusters, cluster: int) -> Dataset:
    """One cluster of a data set: the same items, transform and indices, with every split cut to the cluster.

    Model coordinates stay those of the whole set, so that the experts' predictions add up.
    Raises: DataError: clusters of another set, or one that does not exist.

    Example:
        >>> from diffjax import data
        >>> moons = data.load("moons", size=200)
        >>> found = clusters(moons, 2)
        >>> sum(len(restrict(moons, found, k).split("train")) for k in (0, 1)) == len(moons.split("train"))
        True
    """
    _check(dataset, found)
    if not 0 <= cluster < found.count:
        raise DataError(f"cluster must be in 0..{found.count - 1}; got {cluster}")
    splits = {name: s[found.assignment[s] == cluster] for name, s in dataset.splits.items()}
    # The exact densities are those of the whole set, so they do not go along.
    return dataclasses.replace(
        dataset, name=f"{dataset.name}/{cluster}", splits=splits, log_density=None, score=None, sample=None
    )


def label_clusters(dataset: Dataset, found: Clusters) -> Dataset:
    """The data set with the field `cluster` in every item, for a router to be trained on.

    Raises: DataError: clusters of another set, or a set that has this field.
    """
    _check(dataset, found)
    if "cluster" in dataset.arrays:
        raise DataError(f"data set {dataset.name!r} has a field 'cluster' already")
    return dataclasses.replace(dataset, arrays={**dataset.arrays, "cluster": found.assignment})


def _check(dataset: Dataset, found: Clusters) -> None:
    if found.dataset != dataset.name or len(found.assignment) != len(dataset):
        raise DataError(
            f"these are the clusters of {found.dataset!r} with {len(found.assignment)} items, and the data set is "
            f"{dataset.name!r} with {len(dataset)}; find the clusters of this set, with the same options"
        )
