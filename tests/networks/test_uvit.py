"""U-ViT against a textbook in NumPy, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import inputs
from scipy.special import erf

from diffjax import networks as nw

FIELDS = dict(width=8, depth=3, heads=2, expand=2, num_classes=3, token_size=4, token_length=6)


def case(**fields):
    net = nw.UViT(**FIELDS | fields)
    x, t, cond = inputs(net, (4, 6, 2))
    return net, nw.random_parameters(net, x, t, cond), x, t, cond


def dense(p, h):
    return h @ p["kernel"] + p.get("bias", 0.0)


def norm(p, h):
    return p["scale"] * (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6) + p["bias"]


def block(p, z, skip, keep):
    if skip is not None:
        z = dense(p["join"], np.concatenate([z, skip], axis=1))
    qkv = dense(p["attention"]["qkv"], norm(p["norm_attention"], z)).reshape(len(z), 2, 3, 4)
    assert "bias" not in p["attention"]["qkv"]
    mixed = np.zeros((len(z), 2, 4))
    for head in range(2):
        w = np.exp(qkv[:, head, 0] @ qkv[keep, head, 1].T / 2)
        mixed[:, head] = w / w.sum(1, keepdims=True) @ qkv[keep, head, 2]
    z = z + dense(p["project"], mixed.reshape(len(z), 8))
    h = dense(p["hidden"], norm(p["norm_mlp"], z))
    return z + dense(p["out"], 0.5 * h * (1 + erf(h / np.sqrt(2))))


def textbook(params, x, t, cond):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    out = np.zeros(x.shape)
    for item in range(len(x)):
        time = np.asarray(nw.sinusoids(t[item], 8), np.float64)
        tokens = np.where(cond["mask"][item][:, None], cond["tokens"][item], 0.0)
        extra = np.concatenate([[time, p["label"]["table"][cond["label"][item]]], dense(p["text"], tokens)])
        extra = extra + p["extra_positions"]["table"][:7]
        cut = [x[item, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1) for i in range(2) for j in range(3)]
        z = np.concatenate([extra, dense(p["in"], np.stack(cut)) + nw.grid_positions(2, 3, 8)])
        keep = np.concatenate([[True, True], cond["mask"][item], np.ones(6, bool)])
        first = block(p["block_0"], z, None, keep)
        z = block(p["block_2"], block(p["block_1"], first, None, keep), first, keep)
        pixels = dense(p["decode"], norm(p["norm"], z[7:])).reshape(2, 3, 2, 2, 2)
        image = np.pad(pixels.transpose(0, 2, 1, 3, 4).reshape(4, 6, 2), ((1, 1), (1, 1), (0, 0)))
        for i, j in np.ndindex(4, 6):
            out[item, i, j] = (
                np.einsum("abc,abcd->d", image[i : i + 3, j : j + 3], p["out"]["kernel"]) + p["out"]["bias"]
            )
    return out


def test_it_is_the_textbook():
    net, params, x, t, cond = case()
    y = jax.jit(nw.from_linen(net))(params, x, t, cond)
    want = textbook(params, x, t, cond)
    np.testing.assert_allclose(y, want, atol=3e-5 * np.abs(want).max())


def test_skips_join_mirrored_blocks():
    """Of five blocks, the first feeds the last and the second the last but one."""
    net, params, x, t, cond = case(depth=5)
    read = ["skip_0", "skip_1", "block_0/block", "block_1/block", "block_2/block"]
    _, taps = jax.jit(nw.tapped(nw.from_linen(net), read=read))(params, x, t, cond)
    np.testing.assert_array_equal(taps["skip_0"], taps["block_0/block"])
    np.testing.assert_array_equal(taps["skip_1"], taps["block_1/block"])
    assert {k for k, v in params.items() if "join" in v} == {"block_3", "block_4"}


@pytest.mark.parametrize(
    "net", [nw.UViT(width=8, depth=3, heads=2), nw.MMDiT(width=8, depth=1, single=1, heads=2, token_size=4)]
)
def test_patches_and_other_tokens_in_one_stream_stay_whole_on_a_mesh_that_cuts_sequences(net):
    """Their number is odd here: 6 patches with the time, or with 3 tokens of text."""
    x, cond = jnp.zeros((2, 4, 6, 1)), {"tokens": jnp.zeros((2, 3, 4))} if net.token_size else None
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        y, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, jnp.zeros(2), cond)
    assert y.shape == x.shape


def test_rope_turns_the_patches_alone():
    net, params, x, t, cond = case(rope=nw.Rope(), depth=1)
    plain = net.clone(rope=None)
    q = [jax.jit(nw.tapped(nw.from_linen(n), read="block_0/attention/q"))(params, x, t, cond)[1] for n in (net, plain)]
    a, b = (np.asarray(v["block_0/attention/q"]) for v in q)
    np.testing.assert_array_equal(a[:, :8], b[:, :8])  # time, label, five of text, and the patch at the origin
    np.testing.assert_allclose(a[:, 7:], nw.rotate(b[:, 7:], nw.Rope()(2, 3, 4)), atol=1e-6)
    assert np.abs(a[:, 8:] - b[:, 8:]).max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(depth=4), "depth must be odd.*got 4"),
        (dict(patch=4), "divisible by patch=4"),
        (dict(token_length=4), "token_length=4 tokens; got 5"),
        (dict(heads=3), "heads=3"),
        (dict(positions=nw.Learned(3, 3)), "for 3 x 3 patches; got 2 x 3"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        case(**fields)
