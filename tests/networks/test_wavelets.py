"""Haar's transform against the textbook matrix, and the gated resampling made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import networks as nw
from diffjax.networks.resample import double, halve
from diffjax.networks.wavelets import Gates, gated

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 6, 8, 4)).astype(np.float32)
SLIM = dict(down=nw.wavelet_down, up=nw.wavelet_up)


def test_haar_is_the_product_with_the_orthonormal_matrix_and_is_undone():
    low, high = (np.kron(np.eye(4), row) / np.sqrt(2) for row in ([[1, 1]], [[1, -1]]))
    rows = {"L": low[:3, :6], "H": high[:3, :6]}
    columns = {"L": low, "H": high}
    bands = nw.haar(X)
    for name, band in zip(("LL", "LH", "HL", "HH"), bands, strict=True):  # along the height, then along the width
        want = np.einsum("ih,bhwc,jw->bijc", rows[name[0]], X, columns[name[1]])
        np.testing.assert_allclose(band, want, atol=1e-6)
    np.testing.assert_allclose(nw.inverse_haar(bands), X, atol=1e-6)
    np.testing.assert_allclose(sum(np.square(b).sum() for b in bands), np.square(X).sum(), rtol=1e-6)
    other = RNG.standard_normal(X.shape).astype(np.float32)
    inner = sum(float(np.vdot(a, b)) for a, b in zip(bands, nw.haar(other), strict=True))
    np.testing.assert_allclose(inner, np.vdot(X, other), rtol=1e-4)


def test_gates_of_one_reconstruct_and_special_gates_are_plain_resampling():
    bands = nw.haar(X)
    g = lambda *values: jnp.tile(jnp.asarray(values, jnp.float32)[None], (2, 1))
    np.testing.assert_allclose(nw.inverse_haar(gated(g(1, 1, 1, 1), bands)), X, atol=1e-6)
    np.testing.assert_allclose(sum(gated(g(0.5, 0, 0, 0), bands)), halve(jnp.asarray(X)), atol=1e-6)
    np.testing.assert_allclose(sum(gated(g(0.5, 0.5, 0.5, 0.5), bands)), X[:, ::2, ::2], atol=1e-6)
    np.testing.assert_allclose(
        nw.inverse_haar(gated(g(2, 1, 1, 1), (X, 0 * X, 0 * X, 0 * X))), double(jnp.asarray(X)), atol=1e-6
    )


def test_the_modules_are_the_textbook_formulas():
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    for module in (nw.WaveletDown(), nw.WaveletUp()):
        shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
        p = jax.tree.map(lambda a: RNG.standard_normal(a.shape).astype(np.float32), shapes)
        y = jax.jit(module.apply)({"params": p}, X)
        h = X.mean((1, 2)) @ p["gate"]["hidden"]["kernel"] + p["gate"]["hidden"]["bias"]
        g = sigmoid((h * sigmoid(h)) @ p["gate"]["out"]["kernel"] + p["gate"]["out"]["bias"]).reshape(2, 1, 1, 4)
        assert 0.05 < np.std(g)
        if isinstance(module, nw.WaveletDown):
            want = sum(g[..., i : i + 1] * np.asarray(band) for i, band in enumerate(nw.haar(X)))
        else:
            want = np.zeros((2, 12, 16, 1), np.float32)
            signs = [(1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1)]
            for band, sign in enumerate(signs):
                for (i, j), s in zip(((0, 0), (0, 1), (1, 0), (1, 1)), sign, strict=True):
                    want[:, i::2, j::2, 0] += s * g[..., band] * X[..., band] / 2
        np.testing.assert_allclose(y, want, atol=1e-5)


def test_gates_start_at_a_half_and_are_tapped():
    net = nw.UNet(widths=(4, 8), head_size=4, code=8, **SLIM)
    x, t = X[:, :4, :4, :2], np.full(2, 0.3, np.float32)
    names = nw.tap_names(nw.from_linen(net), nw.random_parameters(net, x, t), x, t)
    assert [n for n in names if n.endswith("gates")] == ["halve_1/gate/gates", "double_0/gate/gates"]
    v = Gates().init(jax.random.key(0), X)
    np.testing.assert_array_equal(Gates().apply(v, X), np.full((2, 4), 0.5))


def test_a_slim_unet_reads_every_input_in_bfloat16_too_and_its_gates_learn():
    net = nw.UNet(widths=(4, 8), head_size=4, code=8, **SLIM)
    x, t = X[:, :4, :4, :2], np.full(2, 0.3, np.float32)
    params = nw.random_parameters(net, x, t)
    loss = lambda dtype, p: jnp.mean(jnp.square(nw.from_linen(net.clone(dtype=dtype))(p, x, t)))
    value, grad = jax.jit(jax.value_and_grad(lambda p: loss(jnp.float32, p)))(params)
    assert all(np.any(g) and np.isfinite(g).all() for g in jax.tree.leaves(grad))
    np.testing.assert_allclose(jax.jit(lambda p: loss(jnp.bfloat16, p))(params), value, rtol=0.1)


def test_a_slim_unet_costs_less_and_plain_resampling_is_unchanged():
    x, t = X[:, :4, :4, :2], np.full(2, 0.3, np.float32)
    count = lambda **k: nw.parameter_count(
        jax.eval_shape(nw.UNet(widths=(16, 32), **k).init, jax.random.key(0), x, t)["params"]
    )
    slim = count(**SLIM)
    gates = (16 * 16 + 16 + 16 * 4 + 4) + (32 * 16 + 16 + 16 * 4 + 4)
    # the first block upwards joins 8 channels instead of 32 to its skip: its norm, convolution and skip lose 24
    assert count() - slim == 24 * (2 + 9 * 16 + 16) - gates


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="haar needs .* even; got shape \\(2, 5, 8, 4\\)"):
        nw.haar(X[:, :5])
    with pytest.raises(ValueError, match="channels divisible by 4, for four bands; got 3"):
        jax.eval_shape(nw.WaveletUp().init, jax.random.key(0), X[..., :3])
    wrong = nw.UNet(widths=(8, 8), factor=(1, 2), attention=(), **SLIM)
    with pytest.raises(ValueError, match="halve and double both axes.*factor=\\(1, 2\\)"):
        jax.eval_shape(wrong.init, jax.random.key(0), X, 0.5)
