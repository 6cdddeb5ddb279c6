"""Weightings against their papers, each in the space of the paper, and the factors between spaces against arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax import processes as P
from diffjax.times import WEIGHTS, laws, weights

T = np.linspace(0.02, 0.98, 25)
PROCESSES = {
    name: P.CATALOGUE[name].build() for name in ("vp", "sub_vp", "cosine", "ve", "edm", "rectified", "learned")
}


@pytest.fixture(params=sorted(PROCESSES))
def process(request):
    return PROCESSES[request.param]


def full_snr(process):
    return (process.alpha(T) / process.sigma(T)) ** 2


def test_error_factors_by_arithmetic(process):
    a, s, da, ds = process.alpha(T), process.sigma(T), process.dalpha(T), process.dsigma(T)
    shift = 0.37  # an error of x0 and the error of eps that keeps alpha x0 + sigma eps
    eps = -a / s * shift
    errors = {"x0": shift, "eps": eps, "v": a * eps - s * shift, "velocity": da * shift + ds * eps, "score": -eps / s}
    for target, error in errors.items():
        np.testing.assert_allclose(weights.error_factor(process, T, target), (error / shift) ** 2, rtol=1e-9)
        np.testing.assert_allclose(weights.in_space(weights.unit(target), target)(process, T), 1, rtol=1e-12)


def test_pytree_times():
    w = weights.in_space(weights.sigmoid(), "v")
    found = w(P.cosine(), {"image": T, "text": 0.5})
    np.testing.assert_allclose(found["image"], w(P.cosine(), T), rtol=1e-12)
    assert found["text"] == w(P.cosine(), 0.5)


def test_unit(process):
    np.testing.assert_allclose(weights.unit("eps")(process, T), full_snr(process), rtol=1e-9)
    np.testing.assert_allclose(weights.unit("v")(P.cosine(), T), full_snr(P.cosine()) + 1, rtol=1e-9)
    np.testing.assert_allclose(weights.unit("velocity")(P.rectified(), T), 1 / T**2, rtol=1e-9)


def test_edm_cancels_its_own_output_scale():
    p, sd = P.edm(), 0.5
    s = p.sigma(T)
    np.testing.assert_allclose(weights.edm(sd)(p, T), (s**2 + sd**2) / (s * sd) ** 2, rtol=1e-12)
    c_out = s * sd / np.sqrt(s**2 + sd**2)  # D = c_skip x + c_out F: the error of x0 is c_out times that of F
    np.testing.assert_allclose(weights.edm(sd)(p, T) * c_out**2, 1, rtol=1e-12)


def test_min_snr_in_three_spaces():
    p, w = P.vp(), weights.min_snr(5.0)
    ratio = full_snr(p)
    clipped = np.minimum(ratio, 5)
    np.testing.assert_allclose(w(p, T), clipped, rtol=1e-9)
    np.testing.assert_allclose(weights.in_space(w, "eps")(p, T), clipped / ratio, rtol=1e-9)
    np.testing.assert_allclose(weights.in_space(w, "v")(p, T), clipped / (ratio + 1), rtol=1e-9)


def test_truncated_snr_is_the_larger_error(process):
    eps_over_x0 = full_snr(process)
    np.testing.assert_allclose(weights.truncated_snr()(process, T), np.maximum(1, eps_over_x0), rtol=1e-9)


@pytest.mark.parametrize(("k", "gamma"), [(1.0, 1.0), (1.0, 0.5), (2.0, 0.0)])
def test_p2_in_eps_space(process, k, gamma):
    found = weights.in_space(weights.p2(k, gamma), "eps")(process, T)
    np.testing.assert_allclose(found, 1 / (k + full_snr(process)) ** gamma, rtol=1e-9)


def test_likelihood_is_half_the_decrease_of_snr(process):
    w = weights.likelihood()
    a, b = 0.3, 0.7
    snr = [(process.alpha(t) / process.sigma(t)) ** 2 for t in (a, b)]
    found = quad(lambda t: float(w(process, t)), a, b, epsrel=1e-9)[0]
    np.testing.assert_allclose(found, 0.5 * (snr[0] - snr[1]), rtol=1e-7)
    # In score space it is half of the squared diffusion coefficient.
    np.testing.assert_allclose(weights.in_space(w, "score")(process, T), 0.5 * process.diffusion(T), rtol=1e-8)


def test_sigmoid_as_its_paper_writes_it(process):
    bias, h = 1.5, 1e-6
    log_snr = 2 * process.log_snr(T)
    slope = (2 * process.log_snr(T + h) - 2 * process.log_snr(T - h)) / (2 * h)
    expected = 0.5 / (1 + np.exp(log_snr - bias)) * -slope
    np.testing.assert_allclose(weights.in_space(weights.sigmoid(bias), "eps")(process, T), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "law", [laws.logit_normal(0.3, 1.8), laws.mode(0.5), laws.cosmap()], ids=["logit", "mode", "cos"]
)
def test_over_density_keeps_the_expectation(law):
    p = P.rectified()
    w = weights.over_density(weights.min_snr(5.0), law)
    u = (jnp.arange(20000, dtype=jnp.float32) + 0.5) / 20000
    t = law.place(law.params, p, u)
    expected = quad(lambda t: min(((1 - t) / t) ** 2, 5.0), 0, 1, points=[1 / (1 + 5**0.5)])[0]
    # Midpoints of u: the integrand grows slowly at the ends of a logit-normal law, hence a percent.
    np.testing.assert_allclose(np.mean(np.asarray(w(p, t))), expected, rtol=1e-2)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_positive_and_finite_in_float32(name, process):
    w = WEIGHTS[name].build()
    t = np.concatenate([np.geomspace(1e-6, 0.5, 30), 1 - np.geomspace(1e-6, 0.5, 30)]).astype(np.float32)
    found = np.asarray(w(process, jnp.asarray(t)))
    assert found.dtype == np.float32 and np.all(np.isfinite(found)) and np.all(found > 0)
    np.testing.assert_allclose(found, w(process, t.astype(np.float64)), rtol=1e-4)


def test_one_trace_hash_and_gradients():
    traces = []

    @jax.jit
    def f(w):
        traces.append(w.f)
        return jnp.sum(w(P.vp(), jnp.asarray([0.01, 0.5, 0.99])))

    for name in sorted(WEIGHTS):
        w, twin = WEIGHTS[name].build(), WEIGHTS[name].build()
        assert jax.tree.structure(w) == jax.tree.structure(twin)
        assert hash(jax.tree.structure(w)) == hash(jax.tree.structure(twin))
        f(w)
        f(jax.tree.map(lambda leaf: leaf * 1.1, w))
        for leaf in jax.tree.leaves(jax.grad(lambda w: f.__wrapped__(w))(w)):
            assert np.isfinite(leaf)
    assert len(traces) == 2 * len(WEIGHTS)  # one trace under jit and one of the plain gradient


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: weights.unit("noise"), "target must be one of"),
        (lambda: weights.error_factor(P.vp(), 0.5, "F"), "target must be one of"),
        (lambda: weights.in_space(weights.unit(), "x"), "target must be one of"),
        (lambda: weights.edm(0.0), "sigma_data must be"),
        (lambda: weights.min_snr(-1.0), "gamma must be"),
        (lambda: weights.truncated_snr(0.0), "floor must be"),
        (lambda: weights.p2(k=0.0), "k must be"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
