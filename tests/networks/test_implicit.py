"""Grids between their points against loops and closed forms; the network of coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import networks as nw
from diffjax import numerics as nu
from diffjax.networks import implicit

RNG = np.random.default_rng(0)


def by_hand(grid, coords):
    """Bilinear interpolation of one grid [H, W, C] at [N, 2], point by point in float64."""
    h, w, _ = grid.shape
    out = []
    for c in coords:
        y, x = (min(max((c[k] + 1) * n / 2 - 0.5, 0.0), n - 1.0) for k, n in enumerate((h, w)))
        i, j = min(int(y), max(h - 2, 0)), min(int(x), max(w - 2, 0))
        up, right = min(i + 1, h - 1), min(j + 1, w - 1)
        top = (1 - (x - j)) * grid[i, j] + (x - j) * grid[i, right]
        bottom = (1 - (x - j)) * grid[up, j] + (x - j) * grid[up, right]
        out.append((1 - (y - i)) * top + (y - i) * bottom)
    return np.stack(out)


SIZES = [(3, 5), (1, 4), (2, 1), (20, 17)]  # the last one is gathered, the others are weighted


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", [True, False])
def test_interpolation_is_the_textbook_loop(size, shared):
    grid = RNG.standard_normal((2, *size, 3))
    coords = RNG.uniform(-1.2, 1.2, (30, 2) if shared else (2, 30, 2))  # some beyond the border
    got = jax.jit(implicit.interpolate)(grid.astype(np.float32), coords.astype(np.float32))
    each = [coords, coords] if shared else coords
    np.testing.assert_allclose(got, np.stack([by_hand(g, c) for g, c in zip(grid, each, strict=True)]), atol=1e-5)


@pytest.mark.parametrize("size", [(3, 5), (20, 17)])
def test_affine_functions_are_exact_and_points_are_kept(size):
    f = lambda c: c @ np.array([[2.0, -1.0], [0.5, 3.0]]) + np.array([1.0, -2.0])
    points = np.asarray(implicit.cell_centres(*size), np.float64)
    grid = f(points).reshape(1, *size, 2).astype(np.float32)
    inside = RNG.uniform(-1, 1, (50, 2)) * (1 - 1 / np.array(size))
    got = implicit.interpolate(grid, inside.astype(np.float32))
    np.testing.assert_allclose(got[0], f(inside), atol=1e-5)
    rough = RNG.standard_normal((1, *size, 2)).astype(np.float32)
    np.testing.assert_allclose(
        implicit.interpolate(rough, implicit.cell_centres(*size))[0], rough.reshape(-1, 2), atol=1e-5
    )


@pytest.mark.parametrize("size", [(4, 5), (20, 17)])
def test_its_gradients_are_finite_differences(size):
    grid, coords = RNG.standard_normal((1, *size, 1)), RNG.uniform(-0.8, 0.8, (6, 2))
    with jax.enable_x64():
        f = lambda g, c: jnp.sum(jnp.square(implicit.interpolate(g, c)))
        of_grid, of_coords = jax.jit(jax.grad(f, (0, 1)))(grid, coords)
    value = lambda g, c: np.sum(by_hand(g[0], c) ** 2)
    for a, g, move in (
        (grid, of_grid, lambda d: (grid + d, coords)),
        (coords, of_coords, lambda d: (grid, coords + d)),
    ):
        d = 1e-6 * RNG.standard_normal(a.shape)
        np.testing.assert_allclose(np.vdot(g, d), (value(*move(d)) - value(*move(-d))) / 2, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_three_planes_are_the_sum_of_three_projections(shared):
    planes = [RNG.standard_normal((2, 3, n, 2)) for n in (3, 4, 5)]
    coords = RNG.uniform(-1, 1, (9, 3) if shared else (2, 9, 3))
    got = jax.jit(implicit.interpolate_planes)([p.astype(np.float32) for p in planes], coords.astype(np.float32))
    for b in range(2):
        c = coords if shared else coords[b]
        want = by_hand(planes[0][b], c[:, :2]) + by_hand(planes[1][b], c[:, [0, 2]]) + by_hand(planes[2][b], c[:, 1:])
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_affine_functions_of_space_are_exact():
    """A plane knows two of three coordinates: together they hold every affine function."""
    slope, n = np.array([1.0, -2.0, 0.5]), 4
    points = np.asarray(implicit.cell_centres(n, n), np.float64)
    share = np.array([[0, 1], [0, 2], [1, 2]])
    planes = [(points @ (slope[axes] / 2)).reshape(1, n, n, 1).astype(np.float32) for axes in share]
    inside = RNG.uniform(-1, 1, (20, 3)) * (1 - 1 / n)
    got = implicit.interpolate_planes(planes, inside.astype(np.float32))[0, :, 0]
    np.testing.assert_allclose(got, inside @ slope, atol=1e-5)


def test_bad_input_is_refused():
    grid = jnp.zeros((2, 3, 3, 1))
    with pytest.raises(
        ValueError, match=r"coords must be floats \[N, 2\] or \[2, N, 2\].*got float32 of shape \(4, 3\)"
    ):
        implicit.interpolate(grid, jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"got float32 of shape \(3, 4, 2\)"):
        implicit.interpolate(grid, jnp.zeros((3, 4, 2)))
    with pytest.raises(ValueError, match=r"a grid must be \[B, H, W, C\]; got shape \(3, 3, 1\)"):
        implicit.interpolate(grid[0], jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match="planes must be three grids.*got 2"):
        implicit.interpolate_planes([grid, grid], jnp.zeros((4, 3)))


# ---------------------------------------------------------------------------------------------------------- networks

NET = implicit.ImplicitAutoencoder(
    widths=(4, 8, 8), latent_channels=2, features=3, scales=(2, 0), width=6, point_blocks=3, out_channels=2
)
X = RNG.standard_normal((3, 8, 4, 1)).astype(np.float32)


def random_params(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(2)
    draw = lambda path, a: np.float32(
        rng.standard_normal(a.shape) / np.sqrt(np.prod(a.shape[:-1]))
        if path[-1].key == "kernel"
        else (path[-1].key == "scale") + 0.1 * rng.standard_normal(a.shape)
    )
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(NET, X)


def test_values_are_the_published_recursion():
    """h_1 = block(p_1), h_k = block([h_{k-1}, p_k]): coarse field first, each read where the coordinate is."""
    net = implicit.Implicit(width=5, out_channels=2, blocks=3)
    fields = [RNG.standard_normal((2, n, n + 1, 4)).astype(np.float32) for n in (2, 6)]
    coords = RNG.uniform(-1, 1, (7, 2)).astype(np.float32)
    p = random_params(net, fields, coords)
    act, dense = lambda u: u / (1 + np.exp(-u)), lambda u, q: u @ q["kernel"] + q["bias"]
    for b in range(2):
        h = by_hand(fields[0][b], coords)
        for k in range(3):
            if k == 1:
                h = np.concatenate([h, by_hand(fields[1][b], coords)], -1)
            q = p[f"block_{k}"]
            h = dense(h, q["skip"]) + dense(act(dense(act(h), q["hidden"])), q["out"])
        want = dense(act(h), p["out"])
        np.testing.assert_allclose(jax.jit(net.apply)({"params": p}, fields, coords)[b], want, atol=1e-5)


def test_a_latent_is_a_function_of_coordinates(params):
    """Pictures of any size are that function at the centres of their pixels, whatever else is asked for."""
    auto = nw.autoencoder(NET)(params)
    z = jax.jit(lambda a: a.encode(X))(auto).mean
    assert z.shape == (3, 2, 1, 2)
    coords = jnp.asarray(RNG.uniform(-1, 1, (3, 5, 2)), jnp.float32)

    @jax.jit
    def values(auto, z, coords):
        grids = [auto.apply("decode_grid", z, shape) for shape in ((8, 4), (24, 12))]
        at = auto.apply("decode", z, coords), auto.apply("decode", z[:1], coords[0, ::-1])
        return auto.decode(z), *grids, *at

    own, same, larger, all_points, turned = values(auto, z, coords)
    assert own.shape == (3, 8, 4, 2) and own.dtype == jnp.float32 and np.std(own) > 1e-2
    np.testing.assert_array_equal(own, same)
    # a grid three times finer has the points of the coarse one in the middle of its cells
    np.testing.assert_allclose(larger[:, 1::3, 1::3], own, atol=1e-5)
    np.testing.assert_allclose(turned[0, ::-1], all_points[0], atol=1e-5)


def test_scales_choose_the_fields(params):
    z = np.zeros((2, 3, 2, 2), np.float32)
    shapes = jax.eval_shape(lambda: NET.apply({"params": params}, z, method=lambda net, z: net.fields(z)))
    assert [f.shape for f in shapes] == [(2, 3, 2, 3), (2, 12, 8, 3)]
    default = NET.clone(scales=None, point_blocks=None)
    blocks = jax.eval_shape(default.init, jax.random.key(0), X)["params"]["values"]
    assert [n for n in sorted(blocks) if n.startswith("block")] == [f"block_{k}" for k in range(4)]
    with pytest.raises(ValueError, match=r"scales must name levels 0 to 2.*got \(3,\)"):
        jax.eval_shape(NET.clone(scales=(3,)).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match="Implicit with 1 blocks reads 1 to 1 fields; got 2"):
        jax.eval_shape(NET.clone(point_blocks=1).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match="divisible by 4"):
        jax.eval_shape(NET.init, jax.random.key(0), X[:, :6])


def test_space_is_read_from_planes():
    net = implicit.Implicit(width=4, out_channels=1, blocks=2)
    fields = [tuple(RNG.standard_normal((2, n, n, 3)).astype(np.float32) for _ in range(3)) for n in (2, 4)]
    coords = RNG.uniform(-1, 1, (2, 6, 3)).astype(np.float32)
    p = random_params(net, fields, coords)
    got = jax.jit(net.apply)({"params": p}, fields, coords)
    summed = [np.asarray(implicit.interpolate_planes(f, coords)) for f in fields]
    as_grids = [s[:, None] for s in summed]  # [B, 1, N, c], read back at its own points
    line = implicit.cell_centres(1, 6)
    np.testing.assert_allclose(got, jax.jit(net.apply)({"params": p}, as_grids, line), atol=1e-5)


def test_gradients_reach_every_parameter_and_bfloat16_and_remat_change_little():
    small = NET.clone(widths=(4, 4), scales=(1, 0), point_blocks=2)
    params = random_params(small, X)
    coords = jnp.asarray(RNG.uniform(-1, 1, (9, 2)), jnp.float32)

    def loss(net, p):
        posterior = net.apply({"params": p}, X, method="encode")
        z = posterior.draw(nu.item_keys(jax.random.key(0), jnp.arange(3)))
        return jnp.mean(jnp.square(net.apply({"params": p}, z, coords, method="decode"))) + posterior.kl().mean()

    value, grad = jax.jit(jax.value_and_grad(lambda p: loss(small.clone(remat="full"), p)))(params)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grad))
    low = jax.jit(lambda p: loss(small.clone(dtype=jnp.bfloat16), p))(params)
    np.testing.assert_allclose(low, value, rtol=0.05)
    assert low.dtype == jnp.float32


def test_taps_are_named_and_written(params):
    names = nw.tap_names(NET.apply, {"params": params}, X)
    assert {"encoder/down_0_0/block", "fields/up_2_0/block", "values/embedding_1", "values/block_2/block"} <= set(names)
    write = {"values/embedding_0": lambda v: 0 * v}
    a, b = jax.jit(lambda p: (NET.apply(p, X), nw.tapped(NET.apply, write=write)(p, X)))({"params": params})
    assert np.abs(a - b).max() > 1e-3
