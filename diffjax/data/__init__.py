"""Data sets, their transform to model coordinates, augmentation, endless batches, and pictures of samples."""

from diffjax.data import augment, densities, hints
from diffjax.data.clusters import Clusters, clusters, label_clusters, load_clusters, restrict
from diffjax.data.dataset import SPLITS, DataError, Dataset, DataTransform, from_arrays, split_indices
from diffjax.data.images import grid, save_png, scatter
from diffjax.data.memory import Memory, memory
from diffjax.data.pipeline import Batches, batches
from diffjax.data.registry import CATALOGUE, load, prepare

__all__ = [
    "CATALOGUE",
    "SPLITS",
    "Batches",
    "Clusters",
    "DataError",
    "DataTransform",
    "Dataset",
    "Memory",
    "augment",
    "batches",
    "clusters",
    "densities",
    "from_arrays",
    "grid",
    "hints",
    "label_clusters",
    "load",
    "load_clusters",
    "memory",
    "prepare",
    "restrict",
    "save_png",
    "scatter",
    "split_indices",
]
