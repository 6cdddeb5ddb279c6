"""DEIS and exponential Adams-Bashforth in any variable: the integrals, against independent quadrature."""

import numpy as np
import pytest
from host_tables import VP, gaussian, network, run, slope
from scipy.integrate import quad

from diffjax import processes, solvers, times
from diffjax.solvers import deis
from diffjax.solvers.adams import EPS, LAMBDA, RHO, TIME, X0

build = deis.deis
GRID = times.quadratic(7, start=0.9, stop=0.02)


def rho(process, t):
    return process.sigma(t) / process.alpha(t)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_in_time_are_the_papers_integrals(order):
    """C_ij = integral of alpha_s d rho/dt times the Lagrange polynomial in t, by adaptive quadrature."""
    s = build(VP, GRID, order)

    def drho(t):
        a = VP.alpha(t)
        return (VP.dsigma(t) - VP.sigma(t) / a * VP.dalpha(t)) / a

    for i in range(len(GRID) - 1):
        nodes = GRID[i::-1][:order]
        got = [s.rows.qn[i], *s.rows.qd[i]][: len(nodes)]
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)
            basis = lambda t, node=node, others=others: np.prod((t - others) / (node - others))
            want = (
                VP.alpha(GRID[i + 1]) * quad(lambda t, b=basis: drho(t) * b(t), GRID[i], GRID[i + 1], epsabs=1e-13)[0]
            )
            np.testing.assert_allclose(got[j], want, rtol=1e-9, atol=1e-12)
        assert np.all(s.rows.qd[i, max(len(nodes) - 1, 0) :] == 0)


@pytest.mark.parametrize("variable", [TIME, RHO, LAMBDA], ids=lambda v: v.name)
@pytest.mark.parametrize("order", [2, 3, 4])
def test_rows_of_full_order_are_exact_on_polynomials(order, variable):
    """eps(t) = a polynomial of degree `order - 1` in the method's variable, whatever the state; to sigma = 0 as well."""
    grid = GRID if variable is LAMBDA else np.append(GRID, 0.0)
    at = lambda t: variable.at(np, VP, VP.log_snr(t))
    c = np.array([0.3, -0.7, 0.4, 0.2])[:order]
    eps = lambda t: np.polynomial.polynomial.polyval(at(t), c)
    model = lambda y, t: ((y - VP.sigma(t) * eps(t)) / VP.alpha(t), eps(t))
    y = [0.5]  # x / alpha along the exact solution, in sqrt(t) because d rho/dt is infinite at t = 0
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        drho = lambda w: (rho(VP, (w + 1e-6) ** 2) - rho(VP, (w - 1e-6) ** 2)) / 2e-6
        y.append(y[-1] + quad(lambda w, d=drho: eps(w * w) * d(w), np.sqrt(a), np.sqrt(b), epsabs=1e-12, limit=200)[0])
    x = np.array(y) * VP.alpha(grid)
    past = [eps(t) for t in grid[order - 2 :: -1]] if order > 1 else []
    got = run(build(VP, grid, order, variable), model, x[order - 1], first=order - 1, past_d=past)
    np.testing.assert_allclose(got, x[-1], rtol=1e-7)


def test_order_with_an_exact_history():
    """The order of the formula itself: 1 to 4, once its first values are those of the exact flow."""
    model, flow = gaussian(VP)
    for variable in (TIME, RHO):
        for order in (1, 2, 3, 4):
            errors = []
            for n in (100, 200):
                grid = times.log_snr(VP, n, start=0.9, stop=0.1)
                x = [flow(2.0, grid[0], t) for t in grid[:order]]
                past = [model(a, t)[1] for a, t in zip(x, grid, strict=False)][::-1][1:]
                end = run(build(VP, grid, order, variable), model, x[-1], order - 1, past_d=past)
                errors.append(abs(end - flow(2.0, grid[0], grid[-1])))
            assert slope(errors) > order - 0.2, (variable.name, order, errors)


def test_equivalences():
    same = lambda a, b: [
        np.testing.assert_allclose(u, v, atol=1e-12) for u, v in zip(a.rows, b.rows, strict=True) if u is not None
    ]
    for order in (1, 2, 3, 4):
        same(build(VP, GRID, order, LAMBDA), solvers.exp_ab(VP, GRID, order, EPS))
        same(build(VP, GRID, order, RHO), solvers.CATALOGUE["lms2"].build.f(VP, GRID, order))
    model = network(VP)
    for variable in (TIME, RHO):
        ddim = run(solvers.ddim(VP, GRID), model, 1.2)
        np.testing.assert_allclose(run(build(VP, GRID, 1, variable), model, 1.2), ddim, rtol=1e-11)


@pytest.mark.parametrize("process", [processes.vp(), processes.cosine(), processes.rectified(), processes.ve()],
                         ids=["vp", "cosine", "rectified", "ve"])  # fmt: skip
def test_infinite_ends(process):
    """From t = 1: `ddim` where alpha = 0, which later rows do not look back to. To t = 0: no jump down in order."""
    grid = times.log_snr(process, 6)
    for variable in (TIME, RHO):
        for g, inverse in ((grid, False), (grid[::-1], True)):
            r = build(process, g, 4, variable, inverse=inverse).rows
            assert all(np.all(np.isfinite(a)) for a in r if a is not None)
        r = build(process, grid, 4, variable).rows
        if process.alpha(1.0) == 0:
            assert r.qx[0, 0] == 0 and r.qn[0] == 1 and np.all(r.qd[1] == 0) and r.qd[2, 1] == 0
        assert np.all(r.qd[-1] != 0)


def test_bad_options():
    with pytest.raises(ValueError, match="order must be 1, 2, 3 or 4; got 5"):
        build(VP, GRID, 5)
    with pytest.raises(ValueError, match="polynomial in rho needs value=EPS; got x0"):
        solvers.exp_ab(VP, GRID, 2, X0, RHO)
    with pytest.raises(ValueError, match="grid must decrease"):
        build(VP, GRID[::-1], 2)
