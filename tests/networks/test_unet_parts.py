"""Parts of a U-Net: blocks against NumPy, the published structures in small, one and three axes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import inputs

from diffjax import networks as nw
from diffjax.networks.embeddings import TimeCode, fourier
from diffjax.networks.layers import GroupNorm, LayerNorm
from diffjax.networks.resample import fir_double, fir_halve
from diffjax.networks.transformer import TransformerBlock, transformer
from diffjax.networks.unet_parts import (
    ResBlock,
    Site,
    added,
    attend,
    enlarged,
    input_residual,
    input_skip,
    part,
    strided,
    within,
)
from diffjax.training import Layout

normal = lambda *shape, seed=0: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
HALF = math.sqrt(0.5)


def random_variables(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(np.float32), shapes)


# --------------------------------------------------------------------------------------- blocks against NumPy


def silu(x):
    return x / (1 + np.exp(-x))


def group_norm(x, p, groups, eps):
    z = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    z = (z - z.mean((1, 3), keepdims=True)) / np.sqrt(z.var((1, 3), keepdims=True) + eps)
    return z.reshape(x.shape) * p["scale"] + p["bias"]


def convolved(x, p, stride=1):
    """Length three, zeros around."""
    big = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    windows = np.stack([big[:, i : i + 3] for i in range(0, x.shape[1], stride)], axis=1)
    return np.einsum("bikc,kcd->bid", windows, p["kernel"]) + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def halved(x):
    """y_i = (x_{2i-1} + 3 x_{2i} + 3 x_{2i+1} + x_{2i+2}) / 8."""
    big = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    return (big[:, 0:-3:2] + 3 * big[:, 1:-2:2] + 3 * big[:, 2:-1:2] + big[:, 3::2]) / 8


@pytest.mark.parametrize("kind", ["added", "film"])
def test_a_block_that_halves_is_the_textbook_one(kind):
    x, c = normal(2, 8, 8), normal(2, 5, seed=1)
    more = dict(modulation=added, rescale=HALF, project=True) if kind == "added" else {}
    norm = part(GroupNorm, groups=4, eps=1e-2)
    block = ResBlock(
        8, 0, jax.nn.silu, None, 0.0, False, jnp.float32, norm=norm, resize=part(fir_halve, factor=2), **more
    )
    v = random_variables(block, x, c, None, None)
    p = v["params"]
    h = convolved(halved(silu(group_norm(x, p["norm_in"], 4, 1e-2))), p["conv_in"])
    code = dense(c, p["film"])[:, None]
    if kind == "added":
        h = group_norm(h + code, p["norm_out"], 4, 1e-2)
        skip = dense(halved(x), p["skip"])
    else:
        h = group_norm(h, p["norm_out"], 4, 1e-2) * (1 + code[..., 8:]) + code[..., :8]
        skip = halved(x)
        assert "skip" not in p
    want = (skip + convolved(silu(h), p["conv_out"])) * (HALF if kind == "added" else 1)
    np.testing.assert_allclose(jax.jit(block.apply)(v, x, c, None, None), want, atol=2e-5)


def test_a_transformer_block_is_the_textbook_one():
    x, tokens, mask = normal(2, 3, 4), normal(2, 5, 6, seed=1), np.ones((2, 5), bool)
    mask[0, 3:] = False
    block = TransformerBlock(heads=2, expand=3, dtype=jnp.float32)
    v = random_variables(block, x, None, tokens, mask)
    p = v["params"]

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def attention(q, kv, p, allowed):
        out = np.zeros_like(q)
        for b, t, head in np.ndindex(2, 3, 2):  # columns of a projection: by head, then q, k, v
            if "qkv" in p:
                w = p["qkv"]["kernel"].reshape(4, 2, 3, 2)[:, head]
                wq, wk, wv = w[:, 0], w[:, 1], w[:, 2]
            else:
                wq = p["q_in"]["kernel"].reshape(4, 2, 2)[:, head]
                wk, wv = (p["kv"]["kernel"].reshape(6, 2, 2, 2)[:, head, i] for i in range(2))
            e = np.exp((kv[b] @ wk) @ (q[b, t] @ wq) / math.sqrt(2)) * allowed[b]
            out[b, t, 2 * head : 2 * head + 2] = e @ (kv[b] @ wv) / e.sum()
        return dense(out, p["out"])

    h = norm(x, p["norm_attention"])
    y = x + attention(h, h, p["attention"], np.ones((2, 3)))
    y = y + attention(norm(y, p["norm_cross"]), tokens, p["cross"], mask)
    h = norm(y, p["norm_mlp"])
    b = dense(h, p["gate"])
    gelu = b * 0.5 * (1 + np.vectorize(math.erf)(b / math.sqrt(2)))
    y = y + dense(dense(h, p["hidden"]) * gelu, p["out"])
    np.testing.assert_allclose(jax.jit(block.apply)(v, x, None, tokens, mask)[0], y, atol=2e-5)


def test_a_transformer_block_cut_over_devices_gives_the_same():
    x = normal(2, 3, 4)
    block = TransformerBlock(heads=2, expand=2, dtype=jnp.float32)
    v = random_variables(block, x, None, None, None)
    f = jax.jit(lambda p, x: block.apply({"params": p["block_0"]}, x, None, None, None)[0])
    params = {"block_0": v["params"]}
    layout = Layout(data=1, model=2, rules=nw.UNet.RULES)
    mesh = jax.make_mesh((1, 1, 2), ("data", "fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    place = lambda p, a: jax.device_put(a, jax.sharding.NamedSharding(mesh, layout.spec(path(p), a.shape)))
    want = f(params, x)
    with jax.set_mesh(mesh):
        got = f(jax.tree_util.tree_map_with_path(place, params), x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_residual_input_is_a_filtered_and_strided_convolution():
    """The convolution and the filter as one kernel of six, with stride two and two zeros around."""
    h, pyramid, w, b = normal(1, 4, 3), normal(1, 8, 2, seed=1), normal(3, 2, 3, seed=2), normal(3, seed=3)
    conv = lambda n, stride, before, name: lambda x: nw.slices(x, w, stride, before) + b.reshape(1, 1, -1)
    got, same = input_residual(h, pyramid, Site("here", 2, conv, None))
    kernel = sum(np.pad(w * f / 8, ((k, 3 - k), (0, 0), (0, 0))) for k, f in enumerate((1, 3, 3, 1)))
    big = np.pad(pyramid, ((0, 0), (2, 2), (0, 0)))
    y = np.stack([np.einsum("bkc,kcd->bd", big[:, 2 * i : 2 * i + 6], kernel) for i in range(4)], axis=1)
    np.testing.assert_allclose(got, (h + y + b) * HALF, atol=1e-5)
    assert same is got


def test_layer_norm_and_fourier_features_against_numpy():
    x, scale, bias = normal(2, 3, 4), normal(4, seed=1), normal(4, seed=2)
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    got = LayerNorm(eps=0.1).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(got, z * scale + bias, atol=1e-5)
    t = np.float32([0.3, -1.0])
    y = np.asarray(fourier(2.0, seed=3)(t, 2000))
    w = 4 * math.pi * np.random.default_rng(3).standard_normal(1000)
    np.testing.assert_allclose(y, np.concatenate([np.sin(t[:, None] * w), np.cos(t[:, None] * w)], 1), atol=1e-4)
    v = random_variables(TimeCode(4, frequencies=fourier(2.0)), t)
    assert v["params"]["hidden"]["kernel"].shape == (4, 4)


def test_parts_are_equal_by_value():
    a, b = (part(attend, norm=part(GroupNorm, eps=1e-5)) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != part(attend)
    assert nw.UNet(mix=a) == nw.UNet(mix=b)
    assert part(max, key=abs)(-3, 2) == -3
    assert part(sorted, reverse=True)([1, 2], reverse=False) == [1, 2]
    assert all(hash(net) == hash(nw.preset(name)) for name, net in ((n, nw.preset(n)) for n in ("adm-64", "sd-1")))


# ------------------------------------------------------------------------------------- published structures in small

TINY = dict(widths=(4, 8), blocks=1, code=8, sinusoids=4, num_classes=3)
ADDED = part(ResBlock, modulation=added, rescale=HALF, project=True)
STRUCTURES = {  # with one, two and three axes
    "scores": (
        nw.UNet(
            **TINY,
            attention=(1,),
            heads=1,
            stem=6,
            frequencies=fourier(1.0),
            block=ADDED,
            mix=part(attend, rescale=HALF),
            late=True,
            down=part(within, resize=fir_halve),
            up=part(within, resize=fir_double),
            pyramid_in=input_residual,
            pyramid_out=fir_double,
        ),
        (8, 2),
    ),
    "convolved": (
        nw.UNet(
            **TINY,
            attention=(1,),
            head_size=4,
            image_channels=1,
            norm=part(GroupNorm, groups=2, eps=1e-5),
            block=part(ResBlock, modulation=added),
            down=part(strided, before=0),
            up=enlarged,
            pyramid_in=input_skip,
        ),
        (4, 6, 2),
    ),
    "latent": (
        nw.UNet(
            **TINY,
            attention=(1,),
            late=True,
            heads=2,
            token_size=3,
            vector_size=5,
            image_channels=1,
            deep_vector=True,
            out_channels=4,
            conv=nw.native,
            kernel=(1, 3, 3),
            factor=(1, 2, 2),
            mix=(part(transformer, depth=2),),
            down=strided,
            up=enlarged,
        ),
        (3, 4, 2, 2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_published_structures_use_all_their_parameters_and_inputs(name):
    net, shape = STRUCTURES[name]
    x, t, cond = inputs(net, shape)
    fn, params = nw.from_linen(net), nw.random_parameters(net, x, t, cond)

    @jax.jit
    def slopes(params, x, t, cond):
        floats = {k: v for k, v in cond.items() if k not in ("label", "mask")}
        loss = lambda p, x, t, floats: (jnp.sum(jnp.square(y := fn(p, x, t, {**cond, **floats}))), y)
        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(params, x, t, floats)

    (by_params, *by_inputs), y = slopes(params, x, t, cond)
    assert y.shape == (3, *shape[:-1], net.out_channels or shape[-1]) and np.isfinite(y).all()
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    unused = [path(p) for p, g in jax.tree_util.tree_leaves_with_path(by_params) if not np.any(g)]
    assert not [p for p in unused if p != "code/label/table"]
    assert all(np.any(g[i]) for g in jax.tree.leaves(by_inputs) for i in range(3))
    fresh = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    half = jax.make_jaxpr(nw.from_linen(net.clone(dtype=jnp.bfloat16)))(params, x, t, cond)
    assert half.out_avals[0].dtype == jnp.float32 and "bf16" in str(half)
    layout = Layout(data=1, model=2, rules=nw.partition_rules(net))
    cut = {path(p) for p, a in jax.tree_util.tree_leaves_with_path(params) if any(layout.spec(path(p), a.shape))}
    paths = [path(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    wide = {p for p in paths if p.endswith(("conv_in/kernel", "_0/hidden/kernel", "gate/kernel", "qkv/kernel"))}
    assert wide <= cut and wide


# ----------------------------------------------------------------------------------------- one and three axes


def test_three_axes_with_flat_kernels_are_two_on_every_frame():
    """Kernels (1, 3, 3) and factors (1, 2, 2) on one frame, or on many without attention, are the network for pictures."""
    net = nw.UNet(widths=(4, 8), code=8, head_size=4)
    x, t = normal(2, 4, 6, 3), np.float32([0.2, 0.7])
    params = nw.random_parameters(net, x, t)
    deep = jax.tree.map(lambda a: a[None] if a.ndim == 4 else a, params)
    video = net.clone(kernel=(1, 3, 3), factor=(1, 2, 2))
    y = jax.jit(nw.from_linen(net))(params, x, t)
    z = jax.jit(nw.from_linen(video))(deep, x[:, None], t)
    np.testing.assert_allclose(z[:, 0], y, atol=1e-5)
    shapes = jax.eval_shape(net.clone(factor=(1, 2, 2)).init, jax.random.key(0), np.zeros((1, 3, 4, 4, 3)), 0.5)
    assert shapes["params"]["in"]["kernel"].shape == (3, 3, 3, 3, 4)


def test_one_axis_is_two_with_kernels_of_one():
    net = nw.UNet(widths=(4, 8), code=8, head_size=4)
    x, t = normal(2, 6, 3), np.float32([0.2, 0.7])
    params = nw.random_parameters(net, x, t)
    assert params["in"]["kernel"].shape == (3, 3, 4)
    wide = jax.tree.map(lambda a: a[:, None] if a.ndim == 3 else a, params)
    y = jax.jit(nw.from_linen(net.clone(conv=nw.native)))(params, x, t)
    flat = net.clone(kernel=(3, 1), factor=(2, 1))
    np.testing.assert_allclose(jax.jit(nw.from_linen(flat))(wide, x[:, :, None], t)[:, :, 0], y, atol=1e-5)


@pytest.mark.parametrize(
    "net, shape, match",
    [
        (nw.UNet(), (), "floating array .B, .n, C.; got float32 of shape .1, 3."),
        (nw.UNet(), (2, 2, 2, 2), "floating array .B, .n, C."),
        (nw.UNet(factor=(1, 2)), (4, 3), "divisible by 1 x 2"),
        (nw.UNet(factor=(1, 2)), (4, 4, 4), "factor=.1, 2. must have one number for each axis"),
        (nw.UNet(kernel=(3,)), (4, 4), "kernel=.3,. must have one number"),
        (
            nw.UNet(mix=(attend,) * 3),
            (4, 4),
            "mix must be one part, or one for each level of attention=.1,., and .* got 3",
        ),
        (nw.UNet(norm=part(GroupNorm, groups=5)), (4, 4), "divisible by groups=5; got 16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(net, shape, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, *shape, 3), np.float32), 0.5)
