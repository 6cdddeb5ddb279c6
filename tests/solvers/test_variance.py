"""Reverse variances: the network's own, and the optimal one, which is exact for Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, processes, solvers, times
from diffjax import numerics as nu
from diffjax.solvers.statistics import check_statistics
from diffjax.testing import gaussian, oracle

PROCESSES = [processes.vp(), processes.cosine(), processes.ve(), processes.edm(), processes.rectified()]
IDS = [p.family.name for p in PROCESSES]
VP = PROCESSES[0]
run = jax.jit(diffjax.sample)


# ------------------------------------------------------------------------------------------------ learned variance


def fraction_of_params(params, x, t, cond):
    return jnp.sin(x), {"fraction": params + 0 * x}


def fraction_of_state(params, x, t, cond):
    return jnp.sin(x), {"fraction": jax.nn.sigmoid(params * x)}


def fraction_of_item(params, x, t, cond):
    return jnp.sin(x), {"fraction": jax.nn.sigmoid(params * x[:, 0])}


def log_variance_of_params(params, x, t, cond):
    return jnp.sin(x), {"log_variance": params + 0 * x}


def with_aux(net, params, process=VP):
    return diffjax.denoiser(net, process, diffjax.from_v, params, aux=True)


def test_constant_fraction_is_ddpm_with_that_variance():
    x = jax.random.normal(jax.random.key(0), (4, 3))
    grid = times.log_snr(VP, 5)
    for fraction in (0.0, 0.4):
        d = with_aux(fraction_of_params, fraction)
        got, chain = (
            run(jax.random.key(1), d, solver, x)
            for solver in (solvers.ddpm_learned(VP, grid), solvers.ddpm(VP, grid, variance=fraction))
        )
        np.testing.assert_allclose(got, chain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("net", [fraction_of_state, fraction_of_item])
def test_variance_per_item_and_per_dimension_against_the_loop(net, x64):
    """Nichol and Dhariwal's chain with alpha-bar and beta, in Python, with the same noise."""
    grid = times.uniform(3, start=0.98, stop=0.1)
    x = jax.random.normal(jax.random.key(0), (3, 2))
    got = run(jax.random.key(1), with_aux(net, 2.0), solvers.ddpm_learned(VP, grid), x)
    x, keys = np.asarray(x), nu.item_keys(jax.random.key(1), jnp.arange(3))
    for i, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        bar_t, bar_s = VP.alpha(t) ** 2, VP.alpha(s) ** 2
        beta = 1 - bar_t / bar_s
        small = beta * (1 - bar_s) / (1 - bar_t)
        x0 = np.sqrt(bar_t) * x - np.sqrt(1 - bar_t) * np.sin(x)
        mean = (np.sqrt(bar_s) * beta * x0 + np.sqrt(bar_t / bar_s) * (1 - bar_s) * x) / (1 - bar_t)
        f = 1 / (1 + np.exp(-2 * (x if net is fraction_of_state else x[:, :1])))
        z = np.asarray(nu.item_normal(keys, 2 * i + 1, x))
        x = mean + np.exp(f / 2 * np.log(beta) + (1 - f) / 2 * np.log(small)) * z
    np.testing.assert_allclose(got, x, rtol=1e-10)


def test_log_variance_itself_and_a_last_step_without_noise():
    x, d = jnp.ones((2, 3)), with_aux(log_variance_of_params, np.log(0.25))
    grid, last = np.array([0.6, 0.3]), np.array([0.3, 0.0])
    chain = lambda grid: solvers.ddpm_learned(VP, grid, solvers.log_variance_of_aux)
    z = nu.item_normal(nu.item_keys(jax.random.key(5), jnp.arange(2)), 1, x)
    mean = run(jax.random.key(5), d, solvers.ddim(VP, grid, 1.0, s_noise=0.0), x)
    np.testing.assert_allclose(run(jax.random.key(5), d, chain(grid), x), mean + 0.5 * z, rtol=1e-5)
    ends = [run(jax.random.key(k), d, chain(last), x) for k in (1, 2)]
    np.testing.assert_array_equal(*ends)


def test_all_processes_run_from_noise_to_data():
    for process in PROCESSES:
        rows = solvers.ddpm_learned(process, times.log_snr(process, 5)).rows
        assert all(np.all(np.isfinite(leaf)) for leaf in rows), process.family.name


def test_learned_chain_is_one_trace_and_differentiable():
    process, traces = processes.vp(), []

    def net(params, x, t, cond):
        traces.append(1)
        return params * x, {"fraction": jax.nn.sigmoid(x)}

    @jax.jit
    def end(params, solver):
        d = diffjax.denoiser(net, process, diffjax.from_v, params, aux=True)
        return jnp.sum(diffjax.sample(jax.random.key(0), d, solver, jnp.ones((2, 2))) ** 2)

    grad = jax.jit(jax.grad(end))
    for start in (0.9, 0.8):
        g = grad(0.5, solvers.ddpm_learned(process, times.uniform(4, start=start)))
        assert np.isfinite(g) and g != 0
    assert len(traces) == 1


def test_guidance_hands_on_the_variance_of_the_condition():
    net = lambda params, x, t, cond: (params * x, {"fraction": cond.astype(x.dtype)[:, None] + 0 * x})
    d = diffjax.denoiser(net, VP, diffjax.from_v, 0.5, null=0, aux=True)
    solver = solvers.ddpm_learned(VP, times.uniform(3, start=0.9))
    ends = [
        run(jax.random.key(0), model.bind(jnp.array([1, 1])), solver, jnp.ones((2, 2)))
        for model in (d, guidance.cfg(2.0, skip=False)(d))
    ]
    np.testing.assert_allclose(*ends, rtol=1e-5)


def test_missing_output_is_named():
    process = processes.vp()
    solver = solvers.ddpm_learned(process, times.uniform(3))
    for net, aux in ((lambda x, t: x, False), (lambda x, t: (x, {"variance": x}), True)):
        d = diffjax.denoiser(net, process, diffjax.from_v, aux=aux)
        with pytest.raises(ValueError, match="no auxiliary output 'fraction' .* aux=True"):
            diffjax.sample(jax.random.key(0), d, solver, jnp.ones((2, 2)))


# ------------------------------------------------------------------------------------------------ optimal variance


def exact_moment(process, t, var):
    """E eps^2 of data N(m, var): the predicted noise is sigma (x - alpha m) / (alpha^2 var + sigma^2)."""
    lam = process.log_snr(t)
    square = process.sigma(t) ** 2 / (process.alpha(t) ** 2 * var + process.sigma(t) ** 2)
    order = np.argsort(lam)
    return solvers.NoiseMoment(lam[order], square[order])


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_data_keep_their_variance_in_any_number_of_steps(process, eta):
    """One variance for all dimensions: every step maps the exact marginal to the exact marginal."""
    var = 0.3
    for n in (1, 3, 10):
        grid = times.log_snr(process, n, start=0.95, stop=0.05)
        rows = solvers.analytic(process, grid, exact_moment(process, grid, var), eta).rows
        a, s = process.alpha(grid), process.sigma(grid)
        got = a[0] ** 2 * var + s[0] ** 2
        for i in range(n):
            total = a[i] ** 2 * var + s[i] ** 2
            gain = rows.u[i, 0] * a[i] * var / total + rows.u[i, 1] * s[i] / total
            got = gain**2 * got + rows.noise[i] ** 2
            np.testing.assert_allclose(got, a[i + 1] ** 2 * var + s[i + 1] ** 2, rtol=1e-10)
    if eta == 1.0:  # the chain's own variance: that of x_s given x_t, from the joint Gaussian
        i = 3
        v_s = a[i + 1] ** 2 * var + s[i + 1] ** 2
        v_t = a[i] ** 2 * var + s[i] ** 2
        np.testing.assert_allclose(rows.noise[i] ** 2, v_s - (a[i] / a[i + 1] * v_s) ** 2 / v_t, rtol=1e-9)


def test_measured_moment_is_the_closed_form():
    process, var = processes.vp(), 0.3
    t = np.linspace(0.9, 0.1, 5)
    x0 = 0.5 + np.sqrt(var) * np.random.default_rng(0).standard_normal((4000, 4))
    d = oracle(gaussian([0.5] * 4, var), process)
    moment = solvers.noise_moment(jax.random.key(0), d, x0, t)
    exact = exact_moment(process, t, var)
    np.testing.assert_allclose(moment.log_snr, exact.log_snr)
    np.testing.assert_allclose(moment.square, exact.square, rtol=0.05)  # 16000 squares of normals: 1 % standard error


def test_without_a_moment_it_is_ddim():
    process, grid = processes.vp(), times.uniform(6)
    for eta in (0.3, 1.0):
        a, b = (f(process, grid, eta=eta).rows for f in (solvers.analytic, solvers.ddim))
        np.testing.assert_allclose(a.u, b.u, rtol=1e-12)
        np.testing.assert_allclose(a.noise, b.noise, rtol=1e-12)


def test_bounds_and_extrapolation():
    process, grid = processes.rectified(), times.uniform(6)
    lam = np.array([-2.0, 0.0, 2.0])
    moment = lambda *square: solvers.NoiseMoment(lam, np.array(square))
    std = lambda m, **o: solvers.analytic(process, grid, m, **o).rows.noise
    plain = std(None)
    np.testing.assert_array_equal(std(moment(1.2, 1.1, 1.3)), plain)  # lower bound: a variance is not negative
    assert np.all(std(moment(0.9, 0.5, 0.1))[:-1] > plain[:-1]) and std(moment(0.9, 0.5, 0.1))[-1] == 0
    high, bounded = std(moment(0.0, 0.0, 0.0)), std(moment(0.0, 0.0, 0.0), data_range=2.0)
    np.testing.assert_array_equal(std(moment(-0.5, -0.5, -0.5)), high)  # upper bound
    assert np.all(np.isfinite(high)) and np.all(bounded <= high) and bounded[1] < high[1]
    a, s = process.alpha(grid), process.sigma(grid)
    v = s[3] ** 2 * (1 - np.exp(2 * (process.log_snr(grid[2]) - process.log_snr(grid[3]))))
    extra = (a[3] - a[2] * np.sqrt(s[3] ** 2 - v) / s[2]) ** 2  # (b - a)^2 / 4 = 1
    np.testing.assert_allclose(bounded[2] ** 2, v + extra, rtol=1e-12)


def test_moments_are_saved_and_checked(tmp_path):
    moment = solvers.NoiseMoment(np.array([-1.0, 0.5]), np.array([0.9, 0.3]))
    solvers.save_statistics(tmp_path / "moment.npz", moment)
    loaded = solvers.load_statistics(tmp_path / "moment.npz")
    assert isinstance(loaded, solvers.NoiseMoment)
    jax.tree.map(np.testing.assert_array_equal, moment, loaded)
    process, grid = processes.vp(), times.uniform(3)
    for bad, message in (
        (solvers.NoiseMoment([0.0, 1.0], [0.5]), "arrays of one shape"),
        (solvers.NoiseMoment([1.0, 0.0], [0.5, 0.5]), "log_snr that increases"),
        (solvers.NoiseMoment([0.0, 1.0], [0.5, np.nan]), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            solvers.analytic(process, grid, bad)
    with pytest.raises(ValueError, match="expected NoiseMoment; got ModelStatistics"):
        check_statistics(solvers.DATA, solvers.NoiseMoment)
    with pytest.raises(ValueError, match="eta must be in"):
        solvers.analytic(process, grid, eta=1.5)
    with pytest.raises(ValueError, match="data_range, the length"):
        solvers.analytic(process, grid, data_range=0.0)
    d = oracle(gaussian([0.0], 1.0), process)
    with pytest.raises(ValueError, match="distinct times with finite log-SNR"):
        solvers.noise_moment(jax.random.key(0), d, jnp.ones((2, 1)), [0.0, 0.5])


def test_the_fraction_may_be_a_tree_like_the_state():
    small, large = jnp.float32(-2.0), jnp.float32(1.0)
    f = {"u": jnp.full((2, 3), 0.25), "v": jnp.ones(2)}
    got = solvers.fraction_of_aux({"fraction": f}, small, large)
    np.testing.assert_allclose(got["u"], np.full((2, 3), -1.25))
    np.testing.assert_allclose(got["v"], np.ones(2))
