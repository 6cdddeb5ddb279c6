"""Autoencoders: published sizes, the contract of `encode` and `decode`, and the linear path against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffjax import networks as nw
from diffjax.networks.components import fold, unfold
from diffjax.training import Layout


def by_hand(widths, blocks, latent, inner, attention, moments, codes=0):
    """Parameters of the published autoencoders, from their description."""
    conv = lambda a, b: 9 * a * b + b
    block = lambda a, b: 2 * a + conv(a, b) + 2 * b + conv(b, b) + (a * b + b if a != b else 0)
    attend = lambda n: 2 * n + 4 * (n * n + n)
    n, top = widths[-1], len(widths) - 1
    middle = 2 * block(n, n) + attend(n)
    down, a = conv(3, widths[0]), widths[0]
    for i, b in enumerate(widths):
        down += (
            block(a, b) + (blocks - 1) * block(b, b) + blocks * attend(b) * (i in attention) + conv(b, b) * (i < top)
        )
        a = b
    down += middle + 2 * n + conv(n, moments * inner)
    up, a = conv(inner, n) + middle, n
    for i, b in reversed(list(enumerate(widths))):
        up += block(a, b) + blocks * block(b, b) + (blocks + 1) * attend(b) * (i in attention) + conv(b, b) * (i > 0)
        a = b
    up += 2 * widths[0] + conv(widths[0], 3)
    maps = (moments * inner + 1) * moments * latent + (latent + 1) * inner
    return down + up + maps + codes * latent


# 83,653,863 is what the released weights of Stable Diffusion's autoencoder hold; the others have 55.3 M, 55.3 M, ...
SIZES = {
    "kl-f8": ((128, 256, 512, 512), 2, 4, 4, (), 2),
    "kl-f4": ((128, 256, 512), 2, 3, 3, (), 2),
    "kl-f16": ((128, 128, 256, 256, 512), 2, 16, 16, (4,), 2),
    "vq-f4": ((128, 256, 512), 2, 3, 3, (), 1, 8192),
    "vq-f16": ((128, 128, 256, 256, 512), 2, 8, 8, (4,), 1, 16384),
    "vqgan-f16-1024": ((128, 128, 256, 256, 512), 2, 256, 256, (4,), 1, 1024),
    "vqgan-f16-16384": ((128, 128, 256, 256, 512), 2, 256, 256, (4,), 1, 16384),
}


def shapes(net, shape=(32, 32, 3)):
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_published(name):
    n = nw.parameter_count(shapes(nw.preset(name)))
    assert n == by_hand(*SIZES[name])
    assert n == {"kl-f8": 83_653_863, "kl-f4": 55_312_063, "vq-f4": 55_322_782}.get(name, n)


def test_the_discriminator_has_the_published_parameters():
    """2,765,633 with three channels, as counted by hand: 4 x 4 convolutions, and two numbers a channel for each norm."""
    c = lambda a, b: 16 * a * b
    hand = c(3, 64) + 64 + c(64, 128) + 256 + c(128, 256) + 512 + c(256, 512) + 1024 + c(512, 1) + 1
    assert nw.parameter_count(shapes(nw.PatchDiscriminator())) == hand == 2_765_633


# ---------------------------------------------------------------------------------------------------------- contract

B = 3
FIELDS = dict(widths=(8, 16), blocks=1, latent_channels=4, attention=(0,))
NETS = {
    "kl": nw.KLAutoencoder(**FIELDS),
    "vq": nw.VQAutoencoder(**FIELDS, codes=16, bottleneck=6, patch=2, linear=True),
    "implicit": nw.ImplicitAutoencoder(**FIELDS, features=4, width=8),
}


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(path, a):
        z, kernel = rng.standard_normal(a.shape), path[-1].key == "kernel"
        z = z / np.sqrt(np.prod(a.shape[:-1])) if kernel else 0.1 * z
        return np.asarray(z + (path[-1].key == "scale"), np.float32)

    return jax.tree_util.tree_map_with_path(leaf, tree)


@pytest.fixture(scope="module", params=list(NETS))
def case(request):
    """`(net, make, params, x, compiled)`, where compiled(params, x) is `(posterior, picture)`."""
    net = NETS[request.param]
    x = np.random.default_rng(1).standard_normal((B, 8, 12, 3)).astype(np.float32)
    make = nw.autoencoder(net)
    both = jax.jit(lambda params, x: (lambda p: (p, make(params).decode(p.mean)))(make(params).encode(x)))
    return net, make, random_like(shapes(net, x.shape[1:])), x, both


def test_every_catalogue_entry_is_tested_here():
    assert set(NETS) == set(nw.AUTOENCODERS)
    assert all(nw.AUTOENCODERS[k].build is type(net) and hash(net) == hash(net.clone()) for k, net in NETS.items())
    assert nw.autoencoder(NETS["kl"]) == nw.autoencoder(NETS["kl"].clone())


def test_shapes_dtypes_and_items(case):
    net, _, params, x, both = case
    posterior, y = both(params, x)
    h, w = 8 // (2 * net.patch), 12 // (2 * net.patch)
    assert posterior.mean.shape == (B, h, w, 4) and y.shape == x.shape and y.dtype == jnp.float32
    assert np.isfinite(y).all() and np.std(y) > 1e-2
    assert (posterior.log_variance is None) == (type(net) is nw.VQAutoencoder)
    moved = both(params, np.concatenate([x[:1], x[:0:-1]]))[1]
    np.testing.assert_allclose(moved[0], y[0], atol=1e-5)
    np.testing.assert_allclose(moved[1], y[2], atol=1e-5)
    assert np.abs(both(params, x + 0.5)[1] - y).max() > 1e-3


@pytest.mark.slow
def test_taps_are_read_and_written_and_remat_changes_nothing(case):
    net, _, params, x, both = case
    call = lambda net: lambda p, x, mutable=False: net.apply({"params": p}, x, mutable=mutable)
    found = {}

    def seen(p, x):
        names = nw.tap_names(call(net), p, x)
        found["names"] = names
        return nw.tapped(call(net), read=names)(p, x)

    y, taps = jax.jit(seen)(params, x)
    np.testing.assert_allclose(y, both(params, x)[1], atol=1e-5)
    wanted = {"encoder/down_0_0/block", "encoder/down_1_0/residual", "encoder/attention_0_0/weights"}
    if type(net) is not nw.ImplicitAutoencoder:
        wanted |= {"decoder/up_0_1/block", "decoder/middle_1/block", "decoder/attention_0_1/weights"}
        parts = ("q", "k", "v", "logits", "weights")
        wanted |= {f"{side}/middle_attention/{n}" for side in ("encoder", "decoder") for n in parts}
    assert wanted <= set(taps) == set(found["names"])
    np.testing.assert_allclose(taps["encoder/attention_0_0/weights"].sum(-1), 1, atol=1e-5)
    write = {"encoder/down_0_0/block": lambda h: 0 * h}
    assert np.abs(jax.jit(nw.tapped(call(net), write=write))(params, x) - y).max() > 1e-3
    both_of = lambda net: jax.jit(jax.grad(lambda p: jnp.square(call(net)(p, x)).sum()))(params)
    a, b = both_of(net), both_of(net.clone(remat="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 + 1e-4 * np.abs(a).max()), a, b)


def test_bfloat16_inside_float32_outside(case):
    net, _, params, x, both = case
    make = nw.autoencoder(net.clone(dtype=jnp.bfloat16))
    posterior = jax.jit(lambda p, x: make(p).encode(x))(params, x)
    assert posterior.mean.dtype == jnp.float32
    exact = both(params, x)[0].mean
    assert 1e-5 < np.abs(posterior.mean - exact).max() < 0.2 * np.abs(exact).max()


def test_rules_fit_and_a_cut_autoencoder_gives_the_same(case):
    net, make, params, x, both = case
    layout = Layout(data=1, model=2, rules=nw.partition_rules(net))
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    specs = jax.tree_util.tree_map_with_path(lambda p, a: layout.spec(path(p), a.shape), params)
    assert any(s != PartitionSpec() for s in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec)))
    place = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))
    cut = jax.tree.map(place, params, specs)
    with jax.set_mesh(mesh):
        mean = jax.jit(lambda p, x: make(p).encode(x).mean)(cut, place(x[:2], PartitionSpec("data")))
    np.testing.assert_allclose(mean, both(params, x)[0].mean[:2], atol=1e-4)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((1, 6, 9, 3), np.float32), "divisible by 2; got pictures of shape"),
        (np.zeros((1, 4, 4, 3), np.int32), "floating pictures"),
        (np.zeros((4, 4, 3), np.float32), "floating pictures"),
    ],
)
def test_bad_pictures_are_refused(x, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(NETS["kl"].init, jax.random.key(0), x)


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match="attention at levels of widths"):
        shapes(nw.KLAutoencoder(widths=(8,), attention=(1,)))
    with pytest.raises(ValueError, match="methods encode and decode; MLP lacks encode and decode"):
        nw.autoencoder(nw.MLP())
    with pytest.raises(ValueError, match="has no quantise"):
        nw.autoencoder(NETS["kl"])({}).encode_tokens  # noqa: B018
        nw.autoencoder(NETS["kl"])({}).quantise(jnp.zeros((1, 2, 2, 4)))
    with pytest.raises(ValueError, match="Did you mean"):
        nw.preset("kl-f9")


# ------------------------------------------------------------------------------------------------------------- parts


def test_the_halving_pads_right_and_below_alone():
    """As published: the window of the last row and column reaches one zero beyond the picture."""
    x = jnp.ones((1, 4, 4, 1))
    y = nw.Conv(1, stride=2, before=0).apply({"params": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}, x)
    assert y[0, :, :, 0].tolist() == [[9.0, 6.0], [6.0, 4.0]]


def test_the_linear_path_starts_as_principal_components():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 8, 8, 3)).cumsum(1).cumsum(2).astype(np.float32)
    net = nw.preset("kl4", widths=(8,), latent_channels=5)
    make = nw.autoencoder(net)
    a = make(nw.start_linear(net, random_like(shapes(net, (8, 8, 3))), x))
    p = jax.jit(lambda a, x: (a.encode(x), a.decode(a.encode(x).mean)))(a, x)
    squares = np.asarray(fold(x.astype(np.float64), 4)).reshape(-1, 48)
    np.testing.assert_array_equal(unfold(fold(x, 4), 4), x)
    _, _, axes = np.linalg.svd(squares - squares.mean(0), full_matrices=False)
    best = (squares - squares.mean(0)) @ axes[:5].T @ axes[:5] + squares.mean(0)
    assert np.abs(np.asarray(fold(p[1], 4)).reshape(-1, 48) - best).max() < 1e-3 * np.abs(x).max()
    z = np.asarray(p[0].mean).reshape(-1, 5)
    np.testing.assert_allclose(np.cov(z.T), np.eye(5), atol=1e-2)
    with pytest.raises(ValueError, match="linear=True"):
        nw.start_linear(NETS["kl"], {}, x)
    with pytest.raises(ValueError, match="data that vary"):
        nw.start_linear(net, random_like(shapes(net, (8, 8, 3))), np.ones_like(x))
    two = nw.start_linear(net, random_like(shapes(net, (8, 8, 3))), x[:1, :4, :8])  # squares: one direction, for five
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(two))
