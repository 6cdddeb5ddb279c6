"""Noise on the condition: its law against quadrature, the same numbers however a batch is cut, and its place in the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import losses, processes

N = 20_000


def cond(n):
    return {"image": jnp.full((n, 1, 1, 2), 3.0), "label": jnp.arange(n)}


def see_all(x, t, cond):
    return jnp.zeros_like(x), {"seen": cond, "t": t}


@pytest.mark.parametrize("t", [0.2, 0.9, 1.0])
def test_strength_follows_its_logit_normal_law(t):
    noise = losses.condition_noise(2.0, exponent=5.0, reach=1.5)
    out = jax.jit(noise)(jax.random.key(0), cond(N), jnp.full(N, t), jnp.arange(N))
    beta = np.asarray(out["vector"][:, 0], np.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    value = 2 / (1 + np.exp(-(2 * 1.5 * t**5 - 1.5 + nodes)))
    mean, second = (weights @ value**k / weights.sum() for k in (1, 2))
    assert abs(beta.mean() - mean) < 4 * np.sqrt((second - mean**2) / N)
    assert abs((beta**2).mean() - second) < 4 * (beta**2).std() / np.sqrt(N)
    z = (np.asarray(out["image"]).reshape(N, 2) - 3) / beta[:, None]  # the image is noised by exactly that strength
    assert abs(z.mean()) < 4 / np.sqrt(2 * N) and abs(z.var() - 1) < 4 / np.sqrt(N)
    assert abs(np.corrcoef(z[:, 0], beta)[0, 1]) < 4 / np.sqrt(N) and abs(np.corrcoef(z.T)[0, 1]) < 4 / np.sqrt(N)
    np.testing.assert_array_equal(out["label"], np.arange(N))


def test_an_item_draws_the_same_noise_in_any_batch():
    noise, t, items = losses.condition_noise(1.0), jnp.linspace(0.1, 1, 6), jnp.arange(6)
    whole = noise(jax.random.key(1), cond(6), t, items)
    part = noise(jax.random.key(1), jax.tree.map(lambda a: a[2:5], cond(6)), t[2:5], items[2:5])
    for name in whole:
        np.testing.assert_allclose(part[name], whole[name][2:5], rtol=1e-6)


def test_the_loss_shows_the_noised_condition_at_its_own_time():
    d = diffjax.denoiser(see_all, processes.cosine(), diffjax.from_v, aux=True)
    seen = {}

    def spy(aux):
        seen.update(aux)
        return jnp.zeros(64)

    # reach so large that beta is 0 or the strength, as t is before or after (1/2)^(1/5)
    noise = losses.condition_noise(2.0, reach=1e4)
    loss = losses.v_prediction(label_drop=0.0, condition=noise, log_variance=spy)
    x0 = jnp.ones((64, 1, 1, 1))
    loss(jax.random.key(2), d, x0, cond(64))
    late = np.asarray(seen["t"]) > 0.5**0.2
    assert late.any() and not late.all()
    np.testing.assert_allclose(seen["seen"]["vector"][:, 0], 2.0 * late, atol=1e-6)
    np.testing.assert_array_equal(np.all(np.asarray(seen["seen"]["image"]) == 3, (1, 2, 3)), ~late)


def test_dropping_a_noised_condition_gives_the_clean_null():
    null = {"image": np.zeros((1, 1, 2)), "vector": np.zeros(1), "label": 0}
    d = diffjax.denoiser(see_all, processes.cosine(), diffjax.from_v, null=null, aux=True)
    seen = {}

    def spy(aux):
        seen.update(aux["seen"])
        return jnp.zeros(8)

    loss = losses.v_prediction(label_drop=1.0, condition=losses.condition_noise(2.0), log_variance=spy)
    loss(jax.random.key(3), d, jnp.ones((8, 1, 1, 1)), cond(8))
    assert not np.any(seen["image"]) and not np.any(seen["vector"])


def test_strength_zero_is_the_plain_loss_and_numbers_do_not_recompile():
    traces = []

    def net(params, x, t, cond):
        traces.append(0)
        return params * x + cond["image"].mean((1, 2, 3), keepdims=True)

    d = diffjax.denoiser(net, processes.cosine(), diffjax.from_v, jnp.float32(0.5))
    call = jax.jit(lambda loss, key: loss(key, d, jnp.ones((4, 1, 1, 1)), cond(4))[0])
    plain = call(losses.v_prediction(label_drop=0.0), jax.random.key(4))
    still, moved = (
        call(losses.v_prediction(label_drop=0.0, condition=losses.condition_noise(s)), jax.random.key(4))
        for s in (0.0, 1.0)
    )
    np.testing.assert_allclose(still, plain, rtol=1e-6)
    assert len(traces) == 2 and not np.allclose(moved, plain)


@pytest.mark.parametrize("bad", [None, jnp.arange(2), {"label": jnp.arange(2)}, cond(2) | {"vector": jnp.ones((2, 1))}])
def test_a_condition_without_an_image_or_with_a_vector_is_refused(bad):
    with pytest.raises(ValueError, match=r"needs a dict with an image and without a vector"):
        losses.condition_noise(1.0)(jax.random.key(5), bad, jnp.ones(2), jnp.arange(2))
