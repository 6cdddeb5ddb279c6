"""The router's loss: least at the exact posterior, and independent of how a batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import losses, processes, testing, training
from diffjax.experts import router
from diffjax.networks import Classifier, from_linen

PROCESS = processes.rectified()
MIXTURE = testing.mixture([1, 2, 1], [[-1.0, 0.0], [0.5, 0.5], [1.0, -1.0]], stds=[0.4, 0.3, 0.6], labels=[0, 1, 0])


def test_the_exact_router_is_the_posterior_by_bayes(x64):
    x, t = np.random.default_rng(0).normal(size=(4, 2)), 0.6
    a, s = 1 - t, t
    density = np.zeros((4, 2))
    for w, m, std, k in zip([1, 2, 1], MIXTURE.means, [0.4, 0.3, 0.6], [0, 1, 0], strict=True):
        v = (a * std) ** 2 + s * s
        density[:, k] += w / (2 * np.pi * v) * np.exp(-((x - a * m) ** 2).sum(1) / (2 * v))
    got = jax.nn.softmax(testing.exact_router(MIXTURE, PROCESS)(jnp.asarray(x), t))
    np.testing.assert_allclose(got, density / density.sum(1, keepdims=True), rtol=1e-12)


def test_the_exact_posterior_is_a_stationary_point():
    x0, component = testing.draw(jax.random.key(0), MIXTURE, 1 << 15)
    cluster = jnp.asarray(MIXTURE.labels)[component]
    exact = testing.exact_router(MIXTURE, PROCESS)

    def mean(shift, tilt):
        def tilted(x, t, cond):
            return exact(x, t) + shift[None] + x @ tilt

        biased = Tilted(tilted)
        return losses.router_loss()(jax.random.key(1), biased, x0, cluster)[0].mean()

    zero = jnp.zeros(2), jnp.zeros((2, 2))
    value, grads = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(*zero)
    for g in grads:
        assert np.abs(g).max() < 4 / np.sqrt(1 << 15)  # each term is at most one in size
    rng = np.random.default_rng(2)
    other = jnp.asarray(rng.normal(size=2), jnp.float32), jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)
    assert mean(*other) > value + 0.05


class Tilted:
    process = PROCESS

    def __init__(self, f):
        self.f = f

    def __call__(self, *args):
        return self.f(*args)


def test_a_small_network_learns_the_posterior():
    net = from_linen(Classifier(classes=2, width=24, depth=1))
    params = net.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))
    model = lambda p: router(net, PROCESS, p)
    step = training.make_train_step(
        model, losses.router_loss(), optax.adam(5e-3), condition=lambda batch: batch["cluster"]
    )
    state = training.init_state(params, optax.adam(5e-3), 0)

    def body(state, key):
        x0, component = testing.draw(key, MIXTURE, 256)
        state, metrics = step(state, {"x": x0, "cluster": jnp.asarray(MIXTURE.labels)[component]})
        return state, metrics["loss"]

    state, loss = jax.jit(lambda s: jax.lax.scan(body, s, jax.random.split(jax.random.key(3), 400)))(state)
    assert loss[-50:].mean() < loss[:5].mean() - 0.1
    t = 0.3
    x, _ = testing.draw(jax.random.key(5), MIXTURE, 500, PROCESS, t)
    got, exact = (jax.nn.softmax(f(x, t)) for f in (model(state.params), testing.exact_router(MIXTURE, PROCESS)))
    assert np.abs(got - exact).mean() < 0.1 < np.abs(0.5 - exact).mean()


def test_items_and_conditions():
    seen = {}

    def fn(params, x, t, cond):
        seen["cond"] = cond
        return x @ params

    r = router(fn, PROCESS, jnp.eye(2, 3))
    x0, cluster, items = jnp.ones((6, 2)), jnp.arange(6) % 3, jnp.arange(6)
    loss = losses.router_loss()
    whole, aux = loss(jax.random.key(0), r, x0, cluster)
    assert whole.shape == (6,) and sorted(aux) == ["accuracy", "t"] and seen["cond"] is None
    part, _ = loss(jax.random.key(0), r, x0[2:4], cluster[2:4], items=items[2:4])
    np.testing.assert_allclose(part, whole[2:4], rtol=1e-6)
    loss(jax.random.key(0), r, x0, {"cluster": cluster, "label": items})
    np.testing.assert_array_equal(seen["cond"], items)
    with pytest.raises(ValueError, match="trained on the clusters of its items"):
        loss(jax.random.key(0), r, x0)
    with pytest.raises(ValueError, match="integers"):
        loss(jax.random.key(0), r, x0, jnp.ones(6))
