"""What recipes of this family share on the digits: a training with its test loss along the way, in one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import data, losses, training
from experiments.loop import advance

DIGITS = data.load("digits")
CLASSES = DIGITS.num_classes
LOSS = losses.flow_matching(label_drop=0.0)
EXAMPLE = (jnp.zeros((1, *DIGITS.shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def test_loss(model, params):
    """The mean flow-matching error on the test digits, always at the same times and with the same noise."""
    test = DIGITS.read("test")
    x, label = (jnp.asarray(np.concatenate([test[k]] * 2)) for k in ("x", "label"))
    return LOSS(jax.random.key(99), model(params), x, label)[1]["mse"].mean()


def train(model, loss, starts, *, steps, batch, rate=3e-3, record=1):
    """One training for each start; averaged parameters, and the test loss after every 1 / `record` of the steps.

    Args: model: params -> denoiser.   starts: parameters, run i draws from seed i alone.
    Returns: a list of (params, curve [record]).
    """
    real = {k: jnp.asarray(v) for k, v in DIGITS.read("train").items() if k != "index"}
    optimizer = training.adamw(training.optimizer.linear_tail(rate, steps, warmup=steps // 10), clip=1.0)
    emas = {"mean": training.ema.decay(0.99 if steps > 200 else 0.9)}
    step = training.make_train_step(model, loss, optimizer, emas=emas)

    @jax.jit
    def run(state, key):
        def part(state, _):
            state = advance(step, state, lambda s: jax.random.fold_in(key, s.step), real, batch, steps // record)
            return state, test_loss(model, state.ema["mean"])

        return jax.lax.scan(part, state, None, length=record)

    ends = []
    for seed, start in enumerate(starts):
        state, curve = run(training.init_state(start, optimizer, seed, emas=emas), jax.random.key(1000 + seed))
        ends.append((state.ema["mean"], np.asarray(curve)))
    return ends


def shades(table, height=120):
    """A table of numbers in [0, 1] as a picture, one row of it in each row of squares.   [rows, columns] -> uint8 [H, W, 3]"""
    table = np.asarray(table, np.float64)
    square = lambda a, n, axis: np.repeat(a, max(1, n // a.shape[axis]), axis=axis)
    gray = np.uint8(255 * np.clip(square(square(table, height, 0), 2 * height, 1), 0, 1))
    return np.stack([gray] * 3, axis=-1)
