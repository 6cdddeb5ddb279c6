"""PNDM and iPNDM against the published loops, with the transfer as the paper writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_tables import VP, gaussian, network, rho_grid, run, slope

import diffjax
from diffjax import processes, solvers, times
from diffjax.solvers import pndm

build = pndm.pndm
GRID = times.uniform(9, start=0.93, stop=0.03)
PLMS = {1: [1], 2: [1.5, -0.5], 3: [23 / 12, -4 / 3, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -3 / 8]}


def phi(process, x, e, t, s):
    """The transfer, in the cumulative products of a variance-preserving process."""
    at, a_s = process.alpha(t) ** 2, process.alpha(s) ** 2
    root = np.sqrt(at) * (np.sqrt((1 - a_s) * at) + np.sqrt((1 - at) * a_s))
    return np.sqrt(a_s / at) * x - (a_s - at) / root * e


def textbook(process, grid, model, x, order=4, runge_kutta=True):
    eps, old = lambda x, t: model(x, t)[1], []
    for i, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        e1 = eps(x, t)
        old = [e1, *old][:order]
        if runge_kutta and i < 3:
            m = (t + s) / 2
            e2 = eps(phi(process, x, e1, t, m), m)
            e3 = eps(phi(process, x, e2, t, m), m)
            e4 = eps(phi(process, x, e3, t, s), s)
            slope = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        else:
            slope = sum(w * e for w, e in zip(PLMS[len(old)], old, strict=True))
        x = phi(process, x, slope, t, s)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_pndm_against_the_textbook_loop(steps):
    model = network(VP)
    s = build(VP, GRID[: steps + 1])
    assert s.evaluations == steps + 3 * min(3, steps)
    assert s.rows.qx.shape[1] == 2 and s.rows.qd.shape[1] == 3
    np.testing.assert_allclose(run(s, model, 1.4), textbook(VP, GRID[: steps + 1], model, 1.4), rtol=1e-11)
    assert s.rows.accept.sum() == steps and s.rows.keep.sum() == steps


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_against_the_textbook_loop(order):
    model = network(VP)
    got = run(pndm.ipndm(VP, GRID, order), model, 1.4)
    np.testing.assert_allclose(got, textbook(VP, GRID, model, 1.4, order, runge_kutta=False), rtol=1e-11)


def test_equivalences():
    model = network(VP)
    np.testing.assert_allclose(
        run(pndm.ipndm(VP, GRID, 1), model, 1.4), run(solvers.ddim(VP, GRID), model, 1.4), rtol=1e-12
    )
    constant = lambda y, t: ((y - VP.sigma(t) * 0.3) / VP.alpha(t), 0.3)  # equal slopes: every step is DDIM's
    np.testing.assert_allclose(
        run(build(VP, GRID), constant, 1.4), run(solvers.ddim(VP, GRID), constant, 1.4), rtol=1e-12
    )
    equal = rho_grid(VP, np.linspace(6.0, 0.1, 10))  # equal steps in rho: the weights are those of the actual steps
    for order in (2, 3, 4):
        a, b = pndm.ipndm(VP, equal, order), solvers.CATALOGUE[f"lms{order}"].build(VP, equal)
        np.testing.assert_allclose(run(a, model, 1.4), run(b, model, 1.4), rtol=1e-9)


def test_fourth_order_in_equal_steps_of_rho():
    """A polynomial slope of degree 3 is exact; on a Gaussian flow Runge-Kutta starts keep the order above the ramp's 2."""
    c = np.array([0.3, -0.7, 0.4, 0.2])
    rho = np.linspace(5.0, 0.2, 9)
    grid = rho_grid(VP, rho)
    y = 0.5 + np.polynomial.polynomial.polyval(rho, np.polynomial.polynomial.polyint(c))
    eps = lambda t: np.polynomial.polynomial.polyval(VP.sigma(t) / VP.alpha(t), c)
    model = lambda x, t: ((x - VP.sigma(t) * eps(t)) / VP.alpha(t), eps(t))
    past = [eps(t) for t in grid[2::-1]]
    got = run(pndm.ipndm(VP, grid), model, y[3] * VP.alpha(grid[3]), 3, past_d=past)
    np.testing.assert_allclose(got, y[-1] * VP.alpha(grid[-1]), rtol=1e-9)
    model, flow = gaussian(VP)
    errors = []
    for n in (80, 160):
        grid = rho_grid(VP, np.linspace(8.0, 0.5, n + 1))
        errors.append(abs(run(build(VP, grid), model, 6.0) - flow(6.0, grid[0], grid[-1])))
    assert slope(errors) > 3.8, errors


@pytest.mark.parametrize("process", [processes.vp(), processes.cosine(), processes.rectified(), processes.edm()],
                         ids=["vp", "cosine", "rectified", "edm"])  # fmt: skip
def test_infinite_ends(process):
    """Steps with an infinite end are one `ddim` row while warming up; Adams-Bashforth then starts from what is known."""
    for n in (2, 3, 4, 7):
        grid = times.log_snr(process, n)
        for g, inverse in ((grid, False), (grid[::-1], True)):
            s = build(process, g, inverse=inverse)
            assert all(np.all(np.isfinite(a)) for a in s.rows if a is not None)
            assert s.rows.accept.sum() == n
            infinite = ~np.isfinite(process.log_snr(g))
            warm = np.arange(n) < 3
            runge = warm & ~infinite[:-1] & ~infinite[1:]
            assert s.evaluations == n + 3 * runge.sum()
    grid = times.log_snr(process, 7)
    if (
        process.alpha(1.0) == 0
    ):  # the last warming step was the third; the fourth knows two slopes of grid points and its own
        r = build(process, grid).rows
        assert r.pd[9:].any() == 0 and r.qd[9, 2] == 0 and r.qd[9, 1] != 0 and r.qd[10, 2] != 0


def test_traced_grid_keeps_the_rows():
    """Under jit nothing can be left out: a `ddim` step has three rows that copy, and the samples agree."""
    process = processes.cosine()
    grid = times.log_snr(process, 3, start=0.9)
    traced = jax.jit(lambda g: build(process, g))(grid)
    host = build(process, grid)
    assert traced.evaluations == 12 and host.evaluations == 9
    model = network(process)
    np.testing.assert_allclose(run(jax.device_get(traced), model, 0.9), run(host, model, 0.9), rtol=2e-5)


def test_sampled_and_kept_at_grid_points(x64):
    """`sample` applies the rows as this file's runner does, and keeps the states after whole steps only."""
    d = diffjax.denoiser(lambda x, t: jnp.sin(1.3 * x) + 0.3 * x * jnp.cos(2 * t), VP, diffjax.from_eps)
    end, kept = diffjax.sample(jax.random.key(0), d, build(VP, GRID[:6]), jnp.full((1,), 1.4), keep=True)
    want = [1.4] + [float(run(build(VP, GRID[: i + 1]), network(VP), 1.4)) for i in range(1, 6)]
    np.testing.assert_allclose(kept.x[:, 0], want, rtol=1e-9)
    np.testing.assert_allclose(end[0], want[-1], rtol=1e-9)


def test_bad_options():
    with pytest.raises(ValueError, match="order must be 1, 2, 3 or 4; got 5"):
        pndm.ipndm(VP, GRID, 5)
    with pytest.raises(ValueError, match="grid must decrease"):
        build(VP, GRID[::-1])
