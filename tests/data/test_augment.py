"""Augmentations: exact identities, known maps, and independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import numerics as nu
from diffjax.data import augment

affine = jax.jit(augment.affine)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).normal(size=(64, 8, 6, 2)).astype(np.float32)


def keys(n, start=0):
    return nu.item_keys(jax.random.key(1), jnp.arange(start, start + n))


def test_affine_gives_the_zero_vector_exactly_where_nothing_happens(pictures):
    out, parameters = affine(keys(64), pictures)
    parameters = np.asarray(parameters)
    still = (parameters == 0).all(1)
    assert parameters.shape == (64, 5) and 8 <= still.sum() <= 32  # of 64, each with probability 0.3
    assert (parameters[~still] != 0).all()
    np.testing.assert_array_equal(np.asarray(out)[still], pictures[still])
    assert (np.abs(np.asarray(out) - pictures).max((1, 2, 3)) > 0)[~still].all()
    out, parameters = affine(keys(64), pictures, 0.0)
    np.testing.assert_array_equal(out, pictures)
    assert not np.asarray(parameters).any()


def test_affine_parameters_are_standard_normal():
    _, parameters = affine(keys(4000), np.zeros((4000, 2, 2, 1), np.float32))
    parameters = np.asarray(parameters)
    moved = parameters[(parameters != 0).all(1)]
    assert abs(len(moved) / 4000 - 0.7) < 0.03  # 4 standard deviations
    assert np.abs(moved.mean(0)).max() < 0.08 and np.abs(moved.std(0) - 1).max() < 0.06
    assert np.abs(np.corrcoef(moved.T) - np.eye(5)).max() < 0.08


def test_affine_moves_a_ramp_as_its_parameters_say():
    # A linear ramp makes bilinear interpolation exact away from the border, so that the map can be read off.
    side = 33
    v, u = np.meshgrid(np.arange(side) - 16.0, np.arange(side) - 16.0, indexing="ij")
    ramp = np.stack([v, u], -1).astype(np.float32)[None].repeat(16, 0)
    out, z = affine(keys(16), ramp, 1.0)
    for picture, (theta, s, h, dx, dy) in zip(
        np.asarray(out), np.asarray(z) * [0.12, 0.07, 0.12, 0.3, 0.3], strict=True
    ):
        turn = np.exp(s) * np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
        matrix = turn @ np.array([[1, h], [0, 1]])
        x, y = matrix @ np.stack([u, v]).reshape(2, -1) - np.array([[dx], [dy]])
        inner = (slice(10, 23), slice(10, 23))
        np.testing.assert_allclose(picture[inner][..., 1], x.reshape(side, side)[inner], atol=2e-5)
        np.testing.assert_allclose(picture[inner][..., 0], y.reshape(side, side)[inner], atol=2e-5)


def test_single_parameters(pictures):
    _, z = affine(keys(4), pictures[:4], 1.0, 0.0, 0.0, 0.0, 1.0)
    assert not np.asarray(z)[:, :3].any() and np.asarray(z)[:, 3:].all()  # what cannot vary is not reported


def test_items_do_not_depend_on_the_batch(pictures):
    for f in (augment.affine, augment.flip, augment.shift):
        f = jax.jit(f)
        whole = jax.tree.leaves(f(keys(8), pictures[:8]))
        part = jax.tree.leaves(f(keys(4, 4), pictures[4:8]))
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[4:], b)
        one_key = f(jax.random.key(1), pictures[:8])
        jax.tree.map(np.testing.assert_array_equal, one_key, f(keys(8), pictures[:8]))


def test_flip_and_shift(pictures):
    flipped = np.asarray(augment.flip(keys(64), pictures))
    mirrored = (flipped == pictures[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == pictures).all((1, 2, 3)) ^ mirrored).all() and 16 <= mirrored.sum() <= 48
    np.testing.assert_array_equal(augment.flip(keys(64), pictures, 1.0), pictures[:, :, ::-1])
    moved = np.asarray(augment.shift(keys(64), pictures, 2))
    padded = np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    seen = set()
    for i in range(64):
        hits = [(r, c) for r in range(5) for c in range(5) if (padded[i, r : r + 8, c : c + 6] == moved[i]).all()]
        assert len(hits) == 1
        seen |= set(hits)
    assert len(seen) > 15
    np.testing.assert_array_equal(augment.shift(keys(64), pictures, 0), pictures)
    with pytest.raises(ValueError, match=r"pictures \[B, H, W, C\]; got shape \(4, 2\)"):
        augment.flip(keys(4), jnp.zeros((4, 2)))
