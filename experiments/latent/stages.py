"""What the recipes of latent diffusion share: training on arrays that fit on the device, and the first stage."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax import data, losses, networks, training
from experiments.loop import advance

KL = 1e-6


class Trained(NamedTuple):
    """The averaged parameters, and the seconds of training without compilation."""

    params: Any
    seconds: float


def train(model, loss, params, arrays, steps, *, batch, rate, seed=0, chunk=50, condition=training.condition):
    """What `steps` batches of `arrays` = {x, ...} give, drawn with replacement; whole chunks, at least one.

    Codes that are moving averages have a step of rate one.
    """
    chunk = min(chunk, steps)
    adam = training.adamw(training.optimizer.cosine(rate, steps, warmup=max(steps // 20, 1)), b2=0.99, clip=1.0)
    optimizer = training.optimizer.by_path({r"codebook/(counts|sums)$": optax.sgd(1.0)}, adam)
    emas = {"mean": training.ema.decay(0.99, warmup=True)}
    step = training.make_train_step(model, loss, optimizer, emas=emas, condition=condition)
    arrays = jax.tree.map(jnp.asarray, arrays)

    key_of = lambda state: jax.random.fold_in(jax.random.key(1000 + seed), state.step)
    run = jax.jit(lambda state, arrays: advance(step, state, key_of, arrays, batch, chunk))
    state = training.init_state(params, optimizer, seed, emas=emas)
    run = run.lower(state, arrays).compile()
    begin = time.perf_counter()
    for _ in range(steps // chunk):
        state = run(state, arrays)
    return Trained(jax.block_until_ready(state.ema["mean"]), time.perf_counter() - begin)


def first_stage(photos, steps, *, batch=32, rate=1e-3, **fields):
    """`(untrained, trained, seconds)` of autoencoders `kl4` of the crops; the first is the best linear map of squares."""
    module = networks.preset("kl4", **fields)
    make, x = networks.autoencoder(module), photos.read("train")["x"]
    params = networks.start_linear(module, make.init(jax.random.key(0), x[:1]), x[:1000])
    loss = losses.autoencoder_loss(losses.squared, kl=KL)
    found = train(make, loss, params, {"x": x}, steps, batch=batch, rate=rate)
    return make(params), make(found.params), found.seconds


def crops(full):
    """The photographs' crops, fewer for a tiny run."""
    return data.load("photos", size=6000 if full else 64)


def psnr(photos, x, y):
    """Peak signal-to-noise ratio in decibels of y against x, in grey levels of 255."""
    error = np.square(np.asarray(x, np.float64) - np.asarray(y)).mean() * photos.transform.std**2
    return 10 * np.log10(255**2 / error)
