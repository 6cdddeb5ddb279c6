"""Halving and doubling against loops in NumPy, and against each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.networks import resample as rs

normal = lambda *shape, seed=0: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
LONG = (1.0, 5.0, 10.0, 10.0, 5.0, 1.0)


def filtered(x, taps, low, high):
    """sum_k f_k x[i + k - low] over the second axis, a textbook loop."""
    f = np.asarray(taps) / np.sum(taps)
    big = np.concatenate([np.zeros((len(x), low, *x.shape[2:])), x, np.zeros((len(x), high, *x.shape[2:]))], axis=1)
    out = np.zeros((len(x), big.shape[1] - len(f) + 1, *x.shape[2:]))
    for i in range(out.shape[1]):
        for k, w in enumerate(f):
            out[:, i] += w * big[:, i + k]
    return out


@pytest.mark.parametrize("taps", [(1.0, 1.0), rs.BINOMIAL, LONG])
def test_filters_equal_a_loop_along_each_axis(taps):
    p = len(taps) // 2
    x = normal(2, 8, 6, 3)
    half = filtered(x, taps, p - 1, p - 1)[:, ::2]
    stuffed = np.zeros((2, 16, 6, 3))
    stuffed[:, ::2] = x
    twice = 2 * filtered(stuffed, taps[::-1], p, p - 1)
    np.testing.assert_allclose(rs.fir_halve(x, (2, 1), taps), half, atol=1e-6)
    np.testing.assert_allclose(rs.fir_double(x, (2, 1), taps), twice, atol=1e-6)
    np.testing.assert_allclose(rs.fir_blur(x, (2, 1), taps), filtered(x, taps, p, p), atol=1e-6)
    turned = lambda f, x: f(np.swapaxes(x, 1, 2), (1, 2), taps)
    np.testing.assert_allclose(turned(rs.fir_halve, x), np.swapaxes(half, 1, 2), atol=1e-6)
    np.testing.assert_allclose(turned(rs.fir_double, x), np.swapaxes(twice, 1, 2), atol=1e-6)


def test_doubling_is_the_transpose_of_halving():
    x, y = normal(2, 4, 6, 3), normal(2, 2, 3, 3, seed=1)
    for halve, double in ((rs.halve, rs.double), (rs.fir_halve, rs.fir_double)):
        np.testing.assert_allclose(np.vdot(halve(jnp.asarray(x)), y), np.vdot(x, double(jnp.asarray(y))) / 4, rtol=1e-5)


def test_the_shortest_filter_is_the_mean_and_the_repeat():
    x = jnp.asarray(normal(2, 4, 2, 6, 3))
    for factor in (2, (1, 2, 2)):
        np.testing.assert_allclose(rs.fir_halve(x, factor, (1.0, 1.0)), rs.halve(x, factor), atol=1e-6)
        np.testing.assert_allclose(rs.fir_double(x, factor, (1.0, 1.0)), rs.double(x, factor), atol=1e-6)
        np.testing.assert_allclose(rs.halve(rs.double(x, factor), factor), x, atol=1e-6)


def test_factors_that_do_not_fit_are_refused():
    x = jnp.zeros((1, 6, 6, 1))
    with pytest.raises(ValueError, match=r"factor=\(2,\) must have one number for each axis"):
        rs.halve(x, (2,))
    with pytest.raises(ValueError, match="factors of 1 or 2; got factor=3"):
        rs.fir_halve(x, 3)
