"""What recipes of networks share: short trainings on arrays, each in one compiled scan, and an error at held-out states."""

import jax
import jax.numpy as jnp

from diffjax import training
from experiments.loop import advance


def train_seeds(
    model, loss, starts, fields, *, steps, batch, rate=2e-3, decay=0.99, every=None, schedule=None, wrap=lambda o: o
):
    """Train from each of `starts` on random items of `fields` ({"x": [N, ...], ...}), compiled once.

    wrap: the optimizer -> the one to use.
    Returns: for each start, the averaged parameters after every `every` steps, stacked, default after all of them.
    """
    every = every or steps
    warm = max(1, steps // 20)
    schedule = schedule or training.optimizer.linear_tail(rate, steps, warmup=warm)
    optimizer = wrap(training.adamw(schedule, b2=0.99, clip=1.0))
    emas = {"mean": training.ema.decay(decay)}
    step = training.make_train_step(model, loss, optimizer, emas=emas)

    @jax.jit
    def run(state, key, fields):
        def some(state, _):
            state = advance(step, state, lambda s: jax.random.fold_in(key, s.step), fields, batch, every)
            return state, state.ema["mean"]

        return jax.lax.scan(some, state, length=steps // every)[1]

    fields = {name: jnp.asarray(a) for name, a in fields.items()}
    states = [training.init_state(p, optimizer, seed, emas=emas) for seed, p in enumerate(starts)]
    return [run(state, jax.random.key(100 + seed), fields) for seed, state in enumerate(states)]


def train(model, loss, start, fields, **options):
    """One training; the averaged parameters at its end."""
    return last(train_seeds(model, loss, [start], fields, **options)[0])


def last(path):
    """The end of what `train_seeds` returns for a seed."""
    return jax.tree.map(lambda a: a[-1], path)


def velocity_error(process, fn, x0, cond):
    """`f(params)`: mean squared error of the velocity at noisy states of held-out items, the same for every network."""
    n = len(x0)
    t = jnp.linspace(0.02, 0.98, n, dtype=jnp.float32)[jax.random.permutation(jax.random.key(8), n)]
    x0, eps = jnp.asarray(x0), jax.random.normal(jax.random.key(9), x0.shape)
    x = process.add_noise(x0, eps, t)
    return jax.jit(lambda params: jnp.mean(jnp.square(fn(params, x, t, cond) - (eps - x0))))
