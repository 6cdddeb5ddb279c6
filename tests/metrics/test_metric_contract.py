"""What every metric of the catalogue keeps: parts add up, chunks do not matter, bad input is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import metrics
from diffjax.metrics import CATALOGUE

rng = np.random.default_rng(0)
REFERENCE = rng.standard_normal((41, 6)).astype(np.float32) + 5
HELD_OUT = rng.standard_normal((30, 6)).astype(np.float32) + 5
SAMPLES = (1.3 * rng.standard_normal((41, 6)) + 4.8).astype(np.float32)
LABELS = rng.integers(0, 2, 41)
REFERENCED = sorted(set(CATALOGUE) - {"accuracy"})
CHUNKED = ["precision_recall", "density_coverage", "kid", "mmd", "energy", "sliced_wasserstein", "memorisation"]


def predict(x):
    return (x[:, 0] > 5).astype(int)


def build(name, reference=REFERENCE, **options):
    if name == "accuracy":
        return metrics.accuracy(predict)
    if name == "memorisation":
        return metrics.memorisation(reference, HELD_OUT, **options)
    return CATALOGUE[name].build(reference, **options)


def batch_of(name, rows):
    return (SAMPLES[rows], LABELS[rows]) if name == "accuracy" else SAMPLES[rows]


def close(a, b, rtol=2e-5):
    # float32 pair sums: the unbiased scores are differences of means of order one
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=1e-5), a, b)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_merge_of_parts_equals_the_whole(name):
    metric = build(name)
    whole = metric.compute(metric.update(metric.init(), batch_of(name, slice(None))))
    parts = []
    for device in (slice(0, 1), slice(1, 18), slice(18, 41)):
        state = metric.init()
        for rows in np.array_split(np.arange(41)[device], 2):
            if len(rows):
                state = metric.update(state, batch_of(name, rows))
        parts.append(state)
    close(metric.compute(metrics.merge_all(metric, parts)), whole)
    left = metric.merge(metric.merge(parts[0], parts[1]), parts[2])
    right = metric.merge(parts[0], metric.merge(parts[1], parts[2]))
    close(metric.compute(left), metric.compute(right))
    close(metric.compute(metric.merge(metric.init(), left)), whole)
    batches = [batch_of(name, rows) for rows in (slice(0, 20), slice(20, 41))]
    close(metrics.evaluate(metric, batches), metrics.score(metric, batch_of(name, slice(None))))


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_states_are_arrays_and_updates_pure(name):
    metric = build(name)
    empty = metric.init()
    state = metric.update(empty, batch_of(name, slice(0, 9)))
    before = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    metric.update(state, batch_of(name, slice(9, 41)))
    assert before and all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(state))
    for old, now in zip(before, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(old, now)
    assert jax.tree.structure(metric.init()) == jax.tree.structure(empty)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_results_are_plain_numbers(name):
    result = metrics.score(build(name), batch_of(name, slice(None)))
    assert json.loads(json.dumps(result)) == result
    assert all(isinstance(v, float | int) and np.isfinite(v) for v in jax.tree.leaves(result))


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_do_not_matter(name):
    results = [metrics.score(build(name, chunk=chunk), SAMPLES) for chunk in (None, 1, 7, 1000)]
    for result in results[1:]:
        close(result, results[0])


@pytest.mark.parametrize("name", REFERENCED)
def test_jax_arrays_and_float64_are_welcome(name):
    want = metrics.score(build(name), SAMPLES)
    close(metrics.score(build(name, jnp.asarray(REFERENCE)), jnp.asarray(SAMPLES)), want)
    close(metrics.score(build(name, REFERENCE.astype(np.float64)), SAMPLES.astype(np.float64)), want, rtol=1e-3)


def with_nan(x):
    x = x.copy()
    x[3, 1] = np.nan
    return x


@pytest.mark.parametrize("name", sorted(CATALOGUE))
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_nan, "NaN or Inf in 1 of 41 items, the first at index 3"),
        (lambda x: x[:0], "has 0 items"),
        (lambda x: (100 * x).astype(np.uint8), "floating array"),
        (lambda x: x[:, 0], "N first"),
    ],
)
def test_bad_samples_are_named(name, spoil, message):
    bad = spoil(SAMPLES)
    with pytest.raises(ValueError, match="samples.*" + message):
        metrics.score(build(name), (bad, LABELS[: len(bad)]) if name == "accuracy" else bad)


@pytest.mark.parametrize("name", REFERENCED)
def test_bad_references_are_named(name):
    word = "train" if name == "memorisation" else "reference"
    for bad in (with_nan(REFERENCE), REFERENCE[:0], REFERENCE.astype(np.int32)):
        with pytest.raises(ValueError, match=word):
            build(name, bad)
    with pytest.raises(ValueError, match="samples has items of shape"):
        metrics.score(build(name), SAMPLES[:, :5])


@pytest.mark.parametrize(
    ("name", "least"), [("frechet", 2), ("kid", 4), ("precision_recall", 4), ("density_coverage", 6)]
)
def test_too_few_items(name, least):
    with pytest.raises(ValueError, match=f"reference has {least - 1} items.*at least {least}"):
        build(name, REFERENCE[: least - 1])
    metric = build(name)
    with pytest.raises(ValueError, match="samples: got 1"):
        metrics.score(metric, SAMPLES[:1])
    with pytest.raises(ValueError, match="samples: got 0"):
        metric.compute(metric.init())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.evaluate(build("frechet"), []), "batches is empty"),
        (lambda: metrics.precision_recall(REFERENCE, k=0), "k must be"),
        (lambda: metrics.density_coverage(REFERENCE, k=-1), "k must be"),
        (lambda: metrics.kid(REFERENCE, subsets=1), "subsets"),
        (lambda: metrics.mmd(REFERENCE, bandwidth=0.0), "bandwidth must be positive; got 0.0"),
        (lambda: metrics.score(metrics.mmd(np.ones((8, 2))), np.ones((8, 2))), "give a bandwidth"),
        (lambda: metrics.sliced_wasserstein(REFERENCE, projections=0), "projections"),
        (lambda: metrics.exact_w2(np.zeros((2001, 1))), "2001 items; exact_w2 takes at most 2000"),
        (lambda: metrics.score(metrics.exact_w2(REFERENCE), SAMPLES[:7]), "41 reference items and 7 samples"),
        (lambda: metrics.c2st(REFERENCE, folds=1), "folds"),
        (lambda: metrics.memorisation(REFERENCE, HELD_OUT, quantile=1.0), "quantile must lie"),
        (lambda: metrics.memorisation(REFERENCE, REFERENCE), "not trained on"),
        (lambda: metrics.memorisation(REFERENCE, HELD_OUT[:, :2]), "held_out has items of shape"),
        (lambda: metrics.score(build("accuracy"), SAMPLES), "batches \\(x, labels\\)"),
        (lambda: metrics.score(build("accuracy"), (SAMPLES, LABELS[:5])), "labels must be 41 integers"),
        (lambda: metrics.score(build("energy", chunk=0), SAMPLES), "chunk must be at least 1"),
        (lambda: metrics.frechet(metrics.moments_of(REFERENCE[:1])), "at least 2"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
