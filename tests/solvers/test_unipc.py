"""UniPC and exponential Adams-Bashforth-Moulton: the folded corrector against loops that correct in a step of their own."""

import jax
import numpy as np
import pytest
from host_tables import VP, gaussian, network, run, slope

from diffjax import processes, solvers, times
from diffjax.solvers import EPS, X0, V, adams, checks, exp_ab, exp_abm, unipc

build = unipc.unipc
GRID = times.uniform(8, start=0.93, stop=0.04)


def moments(hh, n):
    """hh integral_0^1 e^{(1 - u) hh} u^k du for k < n, by the recursion of the phi functions."""
    phi, fact, out = np.expm1(hh) / hh, 1.0, []
    for k in range(n):
        out.append(hh * fact * phi)
        fact *= k + 1
        phi = (phi - 1 / fact) / hh
    return out


def textbook(process, grid, model, x, order, value, scale, correct=True, final=False):
    """UniPC as published: predict, evaluate, correct; every system of equations solved anew."""
    n, ms, lams = len(grid) - 1, [], []
    sign, pick = (-1, 0) if value is X0 else (1, 1)

    def update(x, t, s, ms, lams, extra, simple):
        lam_t, lam_s = process.log_snr(t), process.log_snr(s)
        h = lam_s - lam_t
        outer, ratio = (
            (process.alpha(s), process.sigma(s) / process.sigma(t)) if value is X0
            else (process.sigma(s), process.alpha(s) / process.alpha(t))
        )  # fmt: skip
        r = [(lam - lam_t) / h for lam in lams[1:]] + ([1.0] if extra is not None else [])
        m = [*ms[1:], *([extra] if extra is not None else [])]
        moment = moments(sign * h, len(r) + 1)
        b = scale(np, sign * h)
        system = np.array([[a**k for a in r] for k in range(len(r))]).reshape(len(r), len(r))
        a = [0.5] if simple else np.linalg.solve(system, np.array(moment[1:]) / b) if r else []
        return ratio * x - outer * (
            moment[0] * ms[0] + b * sum(ai / ri * (mi - ms[0]) for ai, ri, mi in zip(a, r, m, strict=True))
        )

    used, base = 0, x
    for i, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        m = model(x, t)[pick]
        if i and correct:
            x = update(base, grid[i - 1], t, ms[:used], lams[:used], m, used == 1)
        ms, lams, base = [m, *ms], [process.log_snr(t), *lams], x
        used = min(i + 1, order, n - i) if final else min(i + 1, order)
        x = update(base, t, s, ms[:used], lams[:used], None, used == 2)
    return x


@pytest.mark.parametrize("value", [X0, EPS], ids=lambda v: v.name)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_against_the_textbook_loop(order, value):
    model = network(VP)
    for scale in (unipc.b1, unipc.b2):
        for correct in (True, False):
            for final in (False, True):
                want = textbook(VP, GRID, model, 1.4, order, value, scale, correct, final)
                s = build(VP, GRID, order, value, scale, correct=correct, lower_order_final=final)
                np.testing.assert_allclose(run(s, model, 1.4), want, rtol=1e-9, err_msg=f"{scale} {correct} {final}")
                assert s.evaluations == len(GRID) - 1
                assert s.rows.qd.shape[1] == (order if correct else order - 1)


def test_equivalences():
    model = network(VP)
    at = lambda s: run(s, model, 1.4)
    same = lambda a, b: np.testing.assert_allclose(at(a), at(b), rtol=1e-11)
    same(build(VP, GRID, 1, correct=False), solvers.ddim(VP, GRID))
    same(build(VP, GRID, 2, correct=False), solvers.dpmpp(VP, GRID, 2))
    # with three differences or more the equations fix a B(h), and UniP is exponential Adams-Bashforth
    full = slice(3, None)
    for value in (X0, EPS):
        for one, two in (
            (build(VP, GRID, 3, value, correct=False), exp_ab(VP, GRID, 3, value)),
            (build(VP, GRID, 3, value), exp_abm(VP, GRID, 3, value=value)),
            (build(VP, GRID, 3, value, unipc.b1), build(VP, GRID, 3, value, unipc.b2)),
        ):
            np.testing.assert_allclose(one.rows.qn[full], two.rows.qn[full], rtol=1e-9)
            np.testing.assert_allclose(one.rows.qd[full], two.rows.qd[full], rtol=1e-9, atol=1e-12)
    for value in (X0, EPS, V):
        same(exp_abm(VP, GRID, 3, 4, value, blend=0.0), exp_ab(VP, GRID, 3, value))


def moulton_loop(process, grid, model, x, order, nodes, value, blend):
    """Predict, evaluate, blend with the corrector in a step of its own; a polynomial fit and 60-point quadrature."""
    points, gauss = np.polynomial.legendre.leggauss(60)
    k = solvers.table.nodes(process, grid)
    past, base = [], None

    def step(i, base, lams, ds):
        mid, half = (k.lam_s[i] + k.lam_t[i]) / 2, (k.lam_s[i] - k.lam_t[i]) / 2
        lam = mid + half * points
        fit = np.polynomial.Polynomial.fit(lams, ds, len(lams) - 1)
        one = k._replace(
            **{f: getattr(k, f)[i : i + 1] for f in ("alpha_t", "alpha_s", "sigma_t", "sigma_s", "lam_t", "lam_s")}
        )
        return value.carry(one)[0] * base + half * np.sum(gauss * value.kernel(one, lam[None])[0] * fit(lam))

    for i, t in enumerate(grid[:-1]):
        x0, eps = model(x, t)
        u0, u1 = value.read(np, k.alpha_t[i], k.sigma_t[i])
        past = [(process.log_snr(t), u0 * x0 + u1 * eps), *past]
        if i:
            x = x + blend * (step(i - 1, base, *zip(*past[: min(nodes, i + 1)], strict=True)) - x)
        base = x
        x = step(i, base, *zip(*past[: min(order, i + 1)], strict=True))
    return x


@pytest.mark.parametrize("value", [X0, EPS, V], ids=lambda v: v.name)
@pytest.mark.parametrize(
    ("order", "nodes", "blend"), [(1, 2, 1.0), (2, 2, 1.0), (2, 3, 0.8), (4, 2, 0.9), (3, 5, 1.0), (2, 1, 0.5)]
)
def test_abm_against_the_loop(value, order, nodes, blend):
    model = network(VP)
    s = exp_abm(VP, GRID, order, nodes, value, blend)
    np.testing.assert_allclose(
        run(s, model, 1.4), moulton_loop(VP, GRID, model, 1.4, order, nodes, value, blend), rtol=1e-9
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_corrected_order_with_an_exact_history(order):
    """A corrector of one node more raises the order by one: UniPC-p has order p + 1 once its first values are exact."""
    model, flow = gaussian(VP)
    for value, pick in ((X0, 0), (EPS, 1)):
        errors = []
        for n in (60, 120):
            grid = times.log_snr(VP, n, start=0.9, stop=0.1)
            x = [flow(2.0, grid[0], t) for t in grid[: order + 1]]
            past = [model(a, t)[pick] for a, t in zip(x, grid, strict=False)][::-1][1:]
            # row `order` holds a prediction: take the step to it with the predictor alone
            r = build(VP, grid, order, value, correct=False).rows
            d = [*past[:order]]
            x_p = (
                r.qx[order - 1, 0] * x[-2]
                + r.qn[order - 1] * d[0]
                + sum(w * v for w, v in zip(r.qd[order - 1], d[1:], strict=True))
            )
            end = run(build(VP, grid, order, value), model, x_p, order, past_d=past)
            errors.append(abs(end - flow(2.0, grid[0], grid[-1])))
        assert slope(errors) > order + 0.8, (value.name, errors)


@pytest.mark.parametrize(
    "process", [processes.vp(), processes.rectified(), processes.edm()], ids=["vp", "rectified", "edm"]
)
def test_infinite_ends(process):
    """A step with an infinite end is `ddim` and is not corrected, on the way down and up."""
    grid = times.log_snr(process, 6)
    for s in (
        exp_abm(process, grid, 3, value=V),
        build(process, grid, 3),
        build(process, grid, 2, EPS),
        build(process, grid[::-1], 3, inverse=True),
    ):
        assert all(np.all(np.isfinite(a)) for a in s.rows if a is not None)
    s = build(process, grid, 3)
    if process.alpha(1.0) == 0:
        np.testing.assert_array_equal(s.rows.qx[0], 0)
        np.testing.assert_array_equal(s.rows.qd[1], 0)
    if process.sigma(0.0) == 0:
        assert s.rows.qx[-1, 0] == 0 and s.rows.qn[-1] == 1 and np.all(s.rows.qd[-1] == 0)


def test_blend_is_differentiable(x64):
    def total(g):
        r = exp_abm(VP, GRID, 2, 3, X0, g).rows
        return (r.qd**2).sum() + (r.qn**2).sum()

    numeric = (total(0.7 + 1e-6) - total(0.7 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.7), numeric, rtol=1e-6)


def test_bad_options():
    with pytest.raises(ValueError, match="order must be 1, 2, 3 or 4; got 0"):
        build(VP, GRID, 0)
    with pytest.raises(ValueError, match="value must be X0 or EPS; got v"):
        build(VP, GRID, 2, V)
    with pytest.raises(ValueError, match="corrector_order must be 1, 2, 3, 4 or 5; got 6"):
        exp_abm(VP, GRID, 2, 6)
    with pytest.raises(ValueError, match="blend must be in"):
        exp_abm(VP, GRID, 2, blend=1.5)
    with pytest.raises(ValueError, match="order must be"):
        checks.check_integer("order", True, adams.ORDERS)
