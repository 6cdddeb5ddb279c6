"""The densities of the plane: normalised, score is the gradient, samples follow them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import data
from diffjax.data import densities

NAMES = ("gaussians", "moons", "checkerboard", "swiss_roll", "pinwheel")
EDGE, CELLS, FINE = 3.5, 20, 16  # a grid of 20 x 20 cells over [-3.5, 3.5]^2, each integrated by 16 x 16 midpoints


@functools.cache
def build(name):
    return getattr(densities, f"{name}_density")()


@functools.cache
def table(name):
    """Density at the midpoints of a fine grid in float64, [n, n], and the points, [n, n, 2]."""
    n = CELLS * FINE
    g = (np.arange(n) + 0.5) * (2 * EDGE / n) - EDGE
    points = np.stack(np.meshgrid(g, g, indexing="ij"), -1)
    with jax.enable_x64():
        f = jax.jit(build(name).log_density)
        values = np.concatenate([np.asarray(f(jnp.asarray(rows))) for rows in np.array_split(points, 10)])
    return np.exp(values), points


@pytest.mark.parametrize("name", NAMES)
def test_integrates_to_one_with_zero_mean_and_unit_deviation(name):
    values, points = table(name)
    area = (2 * EDGE / len(values)) ** 2
    # The midpoint rule is exact far below this for analytic integrands; 1e-6 leaves room for mass beyond the edge.
    assert abs(values.sum() * area - 1) < 1e-6
    mean = (values[..., None] * points).sum((0, 1)) * area
    square = (values[..., None] * points**2).sum((0, 1)) * area
    assert np.abs(mean).max() < 1e-5 and abs(square.mean() - 1) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_gradient(name, x64):
    density = build(name)
    x = np.concatenate(
        [np.asarray(density.sample(jax.random.key(1), 200)[0]), np.random.default_rng(0).normal(0, 3, (100, 2))]
    )
    h = 1e-5
    f = jax.jit(density.log_density)
    differences = np.stack([np.asarray(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(2)], -1)
    score = np.asarray(jax.jit(density.score)(x))
    scale = 1 + np.abs(score)
    assert (np.abs(score - differences) / scale).max() < 1e-6  # h^2 times third derivatives of about 1e3
    gradient = np.asarray(jax.jit(jax.vmap(jax.grad(density.log_density)))(x))
    assert (np.abs(score - gradient) / scale).max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_density(name):
    n = 50_000
    x, label = jax.jit(build(name).sample, static_argnums=1)(jax.random.key(3), n)
    counts, _, _ = np.histogram2d(*np.asarray(x).T, CELLS, [[-EDGE, EDGE]] * 2)
    values, _ = table(name)
    expected = n * values.reshape(CELLS, FINE, CELLS, FINE).sum((1, 3)) * (2 * EDGE / len(values)) ** 2
    use = expected > 8
    chi2, degrees = ((counts - expected)[use] ** 2 / expected[use]).sum(), use.sum() - 1
    assert chi2 < degrees + 4.5 * np.sqrt(2 * degrees)  # 4.5 standard deviations
    assert counts[use].sum() > 0.99 * n
    assert label.dtype == jnp.int32 and set(np.unique(label)) == set(range(build(name).classes))


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_finite_far_away_and_has_any_batch_shape(name):
    density = build(name)
    x = np.array([[[30.0, -20.0], [0.0, 0.0]], [[-9.0, 9.0], [0.3, -100.0]]], np.float32)
    score, log_density = density.score(x), density.log_density(x)
    assert score.shape == (2, 2, 2) and log_density.shape == (2, 2) and score.dtype == jnp.float32
    assert np.isfinite(np.asarray(score)).all() and np.isfinite(np.asarray(log_density)).all()
    assert (np.asarray(score[0, 0]) * x[0, 0] < 0).all()  # it points home


def test_two_gaussians_by_hand(x64):
    factors = np.array([[[0.5, 0.0], [0.3, 0.4]], [[1.0, 0.0], [0.0, 2.0]]])
    means, weights = np.array([[0.0, 1.0], [2.0, -1.0]]), np.array([1.0, 3.0])
    density = densities.mixture(means, factors, weights, standardise=False)
    from scipy.stats import multivariate_normal as normal

    x = np.random.default_rng(0).normal(size=(7, 2))
    expected = sum(w / 4 * normal(m, f @ f.T).pdf(x) for w, m, f in zip(weights, means, factors, strict=True))
    np.testing.assert_allclose(density.log_density(x), np.log(expected), rtol=1e-12)


def test_the_data_set_carries_the_exact_functions():
    first, again = data.load("moons", size=500), data.load("moons", size=500)
    assert (first.arrays["x"] == again.arrays["x"]).all() and first.arrays["x"].shape == (500, 2)
    assert first.score is again.score  # jitted functions are not traced again
    assert not (first.arrays["x"] == data.load("moons", size=500, seed=1).arrays["x"]).all()
    batch = first.read("test")
    assert (batch["x"] == first.arrays["x"][first.splits["test"]]).all()  # the transform is the identity
    np.testing.assert_allclose(first.score(batch["x"]), densities.moons_density().score(batch["x"]))
    assert data.load("swiss_roll", size=50).num_classes is None
    with pytest.raises(data.DataError, match="size must be at least 4.* got 2"):
        data.load("moons", size=2)


def test_mixture_refuses():
    with pytest.raises(ValueError, match=r"means must be \[K, d\]"):
        densities.mixture(np.zeros(3), 1.0)
    with pytest.raises(ValueError, match=r"2 means of dimension 2 need .* weights \[2\]"):
        densities.mixture(np.zeros((2, 2)), 1.0, np.ones(3))
    with pytest.raises(ValueError, match="weights must be positive"):
        densities.mixture(np.zeros((2, 2)), 1.0, np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="singular"):
        densities.mixture(np.zeros((2, 2)), np.array([1.0, 0.0]))
