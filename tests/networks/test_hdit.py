"""HDiT: neighbourhoods against a loop, its places at all levels, what its parts are at the start."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import networks as nw
from diffjax.networks.attention import full
from diffjax.networks.hdit import AdaRMSNorm, CosineAttention
from diffjax.training import flops

rng = np.random.default_rng(0)
normal = lambda *s: rng.standard_normal(s).astype(np.float32)


def mix(mixing, *qkv, **kw):
    """The mixing inside a compact method, where its taps have a place."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, *args):
            return mixing(*args, **kw)

    return jax.jit(lambda *a: Net().apply({}, *a))(*qkv)


@pytest.mark.parametrize("grid, kernel, tile", [((5, 7), 3, 8), ((8, 6), 5, 4), ((9, 4), 3, 1)])
def test_neighbourhoods_are_those_of_a_loop(grid, kernel, tile):
    h, w = grid
    q, k, v = (normal(2, h * w, 2, 4) for _ in range(3))
    want = np.zeros_like(v)
    for i in range(h):
        for j in range(w):
            top, left = min(max(i - kernel // 2, 0), h - kernel), min(max(j - kernel // 2, 0), w - kernel)
            near = [r * w + c for r in range(top, top + kernel) for c in range(left, left + kernel)]
            logits = np.einsum("bhd,bkhd->bhk", q[:, i * w + j], k[:, near])
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            want[:, i * w + j] = np.einsum("bhk,bkhd->bhd", weights, v[:, near])
    np.testing.assert_allclose(mix(nw.Neighborhood(kernel, tile), q, k, v, grid=grid), want, atol=2e-6)


def test_a_window_as_large_as_the_grid_is_full_attention():
    q, k, v = (normal(1, 12, 2, 4) for _ in range(3))
    np.testing.assert_array_equal(mix(nw.Neighborhood(5), q, k, v, grid=(3, 4)), mix(full, q, k, v))
    assert nw.Neighborhood(3).windows(4, 5).sum((2, 3)).tolist() == [[9] * 5] * 4


def test_operations_of_neighbourhoods_are_linear_in_the_tokens():
    def count(side):
        q = jax.ShapeDtypeStruct((1, side * side, 2, 8), jnp.float32)
        run = lambda q: mix(nw.Neighborhood(3), q, q, q, grid=(side, side))
        return flops.count(run, q).matmul

    assert 3.9 < count(64) / count(32) < 4.4  # tiles at the border have fewer keys
    q = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    assert count(64) < 0.05 * flops.count(lambda q: mix(full, q, q, q), q).matmul


def test_places_of_a_coarse_level_are_the_means_of_those_below():
    fine, coarse = (nw.CentredRope()(2 * n, 4 * n, 16).reshape(2 * n, 4 * n, 8) for n in (4, 2))
    means = fine.reshape(4, 2, 8, 2, 8).mean((1, 3))
    np.testing.assert_allclose(coarse, means, atol=1e-5)
    assert not fine[..., :4].any()  # half of the features do not turn
    places = fine[:, :, 4] / np.pi
    assert places.min() > -0.5 and np.abs(fine[0, :, 6] / np.pi).max() < 1  # a shorter side spans less


def test_cosine_attention_does_not_read_the_length_of_queries_and_keys():
    x, angles = normal(2, 6, 8), nw.CentredRope()(2, 3, 8)
    net = CosineAttention(8)
    random = lambda a: 0.3 * normal(*a.shape) if a.ndim == 2 else a
    params = jax.tree.map(random, jax.jit(lambda: net.init(jax.random.key(0), x, angles, (2, 3)))())
    run = jax.jit(lambda p: net.apply(p, x, angles, (2, 3)))
    longer = jax.tree.map(lambda a: a, params)
    longer["params"]["qkv"]["kernel"] = params["params"]["qkv"]["kernel"] * np.repeat([3.0, 0.5, 1.0], 8)
    np.testing.assert_allclose(run(longer), run(params), rtol=1e-4, atol=1e-5)
    sharper = jax.tree.map(lambda a: a, params)
    sharper["params"]["sharpness"] = params["params"]["sharpness"] + 5
    assert np.abs(run(sharper) - run(params)).max() > 1e-3


def test_the_start():
    """Blocks are the identity, norms do not read the code, skips count half, the output is zero."""
    levels = (nw.Level(8, 1, nw.Neighborhood(3)), nw.Level(16, 1))
    net = nw.HDiT(levels=levels, mapping=nw.Mapping(8, 1), head=8, patch=1)
    x = jnp.asarray(normal(1, 4, 4, 2))
    variables = jax.jit(net.init)(jax.random.key(0), x, jnp.zeros(1))
    p = variables["params"]
    assert not np.any(jax.jit(net.apply)(variables, x, jnp.ones(1)))
    assert p["skip_0"].tolist() == [0.5] and p["middle"]["block_0"]["attention"]["sharpness"].tolist() == [10.0, 10.0]
    for name in ("attention", "block_mlp"):
        assert not np.any(p["middle"]["block_0"][name]["out"]["kernel"])
    h, c = normal(1, 3, 8), normal(1, 4)
    norm = AdaRMSNorm()
    y = norm.apply(norm.init(jax.random.key(0), h, c), h, c)
    np.testing.assert_allclose(y, h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-5)


@pytest.mark.parametrize(
    "fields, shape, words",
    [
        (dict(levels=()), (1, 8, 8, 3), "at least one level"),
        (dict(head=24), (1, 8, 8, 3), r"divisible by head=24; got \[64, 128\]"),
        (dict(), (1, 6, 8, 3), "divisible by patch=4"),
        (dict(head=4), (1, 8, 8, 3), "multiple of 8; got 4"),
    ],
)
def test_bad_sizes_are_named(fields, shape, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(nw.HDiT(**fields).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(1))


def test_bad_neighbourhoods_are_named():
    with pytest.raises(ValueError, match="odd kernel >= 1 and tile >= 1; got kernel=4"):
        nw.Neighborhood(4)
    q = jnp.zeros((1, 6, 1, 4))
    with pytest.raises(ValueError, match="grid=.height, width. of 6 tokens"):
        nw.Neighborhood(3)(q, q, q, None, (2, 2))
