"""What the recipes of this family share: a flow trained on batches that are drawn inside the program."""

import jax
import jax.numpy as jnp

import diffjax
from diffjax import losses, networks, processes, training

PROCESS = processes.rectified()


def denoiser(f, params):
    """The velocity network `f` as a denoiser."""
    return diffjax.denoiser(f, PROCESS, diffjax.from_velocity, params)


def train(net, law, draw, steps, rate=2e-3):
    """`seed -> parameters` of a flow on batches `draw(key) = {x, cond}`, of times from a law; one program for all seeds."""
    f = networks.from_linen(net)
    optimizer = training.adamw(training.optimizer.linear_tail(rate, steps, warmup=steps // 10), clip=1.0)
    loss = losses.flow_matching(law, label_drop=0.0)
    step = training.make_train_step(
        lambda params: denoiser(f, params), loss, optimizer, condition=lambda batch: batch.get("cond")
    )

    @jax.jit
    def run(state, key):
        advance = lambda s, i: (step(s, draw(jax.random.fold_in(key, i)))[0], None)
        return jax.lax.scan(advance, state, jnp.arange(steps))[0]

    def fit(seed):
        one = jax.eval_shape(lambda: jax.tree.map(lambda a: a[:1], draw(jax.random.key(0))))
        params = f.init(jax.random.key(seed), one["x"], jnp.zeros(1), one.get("cond"))
        return run(training.init_state(params, optimizer, seed), jax.random.key(100 + seed)).params

    return fit


@jax.jit
def sample(model, cond, x, solver):
    """Samples from the noise x."""
    return diffjax.sample(jax.random.key(3), model if cond is None else model.bind(cond), solver, x)
