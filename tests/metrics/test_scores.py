"""Scores beside their floors, averaged over seeds and shown as a table."""

import functools
import io
import json

import numpy as np
import pytest
from rich.console import Console

from diffjax import metrics

rng = np.random.default_rng(0)
A, B, FAKE = rng.standard_normal((3, 60, 8, 8, 1)).astype(np.float32)
FAKE = 0.7 * FAKE + 0.5


def test_every_score_stands_beside_its_floor():
    result = metrics.distribution_scores(A, B, FAKE)
    assert json.loads(json.dumps(result)) == result
    assert (result["n"], result["reference"]) == (60, 60)
    scores = result["scores"]
    for part in ("frechet", "kernel", "mmd", "energy", "sliced_wasserstein", "exact_w2", "precision", "recall"):
        for space in ("pixels", "randconv"):
            entry = scores[f"{part}_{space}"]
            assert set(entry) == {"score", "floor", "ratio"}
            near_zero = part in ("kernel", "mmd", "energy")
            want = None if near_zero else entry["score"] / entry["floor"]
            assert entry["ratio"] == want
    for part in ("frechet", "mmd", "energy", "sliced_wasserstein", "c2st_accuracy"):
        assert scores[f"{part}_pixels"]["score"] > scores[f"{part}_pixels"]["floor"]
    assert not any("fid" in name.lower() or "kid" in name.lower() for name in scores)


def test_floor_is_the_score_of_the_other_real_half():
    metric = metrics.frechet(A, metrics.random_convolution())
    entry = metrics.distribution_scores(A, B, FAKE, metrics=[metrics.frechet])["scores"]["frechet_randconv"]
    assert entry["floor"] == pytest.approx(metrics.score(metric, B), rel=1e-6)
    assert entry["score"] == pytest.approx(metrics.score(metric, FAKE), rel=1e-6)
    same = metrics.distribution_scores(A, B, B)["scores"]
    assert all(e["score"] == e["floor"] for e in same.values())


def test_score_and_floor_take_the_same_number_of_items():
    result = metrics.distribution_scores(A, B[:40], FAKE)
    assert result["n"] == 40
    assert "exact_w2_pixels" not in result["scores"]  # sets of different sizes
    cut = metrics.distribution_scores(A, B[:40], FAKE[:40])
    assert cut == result


def test_fid_only_for_inception_features():
    one = metrics.user(lambda x: x.reshape(len(x), -1)[:, :5], "iv3", inception=True)
    scores = metrics.distribution_scores(A, B, FAKE, [one], [metrics.frechet, metrics.kid])["scores"]
    assert set(scores) == {"fid_iv3", "kid_iv3", "kid_standard_error_iv3"}
    plain = metrics.user(one.apply, "iv3")
    scores = metrics.distribution_scores(A, B, FAKE, [plain], [metrics.frechet, metrics.kid])["scores"]
    assert set(scores) == {"frechet_iv3", "kernel_iv3", "kernel_standard_error_iv3"}


def test_options_are_set_by_partial():
    wide = functools.partial(metrics.precision_recall, k=20)
    one, more = (
        metrics.distribution_scores(A, B, FAKE, metrics=[m])["scores"] for m in (metrics.precision_recall, wide)
    )
    assert set(one) == set(more) and more["precision_pixels"]["floor"] > one["precision_pixels"]["floor"]


def test_vectors_are_scored_in_pixels_alone():
    flat = [x.reshape(60, -1) for x in (A, B, FAKE)]
    assert all(name.endswith("_pixels") for name in metrics.distribution_scores(*flat)["scores"])


def test_average_and_table():
    results = [metrics.distribution_scores(A, B, FAKE + shift, metrics=[metrics.frechet]) for shift in (0.0, 0.2)]
    mean = metrics.average(results)
    entry = mean["scores"]["frechet_pixels"]
    values = [r["scores"]["frechet_pixels"]["score"] for r in results]
    assert entry["score"] == pytest.approx(np.mean(values)) and entry["std"] == pytest.approx(np.std(values))
    assert entry["ratio"] == pytest.approx(np.mean(values) / entry["floor"])
    console = Console(width=100, record=True, file=io.StringIO())
    for result, columns in ((results[0], ("score", "floor", "ratio")), (mean, ("score", "+-", "floor", "ratio"))):
        console.print(metrics.table(result))
        text = console.export_text()
        assert "frechet_randconv" in text and all(c in text for c in columns)
        assert f"{result['scores']['frechet_pixels']['score']:.4g}" in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.distribution_scores(A, B, FAKE[:, :4]), "fake has items of shape \\(4, 8, 1\\)"),
        (lambda: metrics.distribution_scores(A, B[:0], FAKE), "real_b has 0 items"),
        (lambda: metrics.distribution_scores(A, B, np.full_like(FAKE, np.nan)), "fake holds NaN"),
        (lambda: metrics.distribution_scores(A, B, FAKE, []), "extractors"),
        (lambda: metrics.distribution_scores(A, B, FAKE, [metrics.pixels()] * 2), "different names"),
        (lambda: metrics.average([]), "at least one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_floor_is_the_mean_over_disjoint_sets_and_may_be_taken_over():
    rng = np.random.default_rng(0)
    real, other, fake = (rng.normal(size=(n, 3)).astype(np.float32) for n in (40, 95, 40))
    found = metrics.distribution_scores(real, other, fake, metrics=[metrics.frechet])
    parts = [metrics.score(metrics.frechet(real), other[i : i + 40]) for i in (0, 40)]
    np.testing.assert_allclose(found["scores"]["frechet_pixels"]["floor"], np.mean(parts), rtol=1e-6)
    again = metrics.distribution_scores(real, other, fake[::-1], metrics=[metrics.frechet], floors=found)
    np.testing.assert_allclose(
        again["scores"]["frechet_pixels"]["ratio"], found["scores"]["frechet_pixels"]["ratio"], rtol=1e-5
    )
