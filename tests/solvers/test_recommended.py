"""The recommended solver: its method against a textbook loop, and its rule against the errors that were measured of peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes, solvers, times
from diffjax.solvers.recommended import (
    ENDS,
    EVALUATIONS,
    GUIDED_EVALUATIONS,
    GUIDED_HEIGHTS,
    HEIGHTS,
    MIDDLE,
    heights,
    on_grid,
    orders,
)
from diffjax.testing import flow, gaussian, mixture, oracle
from experiments.benchmarks import solver_accuracy
from experiments.benchmarks.solver_accuracy import LIMITS

COSINE = processes.cosine()


@pytest.fixture(scope="module")
def bar():
    """Problem, start and the best peer's (rms, median) at each number of evaluations."""
    m, x, best = solver_accuracy.bar()
    return m, solver_accuracy.PROCESS, x, best


@pytest.fixture(scope="module")
def ends(bar):
    """What every number of evaluations reaches from the bar's start, in float64 and from one compilation."""
    m, process, x, _ = bar
    with jax.enable_x64(True):
        tables = solvers.stack([solvers.recommended(process, n) for n in LIMITS])
        run = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))
        end = np.asarray(run(jax.random.key(0), oracle(m, process), tables, jnp.asarray(x)))
    return dict(zip(LIMITS, end, strict=True)), flow(m, process, x, 1.0, 0.0, tolerance=1e-10)


@pytest.mark.parametrize("n", LIMITS)
def test_beats_the_best_measured_peer(n, bar, ends):
    best, (end, exact) = bar[3], ends
    error = ((end[n] - exact) ** 2).sum(-1)
    got = np.sqrt(error.mean()) / best[n][0], np.sqrt(np.median(error)) / best[n][1]
    assert got[0] <= LIMITS[n][0] and got[1] <= LIMITS[n][1], got


def textbook(predict, alpha, sigma, x, order, corrector, c, middle=(0.0, np.inf), ends=None):
    """The scheme in y and theta, step by step: polynomials in sigma / (c alpha + sigma) through D = d / sin(theta)."""
    time = lambda angle: np.tan(angle) / (1 + np.tan(angle))
    theta, r = np.arctan2(sigma, c * alpha), np.hypot(c * alpha, sigma)
    q, w = np.polynomial.legendre.leggauss(40)

    def advance(y, i, nodes, values):
        a, b = theta[i], theta[i + 1]
        points = (a + b) / 2 + (b - a) / 2 * q
        through = 0.0
        for t, v in zip(nodes, values, strict=True):
            basis = np.ones_like(points)
            for o in nodes:
                basis = basis * (1.0 if o == t else (time(points) - time(o)) / (time(t) - time(o)))
            through = through + v[None] * basis[:, None, None]
        return y - ((b - a) / 2 * w * np.sin(points)).dot(through.reshape(len(q), -1)).reshape(y.shape)

    inside = (middle[0] <= np.tan(theta)) & (np.tan(theta) <= middle[1])
    nodes = [(order, corrector) if ends is None or i else ends for i in inside]
    y, kept, start = x / r[0], [], None
    for i in range(len(theta) - 1):
        p = predict(y * r[i], i)
        kept = [(theta[i], (sigma[i] * p.x0 / c - c * alpha[i] * p.eps) / r[i] / np.sin(theta[i])), *kept]
        if corrector and i:
            y = advance(start, i - 1, *zip(*kept[: nodes[i - 1][1]], strict=True))
        start, y = y, advance(y, i, *zip(*kept[: nodes[i][0]], strict=True))
    return y * r[-1]


@pytest.mark.parametrize(("order", "corrector", "c"), [(2, 3, 1.0), (3, 3, 0.6), (3, 4, 2.0), (3, 0, 1.0), (5, 5, 1.0)])
def test_is_the_textbook_scheme(order, corrector, c, x64):
    check_textbook(c, order, corrector)


def test_has_fewer_nodes_outside_the_middle(x64):
    check_textbook(0.8, 4, 5, middle=(0.1, 3.0), ends=(2, 3))


def check_textbook(c, order, corrector, **ends):
    process = processes.vp()
    m = mixture([1, 2], [[-1.0, 0.3], [0.5, 0.2]], stds=[0.4, 0.6])
    d = oracle(m, process)
    grid = times.log_snr(process, 8, start=0.98, stop=0.02)
    x = np.random.RandomState(0).randn(4, 2)
    got = diffjax.sample(jax.random.key(0), d, solvers.angle_abm(process, grid, order, corrector, c, **ends), x)
    predict = lambda x, i: jax.tree.map(np.asarray, d(jnp.asarray(x), grid[i]))
    expected = textbook(predict, process.alpha(grid), process.sigma(grid), x, order, corrector, c, **ends)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 6, 40])
def test_gaussian_data_of_that_deviation_is_exact(n, x64):
    c = 0.7
    m = gaussian([0.0, 0.0, 0.0], c**2)
    x = np.random.RandomState(1).randn(5, 3)
    s = solvers.recommended(COSINE, n, data_std=c, stop=0.01)
    got = diffjax.sample(jax.random.key(0), oracle(m, COSINE), s, x)
    np.testing.assert_allclose(got, flow(m, COSINE, x, 1.0, 0.01), rtol=1e-10)


@pytest.mark.parametrize("name", sorted(processes.CATALOGUE))
def test_has_as_many_rows_as_evaluations_and_ends_exactly(name):
    process = processes.CATALOGUE[name].build()
    for start, stop in [(1.0, 0.0), (0.9, 0.1), (0.003, 0.0), (1.0, 0.995)]:
        for n in (1, 2, 3, 4, 5, 9, 33):
            s = solvers.recommended(process, n, start=start, stop=stop, guidance=1.0 + n % 2)
            assert s.evaluations == s.steps == n
            assert s.grid[0] == start and s.grid[-1] == stop and np.all(np.diff(s.grid) < 0)
            assert all(np.all(np.isfinite(np.asarray(leaf, float))) for leaf in jax.tree.leaves(s.rows))


def test_rounding_does_not_grow_with_the_steps():
    """float32, where the method itself has no error left."""
    m = mixture([1, 1], [[-0.5, 0.2], [0.6, 0.1]], stds=[0.9, 0.8])
    x = np.random.RandomState(0).randn(64, 2)
    exact = flow(m, COSINE, x, 1.0, 0.01)
    s = solvers.stack([solvers.recommended(COSINE, n, stop=0.01) for n in (60, 200)])
    run = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))
    end = run(jax.random.key(0), oracle(m, COSINE), s, jnp.asarray(x, jnp.float32))
    few, many = np.sqrt(((np.asarray(end) - exact) ** 2).sum(-1).mean(-1))
    assert many < max(2 * few, 2e-6) and few < 2e-5, (few, many)


def test_inversion_starts_at_the_data(x64):
    m = mixture([1, 1], [[-0.5, 0.2], [0.6, 0.1]], stds=[0.9, 0.8])
    grid = times.log_snr(COSINE, 80)
    x = np.random.RandomState(0).randn(4, 2)
    d = oracle(m, COSINE)
    up = diffjax.sample(jax.random.key(0), d, on_grid(COSINE, grid[::-1], inverse=True), x)
    np.testing.assert_allclose(up, flow(m, COSINE, x, 0.0, 1.0), atol=2e-3)


def test_ends_at_the_data_themselves(x64):
    """To sigma = 0: with few steps by the polynomial, with many by x0 from the process's bound on small noise."""
    m = mixture([1, 1], [[-0.5, 0.2], [0.6, 0.1]], stds=[0.4, 0.3])
    x = np.random.RandomState(0).randn(16, 2)
    exact = flow(m, COSINE, x, 1.0, 0.0)
    d = oracle(m, COSINE)
    for n, limit in ((8, 0.02), (12, 5e-3), (40, 1e-3)):
        s = solvers.recommended(COSINE, n)
        end = diffjax.sample(jax.random.key(0), d, s, x)
        assert np.sqrt(((end - exact) ** 2).sum(-1).mean()) < limit, n
    np.testing.assert_array_equal([s.rows.qx[-1, 0], s.rows.qn[-1], *s.rows.u[-1]], [0, 1, 1, 0])


def test_the_rule():
    assert [orders(n) for n in (1, 5, 8, 15, 25, 100)] == [(3, 4), (3, 4), (4, 5), (5, 5), (6, 6), (6, 6)]
    assert [orders(n, 3.0) for n in (5, 20, 30, 100)] == [(2, 3), (3, 4), (3, 4), (4, 5)]
    assert [orders(n, 7.5) for n in (5, 20, 50)] == [(1, 2), (2, 3), (3, 4)]
    for n, row in zip(EVALUATIONS, HEIGHTS, strict=True):
        np.testing.assert_allclose(heights(n), row)
    for n, row in zip(GUIDED_EVALUATIONS, GUIDED_HEIGHTS, strict=True):
        np.testing.assert_allclose(heights(n, 3.0), row)
    np.testing.assert_array_equal(heights(2), HEIGHTS[0])
    np.testing.assert_array_equal(heights(1000), HEIGHTS[-1])
    grid = times.curvature(COSINE, 30, heights=heights(30), apart=(False, True))
    expected = solvers.angle_abm(COSINE, grid, 6, 6, middle=MIDDLE(30), ends=ENDS)
    np.testing.assert_array_equal(solvers.recommended(COSINE, 30).rows.qd, expected.rows.qd)


def test_bad_input():
    p, g = processes.vp(), times.uniform(4, stop=0.01)
    with pytest.raises(ValueError, match="order must be 1, 2, 3, 4, 5 or 6"):
        solvers.angle_abm(p, g, order=7)
    with pytest.raises(ValueError, match="corrector must be 0"):
        solvers.angle_abm(p, g, corrector=1)
    with pytest.raises(ValueError, match="ends must have at most"):
        solvers.angle_abm(p, g, 3, 4, ends=(4, 4))
    with pytest.raises(ValueError, match="middle must be"):
        solvers.angle_abm(p, g, 3, 4, middle=(2.0, 1.0), ends=(2, 3))
    with pytest.raises(ValueError, match="data_std must be"):
        solvers.angle_abm(p, g, data_std=0.0)
    with pytest.raises(ValueError, match="n, the number of steps"):
        solvers.recommended(p, 0)
    with pytest.raises(ValueError, match="0 <= stop < start"):
        solvers.recommended(p, 5, start=0.1, stop=0.5)
    with pytest.raises(ValueError, match="data_std must be"):
        solvers.recommended(p, 5, data_std=-1.0)
    with pytest.raises(ValueError, match="guidance must be finite"):
        solvers.recommended(p, 5, guidance=float("nan"))
