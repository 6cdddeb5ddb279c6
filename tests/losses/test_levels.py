"""The loss by noise level, and learned uncertainty against the error that is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import losses, processes, testing
from diffjax.times import laws

PROCESS = processes.edm(0.02, 40.0)
LAW = laws.lognormal(0.0, 1.2)


def oracle(params=None):
    return testing.oracle(testing.gaussian([0.0, 0.0], 1.0), PROCESS)


def test_bins_hold_every_item_once_and_the_loss_is_unchanged():
    edges = losses.level_edges(LAW, PROCESS, 4)
    x0 = jax.random.normal(jax.random.key(5), (4000, 2))
    plain = losses.denoising_loss(LAW)
    binned = jax.jit(lambda x0: losses.by_noise_level(plain, edges)(jax.random.key(0), oracle(), x0))
    value, aux = binned(x0)
    np.testing.assert_allclose(value, jax.jit(lambda x0: plain(jax.random.key(0), oracle(), x0)[0])(x0), rtol=1e-5)
    shares = np.stack([v for name, v in aux.items() if name.startswith("bin_share/")])
    sums = np.stack([v for name, v in aux.items() if name.startswith("bin_loss/")])
    np.testing.assert_array_equal(shares.sum(0), 1)
    np.testing.assert_allclose(shares.mean(1), 0.25, atol=0.03)  # quantiles of the law
    np.testing.assert_allclose(sums.sum(0), value)
    means = sums.sum(1) / shares.sum(1)
    sigma = np.exp(-np.asarray(aux["log_snr"]))
    known = sigma**2 / (1 + sigma**2)  # the posterior variance of unit Gaussian data
    np.testing.assert_allclose(means, (shares * known).sum(1) / shares.sum(1), rtol=0.1)
    bad, aux = binned(x0.at[3].set(jnp.nan))
    assert np.isnan(bad[3]) and sum(float(v.sum()) for k, v in aux.items() if k.startswith("bin_share")) == 3999
    assert all(np.isfinite(v).all() for k, v in aux.items() if k.startswith("bin_"))


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: losses.by_noise_level(losses.denoising_loss(), ()), "one or more increasing"),
        (lambda: losses.by_noise_level(losses.denoising_loss(), (1.0, 0.0)), "one or more increasing"),
        (lambda: losses.level_edges(LAW, PROCESS, 1), "at least 2"),
        (lambda: losses.level_edges(lambda k, p, i: jnp.full(i.shape, 0.5), PROCESS, 3), "fewer than 3"),
        (lambda: losses.uncertainty(0), "features"),
    ],
)
def test_levels_that_make_no_sense(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_uncertainty_learns_the_logarithm_of_the_error():
    """For the exact denoiser of Gaussian data E[mse | sigma] = sigma^2 / (1 + sigma^2), and u is its logarithm."""
    u = losses.uncertainty(32)
    params = jax.tree.map(jnp.asarray, u.init({"none": np.zeros(1, np.float32)}))
    model = u.model(oracle)
    loss = losses.denoising_loss(LAW, log_variance=losses.log_variance_of_aux)
    evaluate = jax.jit(lambda params, x0: loss(jax.random.key(1), model(params), x0))
    first, aux = evaluate(params, jnp.zeros((4000, 2)))
    np.testing.assert_array_equal(first, aux["weighted"])  # u starts at zero
    tx = optax.adam(optax.linear_schedule(0.05, 0.0, 600))

    def step(carry, i):
        params, state = carry
        k0, k1 = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        x0 = jax.random.normal(k0, (512, 2))
        grads = jax.grad(lambda p: loss(k1, model(p), x0)[0].mean())(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(600)))((params, tx.init(params)))
    sigma = jnp.array([0.1, 0.3, 1.0, 3.0, 10.0])
    t = PROCESS.time_of_log_snr(-jnp.log(sigma))
    found = u.value(params["u"], PROCESS, t)
    np.testing.assert_allclose(found, np.log(sigma**2 / (1 + sigma**2)), atol=0.2)
    _, aux = evaluate(params, jax.random.normal(jax.random.key(3), (4000, 2)))
    scaled = np.asarray(aux["weighted"] * np.exp(-aux["log_variance"]))
    assert abs(scaled.mean() - 1) < 0.1  # every level contributes alike
    np.testing.assert_array_equal(params["net"]["none"], 0)


def test_uncertainty_keeps_what_the_network_returns_and_equals_itself():
    u = losses.uncertainty(4)
    assert u.model(oracle) == losses.uncertainty(4).model(oracle) and hash(u.model(oracle)) == hash(u.model(oracle))
    evaluate = lambda weights: u.model(oracle)({"net": None, "u": weights}).evaluate(jnp.ones((3, 2)), jnp.full(3, 0.5))
    e = jax.jit(evaluate)(jnp.ones(5))
    assert e.aux["log_variance"].shape == (3,)
    np.testing.assert_allclose(e.prediction.x0, 1 / (1 + float(PROCESS.sigma(0.5)) ** 2), rtol=1e-4)  # of x = 1
    assert np.isfinite(u.value(jnp.ones(5), processes.rectified(), jnp.array([0.0, 1.0]))).all()
