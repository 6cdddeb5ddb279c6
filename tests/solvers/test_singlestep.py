"""Exponential singlestep solvers against the published loops, written out."""

import math

import gaussian_moments
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import numerics as nu
from diffjax import processes, solvers, times
from diffjax.solvers import CATALOGUE, EPS, X0, V, singlestep
from diffjax.testing import oracle, smooth_mixture

KEY = jax.random.key(0)
MIX = smooth_mixture()


def run_stack(tables, denoiser, x):
    run = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))
    return np.asarray(run(KEY, denoiser, solvers.stack(tables), x))


def published_eps(d, process, grid, x, order):
    """DPM-Solver-2 and -3 in lambda, noise prediction."""
    a, s, time = process.alpha, process.sigma, process.time_of_log_snr
    for t, u in zip(grid[:-1], grid[1:], strict=True):
        lam, h = process.log_snr(t), process.log_snr(u) - process.log_snr(t)
        e = d(x, t).eps
        if order == 2:
            m = time(lam + h / 2)
            y = a(m) / a(t) * x - s(m) * math.expm1(h / 2) * e
            x = a(u) / a(t) * x - s(u) * math.expm1(h) * d(y, m).eps
        else:
            m1, m2 = time(lam + h / 3), time(lam + 2 * h / 3)
            y = a(m1) / a(t) * x - s(m1) * math.expm1(h / 3) * e
            bend = d(y, m1).eps - e
            g = 2 * h / 3
            y = a(m2) / a(t) * x - s(m2) * math.expm1(g) * e - s(m2) * 2 * (math.expm1(g) / g - 1) * bend
            bend = d(y, m2).eps - e
            x = a(u) / a(t) * x - s(u) * math.expm1(h) * e - s(u) * 1.5 * (math.expm1(h) / h - 1) * bend
    return x


def published_x0(d, process, grid, x):
    """DPM-Solver++ 2S."""
    for t, u in zip(grid[:-1], grid[1:], strict=True):
        lam, h = process.log_snr(t), process.log_snr(u) - process.log_snr(t)
        m = process.time_of_log_snr(lam + h / 2)
        y = process.sigma(m) / process.sigma(t) * x - process.alpha(m) * math.expm1(-h / 2) * d(x, t).x0
        x = process.sigma(u) / process.sigma(t) * x - process.alpha(u) * math.expm1(-h) * d(y, m).x0
    return x


@pytest.fixture(scope="module")
def vp_case():
    """Both expansions on VP, whose alpha is not 1, on a grid that is not uniform in lambda."""
    with jax.enable_x64(True):
        process, grid = processes.vp(), times.uniform(4, start=0.95, stop=0.05)
        d, x = oracle(MIX, process), jax.random.normal(jax.random.key(3), (2, 2))
        names = ["dpm_solver_1", "ddim", "dpm_solver_2", "dpm2", "dpm_solver_3", "dpmpp_2s"]
        tables = [CATALOGUE[n].build(process, grid) for n in names]
        tables += [solvers.exp_rk(process, grid, (3, 3, 3, 1)), solvers.dpm_solver_fast(process, grid, 10)]
        ends = dict(zip([*names, "mixed", "fast"], run_stack(tables, d, x), strict=True))
        yield process, grid, jax.jit(d), x, ends


def test_dpm_solver_against_the_published_loops(vp_case, x64):
    process, grid, d, x, ends = vp_case
    for order in (2, 3):
        loop = published_eps(d, process, grid, x, order)
        np.testing.assert_allclose(ends[f"dpm_solver_{order}"], loop, rtol=1e-9)
    np.testing.assert_allclose(ends["dpmpp_2s"], published_x0(d, process, grid, x), rtol=1e-9)


def test_equivalences_and_mixed_orders(vp_case, x64):
    process, grid, d, x, ends = vp_case
    np.testing.assert_allclose(ends["dpm_solver_1"], ends["ddim"], rtol=1e-12)
    np.testing.assert_array_equal(ends["dpm_solver_2"], ends["dpm2"])
    np.testing.assert_array_equal(ends["mixed"], ends["fast"])
    y = published_eps(d, process, grid[:-1], x, 3)
    p, u = d(y, grid[3]), grid[4]
    np.testing.assert_allclose(ends["fast"], process.alpha(u) * p.x0 + process.sigma(u) * p.eps, rtol=1e-9)


def test_the_ancestral_samplers_in_sigma(x64):
    """x / alpha in terms of sigma / alpha, as these samplers are published, with the same noise; to sigma = 0."""
    process, n, eta, s_noise = processes.edm(), 4, 0.7, 1.1
    grid = times.karras(process, n)
    sigma, d = process.sigma(grid), jax.jit(oracle(MIX, process))
    x1 = process.prior(jax.random.key(3), (2, 2), dtype=jnp.float64)
    keys = nu.item_keys(KEY, jnp.arange(2))

    def step(name, x, t, s, z):
        up = min(s, eta * (s**2 * (t**2 - s**2) / t**2) ** 0.5)
        down = (s**2 - up**2) ** 0.5
        p = d(x, t / 80)
        slope = (x - p.x0) / t
        if name == "ancestral" or down == 0:
            return x + (down - t) * slope + s_noise * up * z
        middle = (t * down) ** 0.5
        if name == "dpm2_ancestral":
            y = x + (middle - t) * slope
            return x + (down - t) * (y - d(y, middle / 80).x0) / middle + s_noise * up * z
        y = middle / t * x + (1 - middle / t) * p.x0
        return down / t * x + (1 - down / t) * d(y, middle / 80).x0 + s_noise * up * z

    names = ["ancestral", "dpm2_ancestral", "dpmpp_2s_ancestral"]
    order = {"dpm2_ancestral": 2, "dpmpp_2s_ancestral": 2, "ancestral": 1}
    tables = [CATALOGUE["ancestral"].build(process, grid, eta=eta, s_noise=s_noise)]
    tables += [solvers.exp_rk(process, grid, 2, value, eta, s_noise=s_noise) for value in (EPS, X0)]
    for name, got in zip(names, run_stack(tables, oracle(MIX, process), x1), strict=True):
        x = x1
        for i in range(n):  # a step draws in its last row
            z = nu.item_normal(keys, 2 * (order[name] * (i + 1) - 1) + 1, x)
            x = step(name, x, sigma[i], sigma[i + 1], z)
        np.testing.assert_allclose(got, x, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", ["dpm2_ancestral", "dpmpp_2s_ancestral"])
def test_ancestral_cards_converge_to_the_law_of_the_sde(name):
    process = processes.vp()
    grid = lambda n: times.log_snr(process, n, start=0.9, stop=0.1)
    e = gaussian_moments.errors(CATALOGUE[name].build, process, grid, (160, 320), eta=1.0)
    slope = np.log2(e[0] / e[1])
    assert abs(slope[0] - CATALOGUE[name].order) < 0.15 and e[1].max() < 5e-3, (slope, e)


def test_an_ancestral_step_of_order_one_is_ddim():
    process, grid = processes.cosine(), times.uniform(6)
    one, ddim = solvers.exp_rk(process, grid, 1, eta=0.6), solvers.ddim(process, grid, 0.6)
    np.testing.assert_allclose(one.rows.noise, ddim.rows.noise)
    a = gaussian_moments.run(one, process, 0.3, 0.8, (0.0, 1.0))
    np.testing.assert_allclose(a, gaussian_moments.run(ddim, process, 0.3, 0.8, (0.0, 1.0)), rtol=1e-12)


def test_stages_stand_at_their_fractions_of_lambda():
    process, grid = processes.cosine(), times.uniform(5)
    s = solvers.exp_rk(process, grid, 3)
    assert s.evaluations == 1 + 3 * 3 + 1  # a step with an infinite end is one row
    assert s.rows.accept.sum() == 5 and s.rows.accept[[0, 3, 6, 9, 10]].all()
    lam = process.log_snr(s.rows.t[1:10]).reshape(3, 3)
    ends = process.log_snr(grid[1:5])
    np.testing.assert_allclose(lam, ends[:-1, None] + np.diff(ends)[:, None] * [0, 1 / 3, 2 / 3], atol=1e-6)


@pytest.mark.parametrize(("n", "evaluations"), [(1, 1), (1, 2), (2, 3), (2, 4), (4, 9), (4, 10), (4, 11), (4, None)])
def test_fast_makes_the_evaluations_asked_for(n, evaluations):
    process = processes.vp()
    s = solvers.dpm_solver_fast(process, times.log_snr(process, n, start=0.99, stop=0.01), evaluations)
    assert s.evaluations == (11 if evaluations is None else evaluations)
    assert s.rows.accept.sum() == n


def test_phi_is_accurate_at_every_size():
    for g in (1e-12, -1e-6, 0.0499, 0.0501, -0.05, 3.0, -8.0):
        series = math.fsum(g**k / math.factorial(k + 1) for k in range(1, 80))
        np.testing.assert_allclose(singlestep.phi(np, np.float64(g)), series, rtol=1e-13)


def test_gradients_and_kept_states(x64):
    process = processes.vp()
    d, x = oracle(MIX, process), jax.random.normal(jax.random.key(3), (2, 2))
    grid = times.uniform(2, start=0.95, stop=0.1)

    def end(eta, shift):
        s = solvers.exp_rk(process, shift * jnp.asarray(grid), (3, 2), eta=eta)
        y, kept = diffjax.sample(KEY, d, s, x, keep=True)
        return jnp.sum(y**2), (y, kept)

    f = jax.jit(jax.value_and_grad(end, (0, 1), has_aux=True))
    (_, (y, kept)), grads = f(0.5, 0.99)
    assert kept.x.shape == (3, 2, 2)
    np.testing.assert_array_equal(kept.x[-1], y)
    assert all(np.isfinite(g) and g != 0 for g in grads)
    assert all(np.isfinite(g) for g in f(0.0, 0.99)[1])
    step = 1e-6
    numeric = (f(0.5, 0.99 + step)[0][0] - f(0.5, 0.99 - step)[0][0]) / (2 * step)
    np.testing.assert_allclose(grads[1], numeric, rtol=1e-5)


def test_bad_input():
    p, g = processes.vp(), times.uniform(4)
    for order in (0, 4, (3, 3), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="order must be 1, 2 or 3, or one of them for each of the 4 steps"):
            solvers.exp_rk(p, g, order)
    with pytest.raises(ValueError, match="value must be EPS or X0; got 'v'"):
        solvers.exp_rk(p, g, value=V)
    with pytest.raises(ValueError, match="eta must be >= 0"):
        solvers.exp_rk(p, g, eta=-0.5)
    with pytest.raises(ValueError, match="the largest that fits"):
        solvers.exp_rk(p, g, eta=2.0)
    with pytest.raises(ValueError, match="deterministic"):
        solvers.exp_rk(p, g[::-1], eta=1.0, inverse=True)
    with pytest.raises(ValueError, match="13 evaluations need a grid .* got 4. 4 steps take 9 to 11"):
        solvers.dpm_solver_fast(p, g, 13)
    with pytest.raises(ValueError, match="at least two times"):
        solvers.dpm_solver_fast(p, np.array([1.0]))
