"""The balance penalty: its formula, where it is least, and that it reaches routers through any loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import losses, networks, processes


def formula(p, top):
    """f_i P_i, token by token."""
    tokens = p.reshape(-1, p.shape[-1]).astype(np.float64)
    n, e = tokens.shape
    f = np.zeros(e)
    for row in tokens:
        for i in np.argsort(-row)[:top]:
            f[i] += e / (top * n)
    return (f * tokens.mean(0)).sum()


def test_it_is_the_formula_summed_over_layers():
    p = np.random.default_rng(0).dirichlet(np.ones(5), (3, 4, 6)).astype(np.float32)  # [layers, B, T, E]
    want = 0.3 * sum(formula(layer, 2) for layer in p)
    scanned = losses.balance(2, 0.3)({"blocks/experts/probabilities": p, "blocks/block": p}, None)
    looped = losses.balance(2, 0.3)({f"block_{i}/experts/probabilities": layer for i, layer in enumerate(p)}, None)
    np.testing.assert_allclose([scanned, looped], [want, want], rtol=1e-5)
    load = losses.expert_load(p[0], 2)
    np.testing.assert_allclose(load.sum(), 1, rtol=1e-6)


def test_descent_evens_the_load():
    """From routers that prefer one expert, steps down the penalty alone give all experts their share."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 64, 8)).astype(np.float32), 0.1 * rng.standard_normal((8, 4)).astype(np.float32)
    bias = np.array([3.0, 0, 0, 0], np.float32)
    prob = lambda p: jax.nn.softmax(x @ p[0] + p[1][None, None])
    penalty = lambda p: losses.balance(1, 1.0)({"a/probabilities": prob(p)}, None)

    @jax.jit
    def descend(p):
        step = lambda p, _: (jax.tree.map(lambda a, g: a - 0.3 * g, p, jax.grad(penalty)(p)), penalty(p))
        return jax.lax.scan(step, p, None, length=300)

    end, values = descend((w, bias))
    before, after = (np.asarray(losses.expert_load(prob(p), 1)) for p in ((w, bias), end))
    assert before.max() > 0.9 and after.max() < 0.5
    assert values[0] > 2 and values[-1] < 1.1


def test_it_reaches_the_routers_through_the_loss():
    """In a scanned, rematerialised network whose output is zero, only the penalty can move the routers."""
    net = networks.from_linen(
        networks.DiT(
            width=8, depth=2, heads=2, expand=1, scan_layers=True, remat="full", feed_forward=networks.sparse(4, 2, 0)
        )
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4, 4, 1)), jnp.float32)
    params = networks.random_parameters(net.module, x, np.zeros(4, np.float32))
    params["out"] = jax.tree.map(np.zeros_like, params["out"])
    read = networks.tapped(net, read="blocks/experts/probabilities")
    model = lambda p: diffjax.denoiser(read, processes.rectified(), diffjax.from_velocity, p, aux=True)
    loss = losses.flow_matching(penalty=losses.balance(2, 0.5))

    @jax.jit
    def slope(params):
        mean = lambda p: (lambda out: (out[0].mean(), out[1]))(loss(jax.random.key(0), model(p), x))
        return jax.value_and_grad(mean, has_aux=True)(params)

    (value, aux), g = slope(params)
    assert aux["penalty"].shape == (4,) and float(aux["penalty"][0]) >= 0.99  # two layers of at least 0.5
    np.testing.assert_allclose(value, (aux["mse"] + aux["penalty"]).mean(), rtol=1e-6)
    assert np.abs(g["blocks"]["experts"]["router"]["kernel"]).max() > 1e-5
    assert (
        np.abs(g["blocks"]["experts"]["up"]["kernel"][1]).max() < 1e-9
    )  # the last layer's experts feed only the output


def test_bad_uses_are_refused():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        losses.balance(0)
    with pytest.raises(ValueError, match=r"must hold taps that end in 'probabilities'; got \['x'\].*aux=True"):
        losses.balance(1)({"x": jnp.ones(3)}, None)
    with pytest.raises(ValueError, match="got NoneType"):
        losses.balance(1)(None, None)
