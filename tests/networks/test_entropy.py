"""Entropy of attention and its scaling: the closed form of Gaussian logits, and the identity at the size of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy

from diffjax import networks as nw
from diffjax.networks.entropy import ScaleLogits

RNG = np.random.default_rng(0)
normal = lambda *s: RNG.standard_normal(s).astype(np.float32)
NET = nw.DiT(width=8, depth=2, heads=2, expand=1, token_size=4)
SMALL, BIG, T = normal(2, 4, 4, 3), normal(2, 8, 4, 3), np.array([0.2, 0.7], np.float32)
COND = {"tokens": normal(2, 5, 4)}
PARAMS = nw.random_parameters(NET, SMALL, T, COND)
WRITE = nw.entropy_scaling(nw.from_linen(NET), PARAMS, SMALL, T, COND)


def test_the_entropy_is_that_of_scipy():
    w = RNG.dirichlet(np.ones(7), size=(2, 3))
    w[0, 0] = np.eye(7)[2]
    np.testing.assert_allclose(nw.attention_entropy(w), entropy(w, axis=-1).mean(), rtol=1e-5)


@pytest.mark.parametrize("n", [512, 4096, 32768])
def test_gaussian_logits_keep_their_share_of_the_largest_entropy(n):
    """1 - s^2 / (2 log T) of log N when scaled, for any N; (log N - s^2 / 2) when not."""
    logits = 1.2 * normal(40, n)
    scaled = ScaleLogits(256)(jnp.asarray(logits))
    share = nw.attention_entropy(jax.nn.softmax(scaled)) / np.log(n)
    np.testing.assert_allclose(share, 1 - 1.2**2 / (2 * np.log(256)), atol=0.01)
    plain = nw.attention_entropy(jax.nn.softmax(jnp.asarray(logits)))
    np.testing.assert_allclose(plain, np.log(n) - 1.2**2 / 2, atol=0.05)


def test_it_is_softmax_of_lambda_q_k():
    """From the published formula, with q and k read at the larger size."""
    names = [f"block_0/attention/{n}" for n in ("q", "k", "weights")]
    f = jax.jit(nw.tapped(nw.from_linen(NET), read=names, write=WRITE))
    _, taps = f(PARAMS, BIG, T, COND)
    q, k, w = (np.asarray(taps[n], np.float64) for n in names)
    lam = np.sqrt(np.log(8) / np.log(4) / 4)  # log_T N of N = 8 and T = 4 tokens, heads of 4
    e = np.exp(lam * np.einsum("bthd,bshd->bhts", q, k))
    np.testing.assert_allclose(w, e / e.sum(-1, keepdims=True), atol=1e-6)
    plain = nw.from_linen(NET)(PARAMS, BIG, T, COND)
    assert np.abs(f(PARAMS, BIG, T, COND)[0] - plain).max() > 1e-4


def test_at_the_size_of_training_the_program_is_the_same():
    fn = nw.from_linen(NET)
    args = PARAMS, SMALL, T, COND
    text = lambda f: str(jax.make_jaxpr(f)(*args))
    assert text(nw.tapped(fn, write=WRITE)) == text(fn)
    assert set(WRITE) == {"block_0/attention/logits", "block_1/attention/logits"}  # no cross-attention


def test_every_level_of_a_unet_has_its_own_size():
    net = nw.UNet(widths=(4, 8), attention=(0, 1), head_size=4, code=8)
    x = np.zeros((1, 8, 8, 2), np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, T[:1])
    sizes = {w.trained for w in nw.entropy_scaling(net.apply, shapes, x, T[:1]).values()}
    assert sizes == {64, 16}


@pytest.mark.parametrize("scan", [False, True])
def test_scanned_and_looped_networks_agree(scan):
    net = NET.clone(scan_layers=scan, token_size=0)
    params = nw.random_parameters(net, SMALL, T)
    write = nw.entropy_scaling(net.apply, {"params": params}, SMALL, T)
    assert {w.trained for w in write.values()} == {4}
    assert len(write) == (1 if scan else 2)


def test_networks_without_attention_are_refused():
    net = nw.MLP(width=8, depth=1)
    x = normal(2, 3)
    with pytest.raises(ValueError, match="taps named `attention/logits`"):
        nw.entropy_scaling(net.apply, {"params": nw.random_parameters(net, x, T)}, x, T)
    with pytest.raises(ValueError, match="at least two keys"):
        nw.entropy_scaling(nw.from_linen(NET), PARAMS, SMALL[:, :2, :2], T, COND)
