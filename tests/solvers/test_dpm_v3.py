"""DPM-Solver-v3: its two degenerate forms, exactness, the published loop, and statistics against quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, processes, solvers, times
from diffjax.solvers import DATA, NOISE, ModelStatistics, dpm_v3, model_statistics
from diffjax.testing import draw, flow, gaussian, mixture, oracle, predict, smooth_mixture

MIX = smooth_mixture()
VP = processes.vp()
run = jax.jit(diffjax.sample)
run_stack = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))
GRID = times.log_snr(VP, 7, start=0.95, stop=0.05)


SINE = diffjax.denoiser(lambda x, t: jnp.sin(x), VP, diffjax.from_v)


def gaussian_statistics(lam, mean, var):
    """The exact ones of data N(mean, diag(var)): l = e^{-2 lam} / (var + e^{-2 lam}), f = -l mean."""
    rest = np.exp(-2 * lam)[:, None]
    l = rest / (var + rest)
    slope = -2 * rest * var / (var + rest) ** 2
    return ModelStatistics(lam, l, 0 * l, -slope * mean)


def wavy_statistics(seed, dims, n=41):
    """Smooth and not degenerate, so that every term of the method counts."""
    lam = np.linspace(-5, 3, n)
    c = np.random.default_rng(seed).uniform(-0.5, 0.5, (3, 2, *dims))
    wave = lambda c: c[0] * np.sin(lam.reshape(-1, *(1,) * len(dims)) + 3 * c[1])
    return ModelStatistics(lam, 0.5 + wave(c[0]), wave(c[1]), wave(c[2]))


# ------------------------------------------------------------------------------------------------ degenerate forms


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("statistics", "value", "part"), [(DATA, solvers.X0, 0), (NOISE, solvers.EPS, 1)])
def test_degenerate_statistics_are_dpm_solver_and_its_plus_plus(order, statistics, value, part):
    ours = dpm_v3(VP, GRID, order, statistics, correct_above=1.0).rows
    theirs = solvers.exp_ab(VP, GRID, order, value).rows
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    close(ours.qx, theirs.qx)
    unit = ours.u[:, part]  # the kept f is -x0, or e^{-lam} eps
    close(ours.u[:, 1 - part], 0 * unit)
    close(unit * ours.qn, theirs.qn)
    for j in range(order - 1):
        close(unit[: len(unit) - j - 1] * ours.qd[j + 1 :, j], theirs.qd[j + 1 :, j])
    close(ours.qc, 0 * ours.qc)
    if order == 1 and value is solvers.X0:
        close(-ours.qn, solvers.dpmpp(VP, GRID, 1).rows.qn)


def test_default_is_data_prediction_without_a_constant():
    default, data = dpm_v3(VP, GRID), dpm_v3(VP, GRID, statistics=DATA)
    assert default.constants == () and len(data.constants) == 1
    np.testing.assert_array_equal(default.rows.qd, data.rows.qd)


# ------------------------------------------------------------------------------------------------ exactness


@pytest.fixture(scope="module")
def diagonal():
    """Gaussian data, one variance per dimension, and the exact statistics."""
    mean, var = np.array([0.5, -1.0, 0.0]), np.array([0.2, 1.5, 0.05])
    return mean, var, gaussian_statistics(np.linspace(-5, 4, 4001), mean, var)


@pytest.mark.parametrize("process", [VP, processes.edm()], ids=["vp", "edm"])
def test_one_step_is_exact_on_diagonal_gaussians(diagonal, process, x64):
    mean, var, statistics = diagonal
    t, s = (float(process.time_of_log_snr(lam)) for lam in (-3.0, 2.0))
    m = gaussian(mean, np.diag(var))
    x, _ = draw(jax.random.key(0), m, 8, process, t)
    solver = dpm_v3(process, np.array([t, s]), statistics=statistics)
    got = run(jax.random.key(0), oracle(m, process), solver, x)
    np.testing.assert_allclose(got, flow(m, process, x, t, s), atol=1e-5)
    back = dpm_v3(process, np.array([s, t]), 3, statistics, inverse=True)
    back = run(jax.random.key(0), oracle(m, process), back, got)
    np.testing.assert_allclose(back, x, atol=2e-4)  # e^{3} times the error in x / alpha


def test_measured_statistics_of_a_gaussian_are_the_exact_ones(diagonal):
    mean, var, _ = diagonal
    m = gaussian(mean, np.diag(var))
    grid = times.log_snr(VP, 60, start=0.97, stop=0.04)
    got = model_statistics(jax.random.key(1), oracle(m, VP), draw(jax.random.key(0), m, 64)[0], grid, ridge=1e-5)
    exact = gaussian_statistics(got.log_snr, mean, var)
    np.testing.assert_allclose(got.l, exact.l, atol=1e-5)  # the Jacobian is diagonal: one probe is exact
    np.testing.assert_allclose(got.s, 0, atol=0.02)  # f is constant but for rounding: nothing to fit
    np.testing.assert_allclose(got.b[1:-1], exact.b[1:-1], atol=5e-3)


def test_endpoints_with_statistics(diagonal, x64):
    """From exactly t = 1 to exactly t = 0: steps with an infinite end are DDIM, which is inexact but finite."""
    mean, var, statistics = diagonal
    m = gaussian(mean, np.diag(var))
    process = processes.rectified()
    x = process.prior(jax.random.key(0), (8, 3))
    solver = dpm_v3(process, times.log_snr(process, 8), statistics=statistics)
    got = run(jax.random.key(0), oracle(m, process), solver, x)
    np.testing.assert_allclose(got, flow(m, process, x, 1.0, 0.0), atol=0.05)


# ------------------------------------------------------------------------------------------------ the published loop


def published(process, grid, order, m, corrects, pseudo_p, pseudo_c, half, model, x):
    """Algorithm with stored states, corrected in place; all integrals on a fine mesh. [B, d] states."""
    lam, alpha, sigma = process.log_snr(grid), process.alpha(grid), process.sigma(grid)

    def at(values, u):
        return np.stack([np.interp(u, m.log_snr, v) for v in values.T], -1)

    def cumulative(u, f):
        return np.concatenate([0 * f[:1], np.cumsum((u[1:] - u[:-1])[:, None] * (f[1:] + f[:-1]) / 2, 0)])

    def update(x, i, nodes, values, pseudo):
        low, high = min(*lam[nodes], lam[i + 1]), max(*lam[nodes], lam[i + 1])
        own = [u for u in (*m.log_snr, *lam) if low <= u <= high]
        u = np.unique(np.concatenate([np.linspace(low, high, 40001), own]))
        start = np.searchsorted(u, lam[i])
        big_l, big_s = (c - c[start] for c in (cumulative(u, at(m.l, u)), cumulative(u, at(m.s, u))))
        big_b = cumulative(u, np.exp(-big_s) * at(m.b, u))
        big_b = big_b - big_b[start]
        places = np.searchsorted(u, lam[nodes])
        g = [np.exp(-big_s[p]) * f - big_b[p] for p, f in zip(places, values, strict=True)]
        table = [[*g]]
        for k in range(1, len(g)):
            table.append([(a - b) / (lam[nodes[j]] - lam[nodes[j + k]])
                          for j, (a, b) in enumerate(zip(table[-1][:-1], table[-1][1:], strict=True))])  # fmt: skip
        end = np.searchsorted(u, lam[i + 1])
        v = slice(start, end + 1)
        integral = lambda f: cumulative(u[v], f[v])[-1]
        total, newton = integral(np.exp(big_l + big_s) * big_b), np.ones_like(u)
        for k, row in enumerate(table):
            total = total + integral(np.exp(big_l + big_s) * newton[:, None]) * row[0]
            newton = newton * (u - lam[nodes[0] if pseudo else nodes[k]])
        return alpha[i + 1] * np.exp(-big_l[end]) * (x / alpha[i] - total)

    f_of = lambda x, i: (sigma[i] * model(x, i) - at(m.l, lam[i : i + 1]) * x) / alpha[i]
    values, before, used = [], None, 0
    for i in range(len(grid) - 1):
        values.append(f_of(x, i))
        if corrects and i and (grid[i] > 0.5 or not half):
            size = used + pseudo_c
            if size > 1:
                nodes = [i - 1, i, *range(i - 2, i - size, -1)]
                x = update(before, i - 1, nodes, [values[n] for n in nodes], pseudo_c)
        used = min(order, i + 1)
        nodes = list(range(i, i - used, -1))
        before, x = x, update(x, i, nodes, [values[n] for n in nodes], pseudo_p)
    return x


CASES = {
    "corrected": {"order": 3},
    "order_two": {"order": 2, "pseudo_corrector": True},
    "predictor": {"order": 3, "correct_above": 1.0, "pseudo_predictor": True},
    "pseudo": {"order": 3, "pseudo_predictor": True, "pseudo_corrector": True},
    "half": {"order": 2, "correct_above": 0.5, "pseudo_corrector": True},
    "one": {"order": 1, "pseudo_corrector": True},
}


def test_against_the_published_loop(x64):
    x = jax.random.normal(jax.random.key(0), (2, 2))
    m = wavy_statistics(0, (2,))
    tables = [dpm_v3(VP, GRID, statistics=m, **options) for options in CASES.values()]
    got = run_stack(jax.random.key(0), oracle(MIX, VP), solvers.stack(tables), x)
    eps = jax.jit(lambda x, t: predict(MIX, VP, x, t).eps)
    model = lambda x, i: np.asarray(eps(jnp.asarray(x), GRID[i]))
    for end, options in zip(got, CASES.values(), strict=True):
        above = options.get("correct_above", 0.0)
        loop = published(
            VP, GRID, options["order"], m, above < 1, options.get("pseudo_predictor", False),
            options.get("pseudo_corrector", False), above == 0.5, model, np.asarray(x),
        )  # fmt: skip
        np.testing.assert_allclose(end, loop, atol=2e-7, err_msg=str(options))


# ------------------------------------------------------------------------------------------------ tables per dimension


def test_images_are_vectors_and_one_number_is_many(x64):
    x = jax.random.normal(jax.random.key(0), (3, 4))
    end = lambda statistics, x: run(jax.random.key(0), SINE, dpm_v3(VP, GRID, statistics=statistics), x)
    flat = wavy_statistics(1, (4,))
    picture = ModelStatistics(flat.log_snr, *(a.reshape(-1, 2, 2, 1) for a in flat[1:]))
    image = end(picture, x.reshape(3, 2, 2, 1))
    np.testing.assert_allclose(image.reshape(3, 4), end(flat, x), rtol=1e-12)
    single = wavy_statistics(2, ())
    many = ModelStatistics(single.log_snr, *(np.repeat(a[:, None], 4, 1) for a in single[1:]))
    np.testing.assert_allclose(end(single, x), end(many, x), rtol=1e-12)


def test_tables_per_dimension_pad_stack_save_and_load(tmp_path):
    x = jax.random.normal(jax.random.key(0), (3, 2))
    end_of = lambda s: run(jax.random.key(0), SINE, s, x)
    s = dpm_v3(VP, GRID, statistics=wavy_statistics(0, (2,)))
    end = end_of(s)
    np.testing.assert_array_equal(end, end_of(solvers.pad(s, 12, p=2, q=4, noise=2)))
    np.testing.assert_array_equal(end, end_of(solvers.compact(solvers.pad(s, 7, q=4))))
    plain = solvers.heun(VP, times.uniform(3))
    both = run_stack(jax.random.key(0), SINE, solvers.stack([s, plain]), x)
    np.testing.assert_allclose(both[0], end, rtol=1e-5)
    np.testing.assert_allclose(both[1], end_of(plain), rtol=1e-5)
    solvers.save_table(tmp_path / "table.npz", s)
    loaded = solvers.load_table(tmp_path / "table.npz")
    jax.tree.map(np.testing.assert_array_equal, s, loaded)
    np.testing.assert_array_equal(end, end_of(loaded))


def test_traced_grid_builds_the_same_table_with_statistics(x64):
    m = wavy_statistics(0, (2,), n=9)
    host = dpm_v3(VP, GRID, statistics=m)
    traced = jax.jit(lambda g: dpm_v3(VP, g, statistics=m).rows)(GRID)
    for a, b in zip(jax.tree.leaves(host.rows), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_against_quadrature(x64):
    """One dimension: every expectation is an integral over p_t, and f' a finite difference along the flow."""
    process = processes.cosine()
    m = mixture([0.4, 0.6], [[-1.0], [0.8]], stds=[0.5, 0.7])
    grid = times.log_snr(process, 80, start=0.85, stop=0.15)
    got = model_statistics(jax.random.key(0), oracle(m, process), draw(jax.random.key(1), m, 20000)[0], grid)
    u = np.linspace(-7, 7, 2001)
    eps = jax.jit(lambda x, t: predict(m, process, x[:, None], t).eps[:, 0])

    def parts(lam, x):
        t = float(process.time_of_log_snr(lam))
        return process.alpha(t), process.sigma(t), np.asarray(eps(jnp.asarray(x), t))

    def expectation(lam, f):
        a, s, _ = parts(lam, u)
        p = sum(w * np.exp(-((u - a * mu) ** 2) / (2 * v)) / np.sqrt(v) for w, mu, v in
                ((0.4, -1.0, a * a * 0.25 + s * s), (0.6, 0.8, a * a * 0.49 + s * s)))  # fmt: skip
        return (p * f).sum() / p.sum()

    def l_of(lam):
        _, s, e = parts(lam, u)
        return expectation(lam, np.gradient(s * e, u))

    h = 0.01
    for k in (20, 40, 60):
        lam = got.log_snr[k]
        a, s, e = parts(lam, u)

        def f_at(step, lam=lam, a=a, s=s, e=e):  # dz = -e^{-lam} eps dlam in z = x / alpha
            a2, s2, _ = parts(lam + step, u)
            x = a2 * (u / a - step * s / a * e)
            return (s2 * parts(lam + step, x)[2] - l_of(lam + step) * x) / a2

        f, slope = f_at(0.0), (f_at(h) - f_at(-h)) / (2 * h)
        variance = expectation(lam, f * f) - expectation(lam, f) ** 2
        s_star = (expectation(lam, f * slope) - expectation(lam, f) * expectation(lam, slope)) / variance
        b_star = expectation(lam, slope) - s_star * expectation(lam, f)
        np.testing.assert_allclose(got.l[k], l_of(lam), atol=0.01)
        np.testing.assert_allclose([got.s[k, 0], got.b[k, 0]], [s_star, b_star], atol=0.05)


def test_statistics_help_at_few_steps_and_keep_the_order(x64):
    process, start, stop = processes.cosine(), 0.95, 0.05
    d = oracle(MIX, process)
    stats = model_statistics(
        jax.random.key(0), d, lambda key: draw(key, MIX, 1000)[0], times.log_snr(process, 100, start=0.96, stop=0.04)
    )
    x, _ = draw(jax.random.key(1), MIX, 16, process, start)
    exact = flow(MIX, process, x, start, stop)
    grids = {n: times.log_snr(process, n, start=start, stop=stop) for n in (5, 10, 40, 80)}
    tables = [f(process, g) for g in grids.values() for f in (
        lambda p, g: dpm_v3(p, g, 3, stats), lambda p, g: dpm_v3(p, g, 3, stats, correct_above=1.0),
        lambda p, g: solvers.dpmpp(p, g, 2))]  # fmt: skip
    end = np.asarray(run_stack(jax.random.key(0), d, solvers.stack(tables), x))
    error = np.sqrt(((end - exact) ** 2).sum(-1).mean(-1)).reshape(4, 3)
    assert np.all(error[:2, :2] < 0.5 * error[:2, 2:]), error
    assert np.all(np.log2(error[2, :2] / error[3, :2]) > 1.85), error


def test_statistics_belong_to_condition_and_guidance():
    """The bound label alone is a Gaussian; guidance extrapolates l, which is linear in the model."""
    m = mixture([1, 1], [[-1.0, 0.0], [1.0, 0.5]], stds=[0.5, 0.5])
    x0 = draw(jax.random.key(0), m, 500)[0]
    grid = times.log_snr(VP, 12, start=0.8, stop=0.2)
    d = oracle(m, VP)
    measure = lambda d: model_statistics(jax.random.key(1), d, x0, grid)
    one = measure(d.bind(0))
    np.testing.assert_allclose(one.l, gaussian_statistics(one.log_snr, 0.0, 0.25).l * np.ones((1, 2)), atol=1e-5)
    free, guided = measure(d.bind(diffjax.testing.ALL)), measure(guidance.cfg(2.0, skip=False)(d).bind(0))
    assert np.abs(free.l - one.l).max() > 0.05
    np.testing.assert_allclose(guided.l, 2 * one.l - free.l, atol=1e-5)


def test_statistics_are_saved_and_loaded(tmp_path):
    path = tmp_path / "statistics.npz"
    m = wavy_statistics(0, (2, 3))
    solvers.save_statistics(path, m)
    jax.tree.map(np.testing.assert_array_equal, m, solvers.load_statistics(path))
    np.savez(path, format=99, kind="model_statistics", **m._asdict())
    with pytest.raises(ValueError, match="format 99; .* Upgrade diffjax"):
        solvers.load_statistics(path)
    np.savez(path, format=1, kind="model_statistics", log_snr=m.log_snr)
    with pytest.raises(ValueError, match=r"not a file written by save_statistics; it holds \['log_snr'\]"):
        solvers.load_statistics(path)
    solvers.save_statistics(path, m)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"nothing"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not a file written by save_statistics"):
            solvers.load_statistics(path)
    with pytest.raises(ValueError, match="not a file written by save_statistics"):
        solvers.load_statistics(tmp_path / "missing.npz")


def test_bad_options():
    with pytest.raises(ValueError, match="order must be 1, 2 or 3"):
        dpm_v3(VP, GRID, 4)
    with pytest.raises(ValueError, match="correct_above must be in .* a time"):
        dpm_v3(VP, GRID, correct_above=-0.1)
    with pytest.raises(ValueError, match="arrays of one shape"):
        dpm_v3(VP, GRID, statistics=DATA._replace(s=np.zeros(3)))
    with pytest.raises(ValueError, match="log_snr that increases"):
        dpm_v3(VP, GRID, statistics=DATA._replace(log_snr=np.array([1.0, 0.0])))
    d = oracle(MIX, VP)
    measure = lambda x0, times, **o: model_statistics(jax.random.key(0), d, x0, times, **o)
    with pytest.raises(ValueError, match="at least 3 distinct times"):
        measure(np.zeros((4, 2)), [0.5, 0.6])
    with pytest.raises(ValueError, match="finite log-SNR"):
        measure(np.zeros((4, 2)), times.uniform(5))
    with pytest.raises(ValueError, match="one array of items"):
        measure({"a": np.zeros((4, 2)), "b": np.zeros((4, 2))}, [0.2, 0.5, 0.6])
    with pytest.raises(ValueError, match="probes must be"):
        measure(np.zeros((4, 2)), [0.2, 0.5, 0.6], probes=0)
