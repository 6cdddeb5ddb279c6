"""Sets: order does not matter where it should not, padding is not read, and the published size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import inputs

from diffjax import networks as nw
from diffjax.networks.vecset import point_features

ORDER = np.array([4, 0, 5, 2, 1, 3])
SET = dict(width=8, depth=1, heads=2, expand=2, positions=False)


def network(length=6, **fields):
    net = nw.TokenDiT(**SET | fields)
    x, _, cond = inputs(net, (length, 3))
    t = np.array([0.1, 0.5, 0.9], np.float32)
    cond["present"] = np.arange(length)[None] < np.array([length, length - 1, length - 3])[:, None]
    if net.pair_size:
        cond["pairs"] = np.random.default_rng(1).standard_normal((3, length, length, net.pair_size)).astype(np.float32)
    params = nw.random_parameters(net, x, t, cond)
    return jax.jit(lambda params, x, cond: net.apply({"params": params}, x, t, cond)), params, x, cond


@pytest.mark.parametrize("fields", [dict(latents=3, token_size=4), dict(pair_size=2)], ids=["latents", "pairs"])
def test_a_set_network_is_equivariant_and_reads_no_padding(fields):
    f, params, x, cond = network(**fields)
    y = f(params, x, cond)
    moved = cond | {"present": cond["present"][:, ORDER]}
    if "pairs" in cond:
        moved["pairs"] = cond["pairs"][:, ORDER][:, :, ORDER]
        assert np.abs(f(params, x, cond | {"pairs": -cond["pairs"]}) - y).max() > 1e-3
        assert np.abs(f(params, x, cond | {"pairs": cond["pairs"].swapaxes(1, 2)}) - y).max() > 1e-3
    np.testing.assert_allclose(f(params, x[:, ORDER], moved), y[:, ORDER], atol=2e-5)
    poisoned = np.where(cond["present"][:, :, None], x, np.float32(np.nan))
    hidden = dict(cond)
    if "pairs" in cond:
        both = cond["present"][:, :, None] & cond["present"][:, None]
        hidden["pairs"] = np.where(both[..., None], cond["pairs"], np.float32(np.nan))
    np.testing.assert_array_equal(f(params, poisoned, hidden), y)
    assert not np.any(y[~cond["present"]]) and np.all(y[cond["present"]])
    assert np.abs(f(params, x, cond | {"present": np.ones((3, 6), bool)}) - y)[2, :3].max() > 1e-4


def test_padding_a_set_changes_nothing():
    """A set of five alone, and the same set padded to six."""
    f, params, x, cond = network()
    y = f(params, x, {"present": np.arange(6)[None] < np.full((3, 1), 5)})
    short, _, _, _ = network(5)
    np.testing.assert_allclose(short(params, x[:, :5], None), y[:, :5], atol=2e-5)


def test_positions_make_a_sequence_of_a_set():
    f, params, x, _ = network(positions=True)
    assert np.abs(f(params, x[:, ORDER], None) - f(params, x, None)[:, ORDER]).max() > 1e-2


@pytest.mark.parametrize(
    "fields, cond, message",
    [
        (dict(pair_size=2), {}, "pair_size=2 and cond no 'pairs'"),
        ({}, {"pairs": np.zeros((1, 2, 2, 1), np.float32)}, "pair_size=0"),
        (dict(pair_size=2), {"pairs": np.zeros((1, 2, 2, 1), np.float32)}, r"floats \[1, 2, 2, 2\]"),
        ({}, {"present": np.ones((1, 3), bool)}, r"bool \[1, 2\]"),
        (dict(pair_size=2, latents=2), {}, "not both"),
    ],
)
def test_wrong_elements_are_refused(fields, cond, message):
    net = nw.TokenDiT(**SET | fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2, 3)), jnp.zeros(1), cond)


def test_pooling_ignores_the_order_and_induced_attention_follows_it():
    x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
    mask = np.arange(6)[None] < np.array([[6], [4]])
    pool, induced = nw.SetPooling(2, 3), nw.InducedSet(2, 3)
    p, q = jax.jit(lambda k: (pool.init(k, x), induced.init(k, x)))(jax.random.key(0))
    f = jax.jit(lambda x, mask: (pool.apply(p, x, mask), induced.apply(q, x, mask)))
    pooled, spread = f(x, mask)
    again, moved = f(x[:, ORDER], mask[:, ORDER])
    np.testing.assert_allclose(again, pooled, atol=1e-5)
    np.testing.assert_allclose(moved, spread[:, ORDER], atol=1e-5)
    assert pooled.shape == (2, 3, 8) and np.std(pooled, axis=1).min() > 1e-3
    other = np.where(mask[:, :, None], x, 7)
    np.testing.assert_allclose(f(other, mask)[0], pooled, atol=1e-6)
    with pytest.raises(ValueError, match="divisible by heads"):
        jax.eval_shape(nw.SetAttention(3).init, jax.random.key(0), x)


def test_farthest_points_are_those_of_the_loop():
    x = np.random.default_rng(0).standard_normal((2, 9, 3)).astype(np.float32)
    mask = np.arange(9)[None] < np.array([[9], [6]])
    got = nw.farthest_points(x, 4, mask)
    for cloud, n, points in zip(x, (9, 6), got, strict=True):
        cloud = cloud[:n]
        chosen = [cloud[np.argmax(((cloud - cloud.mean(0)) ** 2).sum(-1))]]
        while len(chosen) < 4:
            nearest = ((cloud[:, None] - np.array(chosen)[None]) ** 2).sum(-1).min(1)
            chosen.append(cloud[np.argmax(nearest)])
        np.testing.assert_array_equal(points, chosen)
    with pytest.raises(ValueError, match="at most the number of points"):
        nw.farthest_points(x, 10)


def test_a_set_of_vectors_tells_the_shape_whatever_the_order_of_its_points():
    net = nw.VecSet(width=8, depth=1, heads=2, latents=3, latent_size=2, bands=2)
    rng = np.random.default_rng(0)
    points, places = (rng.uniform(-1, 1, (2, n, 3)).astype(np.float32) for n in (6, 5))
    v = {"params": nw.random_parameters(net, points, places)}

    @jax.jit
    def both(points, places):
        z = net.apply(v, points, method="encode")
        return net.apply(v, points, places), z, net.apply(v, z.mean, places, method="decode")

    y, z, decoded = both(points, places)
    assert y.shape == (2, 5, 1) and z.mean.shape == z.log_var.shape == (2, 3, 2) and np.std(y) > 1e-3
    np.testing.assert_allclose(decoded, y, atol=1e-6)
    np.testing.assert_allclose(both(points[:, ORDER], places)[0], y, atol=1e-4)
    np.testing.assert_allclose(both(points, places[:, ::-1])[0], y[:, ::-1], atol=1e-5)
    slopes = jax.jit(jax.grad(lambda v: jnp.sum(jnp.square(net.apply(v, points, places)))))(v)
    unread = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(slopes) if not np.any(g)]
    assert unread == ["['params']['log_var']['bias']", "['params']['log_var']['kernel']"]  # the mean alone is decoded


def test_a_set_of_vectors_is_cut_over_devices_and_reads_no_padding():
    """Its encoder and the places have one head each, which no mesh can cut."""
    net = nw.VecSet(width=8, depth=1, heads=2, latents=3, bands=2)
    rng = np.random.default_rng(0)
    points, places = (rng.uniform(-1, 1, (2, n, 3)).astype(np.float32) for n in (6, 5))
    v = {"params": nw.random_parameters(net, points, places)}
    want = jax.jit(net.apply)(v, points[:, :4], places)
    mask = np.arange(6)[None] < np.array([[4], [4]])
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        got = jax.jit(net.apply)(v, np.where(mask[:, :, None], points, np.float32(np.nan)), places, mask)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_point_features_are_octaves():
    x = np.array([[[0.25, -0.5]]], np.float32)
    want = [np.sin(np.pi * w * c) for c in (0.25, -0.5) for w in (1, 2)]
    want += [np.cos(np.pi * w * c) for c in (0.25, -0.5) for w in (1, 2)]
    np.testing.assert_allclose(point_features(x, 2).ravel(), [*want, 0.25, -0.5], atol=1e-6)


@pytest.mark.parametrize("size, extra", [(0, 0), (64, 64 * 512 + 512 + 2 * (512 * 64 + 64))])
def test_the_default_is_the_published_autoencoder(size, extra):
    """By hand from the released code of arXiv:2301.11445, `ae_d512_m512` and `kl_d512_m512_l64`: 24 layers of width d."""
    d = 512
    attention, mlp = 4 * d * d + d, 2 * d + 12 * d * d + 9 * d  # no bias of q, k, v; gated MLP with its norm
    count = (51 * d + d) + 2 * (4 * d + attention) + mlp + 24 * (2 * d + attention + mlp) + (d + 1)
    cloud = jnp.zeros((1, 600, 3))
    net = nw.VecSet(latent_size=size, scan_layers=True)
    shapes = jax.eval_shape(net.init, jax.random.key(0), cloud, cloud)["params"]
    assert nw.parameter_count(shapes) == count + extra
