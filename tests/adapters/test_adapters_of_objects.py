"""Grounding tokens against a loop in NumPy; the grounded copy of an encoder against the network run by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import OBJECTS, TOKENS, made, moved, network

from diffjax import adapters
from diffjax.networks.taps import tapped


def unit(a):
    return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)


def tokens_of(params, count):
    """The tokens of `OBJECTS`: words and boxes through a perceptron, learned ones where there is none."""
    w = np.geomspace(1.0, 100.0, count)
    rows = []
    for b in range(3):
        for n in range(2):
            box = np.concatenate([np.concatenate([np.cos(w * v), np.sin(w * v)]) for v in OBJECTS["boxes"][b, n]])
            there = OBJECTS["mask"][b, n]
            rows.append(np.concatenate([TOKENS[b, n], box] if there else [params["no_word"], params["no_box"]]))
    h = np.stack(rows) @ params["mlp"]["0"]["kernel"] + params["mlp"]["0"]["bias"]
    h = np.asarray(jax.nn.gelu(jnp.asarray(h)), np.float64)
    return (h @ params["mlp"]["1"]["kernel"] + params["mlp"]["1"]["bias"]).reshape(3, 2, -1)


def gated(own, v, tokens):
    """v + tanh(g) attend(v, [v, tokens]), one item and head after the other."""
    flat, out = v.reshape(len(v), -1, v.shape[-1]), np.array(v).reshape(len(v), -1, v.shape[-1])
    for b in range(len(v)):
        everything = np.concatenate([unit(flat[b]), unit(tokens[b] @ own["objects"])])
        for head in range(own["query"].shape[1]):
            q = unit(flat[b]) @ own["query"][:, head]
            k, value = (everything @ own["key_value"][kind][:, head] for kind in range(2))
            e = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            out[b] += np.tanh(own["gate"]) * (e / e.sum(-1, keepdims=True)) @ value @ own["out"][head]
    return out.reshape(v.shape)


def test_gated_attention_is_as_in_a_loop():
    net, base, x, t, cond = network("dit")
    fn = adapters.adapt(net, it=adapters.grounding(hidden=5, frequencies=2, targets="block_0/attention"))
    cond = {**cond, "it": OBJECTS}
    params = moved(jax.jit(fn.init)(jax.random.key(0), base, x, t, cond))
    _, got = jax.jit(tapped(fn, read="block_0/block"))(params, x, t, cond)
    _, before = jax.jit(tapped(net, read="block_0/block"))(base, x, t, {"label": cond["label"]})
    own = jax.tree.map(lambda a: np.asarray(a, np.float64), params["adapters"]["it"])
    before = np.asarray(before["block_0/block"], np.float64)
    want = gated(own["at"]["block_0"]["block"], before, tokens_of(own["tokens"], 2))
    np.testing.assert_allclose(got["block_0/block"], want, rtol=2e-4, atol=2e-4)


def test_the_copy_adds_what_a_grounded_encoder_computes():
    fn, params, x, t, cond = made("grounded control")
    net, base, *_ = network("unet")
    params = moved(params)
    own, label = params["adapters"]["it"], {"label": cond["label"]}
    # the copy as a network of its own, with the same tokens in its encoder alone
    reader = adapters.adapt(net, it=adapters.grounding(hidden=5, frequencies=2, targets="(down|middle)_.*attention"))
    grounded = {"base": {**base, **own["copy"]}, "adapters": {"it": {name: own[name] for name in ("tokens", "at")}}}
    names = tuple(own["zero"])
    _, seen = jax.jit(tapped(reader, read=names))(grounded, x, t, cond)
    more = {
        name: seen[name] @ own["zero"][name]["kernel"] + own["zero"][name]["bias"][None, None, None] for name in names
    }
    write = {name: lambda v, name=name: v + more[name] for name in names}
    want = jax.jit(tapped(net, write=write))(base, x, t, label)
    np.testing.assert_allclose(jax.jit(fn)(params, x, t, cond), want, rtol=2e-5, atol=2e-5)


def test_bad_input():
    net, base, x, t, cond = network("unet")
    start = lambda adapter, own: adapters.adapt(net, a=adapter).init(jax.random.key(0), base, x, t, {**cond, "a": own})
    with pytest.raises(ValueError, match="hidden and frequencies must be"):
        adapters.grounding(hidden=0)
    with pytest.raises(ValueError, match="hidden and frequencies must be"):
        adapters.grounded_control(frequencies=0)
    with pytest.raises(ValueError, match=r"a dict with \[.tokens., .boxes.\], and may have \[.mask.\]"):
        start(adapters.grounding(), TOKENS)
    with pytest.raises(ValueError, match=r"boxes must be floats \[3, 2, 4\]"):
        start(adapters.grounded_control(), {**OBJECTS, "boxes": OBJECTS["boxes"][:, :1]})
    with pytest.raises(ValueError, match="names no attention"):
        start(adapters.grounding(targets="nowhere"), OBJECTS)
