"""Parallel attention, value mixing and easy control against loops in NumPy, and what each of them promises alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import CLEAN, TOKENS, made, moved, network

from diffjax import adapters, networks
from diffjax.adapters.easy_control import Stretched
from diffjax.networks.attention import Attention
from diffjax.networks.embeddings import grid_positions
from diffjax.networks.taps import tapped
from diffjax.training import flops

HEADS, SIZE = 2, 3


class ToTokens(nn.Module):
    """One attention to tokens."""

    @nn.compact
    def __call__(self, x, t, cond=None, *, train=False):
        return Attention(HEADS, name="cross")(x, cond["tokens"], cond["mask"])


class ToItself(nn.Module):
    """One attention of a sequence to itself."""

    @nn.compact
    def __call__(self, x, t, cond=None, *, train=False):
        return Attention(HEADS, name="attention")(x)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def project(x, layer, n):
    """Columns by head, then kind: n arrays [B, H, T, D]."""
    y = (np.asarray(x, np.float64) @ layer["kernel"] + layer["bias"]).reshape(*x.shape[:2], HEADS, n, SIZE)
    return [y[..., i, :].transpose(0, 2, 1, 3) for i in range(n)]


def put_out(y, layer):
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1) @ layer["kernel"] + layer.get("bias", 0.0)


def changed(net, x, cond, base_cond, weights, **chosen):
    """Output of the adapted network with moved parameters, and the parameters as float64."""
    base = networks.random_parameters(net, x, jnp.zeros(3), base_cond)
    fn = adapters.adapt(networks.from_linen(net), **chosen)
    params = moved(fn.init(jax.random.key(0), base, x, jnp.zeros(3), cond))
    out = jax.jit(fn)({**params, "weights": weights}, x, jnp.zeros(3), cond)
    return out, jax.tree.map(lambda a: np.asarray(a, np.float64), params)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_branches_beside_attention_to_tokens_are_as_in_a_loop(rng):
    x, tokens = (rng.normal(size=(3, n, 6)).astype(np.float32) for n in (5, 4))
    mask = np.array([[True] * 4, [True, True, False, False], [True] * 4])
    shown = np.array([[True, True], [True, False], [False, False]])
    cond = {"tokens": tokens, "mask": mask}
    own = {"faces": {"tokens": TOKENS, "mask": shown}, "light": TOKENS}
    weights = {"faces": jnp.float32(0.7), "light": jnp.float32(-1.3)}
    pair = dict(faces=adapters.parallel_attention(hidden=5), light=adapters.value_mixing())
    got, params = changed(ToTokens(), x, cond | own, cond, weights, **pair)
    faces, light = params["adapters"]["faces"], params["adapters"]["light"]
    base = params["base"]["cross"]

    (q,), (k, v) = project(x, base["q_in"], 1), project(tokens * mask[..., None], base["kv"], 2)
    unit = lambda a: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)
    values = lambda tokens, kernel: np.einsum("bsn,nhd->bhsd", tokens, kernel)
    e, first, second = TOKENS.astype(np.float64), faces["encoder"]["0"], faces["encoder"]["1"]
    h = np.asarray(jax.nn.gelu(jnp.asarray((e * shown[..., None]) @ first["kernel"] + first["bias"])))
    e = unit(h @ second["kernel"] + second["bias"])
    own_k, own_v = (values(e, faces["at"]["cross"][name]) for name in ("key", "value"))
    other = values(unit(np.einsum("bne,ns->bse", TOKENS, light["lift"])) @ light["zero"], light["at"]["cross"]["value"])
    y = np.zeros_like(q)
    for b in range(3):
        for head in range(HEADS):
            see, hear = mask[b], shown[b]
            weight = softmax(q[b, head] @ k[b, head][see].T / np.sqrt(SIZE))
            y[b, head] = weight @ (v[b, head][see] - 1.3 * other[b, head][see])
            if hear.any():
                weight = softmax(q[b, head] @ own_k[b, head][hear].T / np.sqrt(SIZE))
                y[b, head] += 0.7 * weight @ own_v[b, head][hear]
    np.testing.assert_allclose(got, put_out(y, base["out"]), rtol=2e-4, atol=2e-4)


def test_two_pictures_share_the_denominator_of_attention(rng):
    x, a, b = (rng.normal(size=(3, n, 6)).astype(np.float32) for n in (5, 4, 2))
    pair = dict(a=adapters.easy_control(2), b=adapters.easy_control(1))
    got, params = changed(ToItself(), x, {"a": a, "b": b}, None, {"a": jnp.float32(1.5)}, **pair)
    base = params["base"]["attention"]

    q, k, v = project(x, base["qkv"], 3)
    masses, values = [np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(SIZE))], [v]
    total = masses[0].sum(-1, keepdims=True)
    for picture, own, weight in ((a, params["adapters"]["a"], 1.5), (b, params["adapters"]["b"], 1.0)):
        own = own["attention"]
        kernel = base["qkv"]["kernel"].reshape(6, HEADS, 3, SIZE)
        for kind in range(3):
            low = (own["down"][kind] @ own["up"][kind].reshape(own["up"].shape[1], -1)).reshape(6, HEADS, SIZE)
            kernel = kernel + low[:, :, None] * (np.arange(3) == kind)[:, None]
        _, k, v = project(picture, {"kernel": kernel.reshape(6, -1), "bias": base["qkv"]["bias"]}, 3)
        mass, gate = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(SIZE)), weight * own["gate"]
        total = total + abs(gate) * mass.sum(-1, keepdims=True)
        # of a negative gate the own values are what is left, so that the shares still sum to one
        masses += [gate * mass]
        values += [v]
    y_own = softmax(q @ project(x, base["qkv"], 3)[1].transpose(0, 1, 3, 2) / np.sqrt(SIZE)) @ values[0]
    y = y_own + sum(
        (m @ v - m.sum(-1, keepdims=True) * y_own) / total for m, v in zip(masses[1:], values[1:], strict=True)
    )
    np.testing.assert_allclose(got, put_out(y, base["out"]), rtol=2e-4, atol=2e-4)


def test_with_gate_one_a_picture_is_further_tokens(rng):
    x, a = (rng.normal(size=(3, n, 6)).astype(np.float32) for n in (5, 4))
    base = networks.random_parameters(ToItself(), x, jnp.zeros(3))
    fn = adapters.adapt(networks.from_linen(ToItself()), a=adapters.easy_control(2))
    params = fn.init(jax.random.key(0), base, x, jnp.zeros(3), {"a": a})
    params["adapters"]["a"]["attention"]["gate"] = jnp.ones(())  # and B = 0
    together = networks.from_linen(ToItself())(base, np.concatenate([x, a], axis=1), jnp.zeros(3))
    got = fn(params, x, jnp.zeros(3), {"a": a})
    np.testing.assert_allclose(got, together[:, :5], rtol=2e-5, atol=2e-5)


def test_value_mixing_keeps_the_attention_map_to_the_bit():
    fn, params, x, t, cond = made("value mixing")
    net, base, *_ = network("text")
    name = "down_1_0/cross/weights"  # of the first attention: later ones read other states
    _, got = jax.jit(tapped(fn, read=name))(moved(params), x, t, cond)
    _, want = jax.jit(tapped(net, read=name))(base, x, t, {"tokens": cond["tokens"]})
    np.testing.assert_array_equal(got[name], want[name])


# ------------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("name", ["easy control", "easy control, scanned"])
def test_cached_keys_and_values_are_those_of_the_picture(name):
    fn, params, x, t, cond = made(name)
    params = moved(params)
    run = jax.jit(fn)
    want = run(params, x, t, cond)
    cached = jax.jit(fn.cache)(params, x, t, cond)
    np.testing.assert_allclose(run(params, x, t, cached), want, rtol=1e-5, atol=1e-5)
    assert all(a.shape[0] == len(x) for a in jax.tree.leaves(cached["it"]))  # by item, as a condition is


def test_a_second_condition_leaves_the_first_and_the_order_does_not_matter():
    net, base, x, t, cond = network("dit")
    pair = dict(edge=adapters.easy_control(2), blur=adapters.easy_control(1))
    both, alone = adapters.adapt(net, **pair), adapters.adapt(net, edge=pair["edge"])
    cond = {**cond, "edge": CLEAN, "blur": CLEAN[::-1]}
    params = moved(jax.jit(both.init)(jax.random.key(0), base, x, t, cond))
    cached = jax.jit(both.cache)(params, x, t, cond)
    one = jax.jit(alone.cache)(params, x, t, {k: v for k, v in cond.items() if k != "blur"})
    jax.tree.map(np.testing.assert_array_equal, cached["edge"], one["edge"])
    back = adapters.adapt(net, **dict(reversed(pair.items())))
    np.testing.assert_allclose(
        jax.jit(both)(params, x, t, cached), jax.jit(back)(params, x, t, cached), rtol=2e-5, atol=2e-5
    )


def test_twenty_cached_steps_cost_less():
    fn, params, x, t, cond = made("easy control")

    def steps(params, x, cond):
        return jax.lax.scan(lambda x, _: (x + fn(params, x, t, cond), None), x, length=20)[0]

    each = flops.count(steps, params, x, cond).total
    once = flops.count(lambda p, x, c: steps(p, x, fn.cache(p, x, t, c)), params, x, cond).total
    assert each > 1.5 * once


def test_positions_of_a_smaller_picture_are_those_of_the_places_that_it_covers():
    small, large = Stretched(grid_positions, 4, 6)(2, 3, 8), grid_positions(4, 6, 8)
    np.testing.assert_allclose(small, large.reshape(4, 6, 8)[::2, ::2].reshape(6, 8), rtol=1e-6)


def test_bad_input():
    net, base, x, t, cond = network("dit")
    start = lambda adapter, own: adapters.adapt(net, a=adapter).init(jax.random.key(0), base, x, t, {**cond, "a": own})
    with pytest.raises(ValueError, match="hidden must be"):
        adapters.parallel_attention(hidden=-1)
    with pytest.raises(ValueError, match=r"names no attention.*block_0/attention"):
        start(adapters.parallel_attention(targets="cross"), TOKENS)
    with pytest.raises(ValueError, match=r"reads tokens \[3, S, n\].*NoneType"):
        start(adapters.parallel_attention(), None)
    with pytest.raises(ValueError, match="mask of tokens must be bool"):
        start(adapters.parallel_attention(), {"tokens": TOKENS, "mask": np.ones((3, 3), bool)})
    with pytest.raises(ValueError, match="equally many keys"):
        wide, base_w, x_w, t_w, cond_w = network("unet")
        levels = networks.from_linen(wide.module.clone(attention=(0, 1)))
        base_w = networks.random_parameters(levels.module, x_w, t_w, cond_w)
        adapters.adapt(levels, a=adapters.value_mixing()).init(
            jax.random.key(0), base_w, x_w, t_w, {**cond_w, "a": TOKENS}
        )
    with pytest.raises(ValueError, match="rank >= 1"):
        adapters.easy_control(0)
    with pytest.raises(ValueError, match=r"reads a picture \[3, h, w, 1\].*divisible by 2"):
        start(adapters.easy_control(), CLEAN[:, :3])
    with pytest.raises(ValueError, match="in advance"):
        adapters.adapt(net, a=adapters.lora(2)).cache({"base": base, "adapters": {}}, x, t, cond)
