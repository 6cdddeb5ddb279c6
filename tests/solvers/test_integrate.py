"""Adaptive integration against exact flows and laws, its gradients, statistics and messages."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes
from diffjax.solvers import integrate
from diffjax.testing import flow, gaussian, oracle, smooth_mixture

MIX = smooth_mixture()


@pytest.mark.parametrize("process", [processes.vp(), processes.ve()], ids=["vp", "ve"])
def test_the_whole_flow_and_back(process):
    """From exactly t = 1 to exactly t = 0 in float32, and the encoding of the result."""
    d = oracle(MIX, process)
    run = jax.jit(lambda x, a, b: integrate(None, d, x, a, b, rtol=1e-6, atol=1e-6))
    x = process.prior(jax.random.key(0), (8, 2))
    end, stats = run(x, 1.0, 0.0)
    np.testing.assert_allclose(end, flow(MIX, process, x, 1.0, 0.0), atol=1e-5)
    code, _ = run(end, 0.0, 1.0)
    assert np.abs(code - x).max() < 1e-5 * process.sigma(1.0)
    assert stats.reached == 0.0 and stats.steps < 20


@pytest.mark.parametrize(("solver", "steps"), [(diffrax.Tsit5(), None), (diffrax.Euler(), 30)], ids=["tsit5", "euler"])
def test_evaluations_are_counted(solver, steps):
    calls = []

    def net(params, x, t, cond):
        jax.debug.callback(lambda t: calls.append(float(t.max())), t)
        return -params * jnp.sin(x)

    d = diffjax.denoiser(net, processes.cosine(), diffjax.from_v, 0.9)
    _, stats = integrate(None, d, jnp.ones((2, 1)), solver=solver, steps=steps)
    jax.effects_barrier()
    assert len(calls) == stats.evaluations > 20
    assert all(0 <= t <= 1 for t in calls)


def test_implicit_solver():
    process = processes.rectified()
    d = diffjax.denoiser(lambda x, t: 0.0 * x + 1.0, process, diffjax.from_x0)  # all data at 1
    end, stats = integrate(None, d, jnp.array([[2.0]]), 1.0, 0.1, solver=diffrax.Kvaerno5(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(end, [[0.9 * 1.0 + 0.1 * 2.0]], rtol=1e-3)
    assert stats.evaluations == -1


def test_items_stepped_alone_do_not_depend_on_the_batch():
    """A tree as state, a label as condition, and a step size for every item."""
    process = processes.rectified()

    def net(scale, x, t, cond):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * scale[cond] ** 2 / (alpha**2 * scale[cond] ** 2 + sigma**2)
        return {"a": gain * x["a"], "b": gain[:, None] * x["b"]}

    scale = jnp.array([0.3, 2.0])
    x = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.ones((3, 2))}
    labels = jnp.array([0, 1, 0])
    run = jax.jit(lambda x, labels: integrate(
        None, diffjax.denoiser(net, process, diffjax.from_x0, scale).bind(labels), x, per_item=True))  # fmt: skip
    end, stats = run(x, labels)
    np.testing.assert_allclose(end["a"], scale[labels] * x["a"], rtol=1e-3)  # the flow multiplies by the data's std
    np.testing.assert_allclose(end["b"], scale[labels][:, None] * x["b"], rtol=1e-3)
    assert stats.steps.shape == (3,) and stats.steps[0] != stats.steps[1]
    other, _ = run(jax.tree.map(lambda a: a.at[1:].multiply(50.0), x), labels)
    assert other["a"][0] == end["a"][0]


@pytest.mark.parametrize("adjoint", [diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()],
                         ids=["checkpoint", "backsolve"])  # fmt: skip
def test_gradients_are_the_closed_form(adjoint):
    """Gaussian data of std c: the end is c x, so its gradient is c in x and x in c."""
    process = processes.rectified()

    def net(std, x, t, cond):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (alpha * std**2 / (alpha**2 * std**2 + sigma**2))[:, None] * x

    def end(std, x):
        d = diffjax.denoiser(net, process, diffjax.from_x0, std)
        return jnp.sum(integrate(None, d, x, adjoint=adjoint, rtol=1e-6, atol=1e-6)[0])

    x = jnp.array([[1.0, -0.5]])
    in_std, in_x = jax.jit(jax.grad(end, argnums=(0, 1)))(jnp.float32(0.6), x)
    np.testing.assert_allclose(in_x, 0.6 * jnp.ones_like(x), rtol=1e-4)
    np.testing.assert_allclose(in_std, x.sum(), rtol=1e-4)


@pytest.fixture(scope="module")
def sde():
    process = processes.vp()
    d = oracle(gaussian([0.5, -0.25], np.array([[0.5, 0.2], [0.2, 0.3]])), process)
    run = jax.jit(lambda x, items: integrate(jax.random.key(2), d, x, 1.0, 0.001, eta=1.0, steps=20, items=items))
    x = process.prior(jax.random.key(1), (1024, 2))
    return process, run, x


def test_reverse_sde_has_the_law_of_the_data(sde):
    process, run, x = sde
    end, stats = run(x, jnp.arange(1024))
    alpha, sigma = process.alpha(0.001), process.sigma(0.001)
    mean, cov = alpha * np.array([0.5, -0.25]), alpha**2 * np.array([[0.5, 0.2], [0.2, 0.3]]) + sigma**2 * np.eye(2)
    assert np.abs(end.mean(axis=0) - mean).max() < 4 * np.sqrt(0.5 / 1024)
    assert np.abs(np.cov(np.asarray(end).T) - cov).max() < 4 * 0.5 * np.sqrt(2 / 1024)
    assert np.abs(np.corrcoef(np.asarray(x)[:, 0], np.asarray(end)[:, 0])[0, 1]) < 0.3  # most of the start is forgotten
    assert stats.evaluations == 40 and stats.reached == np.float32(0.001)


def test_paths_belong_to_items(sde):
    _, run, x = sde
    whole = run(x, jnp.arange(1024))[0]
    order = jnp.roll(jnp.arange(1024), 7)
    np.testing.assert_allclose(run(x[order], order)[0], whole[order], rtol=1e-5, atol=1e-6)


def test_running_out_of_steps_is_an_error_or_reported():
    process = processes.vp()
    d, x = oracle(gaussian([0.0], 0.25), process), jnp.ones((2, 1))
    run = jax.jit(lambda x, throw: integrate(None, d, x, max_steps=3, throw=throw), static_argnums=1)
    with pytest.raises(RuntimeError, match=r"did not reach `stop` within max_steps=3, .* Raise max_steps"):
        jax.block_until_ready(run(x, True))
    end, stats = run(x, False)
    assert 0 < stats.reached < 1 and stats.steps == 3
    np.testing.assert_allclose(end, flow(gaussian([0.0], 0.25), process, x, 1.0, float(stats.reached)), rtol=1e-3)


def test_messages():
    d, x = oracle(gaussian([0.0], 0.25), processes.cosine()), jnp.ones((2, 1))
    with pytest.raises(ValueError, match=r"two different times in \[0, 1\]; got start=1.0, stop=1.5"):
        integrate(None, d, x, 1.0, 1.5)
    with pytest.raises(ValueError, match="eta must be >= 0"):
        integrate(None, d, x, eta=-1.0)
    with pytest.raises(ValueError, match=r"log-SNR is infinite at start=1.0, .* start=0.99\d*, stop=0.003\d*"):
        integrate(jax.random.key(0), d, x, eta=1.0)
    with pytest.raises(ValueError, match="from noise to data, start > stop"):
        integrate(jax.random.key(0), d, x, 0.1, 0.9, eta=1.0)
    with pytest.raises(ValueError, match="with eta > 0 give a key"):
        integrate(None, d, x, 0.9, 0.1, eta=1.0)
    with pytest.raises(ValueError, match="state x must be floating"):
        integrate(None, d, jnp.ones((2, 1), jnp.int32))
    with pytest.raises(ValueError, match="steps, of equal length, must be an int >= 1"):
        integrate(None, d, x, steps=0)
    with pytest.raises(ValueError, match=r"one global index per item, shape \(2,\)"):
        integrate(jax.random.key(0), d, x, 0.9, 0.1, eta=1.0, items=jnp.arange(3))
    with pytest.raises(ValueError, match="condition has 3 items and the state 2"):
        integrate(None, d.bind(jnp.zeros(3)), x)
