"""Grids between their points against loops and closed forms; the network of coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
