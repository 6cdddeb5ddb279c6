"""What every process of the catalogue must satisfy."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import processes
from diffjax.processes import CATALOGUE

NAMES = sorted(CATALOGUE)
NEAR = np.concatenate([np.geomspace(1e-6, 0.5, 300), 1 - np.geomspace(1e-6, 0.5, 300)]).astype(np.float32)
MIDDLE = np.random.default_rng(0).uniform(0.01, 0.99, 40)
NOISY_AT_ZERO = {"ve", "learned", "truncated"}
ZERO_AT_ONE = {"cosine", "sigmoid", "rectified", "shifted", "zero_vp", "zero_sub_vp", "zero_betas"}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def process(name):
    return CATALOGUE[name].build()


def scaled(process, factor):
    """Every leaf times another power of `factor` (a common factor leaves `sigmoid` as it is)."""
    leaves, tree = jax.tree.flatten(process)
    return jax.tree.unflatten(tree, [leaf * factor ** (i + 1) for i, leaf in enumerate(leaves)])


def test_positive_and_snr_decreases(process):
    t = np.linspace(0, 1, 2001)
    a, s, lam = process.alpha(t), process.sigma(t), process.log_snr(t)
    assert a.dtype == s.dtype == lam.dtype == np.float64
    assert np.all(a[:-1] > 0) and np.all(s[1:] > 0) and np.all(a >= 0) and np.all(s >= 0)
    assert np.all(lam[1:] < lam[:-1])
    np.testing.assert_allclose(lam[1:-1], np.log(a[1:-1] / s[1:-1]), rtol=1e-10, atol=1e-10)


def test_exact_ends(name, process):
    assert (process.sigma(0.0) > 0) == (name in NOISY_AT_ZERO)
    assert (process.alpha(1.0) == 0) == (name in ZERO_AT_ONE)
    assert np.isinf(process.log_snr(0.0)) == (name not in NOISY_AT_ZERO)
    assert np.isinf(process.log_snr(1.0)) == (name in ZERO_AT_ONE)
    if name not in NOISY_AT_ZERO:
        assert process.alpha(0.0) == 1
    data, noise = process.ends()
    assert 0 <= data < noise <= 1
    assert np.all(np.isfinite(process.log_snr(np.array([data, noise], np.float64))))


def test_lies_on_its_curve(process):
    a, s = process.alpha(MIDDLE), process.sigma(MIDDLE)
    curve = process.family.curve
    np.testing.assert_allclose(curve.norm(np, a, s), 1, rtol=1e-12)
    np.testing.assert_allclose(curve.norm(np, 3 * a, 3 * s), 3, rtol=1e-12)
    n_a, n_b = curve.gradient(np, a, s)
    np.testing.assert_allclose(a * n_a + s * n_b, 1, rtol=1e-12)
    h = 1e-6
    np.testing.assert_allclose(n_a, (curve.norm(np, a + h, s) - curve.norm(np, a - h, s)) / (2 * h), atol=1e-8)
    np.testing.assert_allclose(n_b, (curve.norm(np, a, s + h) - curve.norm(np, a, s - h)) / (2 * h), atol=1e-8)


def test_derivatives(process, x64):
    h = 1e-6
    for value, slope in ((process.alpha, process.dalpha), (process.sigma, process.dsigma)):
        found = slope(MIDDLE)
        # Central differences at h = 1e-6 in float64: 1e-10 of rounding, 1e-12 of curvature.
        np.testing.assert_allclose(found, (value(MIDDLE + h) - value(MIDDLE - h)) / (2 * h), rtol=2e-6, atol=2e-8)
        t = jnp.asarray(MIDDLE)
        np.testing.assert_allclose(found, jax.jvp(value, (t,), (jnp.ones_like(t),))[1], rtol=1e-9, atol=1e-12)


def test_inverse_of_log_snr(process):
    t = NEAR.astype(np.float64)
    lam = process.log_snr(t)
    # One part in 1e10 of the distance to data (the distance to noise is lost in t itself).
    np.testing.assert_allclose(process.time_of_log_snr(lam), t, rtol=1e-9, atol=1e-12)
    found = process.time_of_log_snr(jnp.asarray(lam, jnp.float32))
    assert np.max(np.abs(np.asarray(found) - t)) < 3e-6


def test_inverse_of_log_snr_differentiates(process, x64):
    lam = jnp.asarray(process.log_snr(0.37))
    slope = jax.grad(process.time_of_log_snr)(lam)
    t = jnp.asarray(0.37)
    np.testing.assert_allclose(slope * jax.grad(process.log_snr)(t), 1.0, rtol=1e-7)


def test_float32_accuracy(process):
    t = jnp.asarray(NEAR)

    def all_three(p, t):
        return p.alpha(t), p.sigma(t), p.log_snr(t)

    exact = all_three(process, NEAR.astype(np.float64))
    for found in (all_three(process, t), jax.jit(all_three)(process, t)):
        assert all(f.dtype == jnp.float32 for f in found)
        for f, e in zip(found[:2], exact[:2], strict=True):
            np.testing.assert_allclose(np.asarray(f, np.float64), e, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(found[2], np.float64), exact[2], rtol=1e-5, atol=1e-5)


def test_sde_has_the_marginals(process):
    """The moments of `dx = f x dt + g dW`: d log m = f dt and d(v / m^2) = g^2 / m^2 dt, by Gauss-Legendre panels."""
    x, w = np.polynomial.legendre.leggauss(5)
    edges = np.linspace(0.02, 0.98, 961)  # a thousandth each: the knots of the discrete schedules lie on edges
    h = np.diff(edges)[:, None]
    t = edges[:-1, None] + 0.5 * h * (1 + x)
    f, g2 = process.drift(t), process.diffusion(t)
    assert np.all(f <= 0) and np.all(g2 > 0)
    alpha, ratio = process.alpha(edges), (process.sigma(edges) / process.alpha(edges)) ** 2
    mean = np.cumsum(np.sum(0.5 * h * w * f, -1))
    np.testing.assert_allclose(mean, np.log(alpha[1:] / alpha[0]), rtol=1e-7, atol=1e-10)
    m = process.alpha(t) / alpha[0]
    grown = np.cumsum(np.sum(0.5 * h * w * g2 / m**2, -1))
    np.testing.assert_allclose(grown, (ratio[1:] - ratio[0]) * alpha[0] ** 2, rtol=1e-7)


def test_transition_and_posterior_obey_bayes(process):
    s, t = np.array([0.02, 0.3, 0.7]), np.array([0.03, 0.6, 0.99])
    a_s, s_s = process.alpha(s), process.sigma(s)
    scale, variance = process.transition(s, t)
    np.testing.assert_allclose(scale * a_s, process.alpha(t), rtol=1e-10)
    np.testing.assert_allclose(scale**2 * s_s**2 + variance, process.sigma(t) ** 2, rtol=1e-10)
    c_t, c_0, posterior = process.posterior(s, t)
    expected = 1 / (1 / s_s**2 + scale**2 / variance)
    np.testing.assert_allclose(posterior, expected, rtol=1e-8)
    np.testing.assert_allclose(c_t, expected * scale / variance, rtol=1e-8)
    np.testing.assert_allclose(c_0, expected * a_s / s_s**2, rtol=1e-8)


def total(p):
    t = jnp.asarray([0.001, 0.3, 0.999])
    return jnp.sum(p.alpha(t) + p.sigma(t) + jnp.tanh(p.log_snr(t)) + p.time_of_log_snr(p.log_snr(t)))


JITTED = jax.jit(total)


def test_one_trace_and_gradients_over_parameters(process):
    traces = []

    @jax.jit
    def f(p):
        traces.append(1)
        return jax.value_and_grad(total)(p)

    value, slope = f(process)
    again, _ = f(scaled(process, 1.001))
    assert len(traces) == 1
    assert jax.tree.structure(slope) == jax.tree.structure(process)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
    assert np.isfinite(value) and (not jax.tree.leaves(process) or value != again)


def test_vmap_over_parameters(process):
    if not jax.tree.leaves(process):
        t = jnp.linspace(0.1, 0.9, 3)
        np.testing.assert_allclose(jax.vmap(process.log_snr)(t), process.log_snr(t), rtol=1e-6)
        return
    other = scaled(process, 0.999)
    both = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), jnp.asarray(b)]), process, other)
    found = jax.jit(jax.vmap(total))(both)
    np.testing.assert_allclose(found, [JITTED(process), JITTED(other)], rtol=1e-5)


def test_gradients_are_finite_with_the_ends_in_the_batch(process):
    def f(p):
        t = jnp.asarray([0.0, 0.5, 1.0])
        return jnp.sum(p.alpha(t) + p.sigma(t)) + jnp.sum(jnp.exp(jnp.minimum(p.log_snr(t), 5.0)))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(f))(process)):
        assert np.all(np.isfinite(leaf))


def test_pytree_and_shaped_times(process):
    times = {"image": np.full((2, 3), 0.25), "text": 0.75}
    found = process.alpha(times)
    np.testing.assert_allclose(found["image"], np.full((2, 3), process.alpha(0.25)), rtol=1e-12)
    np.testing.assert_allclose(found["text"], process.alpha(0.75), rtol=1e-12)
    assert process.dsigma(jnp.full((2, 1), 0.5)).shape == (2, 1)


def test_hash_by_value(name, process):
    twin = CATALOGUE[name].build()
    a, b = jax.tree.structure(process), jax.tree.structure(twin)
    assert a == b and hash(a) == hash(b)
    copy = pickle.loads(pickle.dumps(process.family))
    assert copy == process.family and hash(copy) == hash(process.family)


def test_prior_has_the_last_standard_deviation(process, key):
    x = process.prior(key, (4096, 2))
    # The standard error of a standard deviation over 8192 draws is 0.8 %.
    np.testing.assert_allclose(np.std(np.asarray(x)), process.sigma(1.0), rtol=0.04)


def test_catalogue_covers_every_public_factory():
    for name in set(processes.__all__) - {"CATALOGUE", "step_of_time", "zero_terminal_snr"}:
        assert name in CATALOGUE
