import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import prediction, processes
from diffjax.prediction import READERS, EdmReader, EdmTarget, broadcast_null, edm_scale

PROCESSES = {"vp": processes.vp(), "cosine": processes.cosine(), "ve": processes.ve(), "edm": processes.edm(),
             "rectified": processes.rectified(), "sub_vp": processes.sub_vp()}  # fmt: skip
X = jax.random.normal(jax.random.key(1), (3, 4))
OUT = jax.random.normal(jax.random.key(2), (3, 4))
T = jnp.array([0.05, 0.5, 0.95])


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("read", READERS, ids=lambda f: f.__name__)
def test_pair_invariant_and_round_trip(read, process, x64):
    x, out, t = (jnp.asarray(a, jnp.float64) for a in (X, OUT, T))
    p = read(out, x, process, t)
    np.testing.assert_allclose(process.add_noise(p.x0, p.eps, t), x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(READERS[read](p, process, t), out, rtol=1e-7, atol=1e-7)


def test_edm_reader_is_the_papers_preconditioning(x64):
    process, d = processes.edm(), 0.7
    x, out, t = (jnp.asarray(a, jnp.float64) for a in (X, OUT, T))
    sigma = (process.sigma(t) / process.alpha(t))[:, None]
    c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / jnp.sqrt(sigma**2 + d**2)
    p = EdmReader(d)(out, x, process, t)
    np.testing.assert_allclose(p.x0, c_skip * x + c_out * out, rtol=1e-12)
    np.testing.assert_allclose(edm_scale(d)(process, t)[:, None], 1 / jnp.sqrt(sigma**2 + d**2), rtol=1e-12)
    np.testing.assert_allclose(EdmTarget(d)(p, process, t), out, rtol=1e-10)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("read", [f for f in READERS if f is not diffjax.from_velocity], ids=lambda f: f.__name__)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_endpoints_are_finite_and_so_are_their_gradients(read, process, t):
    f = lambda out: sum(jnp.sum(a) for a in read(out, X, process, t))
    value, grad = jax.value_and_grad(f)(OUT)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(grad))


def test_times_per_frame_and_per_leaf():
    process = processes.cosine()
    video = jax.random.normal(jax.random.key(3), (2, 5, 3))
    t = jnp.linspace(0.1, 0.9, 5)[None]
    p = diffjax.from_v(jnp.zeros_like(video), video, process, t)
    each = diffjax.from_v(jnp.zeros((2, 3)), video[:, 2], process, t[0, 2])
    np.testing.assert_allclose(p.x0[:, 2], each.x0, rtol=1e-6)
    state = {"a": X, "b": X[:, 0]}
    p = diffjax.from_x0(state, state, process, {"a": 0.5, "b": 0.25})
    np.testing.assert_allclose(process.add_noise(p.x0, p.eps, {"a": 0.5, "b": 0.25})["b"], X[:, 0], rtol=1e-5)


def test_denoiser_options_reach_the_network():
    seen = {}

    def fn(params, x, t, cond, key=None):
        seen.update(t=t, x=x, key=key)
        return params * x, {"log_variance": t}

    process = processes.edm()
    d = diffjax.denoiser(
        fn,
        process,
        diffjax.from_edm,
        2.0,
        input_scale=edm_scale(0.5),
        time=prediction.time_log_sigma,
        dropout=True,
        aux=True,
    )
    out = d.evaluate(X, 0.5, None, key=jax.random.key(0))
    assert seen["t"].shape == (3,) and seen["key"] is not None
    np.testing.assert_allclose(seen["t"], jnp.log(process.sigma(0.5)) / 4, rtol=1e-6)
    np.testing.assert_allclose(seen["x"], X / np.sqrt(40.0**2 + 0.25), rtol=1e-5)
    assert out.aux["log_variance"].shape == (3,)


def test_new_weights_and_new_process_parameters_do_not_recompile():
    traces = []

    def fn(params, x, t, cond):
        traces.append(1)
        return params * x

    run = jax.jit(lambda d, x: d(x, 0.5).x0)
    a = run(diffjax.denoiser(fn, processes.vp(), diffjax.from_v, 1.0), X)
    b = run(diffjax.denoiser(fn, processes.vp(0.2, 10.0), diffjax.from_v, 2.0), X)
    assert len(traces) == 1 and not np.allclose(a, b)


def test_bad_networks_are_refused():
    with pytest.raises(ValueError, match=r"fn\(x, t\)"):
        diffjax.denoiser(lambda x: x, processes.vp(), diffjax.from_v)
    with pytest.raises(ValueError, match="params were given"):
        diffjax.denoiser(lambda x, t: x, processes.vp(), diffjax.from_v, params=1.0)


def test_null_conditions():
    cond = {"label": jnp.array([1, 2]), "vector": jnp.ones((2, 3))}
    null = broadcast_null({"label": 10, "vector": np.zeros(3, np.float32)}, cond, 2)
    assert null["label"].tolist() == [10, 10] and null["vector"].shape == (2, 3)
    kept = broadcast_null({"label": 10}, cond, 2)
    assert kept["label"].tolist() == [10, 10] and kept["vector"] is cond["vector"]
    with pytest.raises(ValueError, match="same fields"):
        broadcast_null({"image": 10}, cond, 2)
    with pytest.raises(ValueError, match="no batch axis"):
        broadcast_null(np.zeros((2,)), jnp.array([1, 2]), 2)
