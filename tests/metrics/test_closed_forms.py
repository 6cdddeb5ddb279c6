"""Scores against closed forms, brute force and textbook loops."""

import itertools

import numpy as np
import pytest

from diffjax import metrics
from diffjax.metrics.kernels import median_distance
from diffjax.metrics.pairwise import nearest
from diffjax.metrics.streaming import merge_moments, moments_of

rng = np.random.default_rng(3)


def spd(d, rank=None):
    root = rng.standard_normal((d, rank or d))
    return root @ root.T


# ----------------------------------------------------------------------------------------------------------- Frechet


def test_frechet_of_commuting_gaussians():
    q = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    a, b = np.array([1.0, 4.0, 9.0, 0.0, 2.0]), np.array([4.0, 4.0, 0.0, 0.0, 8.0])
    mean = rng.standard_normal(5)
    want = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = metrics.frechet_distance(np.zeros(5), q * a @ q.T, mean, q * b @ q.T)
    assert got == pytest.approx(want, rel=1e-12)


def test_frechet_of_general_gaussians_against_the_matrix_square_root():
    from scipy.linalg import sqrtm

    a, b = spd(6), spd(6)
    want = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert metrics.frechet_distance(np.zeros(6), a, np.zeros(6), b) == pytest.approx(want, rel=1e-9)
    assert metrics.frechet_distance(np.ones(6), a, np.ones(6), a) == pytest.approx(0, abs=1e-12 * np.trace(a))


def test_frechet_of_singular_covariances():
    low = spd(40, rank=3)
    assert metrics.frechet_distance(np.zeros(40), low, np.zeros(40), low) == pytest.approx(0, abs=1e-10 * np.trace(low))
    zero = np.zeros((40, 40))
    assert metrics.frechet_distance(np.zeros(40), low, np.zeros(40), zero) == pytest.approx(np.trace(low), rel=1e-12)


def test_fewer_samples_than_features():
    x = rng.standard_normal((5, 30))
    assert metrics.score(metrics.frechet(x), x) == pytest.approx(0, abs=1e-9)
    shifted = metrics.score(metrics.frechet(x), x + 2.0)
    assert shifted == pytest.approx(30 * 4.0, rel=1e-10)


def test_moments_far_from_zero_lose_no_digits():
    x = rng.standard_normal((1000, 3))
    far = (x + 1e6).astype(np.float64)
    state = moments_of(far[:1])
    for row in range(1, 1000):
        state = merge_moments(state, moments_of(far[row : row + 1]))
    # the data themselves carry 1e6 * 2^-53 of rounding, about 1e-10
    np.testing.assert_allclose(state.scatter / 999, np.cov(x.T), atol=1e-8)
    np.testing.assert_allclose(state.mean, far.mean(0), rtol=1e-14)
    float32_sums = (far.astype(np.float32) ** 2).mean(0) - far.astype(np.float32).mean(0) ** 2
    assert np.abs(float32_sums - 1).max() > 1  # what the textbook formula makes of it


def test_a_reference_may_be_its_moments():
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((60, 4))
    streamed = merge_moments(moments_of(x[:20]), moments_of(x[20:]))
    assert metrics.score(metrics.frechet(streamed), y) == pytest.approx(metrics.score(metrics.frechet(x), y), rel=1e-10)
    with pytest.raises(ValueError, match="samples have 3 features"):
        metrics.score(metrics.frechet(streamed), y[:, :3])


# --------------------------------------------------------------------------------------------------------- transport


def test_sliced_distance_in_one_dimension_is_the_sorted_one():
    a, b = rng.standard_normal((50, 1)), 2 * rng.standard_normal((50, 1)) + 1
    want = np.sqrt(((np.sort(a[:, 0]) - np.sort(b[:, 0])) ** 2).mean())
    assert metrics.score(metrics.sliced_wasserstein(a), b) == pytest.approx(want, rel=1e-5)
    assert metrics.score(metrics.exact_w2(a), b) == pytest.approx(want, rel=1e-12)


def test_sliced_distance_of_sets_of_different_sizes():
    a, b = rng.standard_normal((6, 1)), rng.standard_normal((4, 1))
    twelve = np.sort(np.repeat(a, 2, 0)[:, 0]), np.sort(np.repeat(b, 3, 0)[:, 0])
    want = np.sqrt(((twelve[0] - twelve[1]) ** 2).mean())
    assert metrics.score(metrics.sliced_wasserstein(a), b) == pytest.approx(want, rel=1e-5)


def test_sliced_distance_of_a_shift():
    # every direction sees theta . shift; for many directions the mean square is |shift|^2 / d
    a, shift = rng.standard_normal((80, 3)), np.array([[3.0, 4.0, 0.0]])
    got = metrics.score(metrics.sliced_wasserstein(a, projections=4096), a + shift)
    assert got == pytest.approx(5 / np.sqrt(3), rel=0.02)
    assert metrics.score(metrics.sliced_wasserstein(a), a) == 0


def test_exact_w2_by_brute_force():
    a, b = rng.standard_normal((5, 3)), rng.standard_normal((5, 3))
    cost = ((a[:, None] - b[None]) ** 2).sum(-1)
    want = min(cost[np.arange(5), list(p)].mean() for p in itertools.permutations(range(5)))
    assert metrics.score(metrics.exact_w2(a), b) == pytest.approx(np.sqrt(want), rel=1e-12)
    assert metrics.score(metrics.exact_w2(a), a[::-1]) == 0


# ----------------------------------------------------------------------------------------------------- pair statistics


def unbiased(kernel, x, y):
    """The textbook double loop."""
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * np.mean([[kernel(a, b) for b in y] for a in x])


def test_pair_statistics_against_the_double_loop():
    x, y = rng.standard_normal((17, 4)), 0.5 * rng.standard_normal((13, 4)) + 0.7
    h = median_distance(x)
    rbf = unbiased(lambda a, b: np.exp(-((a - b) ** 2).sum() / (2 * h * h)), x, y)
    poly = unbiased(lambda a, b: (a @ b / 4 + 1) ** 3, x, y)
    euclid = -unbiased(lambda a, b: np.linalg.norm(a - b), x, y)
    assert metrics.score(metrics.mmd(x), y) == pytest.approx(rbf, abs=1e-6)
    assert metrics.score(metrics.kid(x), y)["kid"] == pytest.approx(poly, abs=1e-5)
    assert metrics.score(metrics.energy(x), y) == pytest.approx(euclid, abs=1e-5)
    pairs = [np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)]
    assert h == pytest.approx(np.median(pairs), rel=1e-9)


@pytest.mark.parametrize("name", ["mmd", "energy", "kid"])
def test_unbiased_scores_are_zero_on_average_for_equal_laws(name):
    draws = np.random.default_rng(0).standard_normal((40, 2, 32, 3))
    options = {"mmd": {"bandwidth": 1.5}, "kid": {"subsets": 2}}.get(name, {})
    values = [metrics.score(metrics.CATALOGUE[name].build(a, **options), b) for a, b in draws]
    values = np.array([v["kid"] if isinstance(v, dict) else v for v in values])
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error
    assert 0.2 < (values < 0).mean() < 0.9  # a biased estimate is never negative
    moved = metrics.score(metrics.CATALOGUE[name].build(draws[0, 0], **options), draws[0, 1] + 1.0)
    moved = moved["kid"] if isinstance(moved, dict) else moved
    assert moved > 5 * values.std()


def test_standard_error_of_kid_is_of_the_size_of_its_spread():
    draws = np.random.default_rng(1).standard_normal((30, 2, 64, 3)) + np.array([0.0, 0.8]).reshape(1, 2, 1, 1)
    results = [metrics.score(metrics.kid(a), b) for a, b in draws]
    spread = np.std([r["kid"] for r in results], ddof=1)
    assert np.mean([r["standard_error"] for r in results]) == pytest.approx(spread, rel=0.5)


# -------------------------------------------------------------------------------------------------------- neighbours


def test_nearest_against_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    x, y = rng.standard_normal((40, 5)), rng.standard_normal((30, 5))
    want = NearestNeighbors(n_neighbors=4).fit(y).kneighbors(x)[0]
    np.testing.assert_allclose(nearest(x, y, 4, chunk=9), want, rtol=1e-5)
    want = NearestNeighbors(n_neighbors=3).fit(x).kneighbors()[0]
    np.testing.assert_allclose(nearest(x, x, 3, same=True), want, rtol=1e-5)


def test_a_copy_is_at_distance_zero_however_far_from_the_origin():
    x = (1e3 + rng.standard_normal((20, 8))).astype(np.float32)
    assert (nearest(x[:5], x)[:, 0] == 0).all()


def test_precision_and_recall_of_toy_sets():
    grid = np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), -1).reshape(-1, 2)
    score = lambda ref, x, k=3: metrics.score(metrics.precision_recall(ref, k=k), x)
    assert score(grid, grid) == {"precision": 1.0, "recall": 1.0}
    assert score(grid, grid + 100) == {"precision": 0.0, "recall": 0.0}
    half = grid[grid[:, 0] < 2.5]
    dropped = score(grid, half, k=2)  # every sample is real, and half of the reference out of reach
    assert dropped["precision"] == 1.0 and dropped["recall"] == pytest.approx(4 / 6)
    invented = score(half, grid, k=2)
    assert invented == {"precision": dropped["recall"], "recall": dropped["precision"]}


def test_points_on_a_surface_are_inside():
    # integer data tie all the time: the k-th neighbour itself lies on the sphere that it defines
    ref, x = np.array([[0.0], [1.0], [7.0]]), np.array([[2.0], [14.0]])
    assert metrics.score(metrics.precision_recall(ref, k=1), x)["precision"] == 0.5
    far = metrics.score(metrics.precision_recall(ref + 1000, k=1), x + 1000)
    assert far["precision"] == 0.5


def test_density_and_coverage_against_the_definition():
    ref, x, k = rng.standard_normal((25, 2)), 0.6 * rng.standard_normal((31, 2)), 4
    d_ref = np.linalg.norm(ref[:, None] - ref[None], axis=-1)
    radii = np.sort(d_ref, axis=1)[:, k]
    inside = np.linalg.norm(ref[:, None] - x[None], axis=-1) <= radii[:, None]
    got = metrics.score(metrics.density_coverage(ref, k=k), x)
    assert got["density"] == pytest.approx(inside.sum() / (k * 31), rel=1e-12)
    assert got["coverage"] == pytest.approx(inside.any(1).mean(), rel=1e-12)


# ------------------------------------------------------------------------------------------- classifiers, memorisation


def test_two_sample_test():
    x = rng.standard_normal((300, 3))
    same = metrics.score(metrics.c2st(x[:150]), x[150:])
    assert 0.4 < same["accuracy"] < 0.6 and same["p_value"] > 0.01
    far = metrics.score(metrics.c2st(x[:150]), x[150:] + 10)
    assert far["accuracy"] == 1.0 and far["p_value"] < 1e-80
    again = metrics.score(metrics.c2st(x[:150]), x[150:])
    assert again == same


def test_two_sample_test_with_another_estimator():
    from sklearn.linear_model import LogisticRegression

    x = rng.standard_normal((300, 3))
    metric = metrics.c2st(x[:150], estimator=lambda n: LogisticRegression())
    assert metrics.score(metric, x[150:] + 1)["accuracy"] > 0.75
    # a linear rule cannot see a change of scale, neighbours can
    wide = 4 * x[150:]
    assert metrics.score(metric, wide)["accuracy"] < 0.62 < metrics.score(metrics.c2st(x[:150]), wide)["accuracy"]


def test_memorisation_counts_copies():
    train, held_out, fresh = rng.standard_normal((3, 200, 6)).astype(np.float32)
    metric = metrics.memorisation(train, held_out)
    honest = metrics.score(metric, fresh)
    assert 0.9 < honest["nn"] < 1.1 and honest["near"] < 0.12
    assert [honest[k] for k in ("copies", "near_copies", "repeats", "near_repeats")] == [0, 0, 0, 0]
    step = np.float32(0.02)
    spoiled = np.concatenate([fresh[:100], train[:40], train[40:60] + step, fresh[:5], fresh[5:8] + step, fresh[:5]])
    found = metrics.score(metric, spoiled)
    assert (found["copies"], found["near_copies"]) == (40, 60)
    assert (found["repeats"], found["near_repeats"]) == (10, 13)
    copied = metrics.score(metric, train)
    assert copied["nn"] == 0 and copied["near"] == 1 and copied["copies"] == 200


def test_memorisation_sees_a_shrunken_set():
    train, held_out = rng.standard_normal((2, 300, 6)).astype(np.float32)
    near = train + 0.2 * rng.standard_normal((300, 6)).astype(np.float32)
    found = metrics.score(metrics.memorisation(train, held_out), near)
    assert found["nn"] < 0.6 and found["near"] > 0.3 and found["copies"] == 0


def test_accuracy_counts():
    metric = metrics.accuracy(lambda x: x[:, 0].astype(int))
    x = np.array([[0.0], [1.0], [2.0], [2.0]])
    assert metrics.evaluate(metric, [(x[:2], np.array([0, 0])), (x[2:], [2, 2])]) == 0.75
