"""Principles of diffusion models: one Gaussian path seen as a bound, as a score and as a flow.

Every quantity is exact, because the data are a mixture of Gaussians:
- every parameterisation of the same pair is converted into every other one, and the score checked against grad log p_t;
- the variational bound of the exact denoiser is the exact cross-entropy;
- reverse SDEs dx = [f - (1 + eta^2)/2 g^2 score] dt + eta g dW with eta = 0, 1/2, 1 end in the same law;
- flow maps compose: Phi_{s->r}(Phi_{t->s}(x)) = Phi_{t->r}(x), and every point of a trajectory maps to one end.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import losses, metrics, processes, solvers, testing, times
from diffjax.prediction import READERS
from diffjax.testing import oracles
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=3,
    paper="arXiv:2510.21890",
    claim="all parameterisations agree to 1e-5; ODE and SDE samplers give the same marginals (MMD); flow maps are a semigroup",
    expect={
        "conversion_error_float32": at_most(1e-5),
        "conversion_error_float64": at_most(1e-9),
        "score_error": at_most(1e-5),
        "bound_gap_nats": at_most(0.02),
        "mmd_over_floor": at_most(2.0),
        "mmd_of_wrong_sde_over_floor": at_least(10.0),
        "semigroup_error": at_most(1e-3),
        "consistency_error": at_most(1e-3),
    },
    minutes=1,
)

MIXTURE = testing.mixture([2, 1, 1], [[-1.5, 0.0], [1.0, 1.0], [1.0, -1.2]], stds=[[0.3, 0.6], [0.4, 0.4], [0.5, 0.2]])
PROCESSES = {
    "vp": processes.vp(),
    "cosine": processes.cosine(),
    "rectified": processes.rectified(),
    "ve": processes.ve(),
}


draw = jax.jit(oracles.draw, static_argnums=(2, 4))


@jax.jit
def conversions(process, x0, eps, lam):
    """Largest relative difference over all pairs of parameterisations, and of the score from grad log p_t."""
    t = process.time_of_log_snr(lam)
    x = process.add_noise(x0, eps, t)
    pair = oracles.predict(MIXTURE, process, x, t)
    far = lambda a, b: jnp.max(jnp.abs(a - b) / (1 + jnp.abs(b)))
    gaps = []
    for build, read in READERS.items():
        same = build(read(pair, process, t), x, process, t)
        gaps += [far(other(same, process, t), other(pair, process, t)) for other in READERS.values()]
    score = jax.grad(lambda x: oracles.log_density(MIXTURE, process, x, t).sum())(x)
    return jnp.max(jnp.stack(gaps)), far(READERS[diffjax.from_score](pair, process, t), score)


def run(preset):
    n, steps = (4000, 400) if preset == "full" else (200, 20)
    key, process, every = jax.random.key(0), PROCESSES["vp"], list(PROCESSES.values())
    every = every if preset == "full" else every[-1:]
    x0 = draw(key, MIXTURE, n)[0]

    gaps = []
    for reach, x64 in ((1.0, False), (6.0, True)):  # |log(alpha / sigma)|; further out float32 itself loses the digits
        with jax.enable_x64(x64):
            lam, eps = np.linspace(-reach, reach, n), np.random.default_rng(1).standard_normal((n, 2))
            args = [jnp.asarray(a, jnp.result_type(float)) for a in (np.asarray(x0), eps, lam)]
            gaps.append(np.max([conversions(p, *args) for p in every], axis=0))

    bound = losses.variational_bound(levels=None, samples=64 if preset == "full" else 2)
    bits, _ = jax.jit(bound)(jax.random.key(2), testing.oracle(MIXTURE, process), x0)
    log_p = oracles.log_density(MIXTURE, process, x0)
    gap = bits.mean() * 2 * np.log(2) + log_p.mean()  # bits per dimension -> nats of the two dimensions

    denoiser = testing.oracle(MIXTURE, process)
    start = process.prior(jax.random.key(3), (n, 2))
    sample = jax.jit(diffjax.sample)
    grid = times.log_snr(process, steps)
    ends = {
        eta: sample(jax.random.key(4), denoiser, solvers.ddim(process, grid, eta), start) for eta in (0.0, 0.5, 1.0)
    }
    wrong = sample(jax.random.key(4), denoiser, solvers.ddim(process, grid, 1.0, s_noise=1.5), start)
    mmd = lambda x, seed: metrics.score(
        metrics.mmd(np.asarray(draw(jax.random.key(seed), MIXTURE, n)[0]), bandwidth=0.7), np.asarray(x)
    )
    real = [mmd(draw(jax.random.key(100 + i), MIXTURE, n)[0], 200 + i) for i in range(10)]
    floor = 2 * np.std(real)  # unbiased: zero on average, so its floor is a spread

    def flow(x, t, s, n):  # Phi_{t->s}, each call on a grid of its own
        return sample(key, denoiser, solvers.heun(process, times.log_snr(process, n, start=t, stop=s)), x)

    rms = lambda a, b: float(np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2)))
    t, s, r = 0.9, 0.5, 0.05
    x_t = draw(jax.random.key(5), MIXTURE, n, process, t)[0]
    x_s = flow(x_t, t, s, steps)
    x_r = flow(x_t, t, r, steps + steps // 3)
    exact = oracles.flow(MIXTURE, process, x_t[:100], t, r)
    return {
        "conversion_error_float32": gaps[0][0],
        "conversion_error_float64": gaps[1][0],
        "score_error": gaps[0][1],
        "bound_gap_nats": abs(gap),
        "mmd_over_floor": max(mmd(x, 300) for x in ends.values()) / floor,
        "mmd_of_wrong_sde_over_floor": mmd(wrong, 300) / floor,
        "semigroup_error": rms(flow(x_s, s, r, steps), x_r),
        "exact_flow_error": rms(x_r[:100], exact),
        "consistency_error": max(
            rms(flow(x, u, 0.01, steps), flow(x_t, t, 0.01, steps)) for x, u in ((x_s, s), (x_r, r))
        ),
        "ode_grid": ends[0.0],
        "sde_grid": ends[1.0],
        "wrong_sde_grid": wrong,
    }
