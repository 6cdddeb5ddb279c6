"""Distillation: its three terms against sums written out, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import losses, processes

PROCESS = processes.rectified()
X0 = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)), jnp.float32)


def model(slope, features=True):
    """v = slope x, with features slope x and slope x^2."""

    def fn(params, x, t, cond=None):
        y = params * x
        return y, {"a": y, "b": params * x[:, :2] ** 2} if features else {"a": y}

    return diffjax.denoiser(fn, PROCESS, diffjax.from_velocity, jnp.float32(slope), aux=True)


def test_the_three_terms_and_their_gradient():
    """dx/dt = eps - x0 on the rectified path; x is recovered from the linear networks by the time and the error."""
    loss = losses.distillation(model(0.5), output=0.3, features=0.7, data=2.0, label_drop=0.0)

    def total(slope):
        value, aux = loss(jax.random.key(1), model(slope), X0)
        return value.mean(), (value, aux)

    (_, (value, aux)), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.float32(2.0))
    # the same draws, from a loss of its own
    plain = losses.flow_matching(label_drop=0.0)
    x2 = np.asarray(aux["output"]) / 1.5**2  # mean of x^2
    quartic = np.asarray(aux["features"]) * 2 / 1.5**2 - x2  # mean of x^4 over the first two columns
    np.testing.assert_allclose(value, 2.0 * aux["mse"] + 0.3 * aux["output"] + 0.7 * aux["features"], rtol=1e-6)
    np.testing.assert_allclose(plain(jax.random.key(1), model(2.0), X0)[1]["mse"], aux["mse"], rtol=1e-6)
    state, t = {}, np.asarray(aux["t"])
    spy = lambda x, t: state.setdefault("x", x)
    losses.flow_matching(label_drop=0.0)(jax.random.key(1), diffjax.denoiser(spy, PROCESS, diffjax.from_velocity), X0)
    x = np.asarray(state["x"])
    eps = (x - (1 - t[:, None]) * X0) / t[:, None]
    np.testing.assert_allclose(aux["mse"], ((2 * x - (eps - X0)) ** 2).mean(1), rtol=2e-4)
    np.testing.assert_allclose(x2, (x**2).mean(1), rtol=1e-4)
    np.testing.assert_allclose(quartic, (x[:, :2] ** 4).mean(1), rtol=1e-3)
    by_hand = 2 * (2 * x * (2 * x - (eps - X0))).mean(1) + 0.3 * 2 * 1.5 * x2 + 0.7 * 1.5 * (x2 + quartic)
    np.testing.assert_allclose(grad, by_hand.mean(), rtol=1e-3)


def test_it_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="features of the same names and shapes.*Read the same taps"):
        losses.distillation(model(1.0), label_drop=0.0)(jax.random.key(0), model(1.0, features=False), X0)
    with pytest.raises(ValueError, match=r"label_drop is a probability in \[0, 1\]; got 2.0"):
        losses.distillation(model(1.0), label_drop=2.0)
