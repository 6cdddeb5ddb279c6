"""Stochastic multistep solvers against the published loops with the same noise, and against exact moments."""

import math

import gaussian_moments
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import numerics as nu
from diffjax import processes, solvers, times
from diffjax.solvers import CATALOGUE, X0
from diffjax.testing import oracle, smooth_mixture

KEY = jax.random.key(0)
MIX = smooth_mixture()
STOCHASTIC = [
    "dpmpp_sde_1",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde",
    "dpm_solver_sde_1",
    "dpm_solver_sde_2m",
]


def published(kind, d, process, grid, x, eta, noises):
    """SDE-DPM-Solver++ 2M (midpoint or heun), 3M, and SDE-DPM-Solver 2M, in alpha, sigma and h; sigma = 0 gives x0."""
    old, steps = [], []
    for i, (t, u) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        p = jax.tree.map(np.asarray, d(x, t))
        a, s, s_t = float(process.alpha(u)), float(process.sigma(u)), float(process.sigma(t))
        if s == 0:
            return p.x0
        h = float(process.log_snr(u) - process.log_snr(t))
        g = h * (1 + eta)
        z = noises[i]
        m = p.eps if kind == "eps" else p.x0
        if kind == "eps":
            x = a / float(process.alpha(t)) * x - (1 + eta) * s * math.expm1(h) * m
            x = x + s * math.sqrt(eta * math.expm1(2 * h)) * z
            if old:
                x = x - (1 + eta) * s * math.expm1(h) * 0.5 * h / steps[-1] * (m - old[-1])
        else:
            p2 = math.expm1(-g) / g + 1
            x = s / s_t * math.exp(-eta * h) * x - a * math.expm1(-g) * m + s * math.sqrt(-math.expm1(-2 * eta * h)) * z
            if kind == "3m" and len(old) > 1:
                r0, r1 = steps[-1] / h, steps[-2] / h
                d10, d11 = (m - old[-1]) / r0, (old[-1] - old[-2]) / r1
                d1, d2 = d10 + (d10 - d11) * r0 / (r0 + r1), (d10 - d11) / (r0 + r1)
                x = x + a * p2 * d1 - a * (p2 / g - 0.5) * d2
            elif old and kind != "1":
                factor = -0.5 * math.expm1(-g) if kind == "midpoint" else p2
                x = x + a * factor * (m - old[-1]) * h / steps[-1]
        old.append(m)
        steps.append(h)
    return x


def test_against_the_published_loops(x64):
    process, eta, s_noise = processes.vp(), 0.6, 1.05
    grid = np.append(times.uniform(5, start=0.95, stop=0.05), 0.0)
    d, x = oracle(MIX, process), jax.random.normal(jax.random.key(3), (2, 2))
    options = {"s_noise": s_noise, "eta": eta}
    tables = {
        "1": solvers.dpmpp(process, grid, 1, **options),
        "midpoint": solvers.dpmpp(process, grid, 2, **options),
        "heun": solvers.dpmpp(process, grid, 2, heun=True, **options),
        "3m": solvers.dpmpp(process, grid, 3, heun=True, **options),
        "eps": solvers.dpm_solver_sde(process, grid, 2, **options),
    }
    run = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))
    ends, d = run(KEY, d, solvers.stack(list(tables.values())), x), jax.jit(d)
    keys = nu.item_keys(KEY, jnp.arange(2))
    draws = jax.jit(lambda: jnp.stack([nu.item_normal(keys, 2 * i + 1, x) for i in range(len(grid) - 1)]))
    noises = s_noise * np.asarray(draws())
    for kind, end in zip(tables, ends, strict=True):
        np.testing.assert_allclose(
            end, published(kind, d, process, grid, np.asarray(x), eta, noises), rtol=1e-9, err_msg=kind
        )


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_weak_order_is_the_cards(name, eta):
    """Mean and variance against those of the SDE, which are closed forms; below 1e-9 there is nothing to measure."""
    process = processes.cosine()
    grid = lambda n: times.log_snr(process, n, start=0.9, stop=0.1)
    build = lambda process, g: CATALOGUE[name].build.f(process, g, **dict(CATALOGUE[name].build.options) | {"eta": eta})
    e = gaussian_moments.errors(build, process, grid, (160, 320), eta)
    slopes = np.log2(e[0, e[1] > 1e-9] / e[1, e[1] > 1e-9])
    assert slopes.size and abs(slopes.min() - CATALOGUE[name].order) < 0.15, (slopes, e)
    assert e[1].max() < {1: 2e-2, 2: 1e-4}[CATALOGUE[name].order]


@pytest.mark.parametrize("process", [processes.vp(), processes.edm(), processes.rectified()], ids=["vp", "edm", "rf"])
def test_from_the_prior_to_data(process):
    """t = 1 to t = 0, over infinite lambdas: the data's mean and variance."""
    prior = (0.0, float(process.sigma(1.0)) ** 2)
    for name in STOCHASTIC:
        table = CATALOGUE[name].build(process, times.karras(process, 300))
        got = gaussian_moments.run(table, process, 0.7, 0.5, prior)
        far = 0.04 if CATALOGUE[name].order == 1 else 0.01
        np.testing.assert_allclose(got, [0.7, 0.5], atol=far, err_msg=name)


def test_equivalences():
    process, grid = processes.vp(), times.uniform(6)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    ddpm, sde = solvers.ddpm(process, grid), solvers.dpmpp(process, grid, 1, 1.0)
    for field in ("t", "qx", "qn", "noise"):
        same(getattr(sde.rows, field), getattr(ddpm.rows, field))
    inner = times.uniform(6, start=0.9, stop=0.1)
    ode, ddim = solvers.dpm_solver_sde(process, inner, 1, eta=0.0), solvers.ddim(process, inner)
    assert ode.rows.noise is None
    same(*(gaussian_moments.run(s, process, 0.3, 0.8, (0.1, 1.0)) for s in (ode, ddim)))
    exact, adams = solvers.dpmpp_3m_exact(process, grid), solvers.exp_ab(process, grid, 3, X0)
    for field in ("qx", "qd", "qn"):  # from the third step on; the published update has other weights
        same(getattr(exact.rows, field)[4:], getattr(adams.rows, field)[2:])
    halved = solvers.dpmpp(process, grid, 3)
    assert np.abs(halved.rows.qd[2:-1] - adams.rows.qd[2:-1]).max() > 1e-2


def test_the_exact_third_order_needs_both_its_parabola_and_its_start():
    """Slopes of the error of the mean on Gaussian data: 3 with both, 2 without either."""
    process = processes.cosine()
    grid = lambda n: times.log_snr(process, n, start=0.9, stop=0.1)

    def halved_after_2s(process, g):
        exact, halved = solvers.dpmpp_3m_exact(process, g), solvers.dpmpp(process, g, 3)
        mix = lambda a, b: np.concatenate([a[:4], b[2:]])
        rows = {f: mix(getattr(exact.rows, f), getattr(halved.rows, f)) for f in ("qx", "qd", "qn")}
        return exact.__class__(**{**exact.__dict__, "rows": exact.rows._replace(**rows)})

    slope = {}
    for name, build in {
        "both": solvers.dpmpp_3m_exact,
        "start": halved_after_2s,
        "parabola": lambda p, g: solvers.exp_ab(p, g, 3, X0),
        "neither": lambda p, g: solvers.dpmpp(p, g, 3),
    }.items():
        e = gaussian_moments.errors(build, process, grid, (200, 400), eta=0.0)
        slope[name] = np.log2(e[0] / e[1]).min()
    assert abs(slope.pop("both") - 3) < 0.15
    assert all(abs(v - 2) < 0.15 for v in slope.values()), slope


def test_start_at_infinite_lambda():
    """From alpha = 0 the exact step with eta > 0 forgets x; the first finite step of the third-order method is 2S."""
    process, grid = processes.rectified(), times.uniform(5)
    s = solvers.dpmpp(process, grid, 2, 1.0)
    assert s.rows.qx[0, 0] == 0 and s.rows.noise[0] == process.sigma(grid[1]) and s.rows.noise[-1] == 0
    exact = solvers.dpmpp_3m_exact(process, grid)
    assert exact.evaluations == 6
    np.testing.assert_array_equal(exact.rows.accept, [True, False, True, True, True, True])
    np.testing.assert_array_equal(exact.rows.keep, [True, True, False, True, True, True])


def test_traced_grids_build_the_same_stochastic_tables(x64):
    process, grid = processes.cosine(), times.uniform(7, start=0.97, stop=0.02)
    names = [*STOCHASTIC, "dpm2_ancestral", "dpmpp_2s_ancestral"]
    traced = jax.jit(lambda g: [CATALOGUE[n].build(process, g).rows for n in names])(grid)
    host = [CATALOGUE[n].build(process, grid).rows for n in names]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), host, traced)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_short_grids(n):
    """The first steps of the third-order methods, alone: all of them finite and exact for a constant x0."""
    process = processes.cosine()
    for start, stop in ((0.9, 0.1), (1.0, 0.0), (0.9, 0.0)):
        grid = times.uniform(n, start=start, stop=stop)
        for name in ("dpmpp_3m_exact", "dpmpp_3m", "dpmpp_3m_sde"):
            rows = CATALOGUE[name].build(process, grid)
            got = gaussian_moments.run(rows, process, 0.7, 1e-12, (0.7 * float(process.alpha(start)), 0.0))
            np.testing.assert_allclose(got[0], 0.7 * process.alpha(stop), rtol=1e-6)


def test_gradients_in_the_noise(x64):
    process, grid = processes.vp(), times.uniform(3, start=0.95)
    d, x = oracle(MIX, process), jax.random.normal(jax.random.key(3), (2, 2))

    def end(eta):
        tables = [solvers.dpmpp(process, grid, 3, eta), solvers.dpm_solver_sde(process, grid, 2, eta)]
        return sum(jnp.sum(diffjax.sample(KEY, d, s, x) ** 2) for s in tables)

    f = jax.jit(jax.value_and_grad(end))
    numeric = (f(0.5 + 1e-6)[0] - f(0.5 - 1e-6)[0]) / 2e-6
    np.testing.assert_allclose(f(0.5)[1], numeric, rtol=1e-5)
    assert np.isfinite(f(0.0)[1])


def test_bad_input():
    p, g = processes.vp(), times.uniform(4)
    with pytest.raises(ValueError, match="order must be 1 or 2; got 3"):
        solvers.dpm_solver_sde(p, g, 3)
    for build in (solvers.dpmpp, solvers.dpm_solver_sde):
        with pytest.raises(ValueError, match="eta must be >= 0; got -1.0"):
            build(p, g, eta=-1.0)
    with pytest.raises(ValueError, match="deterministic: eta must be 0 with inverse=True; got 0.5"):
        solvers.dpmpp(p, g[::-1], eta=0.5, inverse=True)
