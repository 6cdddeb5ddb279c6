"""Features of weights that come from a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.metrics.classifier import load_classifier
from diffjax.metrics.features import FeatureExtractor, read_npz


def weights_file(
    path: Any,
    apply: Callable[[dict[str, Any], Any], Any] | None = None,
    name: str = "weights",
    *,
    inception: bool = False,
) -> FeatureExtractor:
    """Features of weights from an `.npz` file.   f(x) = apply(weights, x)

    Args: path: the file; read without unpickling.   apply: `(dict of arrays, x [N, ...]) -> [N, d]`; left out, the file
        must be one that `Classifier.save` wrote.   name: ends the names of its scores.   inception: the weights are
        those of Inception, so that the Frechet distance of these features is FID.
    Raises: ValueError: unreadable file, or neither `apply` nor a classifier file.
    """
    if apply is None:
        return dataclasses.replace(load_classifier(path).extractor(), name=name, inception=inception)
    weights = jax.tree.map(jnp.asarray, read_npz(path))
    return FeatureExtractor(name, partial(jax.jit(apply), weights), inception)
