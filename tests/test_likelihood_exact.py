"""Exact log-densities against closed forms: mixtures, full-covariance Gaussians, and determinants of the flow map."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import bits_per_dim, likelihood, log_density, processes, solvers, times
from diffjax import numerics as nu
from diffjax.likelihood import Exact, Hutchinson
from diffjax.losses import LevelDecoder
from diffjax.testing import gaussian, mixture, oracle, oracles

KEY = jax.random.key(0)
COVARIANCES = [[[0.3, 0.1], [0.1, 0.6]], [[0.4, 0.0], [0.0, 0.4]], [[0.5, -0.2], [-0.2, 0.2]]]
MIX = mixture([2, 1, 1], [[-1.5, 0.0], [1.0, 1.0], [1.0, -1.2]], covariances=COVARIANCES)
PROCESSES = {
    "vp": processes.vp(),
    "ve": processes.ve(),
    "edm": processes.edm(),
    "cosine": processes.cosine(),
    "rectified": processes.rectified(),
}


@dataclasses.dataclass(frozen=True)
class Marginal:
    """The law of the data at time t, as a prior."""

    process: object
    t: float = 1.0

    def log_prob(self, x):
        return oracles.log_density(MIX, self.process, x, self.t)


LOG_P = jax.jit(oracles.log_density)


def points(n):
    """States near the means of the mixture."""
    rng = np.random.default_rng(0)
    return jnp.asarray(MIX.means[rng.integers(3, size=n)] + 0.6 * rng.standard_normal((n, 2)), float)


@pytest.mark.parametrize("name", PROCESSES)
def test_mixtures_have_their_closed_form(name):
    """Under the marginal at t = 1 as prior the model's law is the data's, to 1e-4 in float32."""
    process = PROCESSES[name]
    x = points(16)
    log_p, more = jax.jit(lambda x: log_density(KEY, oracle(MIX, process), x, steps=32, prior=Marginal(process)))(x)
    assert log_p.dtype == jnp.float32 and more.evaluations == 128 and not np.any(more.standard_error)
    np.testing.assert_allclose(log_p, LOG_P(MIX, process, x, 0.0), atol=1e-4)
    np.testing.assert_allclose(more.latent, oracles.flow(MIX, process, x, 0.0, 1.0), rtol=2e-4, atol=2e-4)


def test_fourth_order_in_float64(x64):
    """From an inner time to an inner time, where nothing is singular: 16 times less error for half the step."""
    process = processes.vp()
    x, prior = points(8), Marginal(process, 0.8)
    run = jax.jit(lambda x, steps: log_density(KEY, oracle(MIX, process), x, steps=steps, prior=prior)[0])
    exact = LOG_P(MIX, process, x, 0.1)
    fine = likelihood._even(process, 24, 0.8, 0.1)
    coarse = np.append(np.repeat(fine[::2][:-1], 2), fine[-1])  # 12 steps and 12 of length zero: one compilation
    a, b = (np.abs(run(x, jnp.asarray(grid)) - exact).max() for grid in (coarse, fine))
    assert b < 1e-5 and 3.6 < np.log2(a / b) < 4.6


@pytest.mark.parametrize("process", [processes.vp(), processes.ve(), processes.edm(), processes.sub_vp()])
def test_the_prior_is_what_samples_start_from(process, x64):
    """The flow of a Gaussian is affine: the model's law is the pushed prior N(0, sigma(1)^2), mean and full covariance."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    m = gaussian(rng.standard_normal(4), root @ root.T / 4 + 0.2 * np.eye(4))
    a0, s0, a1, s1 = (float(f(t)) for t in (0.0, 1.0) for f in (process.alpha, process.sigma))
    basis, spectrum, mean = m.bases[0], m.spectra[0], m.means[0]
    gain = basis @ np.diag(np.sqrt((a0**2 * spectrum + s0**2) / (a1**2 * spectrum + s1**2))) @ basis.T
    covariance, centre = s1**2 * gain @ gain.T, a0 * mean - a1 * gain @ mean
    x = rng.standard_normal((3, 4))
    quadratic = np.einsum("bi,ij,bj->b", x - centre, np.linalg.inv(covariance), x - centre)
    exact = -0.5 * (quadratic + np.linalg.slogdet(covariance)[1] + 4 * np.log(2 * np.pi))
    got, _ = log_density(KEY, oracle(m, process), x, steps=48)
    np.testing.assert_allclose(got, exact, atol=1e-6)


# A network that is the exact denoiser of nothing, with a condition, on states [B, 2, 2, 1].
NET = diffjax.denoiser(
    lambda p, x, t, c: jnp.sin(p * x[:, ::-1] + c[:, None, None, None]) - 0.3 * x,
    processes.cosine(), diffjax.from_v, 1.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def bound():
    """The network with its condition bound, and states."""
    with jax.enable_x64(True):
        net = dataclasses.replace(NET, leaves=1.3)
        return net.bind(jnp.linspace(-1, 1, 3)), jax.random.normal(jax.random.key(6), (3, 2, 2, 1), float)


@pytest.fixture(scope="module")
def densities(bound):
    """Exact, Hutchinson and adaptive of the same states."""
    net, x = bound
    with jax.enable_x64(True):
        run = lambda **options: jax.jit(lambda x: log_density(jax.random.key(5), net, x, **options))(x)
        found = {
            "exact": run(steps=24),
            "rademacher": run(steps=24, trace=Hutchinson(400)),
            "gaussian": run(steps=24, trace=Hutchinson(400, nu.item_normal)),
            "adaptive": run(tolerance=(1e-8, 1e-8)),
        }
        return jax.tree.map(np.asarray, found)


def test_any_network_against_the_determinant_of_its_flow(bound, densities, x64):
    net, x = bound
    inverse = solvers.exp_ab(net.process, np.linspace(0, 1, 401), order=3, value=solvers.V, inverse=True)
    run = lambda item, c: diffjax.sample(KEY, net.bind(c[None]), inverse, item.reshape(1, 2, 2, 1))[0].ravel()
    flat = x.reshape(3, 4)
    end, jacobian = jax.jit(jax.vmap(lambda a, c: (run(a, c), jax.jacfwd(run)(a, c))))(flat, net.cond)
    expected = likelihood.normal_log_prob(end, 1.0) + np.linalg.slogdet(jacobian)[1]
    log_p, more = densities["exact"]
    np.testing.assert_allclose(log_p, expected, atol=2e-4)
    np.testing.assert_allclose(more.latent.reshape(3, 4), end, atol=2e-4)


def test_hutchinson_is_unbiased_with_an_honest_standard_error(densities):
    exact, _ = densities["exact"]
    for name in ("rademacher", "gaussian"):
        log_p, more = densities[name]
        assert np.all(more.standard_error > 0) and np.all(more.standard_error < 0.2)
        assert np.all(np.abs(log_p - exact) < 4 * more.standard_error), name
        np.testing.assert_allclose(more.latent, densities["exact"][1].latent, rtol=1e-9)
    assert np.all(densities["rademacher"][1].standard_error < densities["gaussian"][1].standard_error)


def test_adaptive_steps_agree(densities):
    log_p, more = densities["adaptive"]
    np.testing.assert_allclose(log_p, densities["exact"][0], atol=1e-5)
    assert more.evaluations.shape == (3,) and np.all(more.evaluations > 20)


def test_items_do_not_depend_on_the_batch(bound, x64):
    net, x = bound
    run = lambda part, trace: jax.jit(
        lambda x: log_density(KEY, net.bind(net.cond[part]), x, steps=3, trace=trace, items=part)[0]
    )(x[part])
    for trace in (Exact(), Hutchinson(2)):
        np.testing.assert_allclose(run(jnp.arange(3), trace)[1:], run(jnp.arange(1, 3), trace), rtol=1e-12)


def test_the_gradient_is_the_score(x64):
    process = processes.edm()
    x = points(3)
    total = lambda x: log_density(KEY, oracle(MIX, process), x, steps=24, prior=Marginal(process))[0].sum()
    np.testing.assert_allclose(jax.jit(jax.grad(total))(x), jax.jit(oracles.score)(MIX, process, x, 0.0), atol=2e-4)


def test_bits_of_quantised_data_hold_the_jacobian_of_the_transform(x64):
    """Standard normal model, raw levels 0..16 in two channels: E log N(x + u) has a closed form."""
    process, n = processes.cosine(), 4096
    mean, std = np.array([7.0, 9.0]), np.array([3.0, 5.0])
    raw = np.array([[[4.0, 16.0], [8.0, 0.0]]])
    x = np.broadcast_to((raw - mean) / std, (n, 2, 2))
    levels = LevelDecoder(17, tuple((0 - mean) / std), tuple((16 - mean) / std))
    d = oracle(gaussian(np.zeros(4), 1.0), process)
    flat = dataclasses.replace(d, apply=_flattened)
    bits, aux = jax.jit(lambda x: bits_per_dim(KEY, flat, x, levels, samples=2, steps=1))(x)
    width = 1 / std
    expected = 0.5 * (((raw - mean) / std) ** 2 + width**2 / 12 + np.log(2 * np.pi)) - np.log(width)
    got = np.asarray(bits).mean(), np.asarray(bits).std() / n**0.5
    assert abs(got[0] - expected.mean() / np.log(2)) < 4 * got[1]
    assert aux["log_p"].shape == (2, n) and np.all(np.isfinite(aux["standard_error"]))
    bins = jax.scipy.stats.norm.cdf
    z = (raw - mean) / std
    true = -np.log2(bins(z + width / 2) - bins(z - width / 2)).mean()
    assert true <= got[0] < true + 0.02  # a bound, and a tight one for narrow bins


def _flattened(d, state, x, t, cond, key):
    p = oracles.predict(d.leaves, d.process, x.reshape(len(x), -1), t)
    return diffjax.types.Evaluation(jax.tree.map(lambda a: a.reshape(x.shape), p), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": jnp.zeros(3)}, r"x must be floating, of shape \[B, ...\]"),
        ({"x": jnp.zeros((2, 2), jnp.int32)}, "x must be floating"),
        ({"steps": 0}, "steps must be an int >= 1"),
        ({"steps": times.uniform(4)}, r"increase from data to noise.*Did you mean grid\[::-1\]"),
        ({"steps": np.array([0.0, 1.5])}, r"within \[0, 1\]"),
        ({"start": 0.0, "stop": 1.0}, "0 <= stop < start <= 1"),
        ({"tolerance": 1e-5}, "two positive numbers"),
        ({"items": jnp.arange(3)}, "one global index per item"),
    ],
)
def test_bad_input(options, message):
    arguments = {"x": jnp.zeros((2, 2))} | options
    with pytest.raises(ValueError, match=message):
        log_density(KEY, oracle(MIX, processes.vp()), **arguments)
    with pytest.raises(ValueError, match="probes must be an int >= 1"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="samples must be an int"):
        bits_per_dim(KEY, oracle(MIX, processes.vp()), jnp.zeros((2, 2)), samples=0)
