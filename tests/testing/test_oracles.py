import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffjax import processes
from diffjax import testing as T

COV = np.array([[0.5, 0.2, 0.0], [0.2, 0.7, 0.1], [0.0, 0.1, 0.3]])
MIX = T.mixture([0.2, 0.5, 0.3], np.random.RandomState(0).randn(3, 3), covariances=[COV, 0.5 * COV, np.eye(3)])
X = np.random.RandomState(1).randn(5, 3)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_density_is_scipys_and_score_is_its_gradient(t, x64):
    process = processes.vp()
    x = jnp.asarray(X)
    got = T.log_density(MIX, process, x, t)
    a, s = float(process.alpha(t)), float(process.sigma(t))
    parts = [
        w + stats.multivariate_normal(a * m, a * a * (q * l) @ q.T + s * s * np.eye(3)).logpdf(X)
        for w, m, l, q in zip(MIX.log_weights, MIX.means, MIX.spectra, MIX.bases, strict=True)
    ]
    np.testing.assert_allclose(got, np.logaddexp.reduce(parts), rtol=1e-9)
    auto = jax.vmap(jax.grad(lambda x: T.log_density(MIX, process, x[None], t)[0]))(x)
    np.testing.assert_allclose(T.score(MIX, process, x, t), auto, rtol=1e-8)
    p = T.predict(MIX, process, x, t)
    np.testing.assert_allclose(process.add_noise(p.x0, p.eps, t), x, rtol=1e-9)
    np.testing.assert_allclose(-s * auto, p.eps, rtol=1e-8, atol=1e-12)


def test_posterior_mean_is_the_denoiser(x64):
    process, t = processes.rectified(), 0.4
    w, means, covariances = T.posterior(MIX, process, jnp.asarray(X), t)
    np.testing.assert_allclose((w[..., None] * means).sum(1), T.predict(MIX, process, jnp.asarray(X), t).x0, rtol=1e-9)
    a, s = float(process.alpha(t)), float(process.sigma(t))
    bayes = np.linalg.inv(np.linalg.inv(0.5 * COV) + a * a / s**2 * np.eye(3))
    np.testing.assert_allclose(covariances[0, 1], bayes, rtol=1e-8)


def test_flow_of_one_gaussian_agrees_with_the_integrated_one(x64):
    process = processes.vp()
    one = T.gaussian([0.3, -0.2, 0.1], COV)
    two = T.mixture([0.5, 0.5], [[0.3, -0.2, 0.1]] * 2, covariances=[COV, COV])  # the same density, integrated
    np.testing.assert_allclose(T.flow(one, process, X, 1.0, 0.0), T.flow(two, process, X, 1.0, 0.0), rtol=1e-9)


def test_labels_select_components(x64):
    process = processes.vp()
    d = T.oracle(MIX, process)
    only = T.mixture([1.0], MIX.means[1:2], covariances=0.5 * COV[None])
    x = jnp.asarray(X)
    np.testing.assert_allclose(d(x, 0.5, jnp.full(5, 1)).x0, T.predict(only, process, x, 0.5).x0, rtol=1e-9)
    np.testing.assert_allclose(d(x, 0.5, jnp.full(5, T.ALL)).x0, T.predict(MIX, process, x, 0.5).x0, rtol=1e-9)


def test_draws_have_the_moments():
    x, _ = T.draw(jax.random.key(0), T.gaussian([1.0, 0.0, 0.0], COV), 20000)
    np.testing.assert_allclose(np.cov(x.T), COV, atol=0.03)


def test_bad_mixtures():
    with pytest.raises(ValueError, match="weights must be"):
        T.mixture([1.0], np.zeros((2, 3)), stds=[1.0])
    with pytest.raises(ValueError, match="positive definite"):
        T.gaussian([0.0, 0.0], np.diag([1.0, -1.0]))
    with pytest.raises(ValueError, match="either stds"):
        T.mixture([1.0], np.zeros((1, 3)))


def test_checks_catch_wrong_methods():
    import dataclasses

    from diffjax import solvers, times

    p = processes.cosine()
    wrong = lambda process, grid: dataclasses.replace(
        s := solvers.dpmpp(process, grid), rows=s.rows._replace(qd=0.9 * s.rows.qd)
    )
    grid = lambda n: times.log_snr(p, n, start=0.9, stop=0.1)
    T.check_solver(solvers.dpmpp, 2, p, grid, steps=(20, 40))
    with pytest.raises(T.ContractError, match="claimed order 2"):
        T.check_solver(wrong, 2, p, grid, steps=(20, 40))
    d = T.oracle(MIX, p)
    x = jnp.asarray(X, jnp.float32)
    T.check_denoiser(d, x, 0.5)
    leaky = dataclasses.replace(d, apply=_leaky)
    with pytest.raises(T.ContractError, match="item 0 changes"):
        T.check_denoiser(leaky, x, 0.5)


def _leaky(d, state, x, t, cond, key):
    from diffjax.prediction import from_v
    from diffjax.types import Evaluation

    return Evaluation(from_v(x - x.mean(0, keepdims=True), x, d.process, t), state)
