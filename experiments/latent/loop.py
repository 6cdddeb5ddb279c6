"""What the recipes of this family share: a training loop over arrays that fit on the device."""

import jax
import jax.numpy as jnp

from diffjax import training


def train(
    model, loss, params, arrays, steps, *, batch=64, rate=2e-3, seed=0, decay=0.995, condition=training.condition
):
    """The averaged parameters after `steps` batches of `arrays` = {x, ...}, drawn with replacement.

    model: params -> what the loss takes, a denoiser or an autoencoder.
    """
    optimizer = training.adamw(training.optimizer.linear_tail(rate, steps, warmup=max(steps // 20, 1)), clip=1.0)
    emas = {"mean": training.ema.decay(decay if steps > 500 else 0.9)}
    step = training.make_train_step(model, loss, optimizer, emas=emas, condition=condition)
    arrays = jax.tree.map(jnp.asarray, arrays)

    @jax.jit
    def run(state, arrays):
        def body(state, i):
            key = jax.random.fold_in(jax.random.key(1000 + seed), i)
            pick = jax.random.randint(key, (batch,), 0, len(arrays["x"]))
            return step(state, {name: a[pick] for name, a in arrays.items()})[0], None

        return jax.lax.scan(body, state, jnp.arange(steps))[0]

    return run(training.init_state(params, optimizer, seed, emas=emas), arrays).ema["mean"]
