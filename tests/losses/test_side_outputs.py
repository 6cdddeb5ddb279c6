"""Side outputs: squares of r x r pixels by a loop, and their place in a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import losses, processes

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_every_output_is_compared_at_its_resolution():
    target, half, whole = normal(2, 4, 6, 3), normal(2, 2, 3, 3), normal(2, 4, 6, 3)
    low = np.zeros((2, 2, 3, 3))
    for i in range(2):
        for j in range(3):
            low[:, i, j] = 2 * np.asarray(target)[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
    errors = [
        ((a - b) ** 2).mean((1, 2, 3)) for a, b in ((np.asarray(half), low), (np.asarray(whole), np.asarray(target)))
    ]
    aux = {"half": half, "whole": whole}
    np.testing.assert_allclose(losses.side_outputs()(aux, target), errors[0] / 4 + errors[1], rtol=1e-5)
    weighted = losses.side_outputs({"half": 3.0, "whole": 0.5})
    np.testing.assert_allclose(weighted(aux, target), 3 * errors[0] + 0.5 * errors[1], rtol=1e-5)
    noise = losses.side_outputs()({"low": jnp.zeros((1, 8, 8, 1))}, normal(1, 32, 32, 1))
    np.testing.assert_allclose(noise, 1 / 16, rtol=0.5)  # white noise keeps its variance of one


def test_they_are_added_before_the_weight():
    fn = lambda params, x, t, cond=None: (params * x, {"whole": params * x})
    model = diffjax.denoiser(fn, processes.rectified(), diffjax.from_velocity, jnp.float32(0.3), aux=True)
    x0, key = normal(3, 2, 2, 1), lambda: jax.random.key(0)
    options = dict(label_drop=0.0, weight=lambda process, t: 1 + t)
    plain, _ = losses.flow_matching(**options)(key(), model, x0)
    both, aux = losses.flow_matching(**options, sides=losses.side_outputs())(key(), model, x0)
    np.testing.assert_allclose(both, 2 * plain, rtol=1e-5)
    np.testing.assert_allclose(aux["sides"], aux["mse"], rtol=1e-5)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="with denoiser.*aux=True.*got aux None"):
        losses.side_outputs()(None, normal(1, 2, 2, 1))
    for shape in ((1, 2, 1, 1), (1, 3, 4, 1), (1, 4, 4, 2), (1, 8, 8, 1)):
        with pytest.raises(ValueError, match=r"output 'a' must be .* of the target \(1, 4, 4, 1\); got \(1, "):
            losses.side_outputs()({"a": normal(*shape)}, normal(1, 4, 4, 1))
    with pytest.raises(ValueError, match=r"must name the side outputs \['a'\]; got \['b'\]"):
        losses.side_outputs({"b": 1.0})({"a": normal(1, 2, 2, 1)}, normal(1, 2, 2, 1))
