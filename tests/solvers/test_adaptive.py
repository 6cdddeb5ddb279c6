"""Adaptive DPM-Solver against the exact flow, a loop of its own, and its promise to skip."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, processes, solvers, times
from diffjax.solvers import CATALOGUE
from diffjax.testing import draw, flow, gaussian, oracle, smooth_mixture

KEY = jax.random.key(0)
MIX = smooth_mixture()
VP, START, STOP = processes.vp(), 0.9, 0.1
GRID = np.array([START, STOP])
rms = lambda a, b: float(np.sqrt(((np.asarray(a) - b) ** 2).sum(-1).mean()))


@pytest.fixture(scope="module")
def case():
    """`solve(order, denoiser=None, **options) -> (x, report)` on one compilation for each order; start and exact end."""
    with jax.enable_x64(True):
        x, _ = draw(jax.random.key(1), MIX, 16, VP, START)
        d = guidance.count_calls()(oracle(MIX, VP))

        @jax.jit
        def run(s):
            (y, report), state = diffjax.sample(KEY, d, solvers.reported(s), x, return_state=True)
            return y, report, state

        def solve(order, grid=GRID, rtol=1e-3, atol=None, max_evaluations=300, **options):
            atol = rtol if atol is None else atol
            s = solvers.dpm_adaptive(VP, grid, order, rtol=rtol, atol=atol, max_evaluations=max_evaluations, **options)
            y, report, state = run(s)
            return y, report, guidance.counted(state).calls

        yield solve, np.asarray(x), flow(MIX, VP, np.asarray(x), START, STOP)


@pytest.mark.parametrize("order", [2, 3])
def test_the_error_follows_the_tolerance(order, case, x64):
    solve, _, exact = case
    spent, far = [], []
    for rtol in (5e-2, 5e-3, 5e-4):
        y, report, calls = solve(order, rtol=rtol)
        assert report.reached and report.log_snr == VP.log_snr(STOP)
        # the network was called this often and not more, though there are rows for 300 evaluations
        assert calls == report.evaluations == order * (report.accepted + report.rejected) < 300
        spent.append(calls)
        far.append(rms(y, exact))
    assert all(e < 3 * rtol for e, rtol in zip(far, (5e-2, 5e-3, 5e-4), strict=True)), far
    assert far[0] > 3 * far[1] > 9 * far[2] and spent[0] < spent[1] < spent[2]


def loop(d, x, rtol, order, gains, safety=0.9, h=0.05):
    """The published algorithm with a PID controller, for noise predictions, in Python."""
    a, s, time = VP.alpha, VP.sigma, VP.time_of_log_snr
    lam, end = float(VP.log_snr(START)), float(VP.log_snr(STOP))
    p, i, c = gains
    powers = ((p + i + c) / order, -(p + 2 * c) / order, c / order)
    old, accepted, rejected = None, 0, 0
    while lam < end:
        h = min(h, end - lam)
        t, u = time(lam), time(lam + h)
        e = np.asarray(d(x, t).eps)
        move = lambda m, r, x=x, e=e, t=t, h=h: a(m) / a(t) * x - s(m) * math.expm1(r * h) * e
        r = 1 / order
        m = time(lam + r * h)
        bend = np.asarray(d(move(m, r), m).eps) - e
        two = move(u, 1) - s(u) / (2 * r) * math.expm1(h) * bend
        if order == 2:
            low, high = move(u, 1), two
        else:
            m, g = time(lam + 2 / 3 * h), 2 / 3 * h
            y = move(m, 2 / 3) - s(m) * 2 * (math.expm1(g) / g - 1) * bend
            bend = np.asarray(d(y, m).eps) - e
            low, high = two, move(u, 1) - s(u) * 1.5 * (math.expm1(h) / h - 1) * bend
        delta = np.maximum(rtol, rtol * np.maximum(np.abs(low), np.abs(x)))
        error = math.sqrt(np.mean(((high - low) / delta) ** 2))
        old = old or (error, error)
        f = safety * math.prod((1 / (v + 1e-8)) ** k for v, k in zip((error, *old), powers, strict=True))
        if error <= 1:
            x, lam, old, accepted = high, lam + h, (error, old[0]), accepted + 1
        else:
            rejected += 1
        h *= 1 + math.atan(f - 1)
    return x, accepted, rejected


@pytest.mark.parametrize(("order", "gains"), [(2, (0.0, 1.0, 0.0)), (3, (0.2, 0.6, 0.1))])
def test_against_a_loop_of_its_own(order, gains, case, x64):
    solve, x, _ = case
    want, accepted, rejected = loop(jax.jit(oracle(MIX, VP)), x, 2e-2, order, gains)
    y, report, _ = solve(order, rtol=2e-2, gains=gains)
    assert (int(report.accepted), int(report.rejected)) == (accepted, rejected) and rejected > 0
    np.testing.assert_allclose(y, want, rtol=1e-8, atol=1e-10)


def test_evaluations_that_run_out_are_reported(case, x64):
    solve, x, exact = case
    y, report, calls = solve(3, rtol=1e-6, max_evaluations=20)  # six attempts and the step to the end
    assert not report.reached and calls == report.evaluations == 19
    assert VP.log_snr(START) < report.log_snr < VP.log_snr(STOP)
    assert np.all(np.isfinite(y)) and 1e-3 < rms(y, exact) < rms(x, exact)


def test_inversion_returns_to_the_start(case, x64):
    solve, x, _ = case
    run = lambda s, x: diffjax.sample(KEY, oracle(MIX, VP), s, x)
    there = solvers.dpm_adaptive(VP, GRID, rtol=1e-5, atol=1e-5)
    back = solvers.dpm_adaptive(VP, GRID[::-1], rtol=1e-5, atol=1e-5, inverse=True)
    both = jax.jit(lambda x: run(back, run(there, x)))
    assert np.abs(both(x) - x).max() < 1e-3


@pytest.mark.parametrize("process", [processes.edm(), processes.rectified()], ids=["edm", "rf"])
def test_from_the_prior_to_data_in_float32(process):
    """From t = 1 to t = 0, over infinite lambdas, on a Gaussian whose flow is a closed form; only the ends are kept."""
    m = gaussian([0.5, -0.25], np.array([[0.5, 0.2], [0.2, 0.3]]))
    x = process.prior(jax.random.key(5), (8, 2))
    s = solvers.reported(CATALOGUE["dpm_solver_23"].build(process, times.uniform(7), rtol=1e-3, atol=1e-3))
    y, report = jax.jit(lambda x: diffjax.sample(KEY, oracle(m, process), s, x))(x)
    assert report.reached and 20 < report.evaluations < 300
    np.testing.assert_allclose(y, flow(m, process, x, 1.0, 0.0), atol=1e-2)


def test_kept_ends_gradients_and_trees():
    process = processes.rectified()
    x = {"a": jnp.array([[0.3, -1.2, 0.7]]), "b": jnp.array([[1.5]])}
    s = solvers.dpm_adaptive(process, times.uniform(3), 2, max_evaluations=60)
    assert s.steps == 1 and s.evaluations == 60

    def end(params):
        net = lambda p, x, t, c: jax.tree.map(lambda a: p * jnp.tanh(a), x)
        y, kept = diffjax.sample(KEY, diffjax.denoiser(net, process, diffjax.from_v, params), s, x, keep=True)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y)), (y, kept)

    f = jax.jit(jax.value_and_grad(end, has_aux=True))
    (_, (y, kept)), grad = f(0.5)
    np.testing.assert_array_equal(kept.t, [1.0, 0.0])
    np.testing.assert_array_equal(kept.x["a"][0], x["a"])
    np.testing.assert_array_equal(kept.x["b"][1], y["b"])
    assert np.isfinite(grad) and grad != 0


def test_a_report_is_not_kept():
    s = solvers.reported(solvers.dpm_adaptive(VP, GRID))
    for keep in (True, lambda x: x):
        with pytest.raises(ValueError, match="returns more than a state"):
            diffjax.sample(KEY, oracle(smooth_mixture(), VP), s, jnp.ones((1, 2)), keep=keep)


def test_a_traced_grid_and_an_infinite_end_on_the_wrong_side():
    """A stop that is noisier than where the process is cut off still leaves something to step over."""
    process = processes.rectified()
    for stop in (0.5, 0.99999):
        host = solvers.dpm_adaptive(process, np.array([1.0, stop]))
        traced = jax.jit(lambda g: solvers.dpm_adaptive(process, g))(jnp.array([1.0, stop]))
        settings = host.constants[1]
        assert settings.along_begin < settings.along_end and settings.begin > settings.end
        for a, b in zip(jax.tree.leaves(host), jax.tree.leaves(traced), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order must be 2 or 3, DPM-Solver-12 or -23; got 1"),
        ({"rtol": 0.0}, "rtol must be > 0; got 0.0"),
        ({"atol": -1.0}, "atol must be > 0"),
        ({"h_init": math.nan}, "h_init must be > 0; got nan"),
        ({"safety": 1.5}, r"safety must be in \(0, 1\]; got 1.5"),
        ({"max_evaluations": 4}, "max_evaluations must be at least 5, .* got 4"),
        ({"inverse": True}, "with inverse=True the grid must increase"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        solvers.dpm_adaptive(VP, GRID, **options)
