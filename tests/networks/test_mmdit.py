"""MM-DiT against a textbook in NumPy, its forms, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import inputs

from diffjax import networks as nw

FIELDS = dict(width=8, depth=2, heads=2, expand=2, token_size=4, vector_size=3)


def case(**fields):
    net = nw.MMDiT(**FIELDS | fields)
    x, t, cond = inputs(net, (4, 6, 2))
    return net, nw.random_parameters(net, x, t, cond), x, t, cond


def dense(p, h):
    return h @ p["kernel"] + p.get("bias", 0.0)


def norm(h):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)


def rms(p, h):
    return p["scale"] * h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)


def silu(h):
    return h / (1 + np.exp(-h))


def gelu(h):
    return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))


def attend(p, streams, keep, qk_norm):
    """The mixed tokens of all streams of one item, head by head."""
    q, k, v = [], [], []
    for i, h in enumerate(streams):
        end = f"_{i}" if i else ""
        qkv = dense(p["qkv" + end], h).reshape(len(h), 2, 3, 4)  # sorted by head, then by kind
        a, b = qkv[:, :, 0], qkv[:, :, 1]
        q.append(rms(p["q_norm" + end], a) if qk_norm else a)
        k.append(rms(p["k_norm" + end], b) if qk_norm else b)
        v.append(qkv[:, :, 2])
    q, k, v = (np.concatenate(a) for a in (q, k, v))
    out = np.zeros_like(q)
    for head in range(2):
        for i in range(len(q)):
            w = np.exp(k[keep, head] @ q[i, head] / np.sqrt(4))
            out[i, head] = (w / w.sum()) @ v[keep, head]
    return out.reshape(len(q), 8)


def textbook(params, x, t, cond, qk_norm):
    """One item at a time, two streams, the second ends as keys and values of the last block."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    out = np.zeros(x.shape)
    positions = nw.grid_positions(2, 3, 8).astype(np.float64)
    for item in range(len(x)):
        time = np.asarray(nw.sinusoids(t[item], 256), np.float64)
        c = dense(p["time"]["out"], silu(dense(p["time"]["hidden"], time)))
        c = silu(c + dense(p["vector_out"], silu(dense(p["vector_hidden"], cond["vector"][item]))))
        cut = [x[item, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1) for i in range(2) for j in range(3)]
        z = dense(p["in"], np.stack(cut)) + positions
        tokens = np.where(cond["mask"][item][:, None], cond["tokens"][item], 0.0)
        y = dense(p["in_text"], tokens)
        keep = np.concatenate([np.ones(6, bool), cond["mask"][item]])
        for name in ("block_0", "last"):
            b = p[name]
            film = np.split(dense(b["film"], c), 6)
            text = np.split(dense(b["film_text"], c), 2 if name == "last" else 6)
            h = [norm(z) * (1 + film[1]) + film[0], norm(y) * (1 + text[1]) + text[0]]
            mixed = attend(b["attention"], h, keep, qk_norm)
            z = z + film[2] * dense(b["project"], mixed[:6])
            h = norm(z) * (1 + film[4]) + film[3]
            z = z + film[5] * dense(b["out"], gelu(dense(b["hidden"], h)))
            if name != "last":
                y = y + text[2] * dense(b["project_text"], mixed[6:])
                h = norm(y) * (1 + text[4]) + text[3]
                y = y + text[5] * dense(b["out_text"], gelu(dense(b["hidden_text"], h)))
        shift, scale = np.split(dense(p["film"], c), 2)
        pixels = dense(p["out"], norm(z) * (1 + scale) + shift).reshape(2, 3, 2, 2, 2)
        out[item] = pixels.transpose(0, 2, 1, 3, 4).reshape(4, 6, 2)
    return out


@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_is_the_textbook(qk_norm):
    net, params, x, t, cond = case(qk_norm=qk_norm)
    y = jax.jit(nw.from_linen(net))(params, x, t, cond)
    want = textbook(params, x, t, cond, qk_norm)
    np.testing.assert_allclose(y, want, atol=3e-5 * np.abs(want).max())


def test_scanned_blocks_are_the_looped_ones():
    """Of all three kinds of stacks, with the published kinds of last blocks."""
    for fields in (dict(depth=4, alone=1), dict(depth=2, single=2, guided=True, positions=None, rope=nw.Rope())):
        net, params, x, t, cond = case(**fields)
        stacked = nw.stack_blocks(params)
        for name in ("dual", "single"):
            if name in params:
                stacked[name] = nw.stack_blocks(params[name])
        scanned = jax.jit(nw.from_linen(net.clone(scan_layers=True)))(stacked, x, t, cond)
        np.testing.assert_allclose(jax.jit(nw.from_linen(net))(params, x, t, cond), scanned, atol=2e-5)


def test_the_text_answers_the_image():
    """Text tokens change with the image before the last block: cross-attention leaves them as they are."""
    net, params, x, t, cond = case()
    read = lambda x: nw.tapped(nw.from_linen(net), read=["block_0/block_text", "last/attention/q"])(params, x, t, cond)[
        1
    ]
    a, b = read(x), read(x + 1)
    assert np.abs(a["block_0/block_text"] - b["block_0/block_text"]).max() > 1e-3
    assert a["last/attention/q"].shape == (3, 6, 2, 4)  # the image alone asks there


def test_the_guidance_weight_is_the_last_number_of_the_vector():
    net, params, x, t, cond = case(guided=True, single=1, depth=1)
    assert params["vector_hidden"]["kernel"].shape == (2, 8)
    f = jax.jit(nw.from_linen(net))
    other = cond | {"vector": cond["vector"] + np.array([0, 0, 1], np.float32)}
    assert np.abs(f(params, x, t, cond) - f(params, x, t, other)).max() > 1e-3


def test_any_grid_of_patches():
    net, params, *_ = case()
    for shape in ((2, 8, 4, 2), (1, 2, 10, 2)):
        x = np.zeros(shape, np.float32)
        cond = {"tokens": np.zeros((shape[0], 7, 4), np.float32), "vector": np.zeros((shape[0], 3), np.float32)}
        assert jax.eval_shape(nw.from_linen(net), params, x, jnp.zeros(()), cond).shape == shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(token_size=0), "needs token_size > 0.*take DiT"),
        (dict(patch=4), "divisible by patch=4"),
        (dict(heads=3), "divisible by heads; got width 8 and heads=3"),
        (dict(alone=2), r"alone must be in 0 .. 1"),
        (dict(guided=True, vector_size=0), "vector_size must be at least 2; got 0"),
        (dict(positions=nw.Sincos(crop=2)), "cut from a grid of 2 x 2"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        case(**fields)
