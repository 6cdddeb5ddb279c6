"""Layerwise attention pooling: across layers, and nothing else."""

import jax
import numpy as np
import pytest

from diffjax.networks import LayerPooling
from diffjax.networks.taps import tapped

NET = LayerPooling(heads=2, blocks=2, expand=2, features=3)
X = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def made():
    shapes = jax.eval_shape(NET.init, jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: (rng.normal(size=a.shape) / max(a.shape[0], 1) ** 0.5).astype(a.dtype), shapes)
    return params, jax.jit(lambda p, x: NET.apply({"params": p}, x))


def textbook(p, x):
    """One token: layers [N, h]."""
    norm = lambda q, h: (
        q["scale"] * (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) + q["bias"]
    )
    dense = lambda q, h: h @ q["kernel"] + q["bias"]
    gelu = lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) + p["own"]
    for i in range(2):
        q = p[f"block_{i}"]
        qkv = dense(q["attention"]["qkv"], norm(q["norm_attention"], x)).reshape(4, 2, 3, 4)
        mixed = []
        for head in range(2):
            a, b, v = qkv[:, head].swapaxes(0, 1)
            w = np.exp(a @ b.T / 2)
            mixed.append(w / w.sum(1, keepdims=True) @ v)
        x = x + dense(q["attention"]["out"], np.concatenate(mixed, 1))
        x = x + dense(q["out"], gelu(dense(q["hidden"], norm(q["norm_mlp"], x))))
    return dense(p["out"], p["layers"]["kernel"][:, 0] @ x + p["layers"]["bias"])


def test_it_is_the_textbook_loop_over_tokens(made):
    params, f = made
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    want = np.stack([[textbook(wide, x.astype(np.float64)) for x in row] for row in X])
    np.testing.assert_allclose(f(params, X), want, rtol=2e-4, atol=2e-5)


def test_tokens_do_not_see_each_other_and_layers_do(made):
    params, f = made
    other = X.copy()
    other[0, 1, 2] += np.arange(8)
    change = np.abs(np.asarray(f(params, other)) - np.asarray(f(params, X))).max(-1)
    assert change[0, 1] > 1e-2
    change[0, 1] = 0
    assert not change.any()


def test_its_tap_and_bad_input(made):
    params, _ = made
    out, found = tapped(NET.apply, read="pooled")({"params": params}, X)
    np.testing.assert_array_equal(out, found["pooled"])
    with pytest.raises(ValueError, match=r"\[B, S, N, h\].*got shape \(3, 4, 8\)"):
        NET.init(jax.random.key(0), X[0])
