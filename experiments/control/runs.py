"""What the recipes of this family do alike: put an adapter beside a frozen base, train it alone, draw samples with it."""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import adapters, losses, solvers, times, training
from experiments.control.bases import PROCESS
from experiments.loop import trainer

NULL = {"label": np.int32(10)}  # of the digits; hints are never dropped
PLAIN = {"xla_backend_optimization_level": 0}  # fusions of another program round in another way


def first(arrays, n=1):
    """The first `n` items."""
    return {name: a[:n] for name, a in arrays.items()}


def beside(base, arrays, condition=training.condition, **named):
    """`(fn, params)` of the base with fresh adapters, for data `{x, label, and what each adapter reads under its name}`.

    condition: batch -> condition, where these are not the same.
    """
    fn, one = adapters.adapt(base.fn, **named), first(arrays)
    params = jax.jit(fn.init)(jax.random.key(0), base.params, one["x"], jnp.zeros(1), condition(one))
    return fn, params


def trainer_of(base, fn, steps, *, null=NULL, drop=0.0, trainable="^adapters/", **options):
    """`(params, arrays, seed=0) -> params`, which trains what is not frozen by the flow loss.

    drop: how often the label is left out.   It compiles once for all data of the same shapes and names.
    """
    model = lambda p: base.denoiser(p, fn, null)
    return trainer(model, losses.flow_matching(label_drop=drop), steps, trainable=trainable, **options)


@jax.jit
def _drawn(key, denoiser, solver, x):
    return diffjax.sample(key, denoiser, solver, x)


def draw(denoiser, cond, shape, *, steps=12, seed=1):
    """Samples under a condition, by Heun's method from the noise of `seed`: the same noise for every denoiser."""
    x = PROCESS.prior(jax.random.key(seed), shape)
    return _drawn(jax.random.key(seed), denoiser.bind(cond), solvers.heun(PROCESS, times.uniform(steps)), x)


def start_difference(base, fn, params, batch, condition=training.condition):
    """The largest difference that a fresh adapter makes to the base, in programs without fusion."""
    t, cond = jnp.linspace(0.1, 0.9, len(batch["x"])), condition(batch)
    own = {name: a for name, a in cond.items() if name not in params["adapters"]} if isinstance(cond, dict) else cond
    changed = jax.jit(fn, compiler_options=PLAIN)(params, batch["x"], t, cond)
    plain = jax.jit(base.fn, compiler_options=PLAIN)(base.params, batch["x"], t, own or None)
    return jnp.abs(changed - plain).max()


def start_gradients(base, fn, params, batch, null=NULL):
    """The gradient of the flow loss with respect to fresh adapters."""
    trained, rest = training.split(params, "^adapters/")

    def loss(p):
        denoiser = base.denoiser(training.join(p, rest), fn, null)
        each = losses.flow_matching(label_drop=0.0)(jax.random.key(0), denoiser, batch["x"], training.condition(batch))
        return each[0].mean()

    return jax.jit(jax.grad(loss))(trained)["adapters"]


def moved(before, after):
    """The largest change of any parameter."""
    return max(
        float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )
