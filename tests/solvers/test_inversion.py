"""Noise maps of stochastic solvers, and the errors of plain inversion beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import numerics as nu
from diffjax import processes, solvers, testing, times
from diffjax.testing import draw, oracle, smooth_mixture

COSINE = processes.cosine()
MIX = smooth_mixture()
KEY = jax.random.key(3)
ENCODE = jax.jit(solvers.encode, static_argnames="path")
SAMPLE = jax.jit(diffjax.sample)


def decode(denoiser, solver, code):
    return SAMPLE(KEY, denoiser, solvers.replay(solver, code), code.start)


SOLVERS = {
    "ddpm": lambda p, g: solvers.ddpm(p, g),
    "ddim eta 0.5": lambda p, g: solvers.ddim(p, g, 0.5),
    "fixed large": lambda p, g: solvers.ddpm(p, g, variance=1.0),
}


def test_any_data_is_returned_in_float32():
    """Far from the model's data too, when a part of the steps is skipped, and by every stochastic one-step solver."""
    process = processes.rectified()  # from alpha = 0 exactly to sigma = 0 exactly
    d, other = (oracle(testing.gaussian([m, m], 1.0), process) for m in (0.3, 1.0))
    x0 = jnp.concatenate([draw(jax.random.key(1), MIX, 4)[0], jnp.full((1, 2), 5.0), jnp.full((1, 2), -5.0)])
    for name, make in SOLVERS.items():
        for path, start in (("independent", 1.0), ("independent", 0.6), ("markov", 1.0)):
            solver = make(process, times.uniform(20, start=start))
            code = ENCODE(jax.random.key(5), d, solver, x0, path=path)
            error = float(np.abs(decode(d, solver, code) - x0).max())
            assert error < 1e-5, (name, path, start, error)
            assert np.abs(decode(other, solver, code) - x0).max() > 0.1  # a code, not a copy of the data


def test_the_code_against_the_textbook_loop(x64):
    process, grid = processes.vp(), times.uniform(5)
    solver, d = solvers.ddpm(process, grid), oracle(MIX, process)
    x0 = draw(jax.random.key(1), MIX, 3)[0]
    key = jax.random.key(5)
    code = ENCODE(key, d, solver, x0, path="independent")
    keys = nu.item_keys(key, jnp.arange(3))
    path = [process.add_noise(x0, nu.item_normal(keys, i, x0), t) for i, t in enumerate(grid[1:-1])]
    path = [code.start, *path, x0]
    predict = jax.jit(lambda x, t: d(x, t).x0)
    for i in range(5):
        c_t, c_0, variance = process.posterior(grid[i + 1], grid[i])
        residual = path[i + 1] - c_t * path[i] - c_0 * predict(path[i], grid[i])
        np.testing.assert_allclose(code.residual[i], residual, atol=1e-12)
        z = residual / np.sqrt(variance) if variance > 0 else 0 * residual
        np.testing.assert_allclose(code.z[i], z, rtol=1e-8, atol=1e-9)


def test_independent_noise_is_large_and_anticorrelated_and_markov_noise_is_white():
    solver, d = solvers.ddpm(COSINE, times.uniform(50)), oracle(MIX, COSINE)
    x0 = draw(jax.random.key(1), MIX, 512)[0]
    z = {path: ENCODE(jax.random.key(5), d, solver, x0, path=path).z[5:45] for path in ("independent", "markov")}
    correlation = {path: float(np.mean(v[1:] * v[:-1]) / np.mean(v**2)) for path, v in z.items()}
    std = {path: float(np.std(v)) for path, v in z.items()}
    assert std["independent"] > 1.5 and correlation["independent"] < -0.3, (std, correlation)
    assert abs(std["markov"] - 1) < 0.1 and abs(correlation["markov"]) < 0.03, (std, correlation)


def test_the_noise_of_an_item_does_not_depend_on_its_batch():
    solver, d = solvers.ddpm(COSINE, times.uniform(6)), oracle(MIX, COSINE)
    x0 = draw(jax.random.key(1), MIX, 6)[0]
    whole = ENCODE(jax.random.key(5), d, solver, x0)
    part = ENCODE(jax.random.key(5), d, solver, x0[2:4], items=jnp.arange(2, 4))
    np.testing.assert_allclose(whole.residual[:, 2:4], part.residual, atol=1e-5)


def test_replaying_a_sample_returns_it():
    """The residuals of a path that the solver itself drew are its noise."""
    process = processes.rectified()
    solver, d = solvers.ddpm(process, times.uniform(8, stop=0.1)), oracle(MIX, process)
    x = process.prior(jax.random.key(0), (4, 2))
    end = SAMPLE(KEY, d, solver, x)
    keys = nu.item_keys(KEY, jnp.arange(4))
    noise = jnp.stack([solver.rows.noise[i] * nu.item_normal(keys, 2 * i + 1, x) for i in range(8)]).astype(x.dtype)
    code = solvers.NoiseMap(x, noise, noise)
    np.testing.assert_allclose(decode(d, solver, code), end, atol=1e-5)


def test_plain_inversion_is_approximate_and_improves_with_order():
    """Data to noise and back with the same steps: DDIM, DPM-Solver++(2M), and the noise map, which is exact."""
    grid = times.log_snr(COSINE, 50, start=0.98, stop=0.01)
    d, x0 = oracle(MIX, COSINE), draw(jax.random.key(1), MIX, 32)[0]
    error = {}
    for name in ("ddim", "dpmpp_2m"):
        make = solvers.CATALOGUE[name].build
        there = SAMPLE(KEY, d, make(COSINE, grid[::-1], inverse=True), x0)
        error[name] = float(np.sqrt(np.mean((SAMPLE(KEY, d, make(COSINE, grid), there) - x0) ** 2)))
    assert 1e-2 < error["ddim"] < 0.2 and 1e-4 < error["dpmpp_2m"] < 0.3 * error["ddim"], error


def test_bad_input():
    d, x0 = oracle(MIX, COSINE), jnp.zeros((2, 2))
    grid = times.uniform(4)
    for make in (solvers.ddim, solvers.dpmpp, solvers.edm_heun, solvers.edict):
        with pytest.raises(ValueError, match="need a stochastic one-step table"):
            solvers.encode(KEY, d, make(COSINE, grid), x0)
    ddpm = solvers.ddpm(COSINE, grid)
    with pytest.raises(ValueError, match="a padded table has rows that are none"):
        solvers.encode(KEY, d, solvers.pad(ddpm, 6), x0)
    with pytest.raises(ValueError, match="condition has 3 items and the state 2"):
        solvers.encode(KEY, d.bind(jnp.zeros(3)), ddpm, x0)
    with pytest.raises(ValueError, match=r"one global index per item, shape \(2,\)"):
        solvers.encode(KEY, d, ddpm, x0, items=jnp.arange(3))
    with pytest.raises(ValueError, match="must be floating"):
        solvers.encode(KEY, d, ddpm, x0.astype(int))
    with pytest.raises(ValueError, match="carries a state"):
        solvers.encode(KEY, diffjax.Denoiser((), COSINE, init=lambda d, x, c: jnp.zeros(2), apply=d.apply), ddpm, x0)
    with pytest.raises(ValueError, match="path must be one of"):
        solvers.encode(KEY, d, solvers.ddpm(COSINE, grid), x0, "straight")
    code = ENCODE(jax.random.key(5), d, solvers.ddpm(COSINE, grid), x0)
    with pytest.raises(ValueError, match="use the grid of encode"):
        solvers.replay(solvers.ddpm(COSINE, times.uniform(5)), code)
    with pytest.raises(ValueError, match="need a stochastic one-step table"):
        solvers.replay(solvers.ddim(COSINE, grid), code)
