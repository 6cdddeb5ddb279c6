"""Attention in a circle: against a loop over pixels, against full attention, and cut over devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from network_cases import case_of

from diffjax import networks as nw
from diffjax.networks.attention import full
from diffjax.networks.local import Circle, halo
from diffjax.training.flops import count

RNG = np.random.default_rng(0)


def draw(n, b=2, heads=2, size=4):
    return RNG.standard_normal((3, b, n, heads, size)).astype(np.float32)


def textbook(q, k, v, grid, radius, mask):
    """Query by query, in float64: text first, then the grid row by row."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    h, w = grid
    text = q.shape[1] - h * w
    place = [None] * text + [(i, j) for i in range(h) for j in range(w)]
    y = np.zeros_like(q)
    for b in range(q.shape[0]):
        for a, here in enumerate(place):
            seen = []
            for s, there in enumerate(place):
                if there is None:
                    seen.append(bool(mask[b, s]))
                elif here is None:
                    seen.append(True)
                else:
                    seen.append((here[0] - there[0]) ** 2 + (here[1] - there[1]) ** 2 < radius**2)
            keys = np.flatnonzero(seen)
            for head in range(q.shape[2]):
                logits = k[b, keys, head] @ q[b, a, head]
                weights = np.exp(logits - logits.max())
                y[b, a, head] = weights / weights.sum() @ v[b, keys, head]
    return y


def mixed(circle, q, k, v, mask=None, grid=None):
    """Mixing needs a module around it, for its taps."""
    return jax.jit(lambda q, k, v: Mix(circle, grid).apply({}, q, k, v, mask))(q, k, v)


class Mix(nn.Module):
    circle: object
    grid: tuple

    @nn.compact
    def __call__(self, q, k, v, mask):
        return self.circle(q, k, v, mask, self.grid)


@pytest.mark.parametrize(
    ("grid", "radius", "tile", "text"),
    [((5, 7), 3, None, 0), ((6, 4), 2.5, 2, 3), ((7, 3), 1, 4, 2), ((4, 9), 4, 1, 0), ((5, 5), 5.6, 3, 0)],
)
def test_a_circle_and_the_text_are_attended_to_as_in_a_loop(grid, radius, tile, text):
    q, k, v = draw(grid[0] * grid[1] + text)
    mask = np.ones(q.shape[:2], bool)
    mask[0, : text // 2] = False
    y = mixed(Circle(radius, tile), q, k, v, jnp.asarray(mask), grid)
    np.testing.assert_allclose(y, textbook(q, k, v, grid, radius, mask), atol=2e-6)


def test_a_circle_beyond_the_diagonal_is_full_attention():
    """The tiled form itself, with the shortcut to full attention one ulp away."""
    grid, (q, k, v) = (4, 6), draw(24)
    diagonal = np.hypot(3, 5)
    want = np.asarray(mixed(full, q, k, v, None, grid))
    np.testing.assert_array_equal(mixed(Circle(diagonal + 1), q, k, v, None, grid), want)
    tiled = Circle(100.0)._on_grid
    text = (k[:, :0], v[:, :0], None)
    y = jax.jit(lambda q, k, v: mixed(lambda *a: tiled(q, k, v, text, grid), q, k, v))(q, k, v)
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert np.abs(mixed(Circle(3), q, k, v, None, grid) - want).max() > 1e-2


@pytest.mark.parametrize(("devices", "radius"), [(2, 3), (4, 3), (4, 4.5)])
def test_cut_over_devices_it_is_the_same_and_only_borders_are_sent(devices, radius):
    """8 rows; a radius of 4.5 reaches over the neighbour's rows to the next device."""
    grid, text = (8, 5), 2
    q, k, v = draw(text + 40)
    mask = np.array([[True, False] + [True] * 40] * 2)
    mesh = jax.make_mesh((2, devices), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def value_and_slope(q, k, v):
        f = lambda *a: Mix(Circle(radius), grid).apply({}, *a, jnp.asarray(mask))
        y, back = jax.vjp(f, q, k, v)
        return y, back(jnp.cos(y))

    want = jax.jit(value_and_slope)(q, k, v)
    with jax.set_mesh(mesh):
        args = jax.device_put((q, k, v), NamedSharding(mesh, PartitionSpec("data")))
        got = jax.jit(value_and_slope)(*args)
        cut = jax.device_put([a[:, text:] for a in args], NamedSharding(mesh, PartitionSpec("data", "sequence")))
        f = jax.jit(lambda q, k, v: Mix(Circle(radius), grid).apply({}, q, k, v, None))
        program = f.lower(*cut).compile().as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    assert "collective-permute" in program and "all-gather" not in program


def test_a_local_transformer_cut_over_devices_is_the_same():
    net = nw.DiT(width=8, depth=2, heads=2, expand=2, patch=1, mixing=Circle(3), scan_layers=True)
    x, t = RNG.standard_normal((2, 8, 6, 2)).astype(np.float32), np.array([0.2, 0.7], np.float32)
    params = nw.random_parameters(net, x, t)
    want = jax.jit(nw.from_linen(net))(params, x, t)
    mesh = jax.make_mesh((4, 2), ("sequence", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(nw.from_linen(net))(params, x, t), want, atol=1e-5)
        with pytest.raises(ValueError, match="6 rows of tokens cannot be cut over 4 devices"):
            jax.eval_shape(nw.from_linen(net), params, x[:, :6, :4], t)


def test_halo_rows_are_those_of_the_neighbours():
    mesh = jax.make_mesh((4,), ("sequence",))
    x = np.arange(8, dtype=np.float32).reshape(1, 8)
    cut = PartitionSpec(None, "sequence")
    f = jax.shard_map(lambda x: halo(x, 3, 4), mesh=mesh, in_specs=cut, out_specs=cut)
    rows, x = np.pad(x[0], 3), jax.device_put(x, NamedSharding(mesh, cut))
    np.testing.assert_array_equal(np.asarray(f(x)).reshape(4, 8), [rows[2 * i : 2 * i + 8] for i in range(4)])


def test_a_transformer_is_converted_by_a_field():
    """Same parameters; the tiled network is local, and a wide circle is the network that it was."""
    c = case_of("dit", patch=1, depth=1)
    local = c.net.clone(mixing=Circle(2))
    shapes = lambda net: jax.eval_shape(net.init, jax.random.key(0), c.x, c.t, c.cond)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, shapes(local), shapes(c.net)))
    y = np.asarray(jax.jit(c.fn)(c.params, c.x, c.t, c.cond))
    wide = nw.from_linen(c.net.clone(mixing=Circle(9)))
    np.testing.assert_allclose(jax.jit(wide)(c.params, c.x, c.t, c.cond), y, atol=1e-5)
    fn = nw.from_linen(local)
    names = nw.tap_names(fn, c.params, c.x, c.t, c.cond)
    assert names == nw.tap_names(c.fn, c.params, c.x, c.t, c.cond)
    f = jax.jit(nw.tapped(fn, read="block_0/attended"))
    moved = c.x.copy()
    moved[:, 0, 0] += 1
    before, after = (f(c.params, x, c.t, c.cond)[1]["block_0/attended"] for x in (c.x, moved))
    touched = np.abs(after - before).max((0, 2)).reshape(4, 6) > 1e-6
    assert touched.tolist() == [[i * i + j * j < 4 for j in range(6)] for i in range(4)]
    low = jax.jit(nw.from_linen(local.clone(dtype=jnp.bfloat16)))(c.params, c.x, c.t, c.cond)
    high = jax.jit(fn)(c.params, c.x, c.t, c.cond)
    assert np.abs(high - y).max() > 1e-2 and np.abs(low - high).max() < 0.25 * np.abs(high).max()


def test_operations_grow_as_the_number_of_tokens():
    def cost(mixing, side):
        net = nw.from_linen(nw.DiT(width=16, depth=1, heads=2, patch=1, mixing=mixing))
        x = jnp.zeros((1, side, side, 1))
        params = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1))
        return count(net, params, x, jnp.zeros(1)).matmul

    once, four = cost(Circle(3), 16), cost(Circle(3), 32)
    tokens = 16 * 16
    assert four - 4 * once == pytest.approx(0, abs=1e-2 * once)  # but for the code of time, which has no tokens
    quadratic = 2 * 2 * (4 * tokens) ** 2 * 16 - 4 * 2 * 2 * tokens**2 * 16
    assert cost(full, 32) - 4 * cost(full, 16) == pytest.approx(quadratic, rel=0.01)


def test_bad_circles_are_refused():
    with pytest.raises(ValueError, match="radius > 0 and tile >= 1; got radius=0"):
        Circle(0)
    q, k, v = draw(6)
    with pytest.raises(ValueError, match=r"needs grid=\(height, width\).*got grid=None"):
        Circle(2)(q, k, v)
    with pytest.raises(ValueError, match=r"of at most 6 tokens.*got grid=\(3, 3\)"):
        Circle(2)(q, k, v, None, (3, 3))
