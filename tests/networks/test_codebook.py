"""Vector quantisation: nearest codes, gradients straight through, moving averages against a textbook loop, tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import losses, metrics, training
from diffjax import networks as nw
from diffjax.networks.codebook import codes_of
from diffjax.training import devices, optimizer

K, D = 7, 3


def book(average, seed=0):
    rng = np.random.default_rng(seed)
    if average:
        counts = rng.uniform(0.5, 2.0, K).astype(np.float32)
        return {"counts": counts, "sums": rng.standard_normal((K, D)).astype(np.float32) * counts[:, None]}
    return {"embedding": rng.standard_normal((K, D)).astype(np.float32)}


@pytest.mark.parametrize("average", [False, True])
def test_the_nearest_code_and_its_gradients(average):
    params, z = book(average), np.random.default_rng(1).standard_normal((4, 5, D)).astype(np.float32)
    net = nw.Codebook(K, D, average)
    codes = np.asarray(codes_of(params))
    best = np.square(z[:, :, None] - codes).sum(-1).argmin(-1)
    q = jax.jit(lambda p, z: net.apply({"params": p}, z))(params, z)
    np.testing.assert_array_equal(q.tokens, best)
    assert q.tokens.dtype == jnp.int32
    np.testing.assert_allclose(q.z, codes[best], atol=1e-6)
    found = jax.jit(lambda p, t: net.apply({"params": p}, t, method="lookup"))(params, q.tokens)
    np.testing.assert_allclose(found, codes[best], atol=1e-6)
    if average:
        np.testing.assert_allclose(codes, params["sums"] / params["counts"][:, None], rtol=1e-4)

    f = lambda p, z: jnp.sin(net.apply({"params": p}, z).z).sum()
    g_params, g_z = jax.jit(jax.grad(f, (0, 1)))(params, z)
    np.testing.assert_allclose(g_z, np.cos(codes[best]), atol=1e-5)  # that of the code, passed on to z
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(g_params))


def make_step(net, decay=0.9):
    make = nw.autoencoder(net)
    rules = {r"codebook/(counts|sums)$": optax.sgd(1.0)}
    loss = losses.autoencoder_loss(losses.squared, decay=decay)
    return make, loss, optimizer.by_path(rules, optax.sgd(0.0))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_moving_averages_are_those_of_a_textbook_loop(accumulate):
    """Three steps; the networks have rate zero, so that only the codebook moves."""
    net = nw.VQAutoencoder(widths=(8,), blocks=1, latent_channels=D, codes=K, average=True, middle_attention=False)
    make, loss, optimiser = make_step(net)
    x = np.random.default_rng(2).standard_normal((3, 4, 4, 4, 3)).astype(np.float32)
    params = {**make.init(jax.random.key(0), x[0]), "codebook": book(True)}
    step = jax.jit(training.make_train_step(make, loss, optimiser, accumulate=accumulate))
    state = training.init_state(params, optimiser, 0)
    n, s = (np.asarray(params["codebook"][k], np.float64) for k in ("counts", "sums"))
    encode = jax.jit(lambda x: make(params).encode(x).mean)
    for batch in x:
        z = np.asarray(encode(batch), np.float64).reshape(-1, D)
        smooth = (n + 1e-5) / (n.sum() + K * 1e-5) * n.sum()
        k = np.square(z[:, None] - s / smooth[:, None]).sum(-1).argmin(1)
        n = 0.9 * n + 0.1 * np.bincount(k, minlength=K) / 4
        s = 0.9 * s + 0.1 * np.stack([z[k == i].sum(0) for i in range(K)]) / 4
        state, _ = step(state, {"x": batch})
    np.testing.assert_allclose(state.params["codebook"]["counts"], n, atol=1e-5)
    np.testing.assert_allclose(state.params["codebook"]["sums"], s, atol=1e-5)
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, *({k: v for k, v in p.items() if k != "codebook"} for p in (state.params, params)))


@pytest.mark.parametrize("how", ["mesh", "shard_map", "pmap"])
def test_moving_averages_sum_over_devices(how):
    net = nw.VQAutoencoder(widths=(4,), blocks=1, latent_channels=D, codes=K, average=True, middle_attention=False)
    make, loss, optimiser = make_step(net)
    x = np.random.default_rng(3).standard_normal((8, 2, 2, 3)).astype(np.float32)
    params = {**make.init(jax.random.key(0), x), "codebook": book(True)}
    step = training.make_train_step(make, loss, optimiser)
    one, _ = jax.jit(step)(training.init_state(params, optimiser, 0), {"x": x})
    driver = getattr(devices, how)(step, devices=jax.devices()[:4])
    state, _ = driver.step(driver.place(training.init_state(params, optimiser, 0)), [{"x": x}])
    found = jax.device_get(state.params["codebook"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, jax.device_get(one.params["codebook"])
    )


def test_tokens_there_and_back():
    net = nw.VQAutoencoder(widths=(8,), blocks=1, latent_channels=D, codes=K, middle_attention=False)
    make, x = nw.autoencoder(net), np.random.default_rng(4).standard_normal((3, 4, 4, 3)).astype(np.float32)
    params = {**make.init(jax.random.key(0), x), "codebook": book(False)}

    @jax.jit
    def both(params, x):
        a = make(params)
        tokens = a.encode_tokens(x)
        return tokens, a.decode_tokens(tokens), a.decode(a.encode(x).mean)

    tokens, y, plain = both(params, x)
    assert tokens.shape == (3, 4, 4) and tokens.dtype == jnp.int32 and 0 <= tokens.min() <= tokens.max() < K
    np.testing.assert_allclose(y, plain, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
def test_dead_codes_become_data_and_the_others_stay(average):
    params = {k: np.asarray(v) for k, v in book(average).items()}
    codes = np.array(codes_of(params))
    codes[2:] += 100  # far from all data
    params = (
        {"counts": params["counts"], "sums": codes * params["counts"][:, None]} if average else {"embedding": codes}
    )
    z = np.concatenate([codes[:1] + 0.01, codes[1:2] - 0.01]).repeat(50, 0)
    z = z + 1e-3 * np.random.default_rng(0).standard_normal(z.shape).astype(np.float32)
    after = np.asarray(codes_of(nw.restart_codes(jax.random.key(0), params, z)))
    np.testing.assert_allclose(after[:2], codes[:2], atol=1e-3)
    gap = np.abs(after[2:, None] - z).max(-1).min(1)
    assert gap.max() < 1e-4  # each is one of the vectors
    all_new = np.asarray(codes_of(nw.restart_codes(jax.random.key(0), params, z, least=np.inf)))
    assert np.abs(all_new[:, None] - z).max(-1).min(1).max() < 1e-4
    with pytest.raises(ValueError, match="chooses 7 of the vectors z; got only 2"):
        nw.restart_codes(jax.random.key(0), params, z[:2])


def test_usage_against_numpy():
    tokens = np.array([[0, 0, 1], [1, 1, 5]])
    p = np.array([2, 3, 1]) / 6
    found = metrics.score(metrics.code_usage(8), tokens)
    assert found["code_perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found["codes_used"] == pytest.approx(3 / 8)
    m = metrics.code_usage(8)
    parts = m.merge(m.update(m.init(), tokens[:1]), m.update(m.init(), tokens[1:]))
    assert m.compute(parts) == pytest.approx(found)
    with pytest.raises(ValueError, match="tokens must be integers in 0..3"):
        metrics.score(metrics.code_usage(4), tokens)
