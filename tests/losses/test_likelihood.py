"""The variational bound against exact log-densities, entropies and a closed-form sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes, testing
from diffjax.losses import GaussianDecoder, LevelDecoder, variational_bound
from diffjax.types import Evaluation, Prediction


def new(seed=0):
    """A key that was not used yet."""
    return jax.random.key(seed)


PROCESSES = {"cosine": processes.cosine(), "line": processes.rectified(), "vp": processes.vp(), "edm": processes.edm()}
GAUSS = testing.gaussian([0.5, -0.2], [[0.7, 0.3], [0.3, 0.4]])
MIXTURE = testing.mixture([1, 2], [[-1.0, 0.5], [1.0, -0.3]], stds=[0.5, 0.3])
BITS = 2 * np.log(2)  # nats of a two-dimensional point per bit and dimension


@jax.jit
def call(loss, key, d, x0, cond=None):
    return loss(key, d, x0, cond)


def mean_and_error(a):
    a = np.asarray(a, np.float64)
    return a.mean(), a.std() / np.sqrt(len(a))


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("m", [GAUSS, MIXTURE], ids=["gauss", "mixture"])
def test_with_the_exact_denoiser_the_continuous_bound_is_the_likelihood_of_each_point(m, name):
    process, n = PROCESSES[name], 4096
    for point in ([0.3, 0.1], [-1.2, 0.9]):
        x0 = jnp.tile(jnp.asarray([point], jnp.float32), (n, 1))
        bound, aux = call(variational_bound(levels=None, samples=32), new(), testing.oracle(m, process), x0)
        got, error = mean_and_error(bound)
        exact = -float(testing.log_density(m, process, x0[:1], 0.0)[0]) / BITS
        if name == "edm":  # data of variance L below N(0, 80^2): the prior is off by O(L / 80^2)
            assert process.log_snr(1.0) < -4
        assert error < 0.04 and abs(got - exact) < 4 * error + 1e-3
        np.testing.assert_allclose(sum(aux.values()), bound, rtol=1e-5)


def test_conditional_bounds_are_conditional_likelihoods():
    process, n = processes.cosine(), 512
    x0 = jnp.tile(jnp.asarray([[-0.8, 0.4]], jnp.float32), (n, 1))
    for label in (0, 1):
        bound, _ = call(
            variational_bound(levels=None, samples=8), new(), testing.oracle(MIXTURE, process), x0, jnp.full(n, label)
        )
        got, error = mean_and_error(bound)
        exact = -float(testing.log_density(MIXTURE, process, x0[:1], 1e-6, label)[0]) / BITS
        assert abs(got - exact) < 4 * error + 2e-3


def closed_form_bound(process, steps, variance, ends):
    """The expected bound of a chain for N(0, variance) data and its exact denoiser, in bits."""
    t = np.linspace(ends[0], ends[1], steps + 1)
    a, s = process.alpha(t), process.sigma(t)
    posterior = variance * s**2 / (a**2 * variance + s**2)  # E |x0 - x0_hat|^2
    with np.errstate(divide="ignore"):
        snr = (a / s) ** 2
    diffusion = 0.5 * np.sum((snr[:-1] - snr[1:]) * posterior[1:])
    prior = 0.5 * snr[-1] * variance
    std2 = (s[0] / a[0]) ** 2
    return (prior + diffusion + 0.5 * (posterior[0] / std2 + np.log(2 * np.pi * std2))) / np.log(2)


def test_the_discrete_bound_is_its_closed_form_and_tightens_with_steps():
    process, variance, n = processes.cosine(), 0.6, 2048
    d = testing.oracle(testing.gaussian([0.0], variance), process)
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(n, 1)) * np.sqrt(variance), jnp.float32)
    ends = (0.02, 1.0)
    entropy = 0.5 * np.log2(2 * np.pi * np.e * variance)
    last = np.inf
    for steps in (4, 16, 64):
        loss = variational_bound(steps, levels=None, samples=steps, data=ends[0], noise=ends[1])
        got, error = mean_and_error(call(loss, new(), d, x0)[0])
        expected = closed_form_bound(process, steps, variance, ends)
        assert abs(got - expected) < 4 * error + 1e-3
        assert entropy < expected < last
        last = expected
    assert abs(closed_form_bound(process, 20000, variance, ends) - entropy) < 0.01  # the chain's limit is exact


def test_one_random_step_estimates_the_whole_chain():
    process, n = processes.vp(), 1024
    d = testing.oracle(testing.gaussian([0.0, 0.0], 0.5), process)
    x0 = testing.draw(jax.random.key(2), testing.gaussian([0.0, 0.0], 0.5), n)[0]
    make = lambda samples: variational_bound(8, levels=None, samples=samples, data=0.05, noise=1.0)
    all_steps, e1 = mean_and_error(call(make(8), new(), d, x0)[0])
    one_step, e2 = mean_and_error(call(make(1), new(), d, x0)[0])
    assert e2 > e1 and abs(all_steps - one_step) < 4 * np.hypot(e1, e2)


LEVELS = np.array([-1.0, -1 / 3, 1 / 3, 1.0])


def _discrete(d, state, x, t, cond, key):
    """The exact denoiser of data that are uniform on four levels, independently in every entry."""
    a, s = (jnp.broadcast_to(jnp.asarray(c, x.dtype), x.shape[:1]).reshape(-1, 1) for c in
            (d.process.alpha(t), d.process.sigma(t)))  # fmt: skip
    levels = jnp.asarray(LEVELS, x.dtype)
    logits = -0.5 * ((x[..., None] - a[..., None] * levels[None, None]) / s[..., None]) ** 2
    x0 = (jax.nn.softmax(logits, -1) * levels[None, None]).sum(-1)
    return Evaluation(Prediction(x0, (x - a * x0) / s), state)


def test_bits_of_quantised_data_are_the_entropy():
    d = diffjax.Denoiser(leaves=None, process=processes.cosine(), apply=_discrete)
    x0 = jnp.asarray(np.random.default_rng(0).choice(LEVELS, size=(1024, 3)), jnp.float32)
    got, error = mean_and_error(call(variational_bound(levels=4, samples=64), new(), d, x0)[0])
    assert abs(got - 2.0) < 4 * error + 2e-3 and error < 0.03  # log2(4) bits in every entry


# ----------------------------------------------------------------------------------------------------------- decoders


@pytest.mark.parametrize("mean, std", [(0.1, 0.3), (0.999, 0.004), (-4.0, 0.5), (0.2, 50.0), (0.0, 1e-3)])
def test_level_probabilities_sum_to_one_and_match_scipy(mean, std):
    from scipy.stats import norm

    decoder = LevelDecoder(16, low=-1.0, high=1.0)
    v = np.linspace(-1, 1, 16)
    logp = np.asarray(decoder(jnp.asarray(v, jnp.float32), jnp.full(16, mean), jnp.full(16, std)), np.float64)
    np.testing.assert_allclose(np.exp(logp).sum(), 1, rtol=2e-4)
    edges = np.concatenate([[-np.inf], (v[1:] + v[:-1]) / 2, [np.inf]])
    p = norm.cdf(edges[1:], mean, std) - norm.cdf(edges[:-1], mean, std)
    np.testing.assert_allclose(np.exp(logp), p, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("decoder", [LevelDecoder(256), GaussianDecoder(), LevelDecoder(4, (-2.0, 0.0), (1.0, 3.0))])
def test_decoders_are_finite_with_finite_gradients_far_from_the_data(decoder):
    x0 = jnp.asarray([[-1.0, 0.5], [1.0, 1.0]], jnp.float32)
    f = jax.jit(jax.value_and_grad(lambda m: decoder(x0, m * jnp.ones((2, 2)), jnp.full((2, 2), 0.02)).sum()))
    for mean in (-9.0, 0.3, 9.0):
        value, grad = f(mean)
        assert np.isfinite(value) and np.isfinite(grad)


def test_the_bound_is_a_loss_that_learns_the_schedule():
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), jnp.float32)

    def f(process):
        d = diffjax.denoiser(lambda x, t: 0.5 * x, process, diffjax.from_eps)
        return variational_bound(levels=256)(new(), d, x0)[0].mean()

    g = jax.jit(jax.grad(f))(processes.learned())
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(g))
    assert g["high"] != 0 and g["low"] != 0 if isinstance(g, dict) else any(np.any(a != 0) for a in jax.tree.leaves(g))


def test_errors_name_the_way_out():
    for bad in (dict(steps=0), dict(samples=1.5), dict(levels=1)):
        with pytest.raises(ValueError, match="must be an int"):
            variational_bound(**bad)
    with pytest.raises(ValueError, match="not both"):
        variational_bound(levels=8, decoder=GaussianDecoder())
    with pytest.raises(ValueError, match="0 < data < noise <= 1"):
        variational_bound(data=0.5, noise=0.1)
    with pytest.raises(ValueError, match="first level must be below"):
        LevelDecoder(8, 1.0, -1.0)
