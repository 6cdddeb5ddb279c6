"""AdjointDPM: gradients through a sampler by a second ODE, in memory that does not depend on the number of steps.

With y = x / alpha and rho = sigma / alpha the probability flow is dy/drho = eps(alpha y, t, c). After the run to the data,

    d[y, a, g]/drho = [eps, -a^T deps/dy, -a^T deps/d(weights, c)]   from a = dL/dy back to the noise

`adjoint_sample` runs `sample` forward and solves this backward with any deterministic table, here `heun`. It is compared
with backpropagation through the same 50 steps for weights, condition and start, and with the reversible leapfrog, whose
gradient needs as little memory and is exact. Then the start of a sampler of digits is moved until the picture is of a
chosen class. The network of the comparison is a random one in float64; the digits are an exact mixture around real
pictures, and so is their classifier.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffjax
from diffjax import data, processes, solvers, testing, times
from diffjax.testing import oracles
from experiments.recipe import Recipe, at_least, at_most
from experiments.solvers import digits_mixture

RECIPE = Recipe(
    ledger=262,
    paper="arXiv:2307.10711",
    claim="50 steps: cosine > 0.999, relative error < 1e-2, falling with the step; memory is flat in the number of steps",
    expect={
        "smallest_cosine": at_least(0.999),
        "largest_error": at_most(1e-2),
        "error_halving_the_step": at_most(0.5),
        "memory_growth_20_times_the_steps": at_most(1.05),
        "reversible_error": at_most(1e-10),
        "reversible_memory_growth": at_most(1.2),
        "loss_after_over_before": at_most(0.2),
        "accuracy_after": at_least(0.9),
    },
    minutes=2,
)
PROCESS = processes.cosine()
KEY = jax.random.key(0)
START, STOP = 0.95, 0.02


def network(params, x, t, cond):
    h = jnp.tanh(x @ params["in"] + cond @ params["cond"] + t[:, None])
    return h @ params["out"]


def compiled(run, n, batch, width, d=8, **options):
    """The gradient with respect to weights, start and condition of a bounded loss, compiled, and its arguments."""
    keys = jax.random.split(jax.random.key(1), 5)
    shapes = {"in": (d, width), "cond": (4, width), "out": (width, d)}
    params = {k: jax.random.normal(key, s) / s[0] ** 0.5 for key, (k, s) in zip(keys, shapes.items(), strict=False)}
    grid = times.log_snr(PROCESS, n, start=START, stop=STOP)
    solver = (
        solvers.o_belm(PROCESS, grid, solvers.V) if options.pop("reversible", False) else solvers.heun(PROCESS, grid)
    )

    def loss(params, x, cond):
        denoiser = diffjax.denoiser(network, PROCESS, diffjax.from_v, params).bind(cond)
        return jnp.mean(jnp.cos(run(KEY, denoiser, solver, x, **options)))

    args = params, jax.random.normal(keys[3], (batch, d)), jax.random.normal(keys[4], (batch, 4))
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile(), args


def gradients(run, n, batch, width, **options):
    """The three gradients, each one vector."""
    f, args = compiled(run, n, batch, width, **options)
    return [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(part)]) for part in f(*args)]


def temporary(run, n, batch, width, **options):
    return compiled(run, n, batch, width, **options)[0].memory_analysis().temp_size_in_bytes


def optimise_start(m, batch, steps, updates):
    """Adam on the noise, through the adjoint of a sampler of digits.   Returns: losses, accuracies and pictures."""
    denoiser = testing.oracle(m, PROCESS)
    solver = solvers.heun(PROCESS, times.log_snr(PROCESS, steps, start=START, stop=STOP))
    target = jnp.arange(batch) % 10
    optimizer = optax.adam(0.05)

    def loss(x):  # the exact classifier: -log p(class | picture), classes of equal weight
        picture = diffjax.adjoint_sample(KEY, denoiser, solver, x)
        scores = [oracles.log_density(m, PROCESS, picture, STOP, jnp.full(batch, c)) for c in range(10)]
        score = jax.nn.log_softmax(jnp.stack(scores, 1), 1)
        right = jnp.mean((jnp.argmax(score, 1) == target).astype(score.dtype))
        return -jnp.take_along_axis(score, target[:, None], 1).mean(), (right, picture)

    @jax.jit
    def update(carry, _):
        x, state = carry
        (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(x)
        moved, state = optimizer.update(grad * batch, state)
        return (optax.apply_updates(x, moved), state), (value, *aux)

    x = jax.random.normal(jax.random.key(3), (batch, 64))
    carry, history = (x, optimizer.init(x)), []
    for _ in range(updates):
        carry, out = update(carry, None)
        history.append(out)
    return history


def run(preset):
    full = preset == "full"
    n, batch, width = (50, 32, 64) if full else (6, 2, 4)
    out = {}
    with jax.enable_x64():
        errors = {}
        for steps in (n // 2, n):
            plain, got = (gradients(f, steps, batch, width) for f in (diffjax.sample, diffjax.adjoint_sample))
            errors[steps] = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, plain, strict=True)]
        cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(got, plain, strict=True)]
        out |= {f"{k}_error": e for k, e in zip(("weights", "start", "condition"), errors[n], strict=True)}
        exact = [
            np.concatenate(gradients(diffjax.sample, n, batch, width, reversible=True, memory=memory))
            for memory in ("plain", "reversible")
        ]
        out["reversible_error"] = np.linalg.norm(exact[0] - exact[1]) / np.linalg.norm(exact[0])
        for name, f, options in (
            ("memory_growth_20_times_the_steps", diffjax.adjoint_sample, {}),
            ("reversible_memory_growth", diffjax.sample, {"reversible": True, "memory": "reversible"}),
        ):
            few, many = (temporary(f, k, 512 if full else batch, width, **options) for k in (n, 20 * n))
            out[name] = many / few
    m = digits_mixture.mixture(data.load("digits"), 100 if full else 20)
    history = optimise_start(m, 20 if full else 2, 20 if full else 4, 40 if full else 2)
    digits = data.load("digits")
    picture = lambda x: np.clip(digits.transform.decode(np.asarray(x).reshape(-1, 8, 8, 1)), 0, 16)
    return out | {
        "smallest_cosine": min(cosine),
        "largest_error": max(errors[n]),
        "error_halving_the_step": max(b / a for a, b in zip(errors[n // 2], errors[n], strict=True)),
        "loss_before": history[0][0],
        "loss_after_over_before": history[-1][0] / history[0][0],
        "accuracy_before": history[0][1],
        "accuracy_after": history[-1][1],
        "before_grid": picture(history[0][2]),
        "after_grid": picture(history[-1][2]),
    }
