"""Latents of frozen features beside a residual branch of the same scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import latent, losses
from diffjax import networks as nw
from diffjax.networks import frozen as fz

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 4, 4, 1)).astype(np.float32)
NET = nw.ResidualAutoencoder(widths=(4, 4), residual_channels=2, middle_attention=False, out_channels=1)


def blur(weights, x):
    """A frozen linear map of 2 x 2 patches to three channels."""
    b, h, w, c = x.shape
    patches = x.reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(b, h // 2, w // 2, 4 * c)
    return patches @ weights


FROZEN = (5 * RNG.standard_normal((4, 3)) + 1).astype(np.float32)
MAKE = nw.feature_autoencoder(NET, blur, FROZEN)


@pytest.fixture(scope="module")
def params():
    fresh = MAKE.init(jax.random.key(0), X)
    return jax.tree.map(lambda a: a + 0.2 * RNG.standard_normal(a.shape).astype(np.float32), fresh)


def test_the_scale_is_the_mean_over_channels_of_moments_and_matching_gives_it():
    a = RNG.standard_normal((5, 3, 2, 4)) * [1, 2, 3, 4] + [0, 1, 0, 5]
    scale = fz.scale_of(a.astype(np.float32))
    flat = a.reshape(-1, 4)
    np.testing.assert_allclose(scale, (flat.mean(0).mean(), flat.std(0).mean()), rtol=1e-5)
    moved = fz.match_scale(a.astype(np.float32), scale, fz.Scale(jnp.float32(-2.0), jnp.float32(0.5)))
    np.testing.assert_allclose(fz.scale_of(moved), (-2.0, 0.5), rtol=1e-5)
    one = lambda a: fz.scale_of(a).mean + fz.scale_of(a).std
    assert not np.any(jax.grad(one)(jnp.ones((2, 3))))


def test_the_latent_is_features_and_a_residual_of_their_scale(params):
    auto = MAKE(params)
    z = np.asarray(jax.jit(lambda a: a.encode(X).mean)(auto))
    assert z.shape == (6, 2, 2, 5)
    np.testing.assert_allclose(z[..., :3], blur(FROZEN, X), rtol=1e-5)
    np.testing.assert_allclose(fz.scale_of(z[..., 3:]), fz.scale_of(z[..., :3]), rtol=1e-4)
    alone = nw.feature_autoencoder(NET.clone(residual_channels=0), blur, FROZEN)
    shapes = jax.eval_shape(alone.module.init, jax.random.key(0), X, blur(FROZEN, X))["params"]
    assert sorted(shapes) == ["decoder"]
    assert jax.eval_shape(lambda p: alone(p).measured(X).encode(X).mean, shapes).shape == (6, 2, 2, 3)


def test_measured_scales_make_items_independent(params):
    @jax.jit
    def both(auto):
        fixed = auto.measured(X)
        whole, part = fixed.encode(X).mean, fixed.encode(X[:2]).mean
        return auto.encode(X).mean, whole, part, auto.encode(X[:2]).mean

    own, whole, part, batch = both(MAKE(params))
    np.testing.assert_allclose(own, whole, atol=1e-5)
    np.testing.assert_allclose(part, whole[:2], atol=1e-5)
    assert np.abs(batch - whole[:2]).max() > 1e-2  # the batch's own scale is not that of all


def test_gradients_reach_everything_but_the_features(params):
    loss = losses.autoencoder_loss(losses.squared)
    mean = lambda p: loss(jax.random.key(1), MAKE(p), jnp.asarray(X))[0].mean()
    grad = jax.jit(jax.grad(mean))(params)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grad))

    def reach(weights):
        auto = nw.FeatureAutoencoder(params, weights, None, NET, blur)
        return jnp.sum(jnp.square(auto.encode(X).mean))

    assert not np.any(jax.jit(jax.grad(reach))(FROZEN))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="residual and decode.*KLAutoencoder lacks residual"):
        nw.feature_autoencoder(nw.KLAutoencoder(), blur, FROZEN)
    with pytest.raises(ValueError, match="divisible by 2"):
        jax.eval_shape(NET.init, jax.random.key(0), X[:, :3], blur(FROZEN, X))


def test_it_spans_a_latent_space(params):
    with pytest.raises(ValueError, match="scaled by the batch.*measured"):
        latent.latent_space(MAKE(params), X)
    space = latent.latent_space(jax.jit(lambda: MAKE(params).measured(X))(), X)
    z = space.encode_all(X)
    np.testing.assert_allclose(z.reshape(-1, 5).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.reshape(-1, 5).std(0), 1, atol=1e-4)
    assert space.decode_all(z).shape == X.shape
