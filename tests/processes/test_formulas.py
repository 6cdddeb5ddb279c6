"""Each process against its paper's formula, written as the paper writes it, and what bad parameters get."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax import processes as P

T = np.linspace(0.01, 0.99, 23)


def test_vp_integrates_its_beta():
    p = P.vp(0.2, 12.0)
    expected = [np.exp(-0.5 * quad(lambda s: 0.2 + s * 11.8, 0, t)[0]) for t in T]
    np.testing.assert_allclose(p.alpha(T), expected, rtol=1e-12)
    np.testing.assert_allclose(p.sigma(T), np.sqrt(1 - np.square(expected)), rtol=1e-9)
    np.testing.assert_allclose(-2 * p.drift(T), 0.2 + T * 11.8, rtol=1e-12)
    np.testing.assert_allclose(p.diffusion(T), 0.2 + T * 11.8, rtol=1e-12)


def test_sub_vp_noise():
    p = P.sub_vp()
    np.testing.assert_allclose(p.sigma(T), 1 - P.vp().alpha(T) ** 2, rtol=1e-12)
    beta = 0.1 + T * 19.9
    whole = np.exp(-2 * (0.1 * T + 0.5 * T**2 * 19.9))
    np.testing.assert_allclose(p.diffusion(T), beta * (1 - whole), rtol=1e-9)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.5), (-1.0, 4.0, 0.1)])
def test_sigmoid(start, end, tau):
    def s(x):
        return 1 / (1 + np.exp(-x / tau))

    expected = (s(end) - s(start + T * (end - start))) / (s(end) - s(start))
    np.testing.assert_allclose(P.sigmoid(start, end, tau).alpha(T) ** 2, expected, rtol=1e-9, atol=1e-15)


def test_ve_edm_rectified_cosine():
    np.testing.assert_allclose(P.ve(0.02, 30.0).sigma(T), 0.02 * (30 / 0.02) ** T, rtol=1e-12)
    np.testing.assert_allclose(P.edm(0.01, 50.0).sigma(T), 50 * T, rtol=1e-12)
    assert P.edm(0.01, 50.0).ends() == (0.01 / 50, 1.0)
    np.testing.assert_allclose(P.rectified().alpha(T), 1 - T, rtol=1e-12)
    np.testing.assert_allclose(P.cosine().alpha(T), np.cos(np.pi * T / 2), rtol=1e-10)


@pytest.mark.parametrize(
    "betas", [np.linspace(1e-4, 0.02, 1000), [0.3], [0.1, 0.9, 0.2, 1.0]], ids=["ddpm", "one", "zero"]
)
def test_from_betas_at_its_knots(betas):
    p, k = P.from_betas(betas), len(betas)
    bar = np.cumprod(1 - np.asarray(betas))
    t = (np.arange(k) + 1) / k
    np.testing.assert_allclose(p.alpha(t) ** 2, bar, rtol=1e-9, atol=0)
    np.testing.assert_allclose(p.sigma(t) ** 2, 1 - bar, rtol=1e-11)
    np.testing.assert_allclose(P.step_of_time(p, t), np.arange(k), atol=1e-9)
    assert p.alpha(0.0) == 1 and p.sigma(0.0) == 0
    # The one-step transition of the process is the schedule's own beta.
    if k > 1:
        np.testing.assert_allclose(p.transition(t[:-1], t[1:])[1], np.asarray(betas)[1:], rtol=1e-7)


def test_from_betas_learns_through_betas():
    betas = np.full(5, 0.2)

    def f(b):
        return P.from_betas(b).sigma(jnp.asarray(0.5))

    slope = jax.jit(jax.grad(f))(jnp.asarray(betas, jnp.float32))
    for i in range(5):
        h = 1e-6 * np.eye(5)[i]
        expected = (P.from_betas(betas + h).sigma(0.5) - P.from_betas(betas - h).sigma(0.5)) / 2e-6
        np.testing.assert_allclose(slope[i], expected, atol=1e-4)


def test_zero_terminal_snr_is_the_published_algorithm():
    betas = np.linspace(8.5e-4**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    p = P.zero_terminal_snr(P.from_betas(betas))
    t = (np.arange(1000) + 1) / 1000
    found = p.alpha(t)
    assert found[-1] == 0
    # The paper keeps alpha of step 0, we keep alpha = 1 at t = 0: one factor, within 1e-3 of one, relates the two.
    factor = found[0] / root[0]
    np.testing.assert_allclose(found[:-1], factor * root[:-1], rtol=1e-9)
    assert abs(factor - 1) < 1e-3


@pytest.mark.parametrize("base", [P.vp, P.sub_vp])
def test_zero_terminal_snr_in_closed_form(base):
    p, q = base(), P.zero_terminal_snr(base())
    last = p.alpha(1.0)
    np.testing.assert_allclose(q.alpha(T), (p.alpha(T) - last) / (1 - last), rtol=1e-12)
    np.testing.assert_allclose(q.family.curve.norm(np, q.alpha(T), q.sigma(T)), 1, rtol=1e-12)


def test_zero_terminal_snr_keeps_and_refuses():
    for p in (P.cosine(), P.sigmoid(), P.rectified(), P.zero_terminal_snr(P.vp())):
        assert P.zero_terminal_snr(p) is p
    q = P.zero_terminal_snr(P.shifted(P.vp(), 2.0))
    assert q.alpha(1.0) == 0
    np.testing.assert_allclose(q.log_snr(T), P.zero_terminal_snr(P.vp()).log_snr(T) - np.log(2), rtol=1e-9)
    for p in (P.ve(), P.edm(), P.learned(), P.truncated(P.vp(), 0.9)):
        with pytest.raises(ValueError, match="cannot end at alpha = 0"):
            P.zero_terminal_snr(p)


def test_shift_of_rectified_is_a_time_warp():
    q = P.shifted(P.rectified(), 3.0)
    np.testing.assert_allclose(q.sigma(T), 3 * T / (1 + 2 * T), rtol=1e-12)


def test_wrappers_nest():
    p = P.shifted(P.truncated(P.shifted(P.cosine(), 2.0), 0.9, 0.1), 0.5)
    np.testing.assert_allclose(p.log_snr(T), P.cosine().log_snr(0.1 + 0.8 * T), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(p.time_of_log_snr(p.log_snr(T)), T, rtol=1e-9)


def test_truncated_keeps_digits_of_a_start_close_to_one():
    p = P.truncated(P.rectified(), start=1 - 1e-4)
    np.testing.assert_allclose(p.alpha(jnp.float32(1.0)), 1e-4, rtol=1e-6)


def test_learned_is_monotone_for_any_weights(x64):
    rng = np.random.default_rng(3)
    for _ in range(5):
        p = P.learned()
        noise = jax.tree.map(lambda leaf: leaf + rng.normal(size=np.shape(leaf)), p.params)
        p = type(p)({**noise, "high": 6.0, "low": -6.0}, p.family)
        lam = p.log_snr(jnp.linspace(0, 1, 501))
        assert np.all(np.diff(lam) < 0)
        np.testing.assert_allclose(lam[jnp.array([0, -1])], [6, -6], atol=1e-12)


def test_learned_from_a_key_is_a_jax_process(key):
    p = P.learned(key, width=4)
    assert isinstance(p.sigma(0.5), jax.Array) and p.params["bias"].shape == (4,)
    np.testing.assert_allclose(p.time_of_log_snr(p.log_snr(0.3)), 0.3, rtol=1e-5)


def test_learned_inverse_has_parameter_gradients(x64):
    p = P.learned()

    def f(slope):
        return type(p)({**p.params, "log_slope": slope}, p.family).time_of_log_snr(jnp.asarray(0.4))

    h = 1e-5
    np.testing.assert_allclose(jax.grad(f)(jnp.asarray(0.3)), (f(0.3 + h) - f(0.3 - h)) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: P.vp(0.0), "beta_min must be"),
        (lambda: P.vp(5.0, 1.0), "beta_min must be smaller than beta_max"),
        (lambda: P.vp(float("nan")), "beta_min must be"),
        (lambda: P.sub_vp(2.0, 2.0), "smaller"),
        (lambda: P.sigmoid(3.0, -3.0), "start must be smaller than end"),
        (lambda: P.sigmoid(tau=0.01), "raise tau"),
        (lambda: P.sigmoid(tau=-1.0), "tau must be"),
        (lambda: P.ve(0.0), "sigma_min must be"),
        (lambda: P.edm(1.0, 0.5), "sigma_min must be smaller"),
        (lambda: P.from_betas([]), "non-empty"),
        (lambda: P.from_betas([[0.1]]), "got shape"),
        (lambda: P.from_betas([0.1, 0.0]), "must lie in"),
        (lambda: P.from_betas([1.0, 0.1]), "must lie in"),
        (lambda: P.from_betas([0.1, np.nan]), "must lie in"),
        (lambda: P.shifted(P.vp(), 0.0), "shift must be"),
        (lambda: P.truncated(P.vp(), 0.2, 0.4), "0 <= stop < start <= 1"),
        (lambda: P.truncated(P.vp(), 1.2), "0 <= stop < start <= 1"),
        (lambda: P.learned(width=0), "width must be"),
        (lambda: P.learned(log_snr_max=-3.0), "log_snr_min must be smaller"),
        (lambda: P.step_of_time(P.vp(), 0.5), "integer steps"),
    ],
)
def test_bad_parameters(build, message):
    with pytest.raises(ValueError, match=message):
        build()
