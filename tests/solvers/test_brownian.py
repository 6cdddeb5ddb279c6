"""One Brownian path per item: its law, and that refining a grid refines the solution on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import numerics as nu
from diffjax import processes, solvers, times
from diffjax.solvers import sde
from diffjax.solvers.brownian import path
from diffjax.testing import oracle, smooth_mixture

PROCESS = processes.vp()
START, STOP = 0.8, 0.1
ROWS = 256
METHODS = {
    "euler_maruyama": sde.euler_maruyama,
    "reverse_diffusion": sde.reverse_diffusion,
    "ddim": lambda p, g: solvers.ddim(p, g, eta=1.0),
}


def grid(n):
    return times.log_snr(PROCESS, n, start=START, stop=STOP)


@pytest.fixture(scope="module")
def run():
    """A compiled sampler for padded tables of up to ROWS rows, with and without a path."""
    d = oracle(smooth_mixture(), PROCESS)
    sample = jax.jit(lambda key, s, x, items: diffjax.sample(key, d, s, x, items=items))

    def run(solver, x, items=None, key=0, on_path=True):
        s = solvers.pad(solver, ROWS, p=1, q=0, noise=1)
        s = solvers.brownian(s) if on_path else s
        return sample(jax.random.key(key), s, x, jnp.arange(len(x)) if items is None else items)

    return run


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (64, 2))


def rms(a, b):
    return float(jnp.sqrt(jnp.mean((a - b) ** 2)))


def test_strong_convergence_on_a_path_and_not_without(run, x):
    reference = run(sde.euler_maruyama(PROCESS, grid(256)), x)
    for name, build in METHODS.items():
        e = [rms(run(build(PROCESS, grid(n)), x), reference) for n in (8, 32)]
        # order 1: a factor of 4 for a refinement by 4 (float32, and the reference's own error 1/8 of the second)
        assert e[1] < 0.12 and e[0] / e[1] > 3, (name, e)
        apart = [rms(run(build(PROCESS, grid(n)), x, on_path=False),
                     run(sde.euler_maruyama(PROCESS, grid(256)), x, on_path=False)) for n in (8, 32)]  # fmt: skip
        assert min(apart) > 0.5 and apart[0] / apart[1] < 1.3, (name, apart)


def test_a_path_belongs_to_its_item(run, x):
    solver = solvers.ddim(PROCESS, grid(16), eta=1.0)
    whole = run(solver, x)
    order = jnp.roll(jnp.arange(64), 5)
    np.testing.assert_allclose(run(solver, x[order], order), whole[order], rtol=1e-5, atol=1e-6)
    assert rms(run(solver, x, key=1), whole) > 0.3
    d = oracle(smooth_mixture(), PROCESS)
    s = solvers.brownian(solvers.ddim(PROCESS, grid(16), eta=1.0))
    few = jax.jit(lambda k, items, x: diffjax.sample(k, d, s, x, items=items))
    np.testing.assert_allclose(few(jax.random.key(0), jnp.arange(3), x[:3]), whole[:3], rtol=1e-5, atol=1e-6)
    keys = jax.random.wrap_key_data(jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(4), 2)))
    both = jax.jit(jax.vmap(few, (0, None, None)))(keys, jnp.arange(3), x[:3])
    np.testing.assert_allclose(both[1], few(jax.random.split(jax.random.key(4), 2)[1], jnp.arange(3), x[:3]), rtol=1e-5)


@pytest.fixture(scope="module")
def paths():
    """W at eight times of 4096 items, two leaves, depth 20."""
    k = jnp.array([0, 1, 2, 3000, 250_000, 700_001, 2**20 - 1, 2**20])
    like = {"a": jnp.zeros((4096,)), "b": jnp.zeros((4096, 2))}
    keys = nu.item_keys(jax.random.key(2), jnp.arange(4096))
    w = jax.jit(jax.vmap(lambda k: path(keys, k, like, 20)))(k)
    return np.asarray(k) / 2**20, w


def test_the_path_is_brownian(paths):
    t, w = paths
    assert np.all(w["a"][0] == 0)
    for values in (w["a"], w["b"][..., 0], w["b"][..., 1]):
        steps = np.diff(np.asarray(values, np.float64), axis=0) / np.sqrt(np.diff(t))[:, None]
        # independent normals: covariance within five standard errors of the identity (float32 ends of tiny steps: 0.01)
        assert np.abs(np.cov(steps) - np.eye(7)).max() < 5 * np.sqrt(2 / 4096) + 0.01
        assert np.abs(steps.mean(axis=1)).max() < 5 / 64
    assert abs(np.corrcoef(w["a"][-1], w["b"][-1, :, 0])[0, 1]) < 5 / 64


def test_the_path_does_not_depend_on_its_depth():
    keys, like = nu.item_keys(jax.random.key(2), jnp.arange(3)), jnp.zeros((3, 2))
    at = lambda k, depth: jax.jit(path, static_argnums=3)(keys, k, like, depth)
    np.testing.assert_allclose(at(1, 1), at(2**9, 10), rtol=1e-6)  # the midpoint


def test_gradients_and_steps_without_noise(x):
    d = oracle(smooth_mixture(), PROCESS)
    s = solvers.brownian(solvers.ddim(PROCESS, times.uniform(4, stop=0.0), eta=1.0), depth=10)
    end = jax.jit(jax.grad(lambda x: jnp.sum(diffjax.sample(jax.random.key(0), d, s, x) ** 2)))(x[:3])
    assert np.all(np.isfinite(end)) and np.any(end != 0)
    both = lambda g: (sde.euler_maruyama(PROCESS, g), solvers.heun(PROCESS, g))
    traced = jax.jit(lambda g: [solvers.brownian(s).rows.high for s in both(g)])(grid(4))
    np.testing.assert_allclose(traced[0], np.round(grid(4)[:-1] * 2**20), atol=1)
    np.testing.assert_array_equal(traced[1], np.repeat(traced[0], 2))
    two_rows = solvers.brownian(sde.sra1(PROCESS, grid(3), eta=0.0)).rows
    np.testing.assert_array_equal(two_rows.low[::2], two_rows.low[1::2])


def test_messages():
    with pytest.raises(ValueError, match="draws two normals a step"):
        solvers.brownian(sde.sra1(PROCESS, grid(4)))
    with pytest.raises(ValueError, match="before it is stacked"):
        solvers.brownian(solvers.stack([solvers.ddim(PROCESS, grid(4), eta=1.0)] * 2))
    with pytest.raises(ValueError, match="another kind of solver"):
        solvers.brownian(solvers.predictor_corrector(PROCESS, grid(4)))
    with pytest.raises(ValueError, match=r"depth must be an int from 1 to 30; got 31"):
        solvers.brownian(solvers.ddim(PROCESS, grid(4)), depth=31)
    with pytest.raises(ValueError, match=r"steps shorter than 2\^-3 at t = .*; raise depth"):
        solvers.brownian(solvers.ddim(PROCESS, grid(8), eta=1.0), depth=3)
