"""Reversible tables: order, exact round trips both ways, the algebra of the inverse, and the refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes, solvers, times
from diffjax.solvers import CATALOGUE, V, dense, exposed, invert, reversible
from diffjax.testing import draw, flow, oracle, smooth_mixture

MIX = smooth_mixture()
NAMES = list(reversible.CARDS)
COSINE = processes.cosine()
KEY = jax.random.key(0)
SAMPLE = jax.jit(diffjax.sample)
EPS_AT = jax.jit(lambda d, x, t: d(x, t).eps)


def build(name, process, grid, **options):
    return CATALOGUE[name].build(process, grid, **options)


@pytest.mark.parametrize("name", NAMES)
def test_measured_order_is_the_cards(name, x64):
    start, stop = 0.9, 0.1
    x, _ = draw(jax.random.key(1), MIX, 16, COSINE, start)
    exact = flow(MIX, COSINE, x, start, stop)
    error = []
    for n in (80, 160):
        s = build(name, COSINE, times.log_snr(COSINE, n, start=start, stop=stop))
        end = SAMPLE(KEY, oracle(MIX, COSINE), s, x)
        error.append(float(np.sqrt(((np.asarray(end) - exact) ** 2).sum(-1).mean())))
    assert abs(np.log2(error[0] / error[1]) - CATALOGUE[name].order) < 0.15, error


def round_trips(name, process, grid, x):
    """Largest errors of sample then undo, and of invert (from data) then undo."""
    d, errors = oracle(MIX, process), []
    for s in (build(name, process, grid), build(name, process, grid[::-1], inverse=True)):
        pair = SAMPLE(KEY, d, exposed(s), (x, x))
        back = SAMPLE(KEY, d, exposed(invert(s)), pair)
        errors.append(float(max(np.abs(b - x).max() for b in back)))
        assert np.abs(pair[0] - x).max() > 0.1
    return errors


@pytest.mark.parametrize("name", NAMES)
def test_round_trips_are_exact(name):
    grid = times.log_snr(COSINE, 50, start=0.95, stop=0.02)
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(2), (4, 2))
        exact = round_trips(name, COSINE, grid, x)
    single = round_trips(name, COSINE, grid, jnp.asarray(np.asarray(x), jnp.float32))
    assert max(exact) < 1e-10, exact
    assert 0 < max(single) < 2e-3, single  # float32 rounding times the amplification
    inverse = build("ddim", COSINE, grid[::-1], inverse=True)
    there = SAMPLE(KEY, oracle(MIX, COSINE), inverse, jnp.asarray(np.asarray(x), jnp.float32))
    again = SAMPLE(KEY, oracle(MIX, COSINE), build("ddim", COSINE, grid), there)
    assert np.abs(again - np.asarray(x)).max() > 20 * max(single)  # plain inversion is approximate


@pytest.mark.parametrize("name", NAMES)
def test_the_inverse_table_is_the_algebraic_inverse(name):
    s = build(name, processes.vp(), times.uniform(7, start=0.9, stop=0.05))
    t, r, q = invert(s), s.rows, invert(s).rows
    for i in range(s.evaluations):
        j = s.evaluations - 1 - i
        np.testing.assert_allclose(q.a[j] @ r.a[i], np.eye(2), atol=1e-12)
        np.testing.assert_allclose(q.p[j] @ r.a[i], r.p[i], atol=1e-12)
        np.testing.assert_allclose(q.a[j] @ r.b[i] + q.b[j], 0, atol=1e-12)
        np.testing.assert_allclose(r.p[i] @ np.linalg.inv(r.a[i]) @ r.b[i], 0, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), invert(t).rows, r)
    np.testing.assert_array_equal(t.grid, s.grid[::-1])


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_the_inverse_of_two_step_tables_is_that_of_the_run(gamma):
    """x_{i-1} from x_i and x_{i+1}: all rows after the first, whose registers are in the other order."""
    grid = times.uniform(7, start=0.9, stop=0.05)
    for build in (lambda *a, **k: solvers.bdia(*a, gamma, **k), solvers.o_belm):
        undo, inverse = invert(build(COSINE, grid)).rows, build(COSINE, grid[::-1], inverse=True).rows
        np.testing.assert_allclose(inverse.a[1:, :, ::-1][:, ::-1], undo.a[:-1], atol=1e-12)
        np.testing.assert_allclose(inverse.b[1:, ::-1], undo.b[:-1], atol=1e-12)
        np.testing.assert_array_equal(inverse.t[1:], undo.t[:-1])


def test_a_run_from_noise_may_amplify_what_undoes_it():
    """o_belm on a wide grid: nothing wrong with the samples, and no gradient without stored states in float32."""
    process = processes.ve()
    grid = times.log_snr(process, 60)
    solver, d = solvers.o_belm(process, grid), oracle(MIX, process)
    assert dense.amplification(process, solver) > dense.LIMIT / np.finfo(np.float32).eps
    x = process.prior(KEY, (64, 2))
    np.testing.assert_allclose(SAMPLE(KEY, d, solver, x), flow(MIX, process, x, 1.0, 0.0), atol=0.05)
    with pytest.raises(ValueError, match="multiplies rounding errors"):
        diffjax.sample(KEY, d, solver, x, memory="reversible")


def test_edict_against_the_textbook_loop(x64):
    process, p = processes.vp(), 0.93
    grid = times.uniform(5, start=0.9, stop=0.05)
    d = oracle(MIX, process)
    x = y = start = jax.random.normal(jax.random.key(0), (4, 2))
    for i, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        a = process.alpha(s) / process.alpha(t)
        b = process.sigma(s) - a * process.sigma(t)
        if i % 2:
            x, y = y, x
        x = a * x + b * EPS_AT(d, y, t)
        y = a * y + b * EPS_AT(d, x, t)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
        if i % 2:
            x, y = y, x
    got = SAMPLE(KEY, d, exposed(solvers.edict(process, grid, p)), (start, start))
    np.testing.assert_allclose(np.stack(got), np.stack([x, y]), rtol=1e-10)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_bdia_and_o_belm_against_the_textbook_loop(gamma, x64):
    process = processes.vp()
    grid = np.array([0.9, 0.8, 0.55, 0.3, 0.1])
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    d = oracle(MIX, process)
    start = jax.random.normal(jax.random.key(0), (4, 2))
    ddim = lambda x, i, j: alpha[j] / alpha[i] * x + (sigma[j] - alpha[j] / alpha[i] * sigma[i]) * EPS_AT(d, x, grid[i])
    xs = [start, ddim(start, 0, 1)]
    for i in range(1, 4):
        x, old = xs[i], xs[i - 1]
        xs.append(gamma * old + (1 - gamma) * x - gamma * (ddim(x, i, i - 1) - x) + ddim(x, i, i + 1) - x)
    np.testing.assert_allclose(SAMPLE(KEY, d, solvers.bdia(process, grid, gamma), start), xs[-1], rtol=1e-10)
    ws, rho = [start / alpha[0], xs[1] / alpha[1]], sigma / alpha
    for i in range(1, 4):
        h, before = rho[i + 1] - rho[i], rho[i] - rho[i - 1]
        eps = EPS_AT(d, ws[i] * alpha[i], grid[i])
        ratio = h**2 / before**2
        ws.append(ratio * ws[i - 1] + (1 - ratio) * ws[i] + h * (h + before) / before * eps)
    np.testing.assert_allclose(SAMPLE(KEY, d, solvers.o_belm(process, grid), start), ws[-1] * alpha[-1], rtol=1e-10)


def test_ends_are_finite_or_refused():
    """From exactly t = 1 to exactly t = 0: values finite, or an error that names the way out."""
    net = diffjax.denoiser(lambda x, t: jnp.tanh(x), COSINE, diffjax.from_v)
    refused = set()
    for pname in ("vp", "cosine", "ve", "edm", "rectified"):
        process = getattr(processes, pname)()
        d = dataclasses.replace(net, process=process)
        x = jax.random.normal(jax.random.key(3), (2, 3)) * process.sigma(1.0)
        for name in NAMES:
            try:
                s = build(name, process, times.uniform(5))
            except ValueError as e:
                assert "o_belm(value=V)" in str(e) or "singular" in str(e), (pname, name, e)
                refused.add((pname, name))
                continue
            assert np.all(np.isfinite(SAMPLE(KEY, d, s, x))), (pname, name)
            assert np.all(np.isfinite(SAMPLE(KEY, d, invert(s), x))), (pname, name)
    assert not any(name in ("edict", "bdia", "o_belm_v") for _, name in refused), refused


def test_traced_grids_build_the_same_table(x64):
    grid = times.uniform(6, start=0.95, stop=0.02)
    for name in NAMES:
        host = build(name, COSINE, grid)
        traced = jax.jit(lambda g, name=name: build(name, COSINE, g).rows)(grid)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), host.rows, traced)
        assert host.rows.a.dtype == np.float64 and isinstance(host.rows.a, np.ndarray)


def test_kept_points_of_an_inverse_run_are_those_of_the_run(x64):
    d, grid = oracle(MIX, COSINE), times.uniform(5, start=0.9, stop=0.1)
    s = solvers.edict(COSINE, grid)
    x = jax.random.normal(jax.random.key(3), (2, 2))
    run = jax.jit(lambda s, x: diffjax.sample(KEY, d, s, x, keep=True))
    pair, kept = run(exposed(s), (x, x))
    _, back = run(exposed(invert(s)), pair)
    np.testing.assert_allclose(back.x[0][::-1], kept.x[0], atol=1e-12)
    np.testing.assert_allclose(back.t, grid[::-1])


def test_amplification_is_the_measured_growth_of_an_error(x64):
    """A perturbed end, undone: standard normal data, where the estimate is exact."""
    d = oracle(diffjax.testing.gaussian([0.0], 1.0), COSINE)
    for name, n in (("edict", 40), ("o_belm", 30)):
        s = build(name, COSINE, times.uniform(n, start=0.9, stop=0.1))
        bump = (
            jnp.array([[1e-3], [-1e-3]]),
            jnp.array([[1e-3], [1e-3]]),
        )  # both signs, so that the worst one is among them
        _, kept = jax.jit(lambda s, x: diffjax.sample(KEY, d, s, x, keep=True))(exposed(invert(s)), bump)
        grown = max(float(np.abs(k).max()) for k in kept.x) / 1e-3
        bound = dense.amplification(COSINE, s)
        assert 0.3 * bound < grown < 1.01 * bound, (name, grown, bound)
    assert dense.amplification(COSINE, solvers.o_belm(COSINE, times.uniform(1000), V)) < 4


def test_refusals():
    grid = times.uniform(1000, start=0.98, stop=0.01)
    # a run from noise to data damps errors; only undoing it is refused
    for build, fine in ((solvers.edict, 0.999), (solvers.bdia, 1.0)):
        with pytest.raises(ValueError, match=r"multiplies rounding errors by (inf|\d.*e\+\d+).* float64"):
            solvers.check_reversible(COSINE, build(COSINE, grid, 0.5))
        with pytest.raises(ValueError, match="multiplies rounding errors"):
            build(COSINE, grid[::-1], 0.5, inverse=True)
        solvers.check_reversible(COSINE, build(COSINE, grid, fine))
        build(COSINE, grid[::-1], fine, inverse=True)
    edict = solvers.edict(COSINE, times.uniform(6))
    with pytest.raises(ValueError, match="row 2 of the table cannot be undone: .* singular"):
        rows = edict.rows._replace(a=edict.rows.a * (np.arange(12) != 2)[:, None, None])
        solvers.check_reversible(COSINE, dataclasses.replace(edict, rows=rows))
    with pytest.raises(ValueError, match="P A\\^-1 b = "):
        rows = edict.rows._replace(p=edict.rows.p[:, ::-1])
        solvers.check_reversible(COSINE, dataclasses.replace(edict, rows=rows))
    with pytest.raises(ValueError, match="not exactly reversible"):
        solvers.check_reversible(COSINE, solvers.ddim(COSINE, times.uniform(6)))
    with pytest.raises(ValueError, match="only a reversible table"):
        invert(solvers.heun(COSINE, times.uniform(6)))
    with pytest.raises(ValueError, match="mixing must be in"):
        solvers.edict(COSINE, grid, 0.0)
    with pytest.raises(ValueError, match="gamma must be in"):
        solvers.bdia(COSINE, grid, 0.0)
    with pytest.raises(ValueError, match="value must be EPS or V"):
        solvers.o_belm(COSINE, grid, solvers.X0)
    with pytest.raises(ValueError, match="not finite"):
        solvers.o_belm(processes.rectified(), times.uniform(5))
    with pytest.raises(ValueError, match="singular"):
        solvers.edict(processes.rectified(), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="with inverse=True the grid must increase"):
        solvers.edict(COSINE, grid, inverse=True)
