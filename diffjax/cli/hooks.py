"""What `diffjax train` does every so many steps beside training: pictures of samples, activations, snapshots of averages."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax import networks, numerics, prediction
from diffjax.cli import build, config, console, hinted
from diffjax.cli import model as models
from diffjax.cli.sample import choose_labels, draw, drawable, save_grid
from diffjax.training import Hook, hosts, snapshots

COLUMNS = 10  # of a grid of pictures, and its rows
POINTS = 4096  # of a scatter plot
SNAPSHOTS = 64  # of averages, over a run
WATCHED = 64  # items on which activations are measured


def of(
    settings: config.Train, folder: pathlib.Path, dataset: Any, denoiser: Any, solver: Any, failures: list[str],
    view: Any = None,
) -> list[Hook]:  # fmt: skip
    """The hooks of a run.   denoiser: of a state.   failures: gets what could not be written.   view: see `pictures`"""
    t = settings.training
    found = []
    if view is not None or drawable(build.shape_of(dataset)):
        drawn = pictures(settings, folder, dataset, denoiser, solver, failures, view)
        found.append(Hook(t.sample_every, drawn, "samples"))
    if t.magnitudes:
        found.append(Hook(t.sample_every, activations(settings, dataset), "activations"))
    if t.ema_power:
        every = t.snapshot_every or max(1, t.steps // SNAPSHOTS)
        averages = build.averages(t)
        found.append(snapshots.hook(folder / "ema", every, averages, dtype=t.snapshot_dtype, say=console.note))
    return found


def pictures(
    settings: config.Train, folder: pathlib.Path, dataset: Any, denoiser: Any, solver: Any, failures: list[str],
    view: Any = None,
) -> Any:  # fmt: skip
    """Draws the same samples every time, into RUN/samples/.   view: of latents, `(decode, transform)` of the pictures"""
    shape, classes = build.shape_of(dataset), dataset.num_classes
    columns = min(classes or COLUMNS, 2 * COLUMNS)
    show = COLUMNS * columns if len(shape) == 3 else POINTS
    decode, transform = (lambda x: x, dataset.transform) if view is None else view
    labels = choose_labels(None, show, min(classes, columns) if classes and len(shape) == 3 else classes)
    hint, own = hinted.of(settings.adapter), {}
    if hint is not None:
        asked = hinted.held_out(hint, dataset, show, labels)
        own = {name: hinted.told(adapter, asked) for name, adapter in build.adapters(settings.adapter).items()}

    def samples(step: int, state: Any) -> None:
        trained = denoiser(state)  # gathered by all processes
        if not hosts.leader():
            return
        guided = build.guided(trained, settings.sampler.guidance)
        x = draw(jax.random.key(settings.seed), guided, solver, show, shape, labels, own=own, title=None)
        path = folder / "samples" / f"step_{step:07d}.png"
        kept(folder, f"the samples of step {step}", lambda: save_grid(path, transform, decode(x), columns), failures)

    return samples


def activations(settings: config.Train, dataset: Any) -> Any:
    """Measures the activations at every tap of the network, on the same noised items every time."""
    shape, classes = build.shape_of(dataset), dataset.num_classes
    vector = build.vector_size(settings.training)
    net = networks.from_linen(models.network(settings.model, shape, classes, vector))
    items = dataset.read("train", min(WATCHED, len(dataset.split("train"))))
    path, times = build.process(settings.process), build.loss(settings.objective, classes).times
    x0 = jnp.asarray(items["x"])
    cond = {"label": items["label"]} if classes else {}
    cond |= {"vector": jnp.zeros((len(x0), vector), x0.dtype)} if vector else {}

    @jax.jit
    def measure(params: Any) -> dict:
        k_time, k_noise = jax.random.split(jax.random.key(settings.seed))
        t = times(k_time, path, jnp.arange(len(x0)))
        x = path.add_noise(x0, jax.random.normal(k_noise, x0.shape, x0.dtype), t)
        x = numerics.scale(prediction.edm_scale(1.0)(path, t), x)
        return networks.magnitudes(net, params, x, prediction.time_log_sigma(path, t), cond or None)

    def hook(step: int, state: Any) -> dict:
        params = hosts.gather(build.of_network(settings.objective, state.params))
        return {f"activation_rms/{name}": float(v) for name, v in measure(params).items()}

    return hook


def kept(folder: pathlib.Path, what: str, make: Callable[[], Any], failures: list[str]) -> Any:
    """What `make` wrote; a full disk is reported and kept in `failures`, since the training itself goes on."""
    try:
        return make()
    except OSError as error:
        failures.append(f"{what} could not be written to {folder}: {error}")
        console.note(failures[-1])
        return None
