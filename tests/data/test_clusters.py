"""Clusters: found alike every time, saved whole, cut out without a change of coordinates."""

import numpy as np
import pytest

from diffjax import data


@pytest.fixture(scope="module")
def blobs():
    """Three groups far apart, with labels in another order."""
    rng = np.random.default_rng(0)
    truth = np.repeat([2, 0, 1], [60, 90, 150])
    x = rng.normal(size=(300, 2)) * 0.3 + np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])[truth]
    return data.from_arrays(x, truth, name="blobs")


def test_groups_that_are_apart_are_found(blobs):
    found = data.clusters(blobs, 3)
    pairs = set(zip(found.assignment.tolist(), blobs.arrays["label"].tolist(), strict=True))
    assert len(pairs) == 3 and sorted(found.sizes.tolist()) == [60, 90, 150]
    x = blobs.transform.encode(blobs.arrays["x"]).astype(np.float64)
    distance = ((x[:, None] - found.centers[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(found.assignment, distance.argmin(1))
    again = data.clusters(blobs, 3)
    np.testing.assert_array_equal(found.assignment, again.assignment)
    np.testing.assert_array_equal(found.centers, again.centers)


def test_features_choose_the_space(blobs):
    found = data.clusters(blobs, 2, features=lambda x: x[:, 1:])
    assert found.centers.shape == (2, 1)
    high = blobs.arrays["label"] == 2
    assert len(set(found.assignment[high])) == 1 and not set(found.assignment[high]) & set(found.assignment[~high])


def test_an_expert_sees_its_cluster_in_the_coordinates_of_all(blobs):
    found = data.clusters(blobs, 3)
    parts = [data.restrict(blobs, found, k) for k in range(3)]
    for split, indices in blobs.splits.items():
        together = np.concatenate([p.splits[split] for p in parts])
        np.testing.assert_array_equal(np.sort(together), np.sort(indices))
    for k, part in enumerate(parts):
        assert part.transform == blobs.transform and part.name == f"blobs/{k}"
        with data.batches(part, "train", 8, seed=0, prefetch=0) as stream:
            batch = next(stream)
        assert (found.assignment[batch["index"]] == k).all()
        np.testing.assert_array_equal(batch["x"], blobs.transform.encode(blobs.arrays["x"][batch["index"]]))


def test_a_router_gets_the_cluster_as_a_field(blobs):
    found = data.clusters(blobs, 3)
    with data.batches(data.label_clusters(blobs, found), "train", 16, seed=0, prefetch=0) as stream:
        batch = next(stream)
    np.testing.assert_array_equal(batch["cluster"], found.assignment[batch["index"]])
    with pytest.raises(data.DataError, match="has a field 'cluster' already"):
        data.label_clusters(data.label_clusters(blobs, found), found)


def test_densities_of_the_whole_do_not_go_along():
    moons = data.load("moons", size=100)
    part = data.restrict(moons, data.clusters(moons, 2), 0)
    assert moons.score is not None and part.score is part.log_density is part.sample is None


def test_saving_is_exact_and_whole(blobs, tmp_path):
    found = data.clusters(blobs, 3)
    path = tmp_path / "clusters.npz"
    found.save(path)
    read = data.load_clusters(path)
    assert read.dataset == "blobs" and [p.name for p in tmp_path.iterdir()] == ["clusters.npz"]
    np.testing.assert_array_equal(read.centers, found.centers)
    np.testing.assert_array_equal(read.assignment, found.assignment)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(data.DataError, match="holds no clusters"):
        data.load_clusters(path)
    np.savez(path, format=9, dataset="blobs", centers=found.centers, assignment=found.assignment)
    with pytest.raises(data.DataError, match="another format of clusters; this version reads 1"):
        data.load_clusters(path)


def test_bad_arguments(blobs):
    found = data.clusters(blobs, 3)
    other = data.from_arrays(np.arange(40.0)[:, None], name="other")
    cases = [
        (lambda: data.clusters(blobs, 0), "count must be in 1.."),
        (lambda: data.clusters(blobs, 2, features=lambda x: x[:5]), r"must be finite and \[300, d\]"),
        (lambda: data.restrict(blobs, found, 3), "cluster must be in 0..2; got 3"),
        (lambda: data.restrict(other, found, 0), "clusters of 'blobs' with 300 items"),
        (lambda: data.Clusters("a", found.centers, found.assignment + 1), "in 1..3"),
        (lambda: data.Clusters("a", found.centers, found.assignment.astype(float)), "int32"),
    ]
    for build, message in cases:
        with pytest.raises(data.DataError, match=message):
            build()
