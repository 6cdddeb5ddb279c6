"""Sampling all steps at once against sampling one after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import diffjax
from diffjax import processes, sample_parallel, solvers, times
from diffjax.testing import mixture, oracle

PROCESS = processes.cosine()
KEY = jax.random.key(3)
MIX = mixture([2, 1, 1], [[-1.5, 0.0], [1.0, 1.0], [1.0, -1.2]], stds=[[0.3, 0.6], [0.4, 0.4], [0.5, 0.2]])
GRID = times.log_snr(PROCESS, 40)  # from exactly alpha = 0 to exactly sigma = 0
NAMES = ("ddim", "ddpm", "ancestral", "heun", "edm_heun", "dpmpp_2m", "dpmpp_3m", "exp_ab4_eps", "exp_ab3_v")


def start(n=4, d=2):
    return PROCESS.prior(jax.random.key(1), (n, d))


@pytest.fixture(scope="module")
def runs():
    """Every kind of table, padded to one shape: `(x, one after the other, {tolerance: (x, calls)}, rows)` for each."""
    one = jax.jit(diffjax.sample)
    many = jax.jit(lambda k, d, s, x, tolerance: sample_parallel(k, d, s, x, window=16, tolerance=tolerance))
    out = {}
    for name in NAMES:
        solver = solvers.CATALOGUE[name].build(PROCESS, GRID)
        rows = solver.evaluations
        solver = solvers.pad(solver, 80, p=1, q=3, noise=2)
        d, x = oracle(MIX, PROCESS), start()
        out[name] = (
            one(KEY, d, solver, x), {tol: many(KEY, d, solver, x, tol) for tol in (0.0, 0.01, 0.1)}, rows
        )  # fmt: skip
    return out


@pytest.mark.parametrize("name", NAMES)
def test_without_tolerance_it_is_sample(name, runs):
    expected, found, rows = runs[name]
    x, calls = found[0.0]
    np.testing.assert_allclose(x, expected, atol=1e-5)
    assert calls <= rows


@pytest.mark.parametrize("name", NAMES)
def test_a_tolerance_saves_calls_and_bounds_the_error(name, runs):
    expected, found, rows = runs[name]
    (fine, more), (coarse, less) = found[0.01], found[0.1]
    assert less <= more <= found[0.0][1] and 4 * less <= rows
    assert np.abs(fine - expected).max() < 0.02 and np.abs(coarse - expected).max() < 0.2


def test_one_call_for_the_whole_window_and_none_saved_by_a_window_of_one():
    make = lambda window: jax.jit(lambda x: sample_parallel(KEY, d, solver, x, window=window, tolerance=0.0))
    weight = jax.random.normal(jax.random.key(2), (2, 2))
    d = diffjax.denoiser(lambda w, x, t, y: jnp.sin(x @ w) + y[:, None], PROCESS, diffjax.from_v, weight)
    d = d.bind(jnp.arange(4.0))
    solver = solvers.ddim(PROCESS, times.uniform(12))
    expected = diffjax.sample(KEY, d, solver, start())
    for window in (1, 5):
        run = make(window)
        dots = [line for line in run.lower(start()).as_text().splitlines() if "dot_general" in line]
        assert len(dots) == 1 and f"tensor<{window}x4x2x" in dots[0]  # one call an iteration, for window x batch states
        x, made = run(start())
        assert made == 12 if window == 1 else made <= 12
        np.testing.assert_allclose(x, expected, atol=1e-5)


def test_noise_is_per_item_and_frames_have_times_of_their_own():
    d = diffjax.denoiser(lambda x, t: jax.tree.map(jnp.sin, x), PROCESS, diffjax.from_v)
    s = solvers.ddpm(PROCESS, times.uniform(6))
    framed = jax.tree.map(
        lambda r: np.broadcast_to(r.reshape(r.shape + (1, 1)), (*r.shape, 1, 5)) if r.dtype.kind == "f" else r, s.rows
    )
    a, b = jax.random.normal(jax.random.key(8), (2, 4, 5, 3))
    x = {"a": a, "b": b[..., :2]}
    part = jax.tree.map(lambda a: a[1:3], x)
    run = lambda s, x: sample_parallel(KEY, d, s, x, window=4, tolerance=0.0, items=jnp.arange(1, 3))
    found, _ = jax.jit(run)(dataclasses.replace(s, rows=framed), part)
    whole = jax.jit(diffjax.sample)(KEY, d, s, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[1:3], atol=1e-5), found, whole)


def test_the_window_spread_over_8_devices_finds_the_same():
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("window",)), PartitionSpec("window"))
    devices = []

    def net(params, x, t, cond):
        jax.debug.inspect_array_sharding(
            x, callback=lambda s: devices.append((len(s.device_set), s.is_fully_replicated))
        )
        return params * jnp.sin(x)

    d = diffjax.denoiser(net, PROCESS, diffjax.from_v, 0.8)
    solver = solvers.dpmpp(PROCESS, times.uniform(16))
    run = lambda sharding: jax.jit(
        lambda d, x: sample_parallel(KEY, d, solver, x, window=8, tolerance=1e-3, sharding=sharding)
    )(d, start())
    (a, calls), (b, same) = run(None), run(spread)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert calls == same < 16 and devices[-1] == (8, False)


def counting(d, state, x, t, cond, key):
    return diffjax.types.Evaluation(diffjax.from_v(x, x, d.process, t), state + 1)


STATEFUL = diffjax.Denoiser(leaves=(), process=PROCESS, init=lambda d, x, cond: jnp.zeros(()), apply=counting)
OWN = diffjax.Solver(
    rows={"t": np.ones(3)}, grid=times.uniform(3), init=lambda x, c: x, step=lambda *a: a[2], read=lambda x: x
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be an int >= 1"),
        ({"tolerance": -1.0}, "tolerance must be >= 0"),
        ({"items": jnp.arange(3)}, r"shape \(4,\); got \(3,\)"),
        ({"denoiser": STATEFUL}, "the denoiser carries state"),
        ({"solver": OWN}, "only a table can be run in parallel"),
    ],
)
def test_bad_input(options, message):
    arguments = {"denoiser": oracle(MIX, PROCESS), "solver": solvers.ddim(PROCESS, GRID), "x": start(), "window": 4}
    with pytest.raises(ValueError, match=message):
        sample_parallel(KEY, **(arguments | options))
