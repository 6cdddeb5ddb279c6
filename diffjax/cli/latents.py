"""Runs in latents, `diffjax train --latent`: the first stage, which lies in the folder of the run."""

from __future__ import annotations

import os
import pathlib
import shutil

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax import data as data_
from diffjax import latent, losses, networks, training
from diffjax.cli import console
from diffjax.cli.config import Train

FILE = "autoencoder.safetensors"
BATCH, RATE = 32, 1e-3  # of the first stage
FITTED = 1000  # items that its linear path starts from


def of_run(folder: pathlib.Path, settings: Train) -> latent.LatentSpace | None:
    """The latent space of a run; None for a run in pixels.   Raises: ValueError: it is gone, or damaged."""
    return None if settings.latent is None else latent.load(folder / FILE)


def check_steps(settings: Train) -> None:
    """Refuse `--latent-steps` where nothing is trained by them."""
    if settings.latent_steps != Train.latent_steps and settings.latent not in networks.AUTOENCODER_PRESETS:
        raise ValueError(
            f"--latent-steps {settings.latent_steps} is for an autoencoder that is trained here, --latent "
            f"{' or '.join(networks.AUTOENCODER_PRESETS)}; got --latent {settings.latent}. Leave it out"
        )


def check(settings: Train, dataset: data_.Dataset) -> None:
    """Refuse what a run in latents cannot do.

    Raises: ValueError: data that are no pictures, or read lazily; options that work on pixels; several processes.
    """
    if len(dataset.shape) != 3 or dataset.source is not None:
        raise ValueError(
            f"--latent needs pictures that fit into memory; {dataset.name!r} has items of shape {tuple(dataset.shape)}"
            + (" and is read lazily" if dataset.source is not None else "")
        )
    if settings.training.augment != "none":
        raise ValueError(
            f"--training.augment {settings.training.augment} moves pixels, not latents; with --latent use none"
        )
    if jax.process_count() > 1:
        raise ValueError("--latent works in one process; start a single one")


def first_stage(settings: Train, dataset: data_.Dataset) -> latent.LatentSpace:
    """What `--latent` names: a preset, trained here, or the autoencoder of another run, or a file."""
    if settings.latent in networks.AUTOENCODER_PRESETS:
        return _train(settings, dataset)
    return latent.load(_file(settings))


def _file(settings: Train) -> pathlib.Path:
    """The file that `--latent` names.   Raises: ValueError: there is none."""
    path = pathlib.Path(settings.latent)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"--latent {settings.latent} is neither a preset ({', '.join(networks.AUTOENCODER_PRESETS)}) nor a run or file "
            "with an autoencoder"
        )
    return file


def shape_of(settings: Train, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a latent of pictures of a shape, without training anything.

    Raises: ValueError: no such autoencoder, or one that such pictures do not fit.
    """
    item = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    if settings.latent in networks.AUTOENCODER_PRESETS:
        make = networks.autoencoder(networks.preset(settings.latent, out_channels=shape[-1]))
        return jax.eval_shape(lambda key, x: make(make.init(key, x)).encode(x).mean, jax.random.key(0), item).shape[1:]
    space = latent.load(_file(settings))
    try:
        z = jax.eval_shape(space.encode, item)
        again = jax.eval_shape(space.decode, z).shape[1:]
    except (ValueError, TypeError, flax.errors.FlaxError) as error:
        raise ValueError(f"--latent {settings.latent} does not fit items of shape {shape}: {error}") from None
    if again != tuple(shape):
        raise ValueError(f"--latent {settings.latent} makes items of shape {again}, not {tuple(shape)}")
    return z.shape[1:]


def save(folder: pathlib.Path, space: latent.LatentSpace, settings: Train, dataset: data_.Dataset) -> None:
    """Keep the latent space in the folder of the run."""
    if settings.latent in networks.AUTOENCODER_PRESETS:
        latent.save(folder / FILE, space, settings.latent, tuple(dataset.shape), out_channels=dataset.shape[-1])
        return
    part = folder / f".{FILE}.{os.getpid()}"
    try:
        shutil.copyfile(_file(settings), part)
        os.replace(part, folder / FILE)  # whole or not at all
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _train(settings: Train, dataset: data_.Dataset) -> latent.LatentSpace:
    """An autoencoder of the training split, and its normalisation.   Raises: SystemExit: it was interrupted."""
    steps, x = settings.latent_steps, dataset.read("train")["x"]
    module = networks.preset(settings.latent, out_channels=dataset.shape[-1])
    make = networks.autoencoder(module)
    params = make.init(jax.random.key(settings.seed), x[:1])
    if module.linear:
        params = networks.start_linear(module, params, x[:FITTED])
    console.note(
        f"first stage: {settings.latent} with {networks.parameter_count(params):,} parameters, {steps} steps of {BATCH}"
    )
    adam = training.adamw(training.optimizer.cosine(RATE, steps, warmup=steps // 20), b2=0.99, clip=1.0)
    optimizer = training.optimizer.by_path({r"codebook/(counts|sums)$": optax.sgd(1.0)}, adam)
    emas = {"mean": training.ema.decay(0.99, warmup=True)}
    step = training.make_train_step(make, losses.autoencoder_loss(losses.squared), optimizer, emas=emas)
    state = training.init_state(params, optimizer, settings.seed, emas=emas)
    with data_.batches(dataset, "train", min(BATCH, len(x)), seed=settings.seed) as batches:
        end = training.fit(state, step, batches, steps=steps, devices=jax.devices()[:1], log_every=max(steps // 5, 1))
    if end.interrupted is not None:
        console.note(f"interrupted at step {end.step} of the first stage, of which nothing is kept")
        raise SystemExit(end.exit_code)
    space = latent.latent_space(make(end.state.ema["mean"]), x)
    test = dataset.read("validation")["x"]
    z = space.encode_all(test)
    error = np.square((space.decode_all(z) - test) * np.float32(dataset.transform.std)).mean()
    reach = (dataset.transform.high or 1.0) - (dataset.transform.low or 0.0)
    console.note(
        f"first stage: {test[0].size} numbers of an item as {z[0].size}, {10 * np.log10(reach**2 / error):.1f} dB on held-out "
        "items"
    )
    return space
