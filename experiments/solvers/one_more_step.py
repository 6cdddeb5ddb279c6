"""One More Step: a step from pure noise to the first time of a schedule that never gets there.

A schedule with alpha_T > 0 leaves the mean of a picture in its noisiest state, so a sampler that starts in N(0, I) asks for
medium brightness. Train a small net psi on pure noise alone, where v = -x0, and put one step before the base sampler:
x_S ~ N(0, I),  x0 = -psi(x_S, c),  x_T = alpha_T x0 + sigma_T eps,  then the base model, untouched, from T.

Data: 8x8 pictures of one random brightness in 9 classes, exact denoisers for two base schedules (alpha_T^2 = 0.05 and 0.02),
both without a condition: the prompt c is psi's own. On pure noise psi can know only the class mean, so it is the prompt
that carries the brightness: drawn as in the data it restores the law, chosen it controls it.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import losses, networks, processes, solvers, starts, testing, times, training
from diffjax.testing import oracles
from experiments.recipe import Recipe, at_least, at_most, between

RECIPE = Recipe(
    ledger=61,
    paper="arXiv:2311.15744",
    claim="one more step restores mean and spread of brightness within 5 % for two base models with frozen weights, and does "
    "nothing where the schedule begins in pure noise",
    expect={
        "psi_error": at_most(0.05),
        "base_a_std_ratio": at_most(0.8),
        "oms_a_std_ratio": between(0.95, 1.05),
        "oms_a_mean_error": at_most(0.05),
        "oms_b_std_ratio": between(0.95, 1.05),
        "oms_b_mean_error": at_most(0.05),
        "no_op_std_ratio": between(0.95, 1.05),
        "no_op_mean_error": at_most(0.05),
        "control_correlation": at_least(0.5),
    },
    minutes=1,
)
K, SIDE = 9, 8
D = SIDE * SIDE
BRIGHTNESS = np.linspace(-0.7, 1.7, K)
BASES = {"a": 0.0060, "b": 0.0078}  # the last of 1000 linear betas: alpha_T^2 = 0.05 and 0.02


def data():
    """Pictures of brightness b_c + 0.1 z in every pixel, with a texture of deviation 0.3."""
    covariance = 0.1**2 * np.ones((D, D)) + 0.3**2 * np.eye(D)
    return testing.mixture(
        np.ones(K), BRIGHTNESS[:, None] * np.ones((K, D)), covariances=np.tile(covariance, (K, 1, 1))
    )


def at_pure_noise(key, process, items):
    """The law of time of psi's training: t = 1 and nothing else."""
    return jnp.ones(items.shape[0])


def train(law, process, steps, width):
    """psi: a network for labels, by the v-loss at t = 1."""
    net = networks.from_linen(networks.MLP(width=width, depth=2, num_classes=K))
    model = lambda params: diffjax.denoiser(net, process, diffjax.from_v, params, null=K)
    params = net.init(jax.random.key(0), jnp.zeros((1, D)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    optimizer = training.adamw(training.optimizer.linear_tail(3e-3, steps, warmup=steps // 10), clip=1.0)
    step = training.make_train_step(model, losses.v_prediction(at_pure_noise, label_drop=0.1), optimizer)

    def advance(state, i):
        x, label = oracles.draw(jax.random.fold_in(jax.random.key(1), i), law, 128)
        return step(state, {"x": x, "label": label})[0], None

    state = training.init_state(params, optimizer, 1)
    state, _ = jax.jit(lambda s: jax.lax.scan(advance, s, jnp.arange(steps)))(state)
    return model(state.params)


def run(preset):
    n, steps, iterations, width = (3600, 40, 1500, 32) if preset == "full" else (90, 4, 5, 8)
    law, key = data(), jax.random.key(0)
    bases = {name: processes.from_betas(np.linspace(1e-4, last, 1000)) for name, last in BASES.items()}
    psi = train(law, processes.zero_terminal_snr(bases["a"]), iterations, width)
    label = jnp.arange(n) % K
    true = BRIGHTNESS.mean(), np.sqrt(BRIGHTNESS.var() + 0.1**2 + 0.3**2 / D)

    sample = jax.jit(diffjax.sample)
    out, pictures = {}, {}

    def score(name, x):
        b = np.asarray(x.mean(1))
        out[f"{name}_std_ratio"] = b.std() / true[1]
        out[f"{name}_mean_error"] = abs(b.mean() - true[0]) / true[1]
        return b

    step = jax.jit(lambda key, psi, process: starts.one_more_step(key, psi, process, (n, D)))
    pure = processes.zero_terminal_snr(bases["b"])
    for name, process in {**bases, "pure": pure}.items():
        d = testing.oracle(law, process)
        solver = solvers.exp_ab(process, times.log_snr(process, steps), order=3, value=solvers.V)
        plain = sample(key, d, solver, process.prior(jax.random.key(1), (n, D)))
        more = sample(key, d, solver, step(jax.random.key(2), psi.bind(label), process))
        if name == "pure":
            score("no_op", more)
            score("zero_snr", plain)
            continue
        score(f"base_{name}", plain)
        b = score(f"oms_{name}", more)
        out[f"alpha_T_squared_{name}"] = float(process.alpha(1.0)) ** 2
        if name == "a":
            out["control_correlation"] = np.corrcoef(b, BRIGHTNESS[np.asarray(label)])[0, 1]
            seen = lambda x: np.clip(np.asarray(x[:36]).reshape(-1, SIDE, SIDE, 1), -2, 3)
            pictures = {"base_grid": seen(plain), "one_more_step_grid": seen(more)}
    x0 = psi.bind(label[:90])(jax.random.normal(jax.random.key(3), (90, D)), 1.0).x0
    out["psi_error"] = jnp.abs(x0.mean(1) - BRIGHTNESS[np.asarray(label[:90])]).max()
    return {**out, **pictures}
