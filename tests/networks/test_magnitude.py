"""Magnitude-preserving layers: mean square one in, mean square one out; what training does to weights leaves outputs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import networks as nw
from diffjax.networks import magnitude as mg
from diffjax.networks.conditions import Condition

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 16, 16, 64)).astype(np.float32)
FLAT = RNG.normal(size=(4096, 64)).astype(np.float32)


def square(y):
    return float(np.mean(np.square(np.asarray(y, np.float64))))


@pytest.mark.parametrize(
    "y",
    [
        lambda: mg.mp_silu(FLAT),
        lambda: mg.mp_sum(FLAT, np.roll(FLAT, 1), 0.3),
        lambda: mg.mp_cat(FLAT, np.roll(FLAT[:, :24], 1, axis=0), 0.5),
        lambda: mg.mp_cat(FLAT[:, :9], FLAT[:, 9:], 0.2),
        lambda: mg.pixel_norm(5 * FLAT),
        lambda: mg.mp_fourier(np.linspace(-3, 3, 4096), 256),
    ],
)
def test_functions_keep_the_mean_square(y):
    assert square(jax.jit(y)()) == pytest.approx(1, abs=0.05)


def test_layers_keep_the_mean_square_at_initialisation(key):
    label, t = RNG.integers(0, 10, 4096).astype(np.int32), RNG.normal(size=4096).astype(np.float32) / 3
    layers = {
        "dense": (mg.MPDense(128), (FLAT,)),
        "conv": (mg.MPConv(64), (X,)),
        "pointwise": (mg.MPConv(64, (1, 1)), (X,)),
        "embedding": (mg.MPEmbedding(10, 256), (label,)),
        "code": (mg.MPCode(256, 256, num_classes=10), (t, Condition(label=label))),
        "vector": (mg.MPCode(256, 256, vector_size=3), (t, Condition(vector=np.zeros((4096, 3), np.float32)))),
    }
    for name, (layer, args) in layers.items():
        y, _ = jax.jit(lambda layer=layer, args=args: layer.init_with_output(jax.random.clone(key), *args))()
        bound = {"conv": 0.1}.get(name, 0.07)  # at the border a third of the inputs are zeros: (1 - 1/24)^2 = 0.92
        expected = {"conv": (1 - 1 / 24) ** 2, "code": None, "vector": None}.get(name, 1.0)
        if expected is None:  # after the nonlinearity of the code, whose input is one draw of directions
            assert 0.8 < square(y) < 1.25
        else:
            assert square(y) == pytest.approx(expected, abs=bound), name


def test_outputs_depend_on_the_direction_of_weights_alone(key):
    layer = mg.MPDense(5)
    params = layer.init(key, FLAT)["params"]
    y = layer.apply({"params": params}, FLAT[:8])
    longer = {"kernel": params["kernel"] * jnp.arange(1.0, 6.0)[None]}
    np.testing.assert_allclose(layer.apply({"params": longer}, FLAT[:8]), y, rtol=1e-5, atol=1e-6)
    known = FLAT[:8] @ (np.asarray(params["kernel"]) / np.linalg.norm(params["kernel"], axis=0))
    np.testing.assert_allclose(y, known, rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, FLAT[:8]) ** 2))(params)["kernel"]
    np.testing.assert_allclose((grad * params["kernel"]).sum(0), 0, atol=1e-3)  # orthogonal to the weights


def test_shares_of_sum_and_concatenation():
    """A part's share of the mean square is t^2 / ((1 - t)^2 + t^2), whatever its number of channels."""
    a, b, t = FLAT[:, :8], FLAT[:, 8:], 0.3
    y = np.asarray(mg.mp_cat(a, b, t))
    share = np.square(y[:, 8:]).sum() / np.square(y).sum()
    assert share == pytest.approx(t**2 / ((1 - t) ** 2 + t**2), abs=0.01)
    np.testing.assert_allclose(mg.mp_sum(a, a, 0.5), a * np.sqrt(2), rtol=1e-5)
    np.testing.assert_array_equal(mg.mp_sum(a, b[:, :8], 0.0), a)


def test_cosine_attention_is_bounded_and_equals_a_textbook_loop(key):
    layer, x = mg.CosineAttention(2), RNG.normal(size=(2, 5, 8)).astype(np.float32)
    params = layer.init(key, x)["params"]
    params["qkv"]["kernel"] = params["qkv"]["kernel"] * 1e3  # the size of weights does not sharpen it
    y = np.asarray(layer.apply({"params": params}, x))
    unit = lambda w: np.asarray(w) / np.linalg.norm(w, axis=0)
    for b in range(2):
        rows = (x[b] @ unit(params["qkv"]["kernel"])).reshape(5, 3, 2, 4)
        out = np.zeros((5, 2, 4))
        for h in range(2):
            q, k, v = (rows[:, i, h] / np.sqrt(np.mean(rows[:, i, h] ** 2, -1, keepdims=True)) for i in range(3))
            logits = q @ k.T / np.sqrt(4)
            assert np.abs(logits).max() <= 2 + 1e-6  # sqrt(D)
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            out[:, h] = weights @ v
        np.testing.assert_allclose(y[b], out.reshape(5, 8) @ unit(params["out"]["kernel"]), atol=1e-5)
    with pytest.raises(ValueError, match="heads=3"):
        mg.CosineAttention(3).init(jax.random.key(1), x)


UNET = nw.EDM2UNet(
    widths=(8, 12), blocks=1, attention=(1,), head_size=4, num_classes=3, vector_size=2, image_channels=1
)
MLP = nw.EDM2MLP(width=16, depth=2, num_classes=3, vector_size=2)


def inputs(net):
    cond = {"label": np.array([0, 3], np.int32), "vector": RNG.normal(size=(2, 2)).astype(np.float32)}
    if net is MLP:
        return RNG.normal(size=(2, 5)).astype(np.float32), np.array([0.3, -0.2], np.float32), cond
    cond["image"] = RNG.normal(size=(2, 4, 6, 1)).astype(np.float32)
    return RNG.normal(size=(2, 4, 6, 2)).astype(np.float32), np.array([0.3, -0.2], np.float32), cond


@pytest.mark.parametrize("net", [UNET, MLP], ids=["unet", "mlp"])
def test_networks_read_every_input_and_do_not_mix_items(net):
    x, t, cond = inputs(net)
    params = nw.random_parameters(net, x, t, cond)
    f = jax.jit(nw.from_linen(net))
    y = f(params, x, t, cond)
    assert y.shape == x.shape and y.dtype == jnp.float32 and np.std(y) > 1e-3 and np.isfinite(y).all()
    for changed in [(x + 0.5, t, cond), (x, t + 0.1, cond)] + [
        (x, t, {**cond, name: (cond[name] + 1) % 4 if name == "label" else -cond[name]}) for name in cond
    ]:
        assert np.abs(f(params, *changed) - y).reshape(2, -1).max(1).min() > 1e-6
    swapped = f(params, *jax.tree.map(lambda a: a[::-1], (x, t, cond)))
    np.testing.assert_allclose(swapped[::-1], y, atol=1e-6)
    zero = jax.tree_util.tree_map_with_path(lambda p, a: a * 0 if p[-1].key == "gain" else a, params)
    np.testing.assert_array_equal(f(zero, x, t, cond), 0)  # as after initialisation
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert {p[-1].key for p, _ in leaves} == {"kernel", "gain"}  # neither biases nor norms


def test_the_number_of_parameters_of_the_unet():
    w, v, d = 8, 12, 3  # widths, channels in
    conv = lambda i, o, k=3: k * k * i * o
    code = w * v + 4 * v + d * v
    block = lambda i, o, attend, skip: (
        conv(i, o) + v * o + 1 + conv(o, o) + (4 * o * o if attend else 0) + (conv(i, o, 1) if skip else 0)
    )
    encoder = lambda i, o, attend: block(o, o, attend, False) + (conv(i, o, 1) if i != o else 0)
    down = encoder(w, w, False) + encoder(w, w, False) + encoder(w, v, True)
    middle = encoder(v, v, True) + encoder(v, v, False)
    up = block(v + v, v, True, True) + block(v + w, v, True, True) + block(v, v, False, False)
    up += block(v + w, w, False, True) + block(w + w, w, False, True)
    want = code + conv(d + 1, w) + down + middle + up + conv(w, 2) + 1
    x, t, cond = inputs(UNET)
    shapes = jax.eval_shape(UNET.init, jax.random.key(0), x, t, cond)["params"]
    assert nw.parameter_count(shapes) == want


@pytest.mark.slow
def test_magnitudes_of_the_unet_at_initialisation(key):
    """Mean squares of the blocks on white noise; halving averages four pixels, and the encoder normalises after it."""
    net = nw.EDM2UNet(widths=(32, 48), blocks=1, attention=())
    x = RNG.normal(size=(4, 16, 16, 3)).astype(np.float32)
    params = nw.initialise(net, key, x[:1], np.zeros(1, np.float32))
    found = jax.jit(lambda p: nw.magnitudes(nw.from_linen(net), p, x, np.full(4, 0.2, np.float32)))(params)
    blocks = {name: float(v) ** 2 for name, v in found.items() if name.endswith("/block")}
    assert len(blocks) == 10 and all(0.5 < v < 2 for v in blocks.values()), blocks


@pytest.mark.parametrize(
    "net, shape, match",
    [
        (nw.EDM2UNet(widths=()), (1, 4, 4, 1), "at least one width"),
        (nw.EDM2UNet(widths=(8,), attention=(1,)), (1, 4, 4, 1), "levels 0 to 0"),
        (nw.EDM2UNet(widths=(8, 8), attention=()), (1, 3, 4, 1), "divisible by 2"),
    ],
)
def test_unets_that_cannot_be(net, shape, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(1))
