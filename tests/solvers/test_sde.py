"""Tables of the reverse SDE, by the exact mean and variance that a table gives Gaussian data; and the corrector."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import numerics as nu
from diffjax import processes, solvers, times
from diffjax.solvers import sde
from diffjax.solvers.corrector import norm_ratio
from diffjax.testing import oracle, smooth_mixture

START, STOP = 0.9, 0.05
MEAN, VARIANCE = 0.7, 0.4


def run(solver, process, start, mean=MEAN, variance=VARIANCE, noise=None):
    """The table on data N(mean, variance), whose denoiser is affine, in NumPy.

    Every value is a vector of coefficients, of 1 and of independent standard normals; `start` is the first, `noise(i, j)` the
    vector of normal j of row i. Returns the last one: its first entry is the mean, the others squared sum to the variance.
    """
    r = solver.rows
    count = 2 + 2 * len(r.t)
    unit = lambda i, j: np.eye(1, count, 2 + 2 * i + j)[0]
    noise = noise or unit
    x = start if len(start) > 2 else np.pad(start, (0, count - 2))
    one = np.eye(1, len(x))[0]
    d = [np.zeros_like(x)] * r.qd.shape[1]
    alphas, sigmas = process.alpha(r.t), process.sigma(r.t)
    for i, (alpha, sigma) in enumerate(zip(alphas, sigmas, strict=True)):
        z = 0 if r.pz is None else noise(i, 0)
        shared = lambda c, z=z, i=i: 0 if c is None else c[i] * z
        y = r.px[i, 0] * x + sum(c * v for c, v in zip(r.pd[i], d, strict=True)) + shared(r.pz)
        q = (y - alpha * mean * one) / (alpha**2 * variance + sigma**2)
        new = r.u[i, 0] * (mean * one + alpha * variance * q) + r.u[i, 1] * sigma * q
        x = r.qx[i, 0] * x + sum(c * v for c, v in zip(r.qd[i], d, strict=True)) + shared(r.qz) + r.qn[i] * new
        if r.noise is not None:
            x = x + r.noise[i] * noise(i, 1)
        d = [new, *d[:-1]] if r.keep[i] and d else d
    return x


def moments(x):
    return x[0], (x[1:] ** 2).sum()


def marginal(process, t):
    return process.alpha(t) * MEAN, process.alpha(t) ** 2 * VARIANCE + process.sigma(t) ** 2


def weak_errors(build, process, counts, start=START, stop=STOP, **options):
    mean, variance = marginal(process, start)
    exact = np.array(marginal(process, stop))
    ends = [run(build(process, times.log_snr(process, n, start=start, stop=stop), **options), process,
                np.array([mean, variance**0.5])) for n in counts]  # fmt: skip
    return [np.abs(np.array(moments(e)) - exact).max() for e in ends]


PROCESSES = {"vp": processes.vp, "cosine": processes.cosine, "sub_vp": processes.sub_vp, "ve": processes.ve,
             "edm": processes.edm, "rectified": processes.rectified}  # fmt: skip


@pytest.mark.parametrize(
    ("process", "eta"), [("vp", 1.0), ("cosine", 1.0), ("rectified", 1.0), ("edm", 0.5), ("sub_vp", 0.0)]
)
@pytest.mark.parametrize("name", ["reverse_diffusion", "euler_maruyama", "sra1"])
def test_weak_order_is_the_cards(name, eta, process):
    card = solvers.CATALOGUE[name]
    a, b = weak_errors(card.build, PROCESSES[process](), (100, 200), eta=eta)
    assert card.order - 0.15 < np.log2(a / b) < card.order + 0.35, (a, b)  # above: near a zero of the leading term


def test_noise_columns_are_what_eta_asks_for():
    p, g = processes.vp(), times.log_snr(processes.vp(), 6)
    for name in ("reverse_diffusion", "euler_maruyama", "sra1"):
        build = solvers.CATALOGUE[name].build
        assert build(p, g, eta=0.0).rows.noise is None
        assert build(p, g).rows.noise[-1] == 0  # the step to sigma = 0
    flow, grid = processes.rectified(), times.uniform(5, stop=0.1)
    a, b = (f(flow, grid[1:]).rows for f in (lambda *a: sde.euler_maruyama(*a, eta=0.0), solvers.euler))
    np.testing.assert_allclose(a.u, b.u, rtol=1e-12)


def test_one_step_from_pure_noise_and_to_data_is_ddim():
    p = processes.cosine()
    for name in ("reverse_diffusion", "euler_maruyama", "sra1"):
        a = solvers.CATALOGUE[name].build(p, np.array([1.0, 0.6, 0.0]))
        b = solvers.ddim(p, np.array([1.0, 0.6, 0.0]), eta=1.0)
        for row in (0, -1):
            for got, want in ((a.rows.u, b.rows.u), (a.rows.noise, b.rows.noise), (a.rows.qx, b.rows.qx)):
                np.testing.assert_allclose(got[row], want[row], atol=1e-12)


def test_reverse_diffusion_against_the_published_chain():
    """VE: x + (sigma_t^2 - sigma_s^2) score + sqrt(sigma_t^2 - sigma_s^2) z; DDPM's betas: (2 - sqrt(1 - b)) x + b score."""
    ve, grid = processes.ve(), times.uniform(6)
    r = sde.reverse_diffusion(ve, grid).rows
    gap = ve.sigma(grid[:-1]) ** 2 - ve.sigma(grid[1:]) ** 2
    np.testing.assert_allclose(r.qx[:, 0], 1.0)
    np.testing.assert_allclose(r.u[:, 1], -gap / ve.sigma(grid[:-1]), rtol=1e-9)
    np.testing.assert_allclose(r.noise, np.sqrt(gap), rtol=1e-9)
    betas = np.linspace(1e-2, 0.2, 8)
    chain = processes.from_betas(betas)
    grid = np.arange(8, 0, -1) / 8
    r = sde.reverse_diffusion(chain, grid).rows
    beta = betas[::-1][:-1]
    np.testing.assert_allclose(r.qx[:, 0], 2 - np.sqrt(1 - beta), rtol=1e-9)
    np.testing.assert_allclose(r.u[:, 1], -beta / chain.sigma(grid[:-1]), rtol=1e-9)
    np.testing.assert_allclose(r.noise, np.sqrt(beta), rtol=1e-9)


def test_strong_orders_on_one_path():
    """Exact strong errors for a linear drift: the noise of a coarse step is a vector over the normals of a fine path."""
    process, fine = processes.edm(), 2**13
    r0, r1, variance = 3.0, 0.3, 0.4
    r = np.linspace(r0, r1, fine + 1)
    gap = -np.diff(r**2)
    weight = (variance + r1**2) / (variance + (r[:-1] + r[1:]) ** 2 / 4)  # of dM in the exact solution, eta = 1
    start = np.append([0.0, np.sqrt(variance + r0**2)], np.zeros(fine))
    exact = np.concatenate([start[:2] * (variance + r1**2) / (variance + r0**2), weight * np.sqrt(gap)])

    def error(build, n):
        size = fine // n
        solver = build(process, r[::size] / 80.0)
        per_step = solver.evaluations // n

        def noise(row, stream):
            i = row // per_step
            inside = slice(i * size, (i + 1) * size)
            left = (r[inside.start] - r[inside.stop]) - (r[inside.start] - (r[:-1] + r[1:])[inside] / 2)
            m, j = np.zeros((2, fine + 2))
            m[2:][inside] = np.sqrt(gap[inside])
            j[2:][inside] = np.sqrt(gap[inside]) * left
            if per_step == 1:  # z' is the whole increment
                return m / np.sqrt((m**2).sum())
            z = j / np.sqrt((j**2).sum())
            rest = m - (m @ z) * z
            return z if stream == 0 else rest / np.sqrt((rest**2).sum())

        return np.linalg.norm(run(solver, process, start, 0.0, variance, noise) - exact)

    slope = lambda build: np.log2(error(build, 32) / error(build, 64))
    assert slope(sde.sra1) > 1.35
    for build in (sde.euler_maruyama, sde.reverse_diffusion, solvers.ancestral):
        assert abs(slope(build) - 1) < 0.15, build


def test_langevin_approaches_the_marginal():
    """The stationary variance of x - e x / S + sqrt(2 e) z is S / (1 - e / (2 S)): a bias of first order in e."""
    process, t, snr = processes.vp(), 0.3, 0.2
    mean, variance = marginal(process, t)
    got = moments(run(sde.langevin(process, t, 400, snr=snr), process, np.array([3.0, 2.0])))
    e = 2 * (snr * process.sigma(t)) ** 2
    np.testing.assert_allclose(got, [mean, variance / (1 - e / (2 * variance))], rtol=1e-6)


def test_annealed_langevin_against_the_published_loop(x64):
    """NCSN's step sizes epsilon sigma_i^2 / sigma_L^2, level by level."""
    process = processes.ve(0.1, 10.0)
    grid = times.log_snr(process, 6)
    epsilon = 2e-3
    m = smooth_mixture()
    x = start = 10 * jax.random.normal(jax.random.key(1), (4, 2))
    keys, row, sigma = nu.item_keys(jax.random.key(0), jnp.arange(4)), 0, process.sigma(grid)
    d = jax.jit(lambda x, t: oracle(m, process)(x, t))
    normal = jax.jit(lambda i, x: nu.item_normal(keys, i, x))
    for i in range(1, 7):
        step = epsilon * sigma[i] ** 2 / sigma[-1] ** 2
        for _ in range(3):
            score = -d(x, grid[i]).eps / sigma[i]
            x = x + step / 2 * score + np.sqrt(step) * normal(2 * row + 1, x)
            row += 1
    solver = sde.annealed_langevin(process, grid, snr=np.sqrt(epsilon) / (2 * sigma[-1]), steps=3)
    got = diffjax.sample(jax.random.key(0), oracle(m, process), solver, start)
    np.testing.assert_allclose(got, x, rtol=1e-9)


def test_annealed_langevin_reaches_the_data():
    """Bias falls with more levels and steps: the exact moments at sigma = 0."""
    process = processes.ve(0.01, 10.0)
    errors = [weak_errors(sde.annealed_langevin, process, (n,), 1.0, 0.0, snr=0.3, steps=n)[0] for n in (10, 30)]
    assert errors[1] < 0.05 and errors[1] < errors[0] / 3


# ------------------------------------------------------------------------------------------------ predictor-corrector


@pytest.fixture(scope="module")
def corrected():
    """Samples of the corrector with norms, beside the table that fixes q = 1, and the pieces they are made of."""
    process = processes.vp()
    grid = times.log_snr(process, 5, stop=0.0)
    d = oracle(smooth_mixture(), process)
    x = jax.random.normal(jax.random.key(3), (6, 2))
    solver = solvers.predictor_corrector(process, grid, solvers.ddim, snr=0.2, corrector_steps=2)
    sample = jax.jit(lambda key, solver, x, items: diffjax.sample(key, d, solver, x, items=items, keep=True))
    return process, grid, d, x, solver, sample


def test_corrector_against_the_published_loop(corrected):
    process, grid, d, x, solver, sample = corrected
    keys, row, start = nu.item_keys(jax.random.key(0), jnp.arange(6)), 0, x
    points = [x]
    denoise, normal = jax.jit(lambda x, t: d(x, t)), jax.jit(lambda i, x: nu.item_normal(keys, i, x))
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        p = denoise(x, t)
        x = process.alpha(s) * p.x0 + process.sigma(s) * p.eps
        row += 1
        for _ in range(2 if process.sigma(s) > 0 else 0):
            score, z = -denoise(x, s).eps / process.sigma(s), normal(2 * row + 1, x)
            ratio = jnp.linalg.norm(z, axis=1) / jnp.linalg.norm(score, axis=1)
            e = 2 * (process.alpha(t) / process.alpha(s)) ** 2 * (0.2 * ratio[:, None]) ** 2
            x = x + e * score + jnp.sqrt(2 * e) * z
            row += 1
        points.append(x)
    got, path = sample(jax.random.key(0), solver, start, jnp.arange(6))
    assert row == solver.evaluations == 5 + 2 * 4
    np.testing.assert_allclose(got, x, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(path.x, jnp.stack(points), rtol=2e-3, atol=2e-4)


def test_corrector_is_independent_of_the_batch(corrected):
    *_, x, solver, sample = corrected
    whole = sample(jax.random.key(0), solver, x, jnp.arange(6))[0]
    order = jnp.array([4, 2, 0, 1, 5, 3])
    np.testing.assert_allclose(
        sample(jax.random.key(0), solver, x[order], order)[0], whole[order], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("predictor", [solvers.ddim, solvers.heun, sde.reverse_diffusion])
def test_corrector_with_norms_off_is_a_table_that_moves_to_the_marginal(predictor):
    """Exact moments: Langevin steps lower the predictor's error to their own bias; predictors of two rows a step too."""
    process = processes.cosine()
    build = lambda p, g: solvers.predictor_corrector(p, g, predictor, snr=0.2, corrector_steps=2, by_norm=False)
    alone, corrected = (weak_errors(f, process, (40,), 1.0, 0.0)[0] for f in (predictor, build))
    assert corrected < max(0.75 * alone, 0.02), (alone, corrected)
    s = build(process, times.log_snr(process, 5))
    assert s.rows.accept.sum() == 5 and s.rows.accept[-1]
    assert s.evaluations == predictor(process, times.log_snr(process, 5)).evaluations + 2 * 4


def test_corrector_is_finite_everywhere():
    for make in PROCESSES.values():
        process = make()
        s = solvers.predictor_corrector(process, times.log_snr(process, 5))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(s.rows))
        traced = jax.jit(lambda g, p=process: solvers.predictor_corrector(p, g).rows.base.qn)(times.log_snr(process, 5))
        assert np.all(np.isfinite(traced))


def test_norm_ratio_over_leaves_and_of_zero():
    z = {"a": jnp.array([[3.0], [1.0]]), "b": jnp.array([[4.0], [1.0]])}
    eps = {"a": jnp.array([[1.0], [0.0]]), "b": jnp.array([[0.0], [0.0]])}
    np.testing.assert_allclose(norm_ratio(z, eps), [5.0, 0.0])
    assert np.isfinite(jax.grad(lambda e: norm_ratio(z, e).sum())(eps)["a"]).all()


def test_messages():
    p, g = processes.vp(), times.uniform(4)
    with pytest.raises(ValueError, match="eta must be >= 0"):
        sde.euler_maruyama(p, g, eta=-0.5)
    with pytest.raises(ValueError, match="snr must be a finite number"):
        sde.annealed_langevin(p, g, snr=0.0)
    with pytest.raises(ValueError, match="number of Langevin steps must be an int >= 1; got 0"):
        solvers.predictor_corrector(p, g, corrector_steps=0)
    with pytest.raises(ValueError, match="sigma\\(t\\) is 0 at t = 0.0"):
        sde.langevin(p, 0.0, 3)
    two = lambda p, g: solvers.pad(solvers.ddim(p, g), 4, p=2)
    with pytest.raises(ValueError, match="one state register, .* got 2 states"):
        solvers.predictor_corrector(p, g, two)
    broken = dataclasses.replace(solvers.ddim(p, g), rows=())
    with pytest.raises(ValueError, match="got tuple"):
        solvers.predictor_corrector(p, g, lambda p, g: broken)


def test_eta_is_differentiable(x64):
    process = processes.vp()
    d = oracle(smooth_mixture(), process)
    x = jax.random.normal(jax.random.key(0), (3, 2))
    grid = times.log_snr(process, 2, stop=0.1)

    def end(eta, snr):
        predictor = lambda p, g: sde.sra1(p, g, eta=eta)
        solver = solvers.predictor_corrector(process, grid, predictor, snr=snr)
        return jnp.sum(diffjax.sample(jax.random.key(0), d, solver, x) ** 2)

    grads = jax.jit(jax.grad(end, argnums=(0, 1)))(0.8, 0.2)
    assert all(np.isfinite(g) and g != 0 for g in grads)
