"""Learned tables: the exact linear flow of a Gaussian, gains on held-out mixtures, and what a saved table checks."""

import functools

import jax
import numpy as np
import pytest

import diffjax
from diffjax import processes, solvers, testing, times
from diffjax.solvers import Problems
from diffjax.solvers.learn import FixedTable, _assemble, _increments

PROCESS = processes.vp()
AB2 = functools.partial(solvers.exp_ab, order=2, value=solvers.V)
TWO_M = solvers.dpmpp  # cheap to compile


def problems(seed, count, batch, start, stop, make):
    """Oracles of `count` random mixtures, and the ends of a fine solver."""
    rng = np.random.default_rng(seed)
    denoisers = [testing.oracle(make(rng), PROCESS) for _ in range(count)]
    d = jax.tree.map(lambda *leaves: np.stack(leaves), *denoisers)
    x = rng.normal(size=(count, batch, 2)).astype(np.float32)
    fine = solvers.exp_ab(PROCESS, times.log_snr(PROCESS, 60, start=start, stop=stop), 3)
    return Problems(d, x, ends(fine, d, x))


@jax.jit
def ends(solver, denoiser, x):
    return jax.vmap(lambda d, x: diffjax.sample(jax.random.key(0), d, solver, x))(denoiser, x)


def mixtures(rng):
    return testing.mixture(np.ones(4), rng.normal(size=(4, 2)), stds=rng.uniform(0.2, 0.6, 4))


def gaussians(rng):
    return testing.gaussian([0.0, 0.0], 0.25)


def test_the_exact_flow_of_a_gaussian_is_learned():
    """Its flow is linear, and one step of a table is linear in x: the error can vanish, and DDIM's does not."""
    start, stop = 0.9, 0.1
    given = problems(0, 1, 8, start, stop, gaussians)
    exact = testing.flow(testing.gaussian([0.0, 0.0], 0.25), PROCESS, given.x[0], start, stop)[None]
    given = given._replace(target=exact.astype(np.float32))
    learned = solvers.learn(
        solvers.ddim,
        PROCESS,
        [start, stop],
        given,
        family="one Gaussian",
        free=("qx", "qn"),
        free_grid=False,
        steps=400,
    )
    error = lambda s: np.abs(np.asarray(ends(s, given.denoiser, given.x)) - exact).max()
    assert error(solvers.ddim(PROCESS, np.array([start, stop]))) > 0.1
    assert error(learned.solver) < 2e-3
    assert learned.losses.shape == (400,) and learned.solver.rows.qn.dtype == np.float64


def test_a_learned_table_is_better_on_mixtures_it_has_not_seen(tmp_path):
    n, start, stop = 4, 1.0, 1e-3
    grid = times.curvature(PROCESS, n, start=start, stop=stop)
    train, held = (problems(seed, m, 24, start, stop, mixtures) for seed, m in ((1, 24), (2, 12)))
    reports = []
    learned = solvers.learn(
        AB2, PROCESS, grid, train, family="random mixtures", steps=250, batch=12, rate=2e-2,
        on_step=lambda i, loss: reports.append((i, loss)),
    )  # fmt: skip
    rms = lambda s: np.exp(
        np.log(np.asarray(((ends(s, held.denoiser, held.x) - held.target) ** 2).mean((1, 2)))).mean() / 2
    )
    base = rms(AB2(PROCESS, grid))
    assert rms(learned.solver) < 0.7 * base, (rms(learned.solver), base)
    own = learned.solver.grid
    assert own[0] == start and own[-1] == stop and np.all(np.diff(own) < 0) and own.dtype == np.float64
    assert [i for i, _ in reports] == [100, 200] and np.isfinite([l for _, l in reports]).all()

    path = tmp_path / "learned.npz"
    solvers.save_learned(path, learned)
    jax.tree.map(np.testing.assert_array_equal, solvers.load_table(path), learned.solver)
    for card in (solvers.from_table(path), solvers.from_table(learned)):
        assert "random mixtures" in card.summary and card.evals == 1 and "learned" in card.flags
        built = [card.build(PROCESS), card.build(processes.vp(), times.uniform(n, start=start, stop=stop))]
        for s in built:
            jax.tree.map(np.testing.assert_array_equal, s, learned.solver)
        with pytest.raises(ValueError, match="learned for 4 steps from t = 1 to 0.001; got a grid of shape"):
            card.build(PROCESS, times.uniform(5))
        with pytest.raises(ValueError, match="learned for the process vp and its alpha"):
            card.build(processes.rectified())
    assert isinstance(card.build, FixedTable)


@pytest.mark.parametrize("stop", [0.0, 0.02])
@pytest.mark.parametrize("process", [processes.vp(), processes.rectified()], ids=["vp", "rectified"])
def test_zero_offsets_are_the_method_itself(process, stop, x64):
    """Infinite log-SNR at either end of the grid included."""
    grid = times.uniform(6, stop=stop)
    base = TWO_M(process, grid)
    zeros = {name: np.zeros_like(getattr(base.rows, name)) for name in ("t", "px", "pd", "qx", "qd", "qn")}
    params = {"grid": _increments(process, grid), **zeros}
    inner = np.isfinite(process.log_snr(grid))
    for p in (params, jax.tree.map(jax.numpy.asarray, params)):
        make = lambda p: _assemble(TWO_M, process, grid[[0, -1]], p)
        s = make(p) if p is params else jax.jit(make)(p)
        if inner.all():  # else the bound that stands for infinity is at most one increment away
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), s.rows, base.rows)
        assert s.grid[0] == 1 and s.grid[-1] == stop and np.all(np.diff(s.grid) < 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(s.rows))
        assert isinstance(s.rows.qn, np.ndarray) == isinstance(p["grid"], np.ndarray)


def test_a_grid_that_is_not_free_stays(x64):
    """Infinite ends, and a point that is nearer to data than where grids in log-SNR end."""
    process, grid = processes.rectified(), np.array([1.0, 0.7, 0.2, 1e-6, 0.0])
    zeros = {"qn": np.zeros(4)}
    for p in (zeros, jax.tree.map(jax.numpy.asarray, zeros)):
        s = _assemble(TWO_M, process, grid, p)
        np.testing.assert_array_equal(s.grid, grid)
        jax.tree.map(np.testing.assert_array_equal, s.rows, TWO_M(process, grid).rows)


def test_the_gradient_is_that_of_differences(x64):
    grid = times.log_snr(PROCESS, 3, start=0.95, stop=0.05)
    base = TWO_M(PROCESS, grid)
    rng = np.random.default_rng(0)
    params = {name: 0.1 * rng.normal(size=np.shape(getattr(base.rows, name))) for name in ("t", "pd", "qx", "qd", "qn")}
    params["grid"] = _increments(PROCESS, grid)
    d, x = testing.oracle(mixtures(rng), PROCESS), rng.normal(size=(3, 2))

    @jax.jit
    @jax.value_and_grad
    def f(p):
        return (diffjax.sample(jax.random.key(0), d, _assemble(TWO_M, PROCESS, grid[[0, -1]], p), x) ** 2).sum()

    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), params)
    at = lambda h: float(f(jax.tree.map(lambda a, b: a + h * b, params, direction))[0])
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, b: float((g * b).sum()), f(params)[1], direction)))
    np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-5)


def test_bad_learning(tmp_path):
    x = np.zeros((2, 3, 2), np.float32)
    given = Problems(testing.oracle(testing.gaussian([0.0, 0.0], 1.0), PROCESS), x, x)
    grid = times.uniform(3, stop=0.1)
    call = lambda build=solvers.ddim, given=given, **k: solvers.learn(build, PROCESS, grid, given, family="", **k)
    with pytest.raises(ValueError, match="free must name entries"):
        call(free=("q",))
    with pytest.raises(ValueError, match="free must name entries"):
        call(free=(), free_grid=False)
    with pytest.raises(ValueError, match=r"one leading axis of problems; got \[2, 4\]"):
        call(given=given._replace(x=np.zeros((4, 3, 2))))
    with pytest.raises(ValueError, match="draws no noise"):
        call(build=solvers.ddpm)
    solvers.save_table(tmp_path / "plain.npz", solvers.ddim(PROCESS, grid))
    with pytest.raises(ValueError, match="no record of its training"):
        solvers.from_table(tmp_path / "plain.npz")
