"""What recipes share: a training loop over arrays that fit on the device."""

import jax
import jax.numpy as jnp
import optax

from diffjax import training
from diffjax.training.optimizer import by_path


def advance(step, state, key_of, arrays, batch, count):
    """The state after `count` steps on batches drawn with replacement, inside a program.

    key_of: state -> the key of the next draw.   arrays: {x, ...}, each an array or a pytree.   batch: items of each step.
    """
    size = len(jax.tree.leaves(arrays)[0])

    def update(state, _):
        pick = jax.random.randint(key_of(state), (batch,), 0, size)
        return step(state, jax.tree.map(lambda a: a[pick], arrays))[0], None

    return jax.lax.scan(update, state, length=count)[0]


def trainer(
    model, loss, steps, *, batch=64, rate=2e-3, decay=0.995, marks=1, condition=training.condition, trainable=None
):
    """A compiled `(params, arrays, seed=0) -> averaged parameters` after `steps` batches drawn with replacement.

    model: params -> what the loss takes, a denoiser or an autoencoder.   arrays: {x, ...}, each an array or a pytree.
    rate: of learning, with a warm-up and a linear fall over the second half, or a schedule; or {regular expression of the
    paths of arrays: rate}, each part with a clip of its own.   decay: of the average, or one of `training.ema`.
    marks: stops, equally far from each other, at which the average is kept; with more than one, the leaves of the result
    are [marks, ...].   condition, trainable: see `make_train_step`; what is not trained comes back as it was.
    """
    warmup = max(steps // 20, 1)
    schedule = lambda rate: rate if callable(rate) else training.optimizer.linear_tail(rate, steps, warmup=warmup)
    adamw = lambda rate: training.adamw(schedule(rate), clip=1.0)
    parts = isinstance(rate, dict)
    optimizer = by_path({path: adamw(r) for path, r in rate.items()}, optax.set_to_zero()) if parts else adamw(rate)
    emas = {"mean": decay if callable(decay) else training.ema.decay(decay if steps > 500 else 0.9)}
    step = training.make_train_step(model, loss, optimizer, emas=emas, condition=condition, trainable=trainable)

    @jax.jit
    def run(state, arrays):
        key_of = lambda state: jax.random.fold_in(state.key, -1 - state.step)

        def stretch(state, _):
            state = advance(step, state, key_of, arrays, batch, steps // marks)
            return state, state.averaged("mean")

        return jax.lax.scan(stretch, state, length=marks)[1]

    def start(params, arrays, seed=0):
        kept = run(
            training.init_state(params, optimizer, seed, emas=emas, trainable=trainable),
            jax.tree.map(jnp.asarray, arrays),
        )
        return kept if marks > 1 else jax.tree.map(lambda a: a[0], kept)

    return start
