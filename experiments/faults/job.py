"""The run that faults are injected into: an MLP on a mixture of Gaussians with Adam, an average and the data pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax import data, networks, training
from diffjax.cli import build, config
from diffjax.cli import model as models
from diffjax.training import CheckpointStore, FitResult, Hook, TrainState
from experiments.__main__ import CACHE

SHAPE, CLASSES, BATCH = (2,), 8, 64


class Job(NamedTuple):
    """What `training.fit` takes."""

    state: TrainState
    train_step: Any
    batches: Callable[[], Any]


def cache() -> None:
    """Keep compiled programs between processes."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def make(width: int = 192) -> Job:
    """The job; at width 192 its state has 8 MB."""
    cache()
    settings = config.preset("gaussians")
    rate = config.Training(steps=10**6, batch_size=BATCH, decay="constant")
    optimizer, averages = build.optimiser(rate)[0], build.averages(rate)
    module = models.network(config.Model("mlp", width=width, depth=2), SHAPE, CLASSES)
    params = networks.initialise(module, jax.random.key(0), *build.zeros(SHAPE, CLASSES, 0))
    settings = config.Train("gaussians", model=config.Model("mlp", width=width, depth=2), process=settings.process)
    train_step = training.make_train_step(
        build.model(settings, SHAPE, CLASSES, training=True), build.loss(settings.objective, CLASSES), optimizer,
        emas=averages,
    )  # fmt: skip
    dataset = data.load("gaussians")
    return Job(
        training.init_state(params, optimizer, 0, emas=averages),
        train_step,
        lambda: data.batches(dataset, "train", BATCH, seed=0),
    )


def train(
    job: Job,
    folder: Any,
    steps: int,
    *,
    save_every: int,
    hooks: Sequence[Hook] | Callable[[CheckpointStore], Sequence[Hook]] = (),
    **options: Any,
) -> FitResult:
    """Train in a folder, from its newest checkpoint if it has one; hooks may be made from its store."""
    with (
        CheckpointStore(pathlib.Path(folder) / "checkpoints", **options) as store,
        contextlib.closing(job.batches()) as stream,
    ):
        return training.fit(
            job.state, job.train_step, stream, steps=steps, store=store, save_every=save_every,
            resume=bool(store.steps()), hooks=hooks(store) if callable(hooks) else hooks, stream=io.StringIO(), log_every=8,
            metrics_file=pathlib.Path(folder) / "metrics.jsonl", devices=jax.devices()[:1],
        )  # fmt: skip


def digest(state: Any) -> str:
    """A fingerprint of every bit of a state."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def environment() -> dict[str, str]:
    """For a subprocess of a fault: one device, and this copy of the library first."""
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    cached = jax.config.jax_compilation_cache_dir
    return {
        **os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": " ".join(w for w in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in w),
        **({} if cached is None else {"JAX_COMPILATION_CACHE_DIR": str(cached)}),
    }  # fmt: skip
