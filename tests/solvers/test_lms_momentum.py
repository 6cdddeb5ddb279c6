"""Linear multistep in sigma / alpha, heavy ball and GHVB: textbook loops with a stored velocity, orders, stability."""

import jax
import numpy as np
import pytest
from host_tables import VP, gaussian, network, rho_grid, run, slope

from diffjax import processes, times
from diffjax.solvers import ghvb, heavy_ball, ipndm, lms

GRID = times.log_snr(VP, 9, start=0.93, stop=0.03)
EQUAL = rho_grid(VP, np.linspace(6.0, 0.1, 12))
AB = {1: [1], 2: [1.5, -0.5], 3: [23 / 12, -4 / 3, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -3 / 8]}
MIX = {  # the published weights of the velocities, times b
    1: lambda b: [b],
    2: lambda b: [(2 + b) / 2, -(2 - b) / 2],
    3: lambda b: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
    4: lambda b: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
}


def textbook(process, grid, model, x, order, b, seed, generalised):
    """y = x / alpha and rho = sigma / alpha, with the velocity and its history stored."""
    rho = process.sigma(grid) / process.alpha(grid)
    y, v, old = x / process.alpha(grid[0]), None, []
    for i, t in enumerate(grid[:-1]):
        f = model(process.alpha(t) * y, t)[1]
        v = seed * f if v is None else v
        if generalised:
            v = (1 - b) * v + b * f
            old = [v, *old][:order]
            move = sum(w / b * u for w, u in zip(MIX[len(old)](b), old, strict=True))
        else:
            old = [f, *old][:order]
            move = v = (1 - b) * v + b * sum(w * u for w, u in zip(AB[len(old)], old, strict=True))
        y = y + (rho[i + 1] - rho[i]) * move
    return process.alpha(grid[-1]) * y


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("method", "generalised"), [(heavy_ball, False), (ghvb, True)], ids=["heavy_ball", "ghvb"])
def test_momentum_against_the_textbook_loop(method, generalised, order):
    model = network(VP)
    for b in (1.0, 0.8, 0.3):
        for seed in (1.0, 0.0):
            s = method(VP, GRID, order, b, seed=seed)
            assert s.rows.qx.shape[1] == 2 and s.rows.qd.shape[1] == order - 1
            want = textbook(VP, GRID, model, 1.4, order, b, seed, generalised)
            np.testing.assert_allclose(run(s, model, 1.4), want, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_no_momentum_is_adams_bashforth(order):
    """b = 1 to 1e-10, for equal steps the weights of `lms` too; b -> 0 is the method of one order less."""
    model = network(VP)
    for grid, other in ((GRID, ipndm), (EQUAL, ipndm), (EQUAL, lms.lms)):
        want = run(other(VP, grid, order), model, 1.4)
        for s in (ghvb(VP, grid, order), ghvb(VP, grid, order, 1.0), heavy_ball(VP, grid, order, 1.0)):
            np.testing.assert_allclose(run(s, model, 1.4), want, rtol=1e-10)
    if order > 1:  # S_n - S_{n-1} of Adams-Bashforth of one order less
        r = ghvb(VP, EQUAL, order - 1 + 1e-9).rows
        d = VP.sigma(EQUAL[1:]) - VP.sigma(EQUAL[:-1]) * VP.alpha(EQUAL[1:]) / VP.alpha(EQUAL[:-1])
        got = np.column_stack([r.qn, r.qd])[order:] / d[order:, None]
        want = np.subtract([*AB[order - 1], 0], [0, *AB[order - 1]])
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-7)


def test_fractional_order_is_an_order_and_a_momentum():
    for name, order, b in ((2.3, 3, 0.3), (0.6, 1, 0.6), (3.8, 4, 0.8)):
        for u, v in zip(ghvb(VP, GRID, name).rows[:9], ghvb(VP, GRID, order, b).rows[:9], strict=True):
            np.testing.assert_allclose(u, v, rtol=1e-12)


@pytest.mark.parametrize("b", [1.0, 0.8, 0.5])
def test_order_with_a_seeded_velocity(b):
    """In equal steps of rho and with a history from the exact flow: GHVB has order p for every b, heavy ball order 1."""
    model, flow = gaussian(VP, std=2.0)
    for p in (1, 2, 3, 4):
        for method in (ghvb, heavy_ball):
            errors = []
            for n in (50, 100):
                grid = rho_grid(VP, np.linspace(6.0, 3.0, n + 1))
                x = [flow(2.0, grid[0], t) for t in grid[: p + 1]][::-1]
                past = [model(a, t)[1] for a, t in zip(x, grid[p::-1], strict=True)][1:]
                end = run(method(VP, grid, p, b), model, x[0], p, past_x=x[1:], past_d=past)
                errors.append(abs(end - flow(2.0, grid[0], grid[-1])))
            want = p if method is ghvb or b == 1 else 1
            assert abs(slope(errors) - want) < 0.25, (method.__name__, p, errors)


def test_a_cold_start_costs_an_order():
    """From t = 1 on, without a history: v_0 = eps_0 leaves order 2, v_0 = 0 order 1."""
    model, flow = gaussian(VP, std=2.0)
    for seed, want in ((1.0, 2), (0.0, 1)):
        errors = []
        for n in (80, 160):
            grid = rho_grid(VP, np.linspace(6.0, 3.0, n + 1))
            errors.append(abs(run(ghvb(VP, grid, 3, 0.5, seed=seed), model, 2.0) - flow(2.0, grid[0], grid[-1])))
        assert abs(slope(errors) - want) < 0.2, (seed, errors)


def largest_root(p, b, z):
    """Spectral radius of a GHVB step on y' = z y / h: the recursion of the published weights."""
    c = MIX[p](b)
    poly = np.zeros(max(p, 2) + 1)
    poly[:3] += [1, -1 - (1 - b), 1 - b]  # y_{n+1} - y_n - (1 - b) (y_n - y_{n-1})
    poly[1 : p + 1] -= z * np.array(c)
    return np.abs(np.roots(poly)).max()


def test_rows_have_the_stability_of_the_recursion():
    """The table's own recursion on y' = -L y in equal steps, and stable steps that grow as b falls."""
    reach = {}
    for p in (2, 3, 4):
        for b in (1.0, 0.8, 0.5):
            z = -np.linspace(0.01, 3, 300)
            stable = np.array([largest_root(p, b, zi) < 1 + 1e-9 for zi in z])
            reach[p, b] = -z[np.argmin(stable)]
        assert reach[p, 1.0] < reach[p, 0.8] < reach[p, 0.5]
    ve = processes.ve(0.01, 100.0)
    grid = rho_grid(ve, np.linspace(99.0, 1.0, 99))  # steps of -1 in rho, alpha = 1
    for p in (2, 3, 4):
        for b in (1.0, 0.5):
            for z in (-0.9 * reach[p, b], -1.1 * reach[p, b]):
                end = run(ghvb(ve, grid, p, b), lambda y, t, z=z: (y, -z * y), 1.0)  # eps = -z y: y grows by z y a step
                assert (abs(end) < 1) == (z > -reach[p, b]), (p, b, z, end)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_lms_weights_are_integrals(order):
    """Polynomials of degree `order - 1` in rho are exact, on a Karras grid and down to sigma = 0."""
    edm = processes.edm()
    grid = times.karras(edm, 9)
    sigma = edm.sigma(grid)
    c = np.array([0.3, -0.02, 4e-4, 3e-6])[:order]
    eps = lambda t: np.polynomial.polynomial.polyval(edm.sigma(t), c)
    y = 0.5 + np.polynomial.polynomial.polyval(sigma, np.polynomial.polynomial.polyint(c))
    past = [eps(t) for t in grid[order - 2 :: -1]]
    model = lambda x, t: (x - edm.sigma(t) * eps(t), eps(t))
    got = run(lms.lms(edm, grid, order), model, y[order - 1], order - 1, past_d=past)
    np.testing.assert_allclose(got, y[-1], rtol=1e-9)
    h, g = sigma[2] - sigma[1], sigma[1] - sigma[0]
    two = lms.lms(edm, grid, 2).rows
    np.testing.assert_allclose([two.qn[1], two.qd[1, 0]], [h + h * h / (2 * g), -h * h / (2 * g)], rtol=1e-10)


@pytest.mark.parametrize("process", [processes.vp(), processes.cosine(), processes.rectified(), processes.ve()],
                         ids=["vp", "cosine", "rectified", "ve"])  # fmt: skip
def test_infinite_ends(process):
    """The slope before a step from alpha = 0 is infinite: the momentum starts after it, and the last step keeps it."""
    grid = times.log_snr(process, 6)
    for g, inverse in ((grid, False), (grid[::-1], True)):
        for s in (ghvb(process, g, 2.5, inverse=inverse), heavy_ball(process, g, 3, 0.5, inverse=inverse)):
            assert all(np.all(np.isfinite(a)) for a in s.rows if a is not None)
    r = ghvb(process, grid, 1, 0.5).rows
    start = int(process.alpha(1.0) == 0)
    assert np.all(r.qx[: start + 1, 1] == 0) and np.all(r.qx[start + 1 :, 1] != 0)


def test_momentum_and_seed_are_differentiable(x64):
    def total(b, seed):
        tables = [f(VP, GRID, 3, b, seed=seed).rows for f in (ghvb, heavy_ball)]
        return sum((r.qx**2).sum() + (r.qd**2).sum() + (r.qn**2).sum() for r in tables)

    got = jax.jit(jax.grad(total, argnums=(0, 1)))(0.7, 0.9)
    h = 1e-6
    numeric = (
        (total(0.7 + h, 0.9) - total(0.7 - h, 0.9)) / (2 * h),
        (total(0.7, 0.9 + h) - total(0.7, 0.9 - h)) / (2 * h),
    )
    np.testing.assert_allclose(got, numeric, rtol=1e-6)


def test_gradients_are_finite_at_infinite_ends(x64):
    """lambda is infinite at t = 0, and at t = 1 of a rectified flow: no derivative passes through it."""

    def total(beta_max, shift):
        vp, flow = processes.vp(0.1, beta_max), processes.rectified()
        down = shift * times.uniform(5)
        tables = [
            ghvb(vp, times.uniform(5), 2, 0.5),
            ghvb(flow, down, 2, 0.5),
            lms.lms(flow, down, 2),
            lms.lms(vp, times.uniform(5), 3),
        ]
        return sum((r**2).sum() for s in tables for r in (s.rows.qx, s.rows.qd, s.rows.qn))

    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(20.0, 1.0)
    assert all(np.isfinite(g) and g != 0 for g in grads)


def test_bad_options():
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\]"):
        ghvb(VP, GRID, 2, 0.0)
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\]"):
        heavy_ball(VP, GRID, 2, 1.2)
    with pytest.raises(ValueError, match=r"fractional order fixes the momentum: order=2.5 is order=3, momentum=0.5"):
        ghvb(VP, GRID, 2.5, 0.5)
    with pytest.raises(ValueError, match=r"order must be in \(0, 4\]; got 5"):
        ghvb(VP, GRID, 5)
    with pytest.raises(ValueError, match="order must be 1, 2, 3 or 4"):
        heavy_ball(VP, GRID, 5)
    with pytest.raises(ValueError, match="order must be 1, 2, 3 or 4"):
        lms.lms(VP, GRID, 0)
