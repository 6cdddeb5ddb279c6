"""Analytic initial distribution: start early, from the isotropic Gaussian nearest to the law there.

At time M < 1 noised data are not N(0, I). Among all N(m, s^2 I) the one of least KL(q_M || N) is
m = alpha_M E[x0],  s^2 = alpha_M^2 tr(Cov[x0]) / d + sigma_M^2:  two numbers of the data and no training.
Sampling then runs from x_M ~ N(m, s^2 I) at M, skipping the times where an image-to-video model copies its condition.

Data: a mixture of Gaussians in 8 dimensions whose mean is not zero, with its exact denoiser. What fails: at M = 0.3 the
components have come apart, and from one Gaussian the end does not reach the floor, though it is far nearer than from N(0, I).
This is the inference half of the paper; its other half, a training that noises the condition (TimeNoise), is
`time_noise`.
"""

import jax
import numpy as np

import diffjax
from diffjax import metrics, processes, solvers, starts, testing, times
from diffjax.testing import oracles
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=72,
    paper="arXiv:2406.15735",
    claim="the analytic start is nearer to q_M than N(0, I) in KL at every M, and samples from M = 0.7 have a far lower MMD",
    expect={
        "least_kl_gain": at_least(1e-6),
        "least_start_mmd_ratio": at_least(1.0),
        "end_mmd_ratio_at_0.7": at_least(10),
        "end_mmd_over_floor_at_0.7": at_most(2.0),
        "moment_error": at_most(0.05),
    },
    minutes=1,
)
PROCESS = processes.vp()
D = 8


def data(k=4):
    """Four components around a common mean."""
    rng = np.random.default_rng(0)
    means = 2.0 + rng.standard_normal((k, D))
    return testing.mixture(np.ones(k), means, stds=np.full(k, 0.5))


def kl_from(cov, mean, start):
    """KL(q || N(m, s^2 I)) up to the entropy of q, from the moments of q."""
    s2, gap = float(start.scales[0, 0]) ** 2, mean - start.means[0]
    return 0.5 * ((np.trace(cov) + gap @ gap) / s2 + D * np.log(2 * np.pi * s2))


def run(preset):
    n, steps = (4000, 50) if preset == "full" else (100, 5)
    law, key = data(), jax.random.key(0)
    d = testing.oracle(law, PROCESS)
    weights = np.exp(law.log_weights)
    mean = weights @ law.means
    spread = law.means - mean
    cov = np.einsum("k,ki,kj->ij", weights, spread, spread) + 0.25 * np.eye(D)
    train = np.asarray(oracles.draw(jax.random.key(1), law, 50_000 if preset == "full" else 500)[0])

    gains, starting, out, moment = [], [], {}, 0.0
    draw = lambda seed, t: np.asarray(oracles.draw(jax.random.key(seed), law, n, PROCESS, t)[0])
    floor_of = lambda mmd, t: 2 * np.std([metrics.score(mmd, draw(20 + i, t)) for i in range(5)])
    for m in np.linspace(0.1, 1.0, 10):
        alpha, sigma = float(PROCESS.alpha(m)), float(PROCESS.sigma(m))
        start = starts.analytic_start(PROCESS, train, m)
        plain = starts.MixtureStart(float(m), np.zeros(1), np.zeros((1, D)), np.ones((1, D)))
        q = alpha**2 * cov + sigma**2 * np.eye(D), alpha * mean
        gains.append(kl_from(*q, plain) - kl_from(*q, start))
        exact = np.sqrt(np.trace(q[0]) / D)
        moment = max(moment, abs(start.scales[0, 0] / exact - 1), np.abs(start.means[0] - q[1]).max())
        if m < 0.75:  # further out the two samples cannot be told apart
            mmd = metrics.mmd(draw(2, m))
            floor = floor_of(mmd, m)
            ratio = [max(metrics.score(mmd, s.sample(jax.random.key(3), (n, D))), floor) for s in (plain, start)]
            starting.append(ratio[0] / ratio[1])
    sample = jax.jit(diffjax.sample)
    mmd = metrics.mmd(draw(4, 0.0))
    floor = floor_of(mmd, 0.0)
    for m in (0.3, 0.5, 0.7):
        solver = solvers.exp_ab(PROCESS, times.uniform(steps, start=m), order=3, value=solvers.V)
        analytic = starts.analytic_start(PROCESS, train, m)
        plain = starts.MixtureStart(m, np.zeros(1), np.zeros((1, D)), np.ones((1, D)))
        ends = [sample(key, d, solver, s.sample(jax.random.key(5), (n, D))) for s in (plain, analytic)]
        found = [metrics.score(mmd, x) for x in ends]
        out[f"end_mmd_over_floor_at_{m}"] = found[1] / floor
        out[f"end_mmd_ratio_at_{m}"] = max(found[0], floor) / max(found[1], floor)
    return {
        **out,
        "least_kl_gain": min(gains),
        "kl_gain_at_0.7": gains[6],
        "least_start_mmd_ratio": min(starting),
        "moment_error": moment,
        "plain_grid": ends[0][:, :2],  # of the last, M = 0.7: the first two of the dimensions
        "analytic_grid": ends[1][:, :2],
        "data_grid": draw(4, 0.0)[:, :2],
    }
