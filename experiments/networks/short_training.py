"""What recipes of networks share: a short training on arrays in one compiled scan."""

import jax
import jax.numpy as jnp

from diffjax import training


def train(model, loss, params, fields, *, steps, batch, seed=0, rate=2e-3, decay=0.995):
    """Train on random items of `fields` ({"x": [N, ...], ...}).   (averaged parameters, the loss of every step)"""
    optimizer = training.adamw(
        training.optimizer.linear_tail(rate, steps, warmup=max(1, steps // 20)), b2=0.99, clip=1.0
    )
    emas = {"mean": training.ema.decay(decay if steps > 500 else 0.98)}
    step = training.make_train_step(model, loss, optimizer, emas=emas)
    size = len(fields["x"])

    @jax.jit
    def run(state, key, fields):
        def body(state, i):
            pick = jax.random.randint(jax.random.fold_in(key, i), (batch,), 0, size)
            return step(state, {name: a[pick] for name, a in fields.items()})

        return jax.lax.scan(body, state, jnp.arange(steps))

    state = training.init_state(params, optimizer, seed, emas=emas)
    state, metrics = run(state, jax.random.key(seed + 1), {name: jnp.asarray(a) for name, a in fields.items()})
    return state.ema["mean"], metrics["loss"]
