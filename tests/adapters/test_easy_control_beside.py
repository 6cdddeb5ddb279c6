"""Easy control beside other adapters of one attention, and caches that are not of this call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import CLEAN, TOKENS, made, moved, network

from diffjax import adapters
from diffjax.networks.taps import tapped

BOTH = dict(edge=adapters.easy_control(2), style=adapters.parallel_attention(targets="attention$"))


@pytest.mark.parametrize("net", ["dit", "scanned"])
def test_the_order_beside_parallel_attention_does_not_matter(net):
    """And what parallel attention adds has its own weight: it is added to the result of all else."""
    fn, base, x, t, cond = network(net)
    cond = {**cond, "edge": CLEAN, "style": TOKENS}
    there, back = adapters.adapt(fn, **BOTH), adapters.adapt(fn, **dict(reversed(BOTH.items())))
    params = moved(jax.jit(there.init)(jax.random.key(0), base, x, t, cond), 1.0)
    one, two = jax.jit(there)(params, x, t, cond), jax.jit(back)(params, x, t, cond)
    np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-5)
    off = {**params, "weights": {"edge": jnp.float32(0)}}
    assert np.abs(jax.jit(there)(off, x, t, cond) - one).max() > 1e-2


def test_the_two_of_one_attention_by_hand():
    """In the first block, whose queries no adapter has changed: mixed = easy control alone + parallel attention alone - base."""
    fn, base, x, t, cond = network("dit")
    cond = {**cond, "edge": CLEAN, "style": TOKENS}
    both = adapters.adapt(fn, **dict(reversed(BOTH.items())))
    params = moved(jax.jit(both.init)(jax.random.key(0), base, x, t, cond), 1.0)
    seen = {}

    def mixed(weights):
        def keep(h):
            seen[weights] = h
            return h

        name = "block_0/attention.mix"
        around = {name: lambda call, *args: keep(call(*args))}
        given = {**params, "weights": dict(zip(("edge", "style"), jnp.float32(weights), strict=True))}
        tapped(both, around=around)(given, x, t, cond)
        return np.asarray(seen[weights])

    found = {w: mixed(w) for w in ((1, 1), (1, 0), (0, 1), (0, 0))}
    want = found[1, 0] + found[0, 1] - found[0, 0]
    np.testing.assert_allclose(found[1, 1], want, rtol=1e-4, atol=1e-4)
    assert np.abs(found[0, 1] - found[0, 0]).max() > 0.1 and np.abs(found[1, 0] - found[0, 0]).max() > 0.01


@pytest.fixture(scope="module")
def cached():
    fn, params, x, t, cond = made("easy control, scanned")
    shapes = jax.eval_shape(fn.cache, params, x, t, cond)["it"]
    return fn, params, x, t, cond, jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)


def wrong(cache, what):
    (path, (k, v)), *_ = cache.items()
    return {
        "batch": {path: (k[:2], v[:2])},
        "layers": {path: (k[:, :1], v[:, :1])},
        "heads": {path: (k[..., :1, :], v[..., :1, :])},
        "values": {path: (k, v[:, :, :1])},
        "keys alone": {path: k},
        "more": {**cache, "other/attention": (k, v)},
        "picture": {"image": CLEAN},
    }[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("batch", r"cache is of a batch of 2, the state has 3 items: keys of blocks/attention are \[2, 2, 2, 2, 4\]"),
        ("layers", "the cache has .*of another network"),
        ("heads", r"needs keys and values \[3, 2, 'S', 2, 4\]: it is of another network"),
        ("values", r"the cache has \(float32 \[3, 2, 2, 2, 4\], float32 \[3, 2, 1, 2, 4\]\) of blocks/attention"),
        ("keys alone", "needs keys and values"),
        ("more", r"got a dict of \['blocks/attention', 'other/attention'\] where .*of another adapter"),
        ("picture", r"got a dict of \['image'\] where this adapter has \['blocks/attention'\]"),
    ],
)
def test_a_cache_of_another_call_is_refused(cached, what, message):
    fn, params, x, t, cond, cache = cached
    for call in (fn, fn.cache):
        with pytest.raises(ValueError, match=f"{message}.*Make it anew by adapt"):
            jax.eval_shape(call, params, x, t, {**cond, "it": wrong(cache, what)})


def test_a_cache_of_pictures_of_two_sizes(cached):
    _, params, x, t, cond = made("easy control")
    fn = adapters.adapt(network("joint")[0], it=adapters.easy_control(2))
    cache = jax.eval_shape(fn.cache, params, x, t, cond)["it"]
    assert len(cache) > 1
    cut = lambda a: jax.ShapeDtypeStruct((a.shape[0], a.shape[1] - 1, *a.shape[2:]), a.dtype)
    mixed = {path: tuple(map(cut, pair)) if i == 0 else pair for i, (path, pair) in enumerate(cache.items())}
    with pytest.raises(ValueError, match="different pictures in one"):
        jax.eval_shape(fn, params, x, t, {**cond, "it": mixed})
