"""What several tests of the command line share."""

import json
import pathlib

import jax
import numpy as np
from PIL import Image

import diffjax

TINY = (
    "--model.width=16 --model.depth=1 --training.steps=30 --training.batch-size=16 --training.save-every=10 "
    "--training.log-every=5 --training.sample-every=15 --sampler.seeds=1 --sampler.steps=3"
).split()  # fmt: skip


def png_size(path):
    """(width, height) of a picture."""
    with Image.open(path) as picture:
        return picture.size


def losses(folder):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]


def same_leaves(a, b, weights, **tolerance):
    """The parameters of two runs are equal: bit for bit, or to a tolerance."""
    a, b = (diffjax.load(folder, weights=weights) for folder in (a, b))
    assert a.step == b.step
    for u, v in zip(jax.tree.leaves(a.denoiser.leaves), jax.tree.leaves(b.denoiser.leaves), strict=True):
        assert np.allclose(u, v, **tolerance) if tolerance else np.array_equal(u, v)
