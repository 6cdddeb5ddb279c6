"""Known parts: deterministic solvers hold them at their noised truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, processes, solvers, times


def test_the_known_part_runs_along_its_noised_truth_and_the_rest_does_not_feel_it():
    process = processes.rectified()
    d = diffjax.denoiser(lambda x, t: jax.tree.map(lambda a: 0.5 * a, x), process, diffjax.from_x0)
    truth = {"x": jnp.zeros((4, 2)), "y": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    z = process.prior(jax.random.key(0), truth)
    solver = solvers.ddim(process, times.uniform(5))
    free = diffjax.sample(jax.random.key(1), d, solver, z)
    held = guidance.known(truth, {"x": False, "y": True})(d)
    end, path = diffjax.sample(jax.random.key(1), held, solver, z, keep=True)
    np.testing.assert_allclose(end["y"], truth["y"], atol=1e-5)
    np.testing.assert_allclose(end["x"], free["x"], rtol=1e-5, atol=1e-6)
    alpha, sigma = (np.asarray(f(path.t))[:, None, None] for f in (process.alpha, process.sigma))
    noise = np.asarray(z["y"]) / np.asarray(process.sigma(1.0))
    np.testing.assert_allclose(path.x["y"], alpha * np.asarray(truth["y"]) + sigma * noise, atol=1e-5)


def test_places_of_a_picture_and_blends():
    d = diffjax.denoiser(lambda x, t: x, processes.rectified(), diffjax.from_x0)
    x, truth = jnp.ones((2, 2, 1)), 3 * jnp.ones((2, 2, 1))
    mask = jnp.array([[[True], [False]]])
    p = guidance.known(truth, mask)(d)(x, 0.25)
    assert p.x0[:, :, 0].tolist() == [[3.0, 1.0]] * 2
    np.testing.assert_allclose(0.75 * p.x0 + 0.25 * p.eps, x, rtol=1e-6)
    assert guidance.known(truth, 0.5)(d)(x, 0.25).x0[0, 0, 0] == 2.0
    with pytest.raises(ValueError, match="cannot be broadcast"):
        guidance.known(truth, jnp.ones((1, 1, 1, 1)))(d)(x, 0.25)
