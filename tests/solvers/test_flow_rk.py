"""Explicit Runge-Kutta methods in t and EDM's second-order family, against textbook loops and the exact flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes, solvers, times
from diffjax.solvers import CATALOGUE
from diffjax.testing import draw, flow, oracle, predict, smooth_mixture

MIX = smooth_mixture()
FLOW = processes.rectified()
METHODS = {"flow_midpoint": 2, "flow_heun": 2, "flow_rk4": 4}


def run_stack(tables, denoiser, x, **options):
    run = jax.jit(jax.vmap(lambda s: diffjax.sample(jax.random.key(0), denoiser, s, x, **options)))
    return jax.tree.map(np.asarray, run(solvers.stack(tables)))


@pytest.fixture(scope="module")
def predictor():
    return jax.jit(lambda process, x, t: predict(MIX, process, x, t))


@pytest.fixture(scope="module")
def ends():
    """Start, exact end and the ends of all methods at 10 and 20 steps, from exactly t = 1 to exactly t = 0."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (8, 2))
        tables = [CATALOGUE[m].build(FLOW, times.uniform(n)) for n in (10, 20) for m in METHODS]
        got, path = run_stack(tables, oracle(MIX, FLOW), x, keep=True)
        return np.asarray(x), flow(MIX, FLOW, x, 1.0, 0.0), got.reshape(2, len(METHODS), *x.shape), path


@pytest.mark.parametrize("name", METHODS)
def test_rectified_flow_from_noise_to_data_with_the_order_of_the_card(name, ends):
    _, exact, got, _ = ends
    error = np.sqrt(((got[:, list(METHODS).index(name)] - exact) ** 2).sum(-1).mean(-1))
    assert error[1] < {2: 2e-3, 4: 1e-6}[METHODS[name]]
    assert abs(np.log2(error[0] / error[1]) - METHODS[name]) < 0.25, error


def test_against_the_textbook_loops(ends, predictor, x64):
    start, _, got, path = ends

    def u(x, t):
        p = predictor(FLOW, jnp.asarray(x), t)
        return np.asarray(p.eps - p.x0)

    def midpoint(x, t, h):
        return x + h * u(x + h / 2 * u(x, t), t + h / 2)

    def heun(x, t, h):
        k = u(x, t)
        return x + h / 2 * (k + u(x + h * k, t + h))

    def rk4(x, t, h):
        a = u(x, t)
        b = u(x + h / 2 * a, t + h / 2)
        c = u(x + h / 2 * b, t + h / 2)
        return x + h / 6 * (a + 2 * b + 2 * c + u(x + h * c, t + h))

    grid = times.uniform(10)
    for i, method in enumerate((midpoint, heun, rk4)):
        x, states = start, [start]
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            x = method(x, t, s - t)
            states.append(x)
        np.testing.assert_allclose(got[0, i], x, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(path.x[i, :11], states, rtol=1e-10, atol=1e-12)  # stages are not kept


def test_infinite_velocity_is_refused_by_name():
    vp = processes.vp()
    for name in ("flow_heun", "flow_rk4"):
        with pytest.raises(ValueError, match=rf"{name} has a coefficient that is not finite .* at t = 0"):
            CATALOGUE[name].build(vp, times.uniform(4))
        assert CATALOGUE[name].build(vp, times.uniform(4, stop=0.01)).evaluations == 4 * CATALOGUE[name].evals
    assert solvers.flow_midpoint(vp, times.uniform(4)).evaluations == 8  # evaluates at starts and middles alone
    with pytest.raises(ValueError, match="flow_midpoint has a coefficient that is not finite"):
        solvers.flow_midpoint(vp, times.uniform(4)[::-1], inverse=True)
    for name in METHODS:  # rectified flow runs between its ends in both directions
        assert CATALOGUE[name].build(FLOW, times.uniform(4)[::-1], inverse=True).steps == 4


def test_edm_second_order_family(predictor, x64):
    """alpha = 1 is Heun; others against the published loop in sigma, whose step to sigma = 0 is of second order too."""
    edm = processes.edm()
    grid = times.karras(edm, 6)
    start, _ = draw(jax.random.key(2), MIX, 4, edm, 1.0)
    places = (1.0, 2 / 3, 0.5)
    tables = [solvers.edm_rk2(edm, grid, a) for a in places]
    got = run_stack([*tables, solvers.heun(edm, grid)], oracle(MIX, edm), start)
    np.testing.assert_allclose(got[0], got[3], rtol=1e-9)
    assert [t.evaluations for t in tables] == [11, 12, 12]
    slope = lambda x, sigma: np.asarray(predictor(edm, jnp.asarray(x), sigma / 80.0).eps)
    for a, end in zip(places[1:], got[1:3], strict=True):
        x = np.asarray(start)
        for t, s in zip(80 * grid[:-1], 80 * grid[1:], strict=True):
            h, d = s - t, slope(x, t)
            x = x + h * ((1 - 1 / (2 * a)) * d + 1 / (2 * a) * slope(x + a * h * d, t + a * h))
        np.testing.assert_allclose(end, x, rtol=1e-9, atol=1e-9)
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match="alpha, the place of the second evaluation"):
            solvers.edm_rk2(edm, grid, bad)
