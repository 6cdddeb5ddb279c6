"""Laws that sampling starts from, the step before the first, and starting at exactly alpha = 0."""

import dataclasses

import gaussian_moments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import diffjax
from diffjax import processes, solvers, starts, times
from diffjax.testing import gaussian, oracle, oracles

KEY = jax.random.key(2)
VP = processes.vp()
RNG = np.random.default_rng(0)
DATA = RNG.standard_normal((500, 3)) @ np.array([[1.0, 0.4, 0.0], [0.0, 0.5, 0.2], [0.0, 0.0, 1.5]]) + [2.0, 0.0, -1.0]


def make(kind, time=0.6):
    return {
        "analytic": lambda: starts.analytic_start(VP, DATA, time),
        "gaussian": lambda: starts.gaussian_start(VP, DATA, time),
        "diagonal": lambda: starts.gaussian_start(VP, DATA, time, diagonal=True),
        "fitted": lambda: starts.fitted_start(VP, DATA, time, 2),
        "fitted diagonal": lambda: starts.fitted_start(VP, DATA, time, 3, diagonal=True, draws=2),
    }[kind]()


@pytest.mark.parametrize("kind", ["analytic", "gaussian", "diagonal", "fitted", "fitted diagonal"])
def test_densities_are_scipys_and_samples_have_their_moments(kind, x64):
    start = make(kind)
    covariances = [s @ s.T if s.ndim == 2 else np.diag(s**2) for s in start.scales]
    x = RNG.standard_normal((5, 3))
    each = [scipy.stats.multivariate_normal(m, c).pdf(x) for m, c in zip(start.means, covariances, strict=True)]
    weights = np.exp(start.log_weights)
    log_p, drawn = jax.jit(lambda s, x: (s.log_prob(x), s.sample(KEY, (20000, 3))))(start, jnp.asarray(x))
    np.testing.assert_allclose(log_p, np.log(weights @ np.array(each)), rtol=1e-10)
    mean = weights @ start.means
    second = sum(w * (c + np.outer(m, m)) for w, c, m in zip(weights, covariances, start.means, strict=True))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.04)
    np.testing.assert_allclose(np.cov(drawn.T), second - np.outer(mean, mean), atol=0.06)


def test_moments_of_the_marginal():
    alpha, sigma = VP.alpha(0.6), VP.sigma(0.6)
    full = alpha**2 * np.cov(DATA.T, bias=True) + sigma**2 * np.eye(3)
    start = make("gaussian")
    np.testing.assert_allclose(start.scales[0] @ start.scales[0].T, full, rtol=1e-10)
    np.testing.assert_allclose(start.means[0], alpha * DATA.mean(0), rtol=1e-10)
    np.testing.assert_allclose(make("diagonal").scales[0] ** 2, np.diag(full), rtol=1e-10)
    np.testing.assert_allclose(make("analytic").scales[0] ** 2, np.trace(full) / 3, rtol=1e-10)


def test_the_analytic_start_is_the_nearest_isotropic_gaussian(x64):
    """KL(q || N) is E_q[-log N] + constant, and the expectation is known from the moments of q."""
    full, start = make("gaussian", 0.3), make("analytic", 0.3)
    cov = full.scales[0] @ full.scales[0].T

    def cross(mean, std):
        gap = full.means[0] - mean
        return 0.5 * (np.trace(cov) + gap @ gap) / std**2 + 3 * np.log(std)

    best = cross(start.means[0], start.scales[0, 0])
    for shift, factor in ((0.05, 1.0), (-0.05, 1.0), (0.0, 1.03), (0.0, 0.97)):
        assert cross(start.means[0] + shift, start.scales[0, 0] * factor) > best + 1e-4
    assert cross(0.0, 1.0) > best + 0.5


def test_samples_are_per_item_and_of_any_shape():
    start = make("fitted")
    some = np.array([4, 5])
    whole, part = jax.jit(lambda s: (s.sample(KEY, (6, 3)), s.sample(KEY, (2, 3, 1), items=some)))(start)
    np.testing.assert_allclose(part[..., 0], whole[4:], rtol=1e-6)
    assert jax.eval_shape(start.log_prob, part).shape == (2,)
    with pytest.raises(ValueError, match="items of 3 numbers"):
        start.sample(KEY, (2, 4))
    with pytest.raises(ValueError, match="items of 3 numbers"):
        start.log_prob(jnp.zeros((2, 4)))


def test_a_short_diffusion_from_the_right_law_has_the_datas_density_and_samples(x64):
    """Gaussian data, a quarter of the time: the start is exact, and so are density and samples; N(0, I) is not."""
    mean, cov = np.array([2.0, -1.0]), np.array([[0.5, 0.2], [0.2, 0.3]])
    m = gaussian(mean, cov)
    time = 0.25
    alpha, sigma = VP.alpha(time), VP.sigma(time)
    scale = np.linalg.cholesky(alpha**2 * cov + sigma**2 * np.eye(2))
    start = starts.MixtureStart(time, np.zeros(1), alpha * mean[None], scale[None])
    x = jnp.array([[2.0, -1.0], [1.5, 0.0]])
    d = oracle(m, VP)
    log_p = jax.jit(lambda prior: diffjax.log_density(KEY, d, x, steps=16, start=time, prior=prior)[0])
    plain = dataclasses.replace(start, means=np.zeros((1, 2)), scales=np.eye(2)[None])
    exact = jax.jit(oracles.log_density)(m, VP, x, 0.0)
    np.testing.assert_allclose(log_p(start), exact, atol=1e-5)
    assert log_p(plain)[0] < exact[0] - 1
    solver = solvers.exp_ab(VP, times.uniform(10, start=time), order=3, value=solvers.V)
    end = np.asarray(jax.jit(lambda s: diffjax.sample(KEY, d, solver, s.sample(KEY, (4000, 2))))(start))
    np.testing.assert_allclose(end.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(end.T), cov, atol=0.05)


PSI = diffjax.denoiser(  # v = -x0: the mean of class c
    lambda x, t, c: -jnp.broadcast_to(jnp.asarray(c)[:, None], x.shape), processes.zero_terminal_snr(VP), diffjax.from_v
)


def test_one_more_step_reaches_the_first_time(x64):
    n, labels = 6000, np.where(np.arange(6000) % 2, 3.0, -1.0)
    psi, step = PSI.bind(labels), starts.one_more_step
    alpha, sigma = VP.alpha(0.4), VP.sigma(0.4)

    @jax.jit
    def draws():
        part = step(KEY, PSI.bind(labels[4:6]), VP, (2, 2), time=0.4, items=np.array([4, 5]))
        pure = step(KEY, psi, processes.cosine(), (n, 2), eta=0.0)  # a schedule that begins in pure noise: no step
        x, kept = (step(KEY, psi, VP, (n, 2), time=0.4, eta=eta) for eta in (1.0, 0.0))
        return x, kept, part, pure, psi.process.prior(jax.random.fold_in(KEY, 0), (n, 2))

    x, kept, part, pure, noise = map(np.asarray, draws())
    for c in (3.0, -1.0):
        np.testing.assert_allclose(x[labels == c].mean(0), alpha * c, atol=4 * sigma / 3000**0.5)
    np.testing.assert_allclose((x - alpha * labels[:, None]).std(0), sigma, rtol=0.03)
    # eta = 0 keeps the noise that it came from
    np.testing.assert_allclose(kept, alpha * labels[:, None] + sigma * noise, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(part, x[4:6], rtol=1e-12)
    np.testing.assert_allclose(pure, noise, rtol=1e-12)


def test_every_table_starts_at_exactly_no_signal():
    """Zero terminal SNR: from alpha = 0 the mean comes from the denoiser; the plain schedule keeps a trace of it."""
    betas = processes.from_betas(np.linspace(1e-3, 0.02, 100))  # alpha(1) = 0.59: far from noise
    zero = processes.zero_terminal_snr(betas)
    assert float(zero.alpha(1.0)) == 0.0

    def moments(name, process):
        table = solvers.CATALOGUE[name].build(process, times.discrete(process, 50, "trailing"))
        return gaussian_moments.run(table, process, 3.0, 0.25, (0.0, float(process.sigma(1.0)) ** 2))

    # not annealed Langevin dynamics, whose steps are biased and which has no order
    names = [n for n, c in solvers.CATALOGUE.items() if "nonlinear" not in c.flags and c.order is not None]
    for name in names:
        mean, variance = moments(name, zero)
        assert abs(mean - 3.0) < 0.05 and abs(variance**0.5 - 0.5) < 0.05, (name, mean, variance)
    assert abs(moments("ddim", betas)[0] - 3.0) > 0.5


def test_bad_input():
    with pytest.raises(ValueError, match="at least two items"):
        starts.analytic_start(VP, np.zeros((1, 2)), 0.5)
    with pytest.raises(ValueError, match=r"time, where sampling starts, must be in \(0, 1\]"):
        starts.gaussian_start(VP, DATA, 0.0)
    with pytest.raises(ValueError, match="must live on a process that ends in pure noise"):
        starts.one_more_step(KEY, dataclasses.replace(PSI, process=VP), VP, (2, 2))
    with pytest.raises(ValueError, match="eta, the share of new noise"):
        starts.one_more_step(KEY, PSI, VP, (2, 2), eta=1.5)
