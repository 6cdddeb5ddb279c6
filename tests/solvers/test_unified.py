"""Fixed decisions give the published methods; mixed ones match a loop in (x0, eps) that knows nothing of tables."""

import dataclasses
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import diffjax
from diffjax import processes, solvers, times
from diffjax.solvers.unified import Decisions, unified
from diffjax.testing import measured_order, oracle, smooth_mixture

PROCESS = processes.vp()
GRID = times.log_snr(PROCESS, 7, start=0.97, stop=0.02)


def same_table(a, b):
    a, b = (jax.tree.map(lambda leaf: leaf[0], solvers.stack([s, r])) for s, r in ((a, b), (b, a)))
    for field in ("t", "px", "pd", "u", "qx", "qd", "qn"):
        np.testing.assert_allclose(getattr(a.rows, field), getattr(b.rows, field), rtol=1e-9, atol=1e-11)


def run(solver, x, process=PROCESS):
    return diffjax.sample(jax.random.key(0), oracle(smooth_mixture(), process), solver, x)


@pytest.fixture
def x(x64):
    return jax.random.normal(jax.random.key(0), (4, 2))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "process", [processes.vp(), processes.rectified(), processes.ve()], ids=lambda p: p.family.name
)
def test_x0_decisions_are_tables_of_the_other_families(process, inverse):
    grids = [times.log_snr(process, 7, start=0.97, stop=0.02), times.uniform(6)]
    for grid in grids[: 1 if inverse else 2]:
        grid = grid[::-1] if inverse else grid
        if np.isfinite(process.log_snr(grid)).all():  # at an infinite end the same update is written in another way
            same_table(unified(process, grid, Decisions(order=2, mean=True), inverse=inverse),
                       solvers.dpmpp(process, grid, 2, inverse=inverse))  # fmt: skip
        for order in (1, 2, 3, 4):
            same_table(unified(process, grid, Decisions(order=order), inverse=inverse),
                       solvers.exp_ab(process, grid, order, inverse=inverse))  # fmt: skip


def test_eps_decisions_run_as_the_other_families(x):
    for order in (1, 2, 4):
        got = run(unified(PROCESS, GRID, Decisions(order=order, eps=True)), x)
        np.testing.assert_allclose(got, run(solvers.exp_ab(PROCESS, GRID, order, solvers.EPS), x), rtol=1e-9)
    for eps in (True, False):
        np.testing.assert_allclose(
            run(unified(PROCESS, GRID, Decisions(order=1, eps=eps)), x), run(solvers.ddim(PROCESS, GRID), x), rtol=1e-9
        )


def test_singlestep_dpm_solver_against_the_textbook_loop(x):
    """DPM-Solver-2 (r = 1/2) and DPM-Solver-3 (r = 1/3, 2/3): their stages are points of the grid."""
    eps = lambda y, t: oracle(smooth_mixture(), PROCESS)(y, t).eps
    lam = np.linspace(PROCESS.log_snr(0.97), PROCESS.log_snr(0.05), 3)
    at = lambda lam: (t := PROCESS.time_of_log_snr(lam), PROCESS.alpha(t), PROCESS.sigma(t))
    for order in (2, 3):
        y = x
        for l0, l1 in zip(lam[:-1], lam[1:], strict=True):
            h = l1 - l0
            (t, a, _), (_, a1, s1) = at(l0), at(l1)
            e0 = eps(y, t)
            if order == 2:
                tm, am, sm = at(l0 + h / 2)
                u = am / a * y - sm * np.expm1(h / 2) * e0
                y = a1 / a * y - s1 * np.expm1(h) * eps(u, tm)
            else:
                (ta, aa, sa), (tb, ab, sb) = at(l0 + h / 3), at(l0 + 2 * h / 3)
                d1 = eps(aa / a * y - sa * np.expm1(h / 3) * e0, ta) - e0
                phi = lambda z: np.expm1(z) / z - 1
                u = ab / a * y - sb * np.expm1(2 * h / 3) * e0 - sb * 2 * phi(2 * h / 3) * d1
                y = a1 / a * y - s1 * np.expm1(h) * e0 - s1 * 1.5 * phi(h) * (eps(u, tb) - e0)
        grid = PROCESS.time_of_log_snr(np.linspace(lam[0], lam[-1], 2 * order + 1))
        decisions = {
            2: Decisions(order=[1, 2] * 2, eps=True, base=[0, 1] * 2, mean=True),
            3: Decisions(order=[1, 2, 2] * 2, eps=True, base=[0, 1, 2] * 2, stride=[1, 1, 2] * 2),
        }[order]
        np.testing.assert_allclose(run(unified(PROCESS, grid, decisions), x), y, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_corrector_is_unipc(order, x):
    """UniPC with B(h) = e^h - 1 in x0: the published systems R rho = b, written out."""
    d = oracle(smooth_mixture(), PROCESS)
    lam, alpha, sigma = PROCESS.log_snr(GRID), PROCESS.alpha(GRID), PROCESS.sigma(GRID)
    n = len(GRID) - 1
    y, values = x, [d(x, GRID[0]).x0]
    for i in range(n):
        h = lam[i + 1] - lam[i]
        p = min(order, i + 1)
        r = [(lam[i - j] - lam[i]) / h for j in range(1, p)] + [1.0]
        b, phi = [], np.expm1(-h) / -h - 1
        for j in range(1, p + 1):
            b.append(phi * factorial(j) / np.expm1(-h))
            phi = phi / -h - 1 / factorial(j + 1)
        system = np.array([np.array(r) ** j for j in range(p)])
        back = [(values[-1 - j] - values[-1]) / r[j - 1] for j in range(1, p)]
        rho = [0.5] if p == 2 else list(np.linalg.solve(system[:-1, :-1], b[:-1])) if p > 2 else []
        base = sigma[i + 1] / sigma[i] * y - alpha[i + 1] * np.expm1(-h) * values[-1]
        scale = alpha[i + 1] * np.expm1(-h)
        predicted = base - scale * sum((c * v for c, v in zip(rho, back, strict=True)), 0.0)
        if i == n - 1:
            y = predicted
            break
        values.append(d(predicted, GRID[i + 1]).x0)
        rho = [0.5] if p == 1 else np.linalg.solve(system, b)
        y = base - scale * sum(c * v for c, v in zip(rho, [*back, values[-1] - values[-2]], strict=True))
    got = run(unified(PROCESS, GRID, Decisions(order=order, corrector=True, mean=True)), x)
    np.testing.assert_allclose(got, y, rtol=1e-9)


def loop(process, grid, c, denoiser, x):
    """One candidate of the whole space, step by step with both predictions at hand and integrals by adaptive quadrature."""
    lam, alpha, sigma = process.log_snr(grid), process.alpha(grid), process.sigma(grid)
    starts, states, pairs, y = [], [], [], x  # `starts` is where a step really starts from: the corrected state
    for i in range(len(grid) - 1):
        states.append(y)
        pairs.append(denoiser(y, grid[i]))
        if i and c.corrector[i - 1] and c.base[i] == 0:
            y = _step(i - 1, lam, alpha, sigma, c, starts, pairs, True)
        starts = [*states[:-1], y]
        y = _step(i, lam, alpha, sigma, c, starts, pairs, False)
    return y


def _step(i, lam, alpha, sigma, c, states, pairs, corrected):
    base = i - c.base[i] if i >= c.base[i] else i
    points = [i - j for j in range(0, min(4, i + 1), c.stride[i]) if j // c.stride[i] < c.order[i]]
    new = [i + 1] if corrected else []
    value = lambda j: pairs[j].eps if c.eps[i] else pairs[j].x0
    h = lam[i + 1] - lam[base]
    kernel = (lambda l: -sigma[i + 1] * np.exp(lam[i + 1] - l)) if c.eps[i] else (
        lambda l: alpha[i + 1] * np.exp(l - lam[i + 1]))  # fmt: skip
    total = 0.0
    count = len(points) + len(new)
    for k in range(count):
        some = [*new, *(points if corrected or k == 0 else points[: k + 1 + c.spare[i]])]
        place = np.array([lam[j] - lam[base] for j in some])
        derivative = np.linalg.inv(np.vander(place, increasing=True))[k]  # times values: D_k / k!
        moment = quad(lambda l, k=k: kernel(l) * (l - lam[base]) ** k, lam[base], lam[i + 1], epsabs=1e-13)[0]
        if c.mean[i] and count == 2 and k == 1:
            moment = h / 2 * quad(kernel, lam[base], lam[i + 1], epsabs=1e-13)[0]
        total = total + moment * sum(w * value(j) for w, j in zip(derivative, some, strict=True))
    carry = alpha[i + 1] / alpha[base] if c.eps[i] else sigma[i + 1] / sigma[base]
    return carry * states[base] + total


def draw(rng, n):
    """A random candidate; a state that a later step starts from two or more back is not corrected in between."""
    base = rng.choice([0, 0, 0, 1, 2], n)
    corrector = rng.integers(0, 2, n)
    for i in np.flatnonzero(base):
        corrector[max(0, i - base[i] - 1) : i] = 0
    return Decisions(
        rng.integers(1, 5, n), rng.integers(0, 2, n), rng.integers(1, 4, n), rng.integers(0, 4, n),
        rng.integers(0, 2, n), base, corrector,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["vp", "rectified", "ve"])
def test_random_decisions_against_a_loop_and_in_one_call(name, x64):
    process = {"vp": processes.vp, "rectified": processes.rectified, "ve": processes.ve}[name]()
    rng = np.random.default_rng(0)
    d = oracle(smooth_mixture(), process)
    grids = [PROCESS_GRID(process, rng) for _ in range(12)]
    candidates = [draw(rng, 6) for _ in grids]
    x = jax.random.normal(jax.random.key(0), (3, 2)) * process.sigma(0.97)
    tables = solvers.stack([unified(process, g, c) for g, c in zip(grids, candidates, strict=True)])
    got = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))(jax.random.key(0), d, tables, x)
    step = jax.jit(d)
    for g, c, e in zip(grids, candidates, got, strict=True):
        np.testing.assert_allclose(e, loop(process, g, c, lambda y, t: step(y, t), x), rtol=1e-7, atol=1e-9)


def PROCESS_GRID(process, rng):
    lam = np.sort(rng.uniform(process.log_snr(0.97), process.log_snr(0.05), 5))
    ends = process.log_snr(np.array([0.97, 0.03]))
    return process.time_of_log_snr(np.concatenate([ends[:1], lam, ends[1:]]))


def test_corrections_of_a_base_further_back_stay_out(x):
    """A correction is used by the step that starts there, and by no other."""
    kept, dropped = (Decisions(order=2, base=[0, 0, 0, 1, 0, 0, 0], corrector=[1, 1, c, 1, 1, 1, 1]) for c in (0, 1))
    same_table(unified(PROCESS, GRID, kept), unified(PROCESS, GRID, dropped))


def test_mixed_predictions_reach_the_order(x64):
    grid = lambda n: times.log_snr(processes.cosine(), n, start=0.9, stop=0.1)
    build = lambda p, g: unified(p, g, Decisions(order=2, eps=np.arange(len(g) - 1) % 2))
    assert abs(measured_order(build, processes.cosine(), grid)[0] - 2) < 0.15


def test_traced_decisions_make_the_same_table(x64):
    rng = np.random.default_rng(1)
    stacked = jax.tree.map(lambda *c: np.stack(c), *[draw(rng, 7) for _ in range(5)])
    traced = jax.jit(jax.vmap(lambda c: unified(PROCESS, GRID, c)))(stacked)
    for i in range(5):
        same_table(unified(PROCESS, GRID, jax.tree.map(lambda a, i=i: a[i], stacked)),
                   jax.tree.map(lambda a, i=i: np.asarray(a[i]), traced))  # fmt: skip


def test_one_trace_for_all_decisions(x64):
    traces = []

    def net(params, x, t, cond):
        traces.append(1)
        return params * x

    rng = np.random.default_rng(2)
    d = diffjax.denoiser(net, PROCESS, diffjax.from_v, 0.5)
    go = jax.jit(diffjax.sample)
    ends = {
        float(go(jax.random.key(0), d, unified(PROCESS, GRID, draw(rng, 7)), jnp.ones((2, 2))).sum()) for _ in range(6)
    }
    assert len(traces) == 1 and len(ends) > 4


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        (Decisions(order=0), "decisions.order must be integers from 1 to 4; got 0"),
        (Decisions(order=[2, 2]), r"decisions.order must be one value or one for each of 7 steps; got shape \(2,\)"),
        (Decisions(stride=4), "decisions.stride must be integers from 1 to 3"),
        (Decisions(spare=-1), "decisions.spare must be"),
        (Decisions(base=3), "decisions.base must be"),
        (Decisions(mean=0.5), "decisions.mean must be"),
    ],
)
def test_bad_decisions(decisions, message):
    with pytest.raises(ValueError, match=message):
        unified(PROCESS, GRID, decisions)


def test_cards_are_by_value():
    build = solvers.CATALOGUE["unified_2c_x0"].build
    assert build == dataclasses.replace(build) and hash(build) == hash(dataclasses.replace(build))
