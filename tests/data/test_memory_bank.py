"""The memory of snippets: a truncated SVD, to which pictures are put without training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.data import memory

RNG = np.random.default_rng(0)
FEATURES = (RNG.normal(size=(30, 4)) @ RNG.normal(size=(4, 9)) + 0.1 * RNG.normal(size=(30, 9))).astype(np.float32)
UNIT = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)


def test_it_is_the_best_approximation_of_its_rank():
    for rank in (3, 9):
        m = memory(FEATURES, rank)
        got = np.asarray(m.coefficients) @ m.basis
        lost = np.linalg.svd(UNIT, compute_uv=False)[rank:]
        np.testing.assert_allclose(np.linalg.norm(UNIT - got), np.linalg.norm(lost), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(m.basis @ m.basis.T, np.eye(rank), atol=1e-6)
        assert m.numbers == rank * (30 + 9)
    np.testing.assert_allclose(memory(FEATURES).read(np.arange(30)), UNIT, atol=1e-5)


def test_snippets_have_norm_one_and_items_draw_for_themselves():
    m = memory(FEATURES, 3)
    draw = jax.jit(lambda m, items: m.draw(jax.random.key(0), items))
    s = draw(m, jnp.arange(200))
    np.testing.assert_allclose(np.linalg.norm(s, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(draw(m, jnp.arange(5, 9)), s[5:9], atol=1e-6)
    seen = np.argmax(np.asarray(s) @ np.asarray(m.read(np.arange(30))).T, axis=1)
    assert len(set(seen)) > 25
    first, second = np.array([0, 1]), np.array([2, 3])
    np.testing.assert_allclose(m.mixed(first, second, jnp.array([0.0, 1.0])), m.read(np.array([0, 3])), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(m.mixed(first, second, 0.4), axis=1), 1, rtol=1e-5)


def test_more_pictures_enter_by_projection_or_with_new_directions():
    m, more = memory(FEATURES, 3), RNG.normal(size=(5, 9)).astype(np.float32)
    unit = more / np.linalg.norm(more, axis=1, keepdims=True)
    plain, grown = m.with_more(more), m.with_more(more, grow=5)
    assert plain.size == grown.size == 35 and plain.basis.shape == (3, 9) and grown.basis.shape == (8, 9)
    np.testing.assert_allclose(plain.coefficients[30:], unit @ m.basis.T, atol=1e-6)
    np.testing.assert_allclose(grown.basis @ grown.basis.T, np.eye(8), atol=1e-6)
    np.testing.assert_allclose(grown.read(np.arange(30, 35)), unit, atol=1e-5)
    np.testing.assert_allclose(grown.read(np.arange(30)), m.read(np.arange(30)), atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"rank must be in 1..9 .*got 10"):
        memory(FEATURES, 10)
    with pytest.raises(ValueError, match="without rows of zeros"):
        memory(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\[M, 9\] and grow in 0..2; got \(2, 9\) and grow=3"):
        memory(FEATURES, 3).with_more(FEATURES[:2], grow=3)
