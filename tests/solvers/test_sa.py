"""SA-Solver: the deterministic limit, the published loop with the same noise, and exact moments on Gaussian data."""

import gaussian_moments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import diffjax
from diffjax import numerics as nu
from diffjax import processes, solvers, times
from diffjax.testing import draw, flow, oracle, predict, smooth_mixture

MIX = smooth_mixture()
ORDERS = {(1, 0): 1, (1, 2): 2, (2, 0): 2, (2, 3): 3, (3, 3): 3, (4, 3): 3, (4, 4): 3}  # by (predictor, corrector)


def test_without_noise_it_converges_with_its_order(x64):
    process, start, stop = processes.cosine(), 0.9, 0.1
    x, _ = draw(jax.random.key(1), MIX, 8, process, start)
    exact = flow(MIX, process, x, start, stop)
    grids = [times.log_snr(process, n, start=start, stop=stop) for n in (160, 320)]
    tables = [solvers.sa(process, g, p, c, 0.0) for g in grids for p, c in ORDERS]
    run = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))
    end = np.asarray(run(jax.random.key(0), oracle(MIX, process), solvers.stack(tables), x))
    error = np.sqrt(((end - exact) ** 2).sum(-1).mean(-1)).reshape(2, -1)
    slope = dict(zip(ORDERS, np.log2(error[0] / error[1]), strict=True))
    assert all(abs(slope[k] - ORDERS[k]) < 0.15 for k in ORDERS), slope


@pytest.mark.parametrize("process", [processes.vp(), processes.rectified(), processes.edm()], ids=["vp", "flow", "edm"])
def test_it_contains_ddim_ddpm_and_exponential_adams(process):
    grid = times.log_snr(process, 6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    table, adams = solvers.sa(process, grid, 3, 0, 0.0).rows, solvers.exp_ab(process, grid, 3).rows
    finite = np.isfinite(process.log_snr(grid[:-1])) & np.isfinite(process.log_snr(grid[1:]))
    close(table.qn[finite], adams.qn[finite])
    close(table.qx[finite], adams.qx[finite])
    close(table.qd, adams.qd)
    table, chain = solvers.sa(process, grid, 1, 0, 1.0).rows, solvers.ddpm(process, grid).rows
    close(table.qx, chain.qx)
    close(table.qn, chain.qn)
    close(table.noise, chain.noise)
    table = solvers.sa(process, grid, 1, 0, 0.0).rows
    assert table.noise is None
    t, s = grid[:-1], grid[1:]
    close(table.qx[:, 0] * process.sigma(t), process.sigma(s))  # ddim, with x_t = alpha_t x0 + sigma_t eps
    close(table.qx[:, 0] * process.alpha(t) + table.qn, process.alpha(s))


@pytest.mark.parametrize(("predictor", "corrector", "tau"), [(3, 3, 0.8), (2, 4, 1.0)])
def test_against_the_published_loop_with_the_same_noise(predictor, corrector, tau, x64):
    """Predict with noise, evaluate, correct with the same noise; the correction is the state that goes on."""
    process = processes.vp()
    grid = times.log_snr(process, 6, start=0.95, stop=0.05)
    low, high = 0.15, 2.0
    solver = solvers.sa(process, grid, predictor, corrector, tau, low=low, high=high)
    start = jax.random.normal(jax.random.key(0), (3, 2))
    got = diffjax.sample(jax.random.key(1), oracle(MIX, process), solver, start)

    lam, alpha, sigma = process.log_snr(grid), process.alpha(grid), process.sigma(grid)
    model = jax.jit(lambda x, t: predict(MIX, process, x, t).x0)
    keys = nu.item_keys(jax.random.key(1), jnp.arange(3))

    def step(x, i, nodes, values, z):
        rate = tau**2 if low <= np.exp(-lam[i]) <= high else 0.0
        h = lam[i + 1] - lam[i]
        out = sigma[i + 1] / sigma[i] * np.exp(-rate * h) * x
        for j, value in enumerate(values):
            basis = lambda u, j=j: np.prod([(u - n) / (nodes[j] - n) for m, n in enumerate(nodes) if m != j])
            kernel = lambda u, basis=basis: (1 + rate) * np.exp((1 + rate) * (u - lam[i + 1])) * basis(u)
            out = out + alpha[i + 1] * quad(kernel, lam[i], lam[i + 1], epsabs=1e-13)[0] * value
        return out + sigma[i + 1] * np.sqrt(1 - np.exp(-2 * rate * h)) * z

    x, values = np.asarray(start), [np.asarray(model(start, grid[0]))]
    for i in range(6):
        z = np.asarray(nu.item_normal(keys, 2 * i + 1, start))
        past = min(predictor, i + 1)
        new = step(x, i, lam[i - past + 1 : i + 1][::-1], values[:past], z)
        if i == 5:
            break
        values = [np.asarray(model(jnp.asarray(new), grid[i + 1])), *values]
        past = min(corrector, i + 2)
        x = step(x, i, lam[i + 2 - past : i + 2][::-1], values[:past], z)
    np.testing.assert_allclose(got, new, rtol=1e-9, atol=1e-11)


def moments(solver, process, mean, var):
    """Mean and variance at the end of a table, exactly, for one-dimensional data N(mean, var) and its marginal at the start."""
    alpha, sigma = process.alpha(solver.grid[0]), process.sigma(solver.grid[0])
    return gaussian_moments.run(solver, process, mean, var, (alpha * mean, alpha**2 * var + sigma**2))


@pytest.mark.parametrize(("tau", "low", "high"), [(1.0, 0.0, np.inf), (0.6, 0.05, 1.0), (0.0, 0.0, np.inf)])
def test_gaussian_moments_converge_to_the_truth(tau, low, high):
    process, mean, var = processes.vp(), 0.7, 0.3
    truth = np.array([mean * process.alpha(0.02), var * process.alpha(0.02) ** 2 + process.sigma(0.02) ** 2])
    error = []
    for n in (10, 20, 40, 80):
        solver = solvers.sa(process, times.log_snr(process, n, stop=0.02), tau=tau, low=low, high=high)
        error.append(np.abs(moments(solver, process, mean, var) - truth).max())
    # the prior of vp is not exactly the marginal at t = 1, which `moments` starts from: nothing but discretisation is left
    assert error[-1] < 2e-3 and error[0] > 3 * error[1] > 0 and error[2] > 3 * error[3], error


def test_three_predictor_values_are_better_than_one_with_noise():
    process, mean, var = processes.vp(), 0.7, 0.3
    grid = times.log_snr(process, 15, stop=0.02)
    truth = var * process.alpha(0.02) ** 2 + process.sigma(0.02) ** 2
    wrong = [abs(moments(solvers.sa(process, grid, p, c), process, mean, var)[1] - truth) for p, c in ((1, 0), (3, 3))]
    assert wrong[1] < 0.4 * wrong[0], wrong


def test_noise_is_drawn_in_the_range_alone():
    process = processes.edm()
    grid = times.karras(process, 12)
    r = solvers.sa(process, grid, low=0.05, high=1.0).rows
    sigma = process.sigma(grid[:-1])
    drawn = (sigma >= 0.05) & (sigma <= 1.0)
    assert 0 < drawn.sum() < 12 and np.all((r.noise > 0) == drawn)


def test_tau_is_differentiable(x64):
    process = processes.vp()
    grid = times.log_snr(process, 4, start=0.98, stop=0.05)
    d = oracle(MIX, process)
    x = jax.random.normal(jax.random.key(0), (4, 2))

    @jax.jit
    @jax.value_and_grad
    def end(tau):
        return jnp.sum(diffjax.sample(jax.random.key(0), d, solvers.sa(process, grid, 2, 2, tau), x) ** 2)

    numeric = (end(0.7 + 1e-5)[0] - end(0.7 - 1e-5)[0]) / 2e-5
    np.testing.assert_allclose(end(0.7)[1], numeric, rtol=1e-6)
    assert np.isfinite(end(0.0)[1])


def test_bad_options():
    p, g = processes.vp(), times.uniform(4)
    with pytest.raises(ValueError, match="predictor must be"):
        solvers.sa(p, g, 5)
    with pytest.raises(ValueError, match="corrector must be 0, 2, 3 or 4, which counts its values"):
        solvers.sa(p, g, 3, 1)
    with pytest.raises(ValueError, match="tau must be >= 0"):
        solvers.sa(p, g, tau=-1.0)
    with pytest.raises(ValueError, match="deterministic: tau must be 0"):
        solvers.sa(p, g[::-1], inverse=True)
