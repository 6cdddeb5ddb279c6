"""ControlNet, ControlNeXt, skip tuners and ControlNorm, against closed forms and loops of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import CASES, LARGE, PICTURE, made, moved, network

from diffjax import adapters, networks
from diffjax.adapters import copies, maps
from diffjax.adapters.control_norm import blurred
from diffjax.networks.taps import per_layer, tapped
from diffjax.training import flops

SKIPS = [f"skip_{k}" for k in range(4)]


def start(adapter, name, own=None):
    """As `made`, of an adapter that is no case of the contract."""
    net, base, x, t, cond = network(name)
    fn = adapters.adapt(net, it=adapter)
    cond = cond if own is None else {**cond, "it": own}
    return fn, jax.jit(fn.init)(jax.random.key(0), base, x, t, cond), x, t, cond


def conv(x, kernel, bias, stride=1):
    """A 3 x 3 convolution of zero-padded pictures, as loops."""
    b, h, w, _ = x.shape
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((b, -(-h // stride), -(-w // stride), kernel.shape[-1]))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            at = wide[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[:, i, j] = np.einsum("bhwc,hwcd->bd", at, kernel) + bias
    return out


def silu(x):
    return x / (1 + np.exp(-x))


def test_the_encoder_of_a_picture_is_this_loop():
    p = maps.fresh_hint(jax.random.key(0), (4, 6), 2, 2, 5)
    rng = np.random.default_rng(0)
    p["out"] = {"kernel": rng.normal(size=(3, 3, 6, 5)), "bias": rng.normal(size=5)}
    p = jax.tree.map(lambda a: np.asarray(a, np.float32), p)
    h = silu(conv(LARGE, **p["in"]))
    h = silu(conv(h, **p["same_0"]))
    h = silu(conv(h, **p["down_0"], stride=2))
    np.testing.assert_allclose(jax.jit(maps.hint, static_argnums=2)(p, LARGE, 1), conv(h, **p["out"]), atol=1e-5)


def test_identity_instead_of_zero_convolutions_doubles_what_the_decoder_gets():
    fn, params, x, t, cond = start(adapters.controlnet((6,)), "unet", PICTURE)
    net, base, *_, plain = network("unet")
    own = params["adapters"]["it"]
    own["zero"] = jax.tree.map(lambda a: jnp.eye(len(a)) if a.ndim == 2 else a, own["zero"])
    double = tapped(net, write=dict.fromkeys([*SKIPS, "bottleneck"], lambda v: 2 * v))
    got = jax.jit(fn)({**params, "adapters": {"it": own}}, x, t, cond)
    np.testing.assert_allclose(got, jax.jit(double)(base, x, t, plain), rtol=1e-5, atol=1e-5)


def test_the_picture_enters_behind_the_first_convolution_of_the_copy():
    """A picture that is encoded as one constant is the same as another bias of that convolution."""
    fn, params, x, t, cond = made("controlnet")
    params = moved(params)
    own, (net, base, *_, plain) = params["adapters"]["it"], network("unet")
    shift = np.linspace(-1, 1, 8, dtype=np.float32)
    own["hint"]["out"] = {"kernel": np.zeros_like(own["hint"]["out"]["kernel"]), "bias": shift}
    copy = {**base, **own["copy"]}
    copy["in"] = {**copy["in"], "bias": copy["in"]["bias"] + shift}
    _, seen = jax.jit(tapped(net, read=[*SKIPS, "bottleneck"]))(copy, x, t, plain)
    scales = dict(zip([*SKIPS, "bottleneck"], (0.5, 1.0, 1.0, 1.0, 2.0), strict=True))
    write = {
        name: lambda v, name=name: (
            v
            + 0.7
            * scales[name]
            * (seen[name] @ own["zero"][name]["kernel"] + own["zero"][name]["bias"][None, None, None])
        )
        for name in seen
    }
    got = jax.jit(fn)({**params, "weights": {"it": jnp.float32(0.7)}}, x, t, cond)
    np.testing.assert_allclose(got, jax.jit(tapped(net, write=write))(base, x, t, plain), rtol=1e-4, atol=1e-4)


def test_several_nets_add_and_their_decoder_is_not_run():
    net, base, x, t, cond = network("unet")
    one = {
        "base": base,
        "adapters": {"it": moved(start(adapters.controlnet((6,)), "unet", PICTURE)[1])["adapters"]["it"]},
    }
    both = adapters.adapt(net, a=adapters.controlnet((6,)), b=adapters.controlnet((6,)))
    twice = {"base": base, "adapters": dict.fromkeys("ab", one["adapters"]["it"])}
    halves = {**twice, "weights": {"a": jnp.float32(0.3), "b": jnp.float32(0.7)}}
    fn = adapters.adapt(net, it=adapters.controlnet((6,)))
    got = jax.jit(both)(halves, x, t, {**cond, "a": PICTURE, "b": PICTURE})
    np.testing.assert_allclose(got, jax.jit(fn)(one, x, t, {**cond, "it": PICTURE}), rtol=1e-4, atol=1e-4)
    site = adapters.Site(net, base, x, t, cond, None)
    half = flops.count(lambda p: copies.features(site, p, {}), copies.encoder(base)).total
    whole = flops.count(net, base, x, t, cond).total
    assert half < 0.6 * whole
    more = flops.count(fn, one, x, t, {**cond, "it": PICTURE}).total - whole
    assert more < 1.5 * half  # the picture's encoder and the 1x1 convolutions, on top of the copy


@pytest.mark.parametrize("scan", [False, True])
def test_a_transformer_gets_what_its_copied_blocks_say(scan):
    """With identity maps the first block's output is doubled."""
    net, base, x, t, cond = network("scanned" if scan else "dit")
    fn = adapters.adapt(net, it=adapters.control_transformer(1))
    params = jax.jit(fn.init)(jax.random.key(0), base, x, t, {**cond, "it": PICTURE})
    params["adapters"]["it"]["zero"]["kernel"] = jnp.eye(8)[None]
    looped, parts, *_ = network("dit")
    parts = networks.unstack_blocks(base) if scan else parts
    double = tapped(looped, write={"block_0/block": lambda v: 2 * v})
    got = jax.jit(fn)(params, x, t, {**cond, "it": PICTURE})
    np.testing.assert_allclose(got, jax.jit(double)(parts, x, t, cond), rtol=1e-5, atol=1e-5)


def test_control_of_an_mmdit():
    net = networks.from_linen(networks.MMDiT(width=8, depth=3, heads=2, token_size=5))
    x, t = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32), np.full(2, 0.5, np.float32)
    cond = {"tokens": np.ones((2, 3, 5), np.float32)}
    base = networks.random_parameters(net.module, x, t, cond)
    fn = adapters.adapt(net, it=adapters.control_transformer(2))
    params = jax.jit(fn.init)(jax.random.key(0), base, x, t, {**cond, "it": PICTURE[:2]})
    params["adapters"]["it"]["zero"]["kernel"] = jnp.stack([jnp.zeros((8, 8)), jnp.eye(8)])
    double = tapped(net, write={"block_1/block": lambda v: 2 * v})
    got = jax.jit(fn)(params, x, t, {**cond, "it": PICTURE[:2]})
    np.testing.assert_allclose(got, jax.jit(double)(base, x, t, cond), rtol=1e-5, atol=1e-5)


def test_cross_normalisation_has_the_moments_of_the_state():
    rng = np.random.default_rng(0)
    c, h = rng.normal(3, 7, (4, 5, 6, 2)), rng.normal(-1, 0.3, (4, 5, 6, 2))
    got = np.asarray(adapters.cross_normalised(jnp.float32(c), jnp.float32(h)))
    for a in (np.mean, np.std):
        np.testing.assert_allclose(a(got, axis=(1, 2, 3)), a(h, axis=(1, 2, 3)), atol=1e-5)
    want = (c[0] - c[0].mean()) / c[0].std() * h[0].std() + h[0].mean()
    np.testing.assert_allclose(got[0], want, atol=1e-5)
    flat = jax.grad(lambda c: adapters.cross_normalised(c, jnp.float32(h)).sum())(jnp.ones((4, 5, 6, 2)))
    assert np.isfinite(flat).all()


@pytest.mark.parametrize(("name", "tap"), [("dit", "block_0/block"), ("scanned", "blocks/block")])
def test_control_next_enters_a_transformer_by_its_patches_once(name, tap):
    """With a constant picture what is added is the mean of what is there."""
    fn, params, x, t, cond = start(adapters.control_next(tap, (4,)), name, PICTURE)
    net, base, *_, plain = network(name)
    own = jax.tree.map(jnp.zeros_like, params["adapters"]["it"])
    more = lambda h, layer=0: h + jnp.where(layer == 0, h.mean((1, 2), keepdims=True), 0.0)
    mean = tapped(net, write={tap: more if name == "dit" else per_layer(more)})
    got = jax.jit(fn)({**params, "adapters": {"it": own}}, x, t, cond)
    np.testing.assert_allclose(got, jax.jit(mean)(base, x, t, plain), rtol=1e-5, atol=1e-5)


def test_skip_tuner_is_this_map_and_stops_gradients_at_the_encoder():
    fn, params, x, t, cond = start(adapters.skip_tuner(2), "unet")
    net, base, *_ = network("unet")
    params = moved(params)
    own = params["adapters"]["it"]

    def tuned(name, s):
        p = own[name]
        row = lambda b: b[None, None, None]
        h = jax.nn.gelu(s @ p["down"]["kernel"] + row(p["down"]["bias"]), approximate=False)
        return s + 0.5 * (h @ p["up"]["kernel"] + row(p["up"]["bias"]))

    write = {name: lambda s, name=name: tuned(name, s) for name in SKIPS}
    got = jax.jit(fn)({**params, "weights": {"it": jnp.float32(0.5)}}, x, t, cond)
    np.testing.assert_allclose(got, jax.jit(tapped(net, write=write))(base, x, t, cond), rtol=1e-5, atol=1e-5)

    stopped = adapters.adapt(net, it=adapters.skip_tuner(2, stop=True))
    total = lambda base: jnp.square(stopped({**params, "base": base}, x, t, cond)).sum()
    grads = jax.jit(jax.grad(total))(base)
    size = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))
    first = {name: g for name, g in copies.encoder(grads).items() if name != "code"}  # the code goes to the decoder too
    assert size(first) == 0 and size(grads["up_0_0"]) > 0


def test_pictures_of_a_skip_tuner_go_with_a_network_in_half_precision():
    net, base, x, t, cond = network("unet")
    half = adapters.adapt(networks.from_linen(net.module.clone(dtype=jnp.bfloat16)), it=CASES["skip_tuner"].adapter)
    cond = {**cond, "it": CASES["skip_tuner"].own}
    params = jax.eval_shape(half.init, jax.random.key(0), base, x, t, cond)
    assert jax.eval_shape(half, params, x, t, cond).shape == x.shape


def test_pictures_of_a_skip_tuner_add_and_may_be_left_out():
    fn, params, x, t, cond = made("skip_tuner")
    params = moved(params)
    net, base, *_, plain = network("unet")
    site = adapters.Site(net, base, x, t, plain, None)
    only = lambda *names: {name: cond["it"][name] for name in names}
    s = np.random.default_rng(0).normal(size=(3, 2, 2, 12)).astype(np.float32)

    @jax.jit
    def more(own):
        adapter = dict(fn.adapters)["it"]
        return adapter.change(params["adapters"]["it"], site._replace(own=own), None).write["skip_3"](s) - s

    a, b = more(only("a")), more(only("b"))
    np.testing.assert_allclose(more(only("a", "b")), a + b, rtol=1e-4, atol=1e-5)
    assert jnp.abs(a).max() > 0.1 and jnp.abs(more(only())).max() == 0
    with pytest.raises(ValueError, match=r"any of \['a', 'b'\]"):
        fn(params, x, t, {**cond, "it": {"c": PICTURE}})


def test_control_norm_scales_shifts_and_blends():
    fn, params, x, t, cond = made("control_norm")
    params, call = moved(params, 0.1), jax.jit(fn)
    net, base, *_, plain = network("unet")
    nothing = {name: jnp.zeros_like(a) for name, a in cond["it"].items()}
    empty = call(params, x, t, {**cond, "it": {}})
    np.testing.assert_array_equal(empty, call(params, x, t, {**cond, "it": nothing}))

    constant = moved(params)
    for name, p in constant["adapters"]["it"]["pair"].items():
        n = p["kernel"].shape[0]
        constant["adapters"]["it"]["pair"][name] = {"kernel": np.zeros((n, 2 * n)), "bias": np.repeat([0.5, -0.25], n)}
    write = dict.fromkeys([*SKIPS, "bottleneck"], lambda v: 1.5 * v - 0.25)
    got = call(jax.tree.map(jnp.float32, constant), x, t, cond)
    np.testing.assert_allclose(got, jax.jit(tapped(net, write=write))(base, x, t, plain), rtol=1e-5, atol=1e-5)

    # one object far larger than the picture is the picture itself; one far outside is nothing
    objects = {name: a[:, None] for name, a in cond["it"].items()}
    boxed = lambda box: {**cond, "it": {**objects, "boxes": np.tile(np.float32(box), (3, 1, 1))}}
    inside, outside = (call(params, x, t, boxed(box)) for box in ([-9, -9, 9, 9], [8, 8, 9, 9]))
    np.testing.assert_allclose(inside, call(params, x, t, cond), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outside, empty, rtol=1e-4, atol=1e-4)
    mask = np.asarray(blurred(np.float32([[[0.25, 0.0, 0.75, 1.0]]]), (64, 64)))[0, 0, :, 32, 0]
    assert mask[32] > 0.99 and abs(mask[15:17].mean() - 0.5) < 1e-5 and mask[0] < 1e-3


def test_region_bias_draws_attention_into_the_region():
    fn, params, x, t, cond = made("region_bias")
    half = np.zeros((3, 4, 4, 4), np.float32)
    half[:, :2, :, 1] = half[:, 2:, :, 2] = 1
    cond = {**cond, "it": half}
    strong = {**params, "adapters": {"it": {"strength": jnp.float32(60.0)}}}
    read = jax.jit(lambda p, c: tapped(fn, read=["down_1_0/cross/weights"])(p, x, t, c)[1]["down_1_0/cross/weights"])
    before, after = (np.asarray(read(p, cond))[..., 1] for p in (params, strong))  # [B, H, 4 places], of token 1
    share = lambda w: w[..., :2].sum() / w.sum()
    assert share(before) < 0.7 and share(after) > 0.9
    logits = np.asarray(
        jax.jit(lambda: tapped(fn, read=["down_1_0/cross/logits"])(params, x, t, cond)[1])().popitem()[1]
    )
    change = (
        np.asarray(jax.jit(lambda: tapped(fn, read=["down_1_0/cross/logits"])(strong, x, t, cond)[1])().popitem()[1])
        - logits
    )
    want = 60 * np.log(1 + (1 - np.asarray(t)) ** 2) * logits.std(axis=(1, 2, 3))
    np.testing.assert_allclose(change[:, 0, 0, 1], want, rtol=1e-4)
    np.testing.assert_allclose(change[:, 0, 2, 1], 0, atol=1e-5)


def test_bad_input():
    net, base, x, t, cond = network("unet")
    init = lambda adapter, own, net=net, base=base: adapters.adapt(net, it=adapter).init(
        jax.random.key(0), base, x, t, {**cond, "it": own} if own is not None else cond
    )
    with pytest.raises(ValueError, match="under the adapter's name.*got NoneType"):
        init(adapters.controlnet((4,)), None)
    with pytest.raises(ValueError, match=r"axes, or of axes 2.*got \[3, 5, 4, 2\]"):
        init(adapters.controlnet((4, 4)), np.ones((3, 5, 4, 2), np.float32))
    with pytest.raises(ValueError, match="batch and axes"):
        init(adapters.controlnet((4,)), LARGE)  # one width cannot halve
    with pytest.raises(ValueError, match="scales must be 5 numbers"):
        init(adapters.controlnet((4,), scales=(1.0,)), PICTURE)
    with pytest.raises(ValueError, match="channels >= 1"):
        adapters.controlnet(())
    dit, own, *_ = network("dit")
    with pytest.raises(ValueError, match="take control_transformer"):
        init(adapters.controlnet((4,)), PICTURE, dit, own)
    with pytest.raises(ValueError, match="take controlnet"):
        init(adapters.control_transformer(1), PICTURE)
    with pytest.raises(ValueError, match="at most 2"):
        init(adapters.control_transformer(3), PICTURE, dit, own)
    with pytest.raises(ValueError, match="whole multiple"):
        init(adapters.control_transformer(1), PICTURE[:, :3], dit, own)
    with pytest.raises(ValueError, match="blocks >= 1"):
        adapters.control_transformer(0)
    with pytest.raises(ValueError, match="unknown taps"):
        init(adapters.control_next("nowhere"), PICTURE)
    with pytest.raises(ValueError, match="needs a tap"):
        adapters.control_next(widths=())
    with pytest.raises(ValueError, match="rank >= 1"):
        adapters.skip_tuner(0)
    with pytest.raises(ValueError, match="all of them at init"):
        init(adapters.skip_tuner(2, conditions=("a", "b")), {"a": PICTURE})
    with pytest.raises(ValueError, match="none of them 'boxes'"):
        adapters.control_norm(("boxes",))
    with pytest.raises(ValueError, match="reads a dict of pictures"):
        init(adapters.control_norm(("a", "b")), PICTURE)
    fn, params, x, t, cond = made("control_norm")
    with pytest.raises(ValueError, match="boxes must be floats"):
        fn(params, x, t, {**cond, "it": {"a": PICTURE[:, None], "boxes": np.ones((3, 1, 4), np.int32)}})
    with pytest.raises(ValueError, match="all its pictures"):
        init(adapters.control_norm(("a", "b")), {"a": PICTURE})
    with pytest.raises(ValueError, match="reads masks"):
        init(adapters.region_bias(), PICTURE)
