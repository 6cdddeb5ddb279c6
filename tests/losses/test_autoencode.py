"""Losses of autoencoders against NumPy and closed forms; each of two networks is moved by its own loss alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import losses, training
from diffjax import networks as nw
from diffjax.networks import Posterior
from diffjax.numerics import item_keys
from diffjax.training import optimizer

rng = np.random.default_rng(0)
X = rng.standard_normal((4, 4, 4, 3)).astype(np.float32)


def test_the_kl_of_a_gaussian_is_the_mean_log_ratio():
    mean, log_variance = (rng.standard_normal((2, 3)).astype(np.float32) for _ in range(2))
    p = Posterior(jnp.asarray(mean), jnp.asarray(log_variance))
    exact = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(1)
    np.testing.assert_allclose(p.kl(), exact, rtol=1e-5)
    many = Posterior(jnp.broadcast_to(mean[:1], (20000, 3)), jnp.broadcast_to(log_variance[:1], (20000, 3)))
    z = np.asarray(many.draw(item_keys(jax.random.key(0), jnp.arange(20000))), np.float64)
    log_q = -0.5 * ((z - mean[0]) ** 2 / np.exp(log_variance[0]) + log_variance[0]).sum(1)
    assert abs((log_q + 0.5 * (z**2).sum(1)).mean() - exact[0]) < 0.05
    point = Posterior(jnp.asarray(mean))
    assert point.kl().tolist() == [0, 0] and point.draw(None) is point.mean


@pytest.mark.parametrize("weighted", [False, True])
def test_the_perceptual_distance_is_that_of_numpy(weighted):
    a, b = X, X[::-1].copy()
    features = lambda x: (x, jnp.concatenate([x[:, ::2], -2 * x[:, 1::2]], axis=-1))
    weights = (np.array([1.0, 0.0, 2.0]), np.arange(6.0)) if weighted else None
    d = losses.perceptual(features, weights)(jnp.asarray(a), jnp.asarray(b))
    total = np.zeros(4)
    for i, (u, v) in enumerate(zip(features(a), features(b), strict=True)):
        unit = lambda f: np.asarray(f) / np.linalg.norm(np.asarray(f), axis=-1, keepdims=True)
        gap = (unit(u) - unit(v)) ** 2 * (weights[i] if weighted else 1.0)
        total += gap.sum(-1).mean((1, 2))
    np.testing.assert_allclose(d, total, rtol=1e-4)
    np.testing.assert_allclose(losses.perceptual(features)(a, 3.0 * a), 0, atol=1e-5)  # lengths do not count
    with pytest.raises(ValueError, match="each of the 2 layers; got 1"):
        losses.perceptual(features, (np.ones(3),))(a, b)


def test_losses_of_the_discriminator():
    real, fake = rng.standard_normal((2, 4, 2, 2, 1)).astype(np.float32)
    mean = lambda a: a.reshape(4, -1).mean(1)
    relu, soft = lambda a: np.maximum(a, 0), lambda a: np.log1p(np.exp(a))
    np.testing.assert_allclose(losses.hinge(real, fake), (mean(relu(1 - real)) + mean(relu(1 + fake))) / 2, rtol=1e-5)
    np.testing.assert_allclose(losses.vanilla(real, fake), (mean(soft(-real)) + mean(soft(fake))) / 2, rtol=1e-5)


def test_the_parts_of_the_loss_add_up():
    make = nw.autoencoder(nw.KLAutoencoder(widths=(8,), blocks=1, middle_attention=False))
    params = make.init(jax.random.key(0), X)
    double = lambda x, y: 2 * losses.squared(x, y)
    loss = losses.autoencoder_loss(losses.absolute, kl=0.5, perceptual=double, perceptual_weight=3.0)

    @jax.jit
    def both(params, key):
        a = make(params)
        total, aux = loss(key, a, X)
        posterior = a.encode(X)
        y = a.decode(posterior.draw(item_keys(key, jnp.arange(4))))
        return total, aux, y, posterior.kl()

    total, aux, y, kl = both(params, jax.random.key(3))
    mse = np.square(X - y).reshape(4, -1).mean(1)
    np.testing.assert_allclose(aux["mse"], mse, rtol=1e-4)
    expected = np.abs(X - y).reshape(4, -1).mean(1) + 0.5 * kl / 48 + 3.0 * 2 * mse
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_allclose(aux["kl"], kl, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_losses_have_the_precision_of_the_data(x64, dtype):
    """Shapes alone; parameters are float32 throughout."""
    small = dict(widths=(4,), blocks=1, middle_attention=False)
    kinds = [nw.KLAutoencoder(**small), *(nw.VQAutoencoder(**small, codes=8, average=a) for a in (False, True))]
    cases = [(nw.autoencoder(net), losses.autoencoder_loss()) for net in kinds]
    pair = nw.adversary(kinds[0], nw.PatchDiscriminator(width=4, layers=1))
    cases.append((pair, losses.adversarial_loss(losses.autoencoder_loss())))
    for make, loss in cases:

        def found(key, x, make=make, loss=loss):
            k_init, k_loss = jax.random.split(key)
            params = make.init(k_init, X)
            return (
                params,
                jax.grad(lambda p: loss(k_loss, make(p), x)[0].mean())(params),
                loss(k_loss, make(params), x)[0],
            )

        params, grad, value = jax.eval_shape(found, jax.random.key(0), X.astype(dtype))
        assert value.dtype == dtype
        assert {a.dtype for a in jax.tree.leaves((params, grad))} == {np.dtype(np.float32)}


# --------------------------------------------------------------------------------------------------------- adversary


@pytest.fixture(scope="module")
def pair():
    """`(make, params)` of a tiny autoencoder and discriminator; the outputs that start at zero are random."""
    make = nw.adversary(
        nw.KLAutoencoder(widths=(4,), blocks=1, middle_attention=False), nw.PatchDiscriminator(width=4, layers=1)
    )
    params = make.init(jax.random.key(0), X)
    return make, {**params, "age": np.float32(5)}


def gradients(make, params, loss):
    def mean(params):
        per_item, aux = loss(jax.random.key(1), make(params), X)
        return per_item.mean(), aux

    return jax.jit(jax.grad(mean, has_aux=True))(params)


def test_each_loss_moves_its_own_parameters_alone(pair):
    """The gradient is that of the published objectives, taken one network at a time."""
    make, params = pair
    base = losses.autoencoder_loss(losses.squared, kl=1e-3)
    loss = losses.adversarial_loss(base, weight=0.5)
    g, aux = gradients(make, params, loss)
    factor = float(aux["adversarial_weight"])

    def alone(auto, disc, which):
        a = make({"autoencoder": auto, "discriminator": disc, "age": params["age"]})
        z, latent, _ = base.latent(jax.random.key(1), a.autoencoder, X, None)
        y = a.autoencoder.decode(z)
        if which == "autoencoder":
            return (base.compare(X, y)[0] + latent).mean() - factor * a.judge(y).mean()
        return losses.hinge(a.judge(X), a.judge(y)).mean()

    @jax.jit
    def separate(params):
        auto, disc = params["autoencoder"], params["discriminator"]
        return jax.grad(alone, 0)(auto, disc, "autoencoder"), jax.grad(alone, 1)(auto, disc, "discriminator")

    for found, wanted in zip((g["autoencoder"], g["discriminator"]), separate(params), strict=True):
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
        assert scale > 1e-3
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), found, wanted)  # noqa: B023
    assert g["age"] == -1


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(pair):
    make, params = pair
    base = losses.autoencoder_loss(losses.squared, kl=0.0)
    _, aux = gradients(make, params, losses.adversarial_loss(base, weight=0.5))

    @jax.jit
    def norms(params):
        def part(kernel, which):
            out = {**params["autoencoder"]["decoder"]["out"], "kernel": kernel}
            auto = {**params["autoencoder"], "decoder": {**params["autoencoder"]["decoder"], "out": out}}
            a = make({**params, "autoencoder": auto})
            y = a.autoencoder.decode(base.latent(jax.random.key(1), a.autoencoder, X, None)[0])
            return jnp.square(X - y).mean() if which else -a.judge(y).mean()

        kernel = params["autoencoder"]["decoder"]["out"]["kernel"]
        return [jnp.sqrt(jnp.square(jax.grad(part)(kernel, which)).sum()) for which in (1, 0)]

    rec, gan = norms(params)
    np.testing.assert_allclose(aux["adversarial_weight"], 0.5 * rec / (gan + 1e-4), rtol=1e-3)
    with pytest.raises(ValueError, match="last=decoder/nowhere is no path.*at 'nowhere' there are"):
        gradients(make, params, losses.adversarial_loss(base, last=("decoder", "nowhere")))


def test_it_begins_after_the_start_and_fits_the_training_step(pair):
    """Before `start` updates the discriminator stands still; the age counts updates, by the optimiser alone."""
    make, params = pair
    params = {**params, "age": jnp.zeros(())}
    loss = losses.adversarial_loss(losses.autoencoder_loss(), start=2)
    rules = {"^age$": optax.sgd(1.0), "^discriminator/": optax.adam(1e-2)}
    optimiser = optimizer.by_path(rules, optax.adam(1e-3))
    step = jax.jit(training.make_train_step(make, loss, optimiser))
    state, states = training.init_state(params, optimiser, 0), []
    for _ in range(3):
        state, metrics = step(state, {"x": X})
        states.append(state.params)
    assert [float(p["age"]) for p in states] == [1, 2, 3]
    moved = lambda a, b, k: max(np.abs(u - v).max() for u, v in zip(*map(jax.tree.leaves, (a[k], b[k])), strict=True))
    assert moved(params, states[1], "discriminator") == 0 < moved(states[1], states[2], "discriminator")
    assert moved(params, states[0], "autoencoder") > 0 and float(metrics["adversarial_weight"]) > 0
    assert dataclasses.is_dataclass(loss)
