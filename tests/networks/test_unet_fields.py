"""Fields of U-Nets that published weights need: features of the time, heads by level, the bottom, labels without a null."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import networks as nw
from diffjax.networks.embeddings import LabelEmbedding, TimeCode
from diffjax.networks.transformer import TransformerBlock
from diffjax.networks.unet_parts import attend, unnormalised

X, T = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32), np.float32([3.0, 500.0])


def shapes(net, *args):
    return jax.eval_shape(net.init, jax.random.key(0), *args)["params"]


@pytest.mark.parametrize("shift, cosines_first", [(0, True), (1, False)])
def test_falling_features(shift, cosines_first):
    w = 10000.0 ** (-np.arange(4) / (4 - shift))
    parts = [np.cos(T[:, None] * w), np.sin(T[:, None] * w)]
    want = np.concatenate(parts if cosines_first else parts[::-1], axis=1)
    np.testing.assert_allclose(nw.falling(shift, cosines_first)(jnp.asarray(T), 8), want, atol=1e-4)


def test_falling_features_are_the_rising_ones_in_another_order():
    low = 10000.0 ** (-3 / 4)
    rising = np.asarray(nw.sinusoids(jnp.asarray(T), 8, (low, 1.0))).reshape(2, 2, 4)
    np.testing.assert_allclose(nw.falling()(jnp.asarray(T), 8), rising[:, :, ::-1].reshape(2, 8), atol=1e-3)


@pytest.mark.parametrize("size, shift", [(7, 0), (0, 0), (2, 1)])
def test_falling_refuses(size, shift):
    with pytest.raises(ValueError, match="must be even, at least 2, and not twice shift"):
        nw.falling(shift)(jnp.zeros(1), size)


def test_kept_frequencies_are_parameters_without_gradient():
    net = TimeCode(4, 6, nw.kept_fourier(2.0))
    params = jax.jit(net.init)(jax.random.key(0), T)["params"]
    assert params["frequencies"].shape == (3,)
    grads = jax.jit(jax.grad(lambda p: net.apply({"params": p}, jnp.asarray(T)).sum()))(params)
    assert not np.any(grads["frequencies"]) and np.any(grads["hidden"]["kernel"])
    w = np.asarray(params["frequencies"])
    phase = 2 * np.pi * 0.3 * w
    found = nw.kept_fourier().features(jnp.float32([0.3]), jnp.asarray(w))
    np.testing.assert_allclose(found[0], np.concatenate([np.sin(phase), np.cos(phase)]), atol=1e-5)


def test_a_vector_beside_the_time():
    net = nw.UNet(widths=(4,), blocks=1, attention=(), code=6, sinusoids=4, vector_size=3, early=("vector",))
    code = shapes(net, X, T, {"vector": np.zeros((2, 3), np.float32)})["code"]
    assert code["vector"]["kernel"].shape == (3, 4) and "bias" not in code["vector"]
    time = TimeCode(6, 4)
    params = jax.jit(time.init)(jax.random.key(0), T)["params"]
    a, b, bare = (
        time.apply({"params": params}, jnp.asarray(T), *more)
        for more in ((jnp.zeros((2, 4)),), (jnp.ones((2, 4)),), ())
    )
    np.testing.assert_allclose(a, bare, rtol=1e-6)
    assert np.abs(a - b).max() > 1e-3


def test_labels_without_a_null():
    assert shapes(LabelEmbedding(3, 4, null=False), np.zeros(1, np.int32))["table"].shape == (3, 4)
    net = nw.UNet(widths=(4,), blocks=1, attention=(), num_classes=3, null_label=False)
    assert shapes(net, X, T, np.int32([0, 2]))["code"]["label"]["table"].shape[0] == 3
    with pytest.raises(ValueError, match=r"\[0, 2\] \(there is no 'no label'\); got \[3\]"):
        jax.eval_shape(lambda key: net.init(key, X, T, np.int32([0, 3])), jax.random.key(0))


@pytest.mark.parametrize(
    "middle, blocks, attends", [(None, 2, True), ((), 0, False), ((False,), 1, False), ((False, True, False), 3, True)]
)
def test_the_bottom(middle, blocks, attends):
    tree = shapes(nw.UNet(widths=(4, 8), head_size=4, middle=middle), X, T)
    found = {name: p for name, p in tree.items() if name.startswith("middle")}
    assert len(found) == blocks
    assert any("attention" in p for p in found.values()) == attends


def test_heads_by_level_and_a_part_for_the_bottom():
    bare = nw.part(attend, norm=unnormalised)
    net = nw.UNet(widths=(4, 8), attention=(0, 1), heads=(1, 4), mix=(attend, attend, bare))
    assert [net.heads_of(i) for i in (0, 1)] == [1, 4]
    tree = shapes(net, X, T)
    assert "norm_attention" in tree["down_1_0"] and "norm_attention" not in tree["middle_0"]
    read = jax.eval_shape(
        lambda p: nw.tapped(nw.from_linen(net), read=["down_0_0/attention/logits", "middle_0/attention/logits"])(
            p, X, T
        ),
        tree,
    )[1]
    assert [a.shape for a in read.values()] == [(2, 1, 16, 16), (2, 4, 4, 4)]
    with pytest.raises(ValueError, match="heads must be one number, or one for each of widths"):
        shapes(net.clone(heads=(1,)), X, T)


def test_a_transformer_of_tokens_alone():
    block = TransformerBlock(heads=2, expand=2, dtype=jnp.float32, only_tokens=True)
    x, tokens = np.ones((1, 3, 4), np.float32), np.ones((1, 2, 6), np.float32)
    tree = shapes(block, x, None, tokens, np.ones((1, 2), bool))
    assert tree["attention"]["kv"]["kernel"].shape == (6, 8) and tree["attention"]["q_in"]["kernel"].shape == (4, 4)
