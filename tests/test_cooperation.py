"""Models of two latent spaces against the loop of the paper, and against what they would do alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes, solvers, testing
from diffjax.cooperation import Code, cooperate, hand_over
from diffjax.numerics import pytree_dataclass

PROCESS = processes.vp()
B = 5


@pytree_dataclass
class Linear:
    """x -> x A"""

    matrix: object

    def __call__(self, x):
        return x @ jnp.asarray(self.matrix, x.dtype)


def code(seed, pixels, latent):
    """An orthonormal basis of a subspace of the pixels."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(pixels, latent)))[0]
    return Code(Linear(q), Linear(q.T)), q


def gaussian(q, mean):
    """The exact model of latents of N(mean, C) in the pixels."""
    pixels = len(mean)
    root = np.random.default_rng(9).normal(size=(pixels, pixels)) / 3
    covariance = root @ root.T + 0.2 * np.eye(pixels)
    return testing.oracle(testing.gaussian(mean @ q, q.T @ covariance @ q), PROCESS)


def test_the_two_chains_are_those_of_the_published_loop(x64):
    (code_a, qa), (code_b, qb) = code(0, 6, 4), code(1, 6, 5)
    a, b = gaussian(qa, np.ones(6)), gaussian(qb, np.linspace(-1, 1, 6))
    w, grid = 0.3, np.linspace(1, 0, 9)
    rng = np.random.default_rng(2)
    za, zb = rng.normal(size=(B, 4)), rng.normal(size=(B, 5))
    d = cooperate(a, b, code_a, code_b, weight=w)
    got = jax.jit(lambda d, x: diffjax.sample(jax.random.key(0), d, solvers.ddim(PROCESS, grid), x))(
        d, (jnp.asarray(za), jnp.asarray(zb))
    )
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        bar_t, bar_s = float(PROCESS.alpha(t)) ** 2, float(PROCESS.alpha(s)) ** 2
        eps_a, eps_b = (np.asarray(m(jnp.asarray(z), t).eps) for m, z in ((a, za), (b, zb)))
        clean_a = (za - np.sqrt(1 - bar_t) * eps_a) / np.sqrt(bar_t)
        clean_b = (zb - np.sqrt(1 - bar_t) * eps_b) / np.sqrt(bar_t)
        into_a, into_b = clean_b @ qb.T @ qa, clean_a @ qa.T @ qb
        mixed_a = w * (za - np.sqrt(bar_t) * into_a) / np.sqrt(1 - bar_t) + (1 - w) * eps_a
        mixed_b = w * (zb - np.sqrt(bar_t) * into_b) / np.sqrt(1 - bar_t) + (1 - w) * eps_b
        step = lambda z, e, bt=bar_t, bs=bar_s: (
            np.sqrt(bs) * (z - np.sqrt(1 - bt) * e) / np.sqrt(bt) + np.sqrt(1 - bs) * e
        )
        za, zb = step(za, mixed_a), step(zb, mixed_b)
    np.testing.assert_allclose(got[0], za, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got[1], zb, rtol=1e-9, atol=1e-9)


def test_two_bases_of_one_space_are_one_model(x64):
    # Two rotations of the pixels and the exact models of the same data: each chain is the other's, for any weight.
    (code_a, qa), (code_b, qb) = code(0, 4, 4), code(1, 4, 4)
    mean = np.linspace(-1, 1, 4)
    a, b = gaussian(qa, mean), gaussian(qb, mean)
    x = np.random.default_rng(0).normal(size=(B, 4))
    solver = solvers.heun(PROCESS, np.linspace(1, 0, 7))
    run = jax.jit(lambda d, x: diffjax.sample(jax.random.key(0), d, solver, x))
    za, zb = run(cooperate(a, b, code_a, code_b, weight=0.8), (jnp.asarray(x @ qa), jnp.asarray(x @ qb)))
    np.testing.assert_allclose(za @ qa.T, zb @ qb.T, atol=1e-10)
    np.testing.assert_allclose(za, run(a, jnp.asarray(x @ qa)), atol=1e-10)


def test_weight_zero_is_each_model_alone_and_conditions_are_pairs():
    (code_a, _), (code_b, _) = code(0, 6, 4), code(1, 6, 5)
    net = lambda scale, z, t, c: z * scale + c[:, None]
    a, b = (diffjax.denoiser(net, PROCESS, diffjax.from_v, jnp.float32(s)) for s in (0.5, 0.7))
    z = (jnp.ones((B, 4)), 2 * jnp.ones((B, 5)))
    ca, cb = jnp.arange(5.0), -jnp.arange(5.0)
    d = cooperate(a, b, code_a, code_b, weight=0.0)
    alone = a(z[0], 0.4, ca).x0, b(z[1], 0.4, cb).x0
    for got in (d(z, 0.4, (ca, cb)).x0, d.bind((ca, cb))(z, 0.4).x0):
        jax.tree.map(np.testing.assert_array_equal, got, alone)
    bound = cooperate(a.bind(ca), b.bind(cb), code_a, code_b, weight=0.0, weight_b=1.0)
    np.testing.assert_array_equal(bound(z, 0.4).x0[0], alone[0])
    np.testing.assert_allclose(bound(z, 0.4).x0[1], code_b.encode(code_a.decode(alone[0])), rtol=1e-6)


def test_errors_name_the_pair():
    (code_a, _), (code_b, _) = code(0, 6, 4), code(1, 6, 5)
    a = diffjax.denoiser(lambda z, t: z, PROCESS, diffjax.from_v)
    b = diffjax.denoiser(lambda z, t: z, processes.rectified(), diffjax.from_v)
    with pytest.raises(ValueError, match="must share one process"):
        cooperate(a, b, code_a, code_b)
    d = cooperate(a, a, code_a, code_b)
    with pytest.raises(ValueError, match="need a pair as state, one for each; got "):
        d(jnp.ones((B, 4)), 0.4)
    with pytest.raises(ValueError, match="need a pair as condition"):
        d((jnp.ones((B, 4)), jnp.ones((B, 5))), 0.4, jnp.ones(B))


def test_hand_over_has_the_marginal_law_of_the_second_model():
    # The first model is certain of the data, so the handed state is the second model's marginal at t.
    t, n = 0.4, 20000
    mean = np.array([1.0, -2.0])
    low = diffjax.denoiser(lambda z, t: 0 * z + jnp.asarray(mean, z.dtype)[None], PROCESS, diffjax.from_x0)
    up = lambda x: jnp.repeat(x, 2, axis=1)
    z = hand_over(jax.random.key(0), low, jnp.zeros((n, 2)), t, up)
    alpha, sigma = float(PROCESS.alpha(t)), float(PROCESS.sigma(t))
    np.testing.assert_allclose(z.mean(0), alpha * np.repeat(mean, 2), atol=4 * sigma / np.sqrt(n))
    np.testing.assert_allclose(
        np.cov(np.asarray(z), rowvar=False), sigma**2 * np.eye(4), atol=5 * sigma**2 / np.sqrt(n)
    )
    part = hand_over(jax.random.key(0), low, jnp.zeros((3, 2)), t, up, items=jnp.arange(7, 10))
    np.testing.assert_allclose(part, z[7:10], rtol=1e-6)


def test_the_resolution_gap_is_closed_in_sequence():
    # Low resolution: means of neighbours. The high-resolution model is exact, so the result is its own data.
    data = testing.mixture([1, 1], [[-3.0, -3.0], [3.0, 3.0]], stds=[0.3, 0.3])
    half = testing.mixture([1, 1], [[-3.0], [3.0]], stds=[0.22, 0.22])
    low, high, t = testing.oracle(half, PROCESS), testing.oracle(data, PROCESS), 0.25
    z = PROCESS.prior(jax.random.key(0), (512, 1))
    grid = lambda start, end: np.linspace(start, end, 13)
    run = jax.jit(lambda d, solver, x: diffjax.sample(jax.random.key(0), d, solver, x))
    z = run(low, solvers.heun(PROCESS, grid(1.0, t)), z)
    x = hand_over(jax.random.key(0), low, z, t, lambda x: jnp.repeat(x, 2, axis=1))
    x = np.asarray(run(high, solvers.heun(PROCESS, grid(t, 1e-3)), x))
    assert (np.abs(np.abs(x) - 3) < 1.5).all() and (np.sign(x[:, 0]) == np.sign(x[:, 1])).all()
    # the low-resolution model has chosen the picture
    assert (np.sign(x[:, 0]) == np.sign(np.asarray(low(z, t).x0)[:, 0])).mean() > 0.99
    np.testing.assert_allclose(np.abs(x).std(0), 0.3, atol=0.04)
