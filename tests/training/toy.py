"""A linear denoiser with a quadratic loss: the smallest thing that trains, and whose gradient is known."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax import numerics as nu
from diffjax.training import ema, state, step
from diffjax.types import Denoiser, Evaluation, Prediction

D = 3


def apply(denoiser, state, x, t, cond, key):
    params = denoiser.leaves
    x0 = x @ params["w"] + nu.expand(t, x) * params["b"][None]
    if cond is not None:
        x0 = x0 + params["embed"][cond]
    return Evaluation(Prediction(x0, x - x0), state)


def model(params):
    return Denoiser(params, None, apply=apply)


def loss(key, denoiser, x0, cond, items=None):
    items = jnp.arange(x0.shape[0]) if items is None else items
    k_time, k_noise = jax.random.split(key)
    eps = nu.item_normal(nu.item_keys(k_noise, items), 0, x0)
    t = jax.vmap(lambda k: jax.random.uniform(k, (), x0.dtype))(nu.item_keys(k_time, items))
    x = nu.add(nu.scale(1 - t, x0), nu.scale(t, eps))
    per_example = ((denoiser(x, t, cond).x0 - x0) ** 2).mean(-1)
    return per_example, {"time": t}


def params(dtype=np.float32, classes=4):
    rng = np.random.default_rng(0)
    shapes = {"w": (D, D), "b": (D,), "embed": (classes, D)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def batch(i, size=16, dtype=np.float32, bad=False):
    rng = np.random.default_rng(100 + i)
    x = rng.normal(size=(size, D)).astype(dtype)
    if bad:
        x[0, 0] = np.nan
    index = np.arange(i * size, (i + 1) * size, dtype=np.int32)
    return {"x": x, "label": (index % 4).astype(np.int32), "index": index}


EMAS = {"fast": ema.decay(0.9), "wide": ema.power(0.1)}


def make(optimizer=None, dtype=np.float32, emas=None, **options):
    """(state, train_step)"""
    optimizer = optax.adam(1e-2) if optimizer is None else optimizer
    emas = EMAS if emas is None else emas
    train_step = step.make_train_step(model, loss, optimizer, emas=emas, **options)
    return state.init_state(params(dtype), optimizer, 3, emas=emas), train_step


class Batches:
    """The contract of a batch iterator: resumable by a JSON-able state."""

    def __init__(self, size=16, stop=None, bad=(), on_next=None):
        self.i, self.size, self.stop, self.bad, self.on_next, self.closed = 0, size, stop, bad, on_next, False

    def __iter__(self):
        return self

    def __next__(self):
        if self.stop is not None and self.i >= self.stop:
            raise StopIteration
        if self.on_next is not None:
            self.on_next(self.i)
        out = batch(self.i, self.size, bad=self.i in self.bad)
        self.i += 1
        return out

    def get_state(self):
        return {"next": self.i}

    def set_state(self, state):
        self.i = state["next"]

    def close(self):
        self.closed = True


def leaves(tree):
    return [
        np.asarray(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a)
        for a in jax.tree.leaves(tree)
    ]


def assert_equal(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a, b, **tolerance):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def clean_environment(devices=8, fast=True):
    """For a subprocess: that many devices; `fast` compiles as the tests do, else with the compiler's default flags."""
    flags = f"--xla_force_host_platform_device_count={devices}" + " --xla_backend_optimization_level=0" * fast
    cache = {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)} if fast else {}
    limits = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    return {**os.environ, **cache, **limits, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
