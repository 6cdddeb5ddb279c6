"""Gradients through a sampler without stored states: exact by reversible tables, approximate by the adjoint equation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, processes, solvers, times
from diffjax.types import Denoiser, Evaluation

COSINE = processes.cosine()
KEY = jax.random.key(7)


def network(params, x, t, cond):
    return jnp.tanh(x @ params["w"]) * params["gain"] + t[:, None] + cond[:, None]


def state(n=8, d=4):
    return jax.random.normal(jax.random.key(1), (n, d))


def parameters(d=4):
    return {"w": jax.random.normal(jax.random.key(2), (d, d)) / d, "gain": jnp.asarray(0.7)}


def loss(solver, params, x, cond, weight, memory):
    """Guided, so that weights of the network, start, condition and guidance weight are asked for."""
    d = guidance.cfg(weight, skip=False)(diffjax.denoiser(network, COSINE, diffjax.from_v, params, null=0.0)).bind(cond)
    return jnp.sum(jnp.cos(diffjax.sample(KEY, d, solver, x, memory=memory)))


def arguments(d=4, batch=8):
    return parameters(d), state(batch, d), jnp.full(batch, 0.3), jnp.asarray(1.5)


def test_reversible_gradients_are_the_plain_ones_of_a_traced_grid():
    def f(stop, *args, memory):
        return loss(solvers.o_belm(COSINE, jnp.linspace(0.95, stop, 31), solvers.V), *args, memory)

    make = lambda memory: jax.jit(jax.grad(lambda *a: f(*a, memory=memory), (0, 1, 2, 3, 4)))
    got, want = (make(m)(jnp.asarray(0.05), *arguments()) for m in ("reversible", "plain"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
        assert np.any(b != 0)


def test_reversible_gradients_of_the_table_itself(x64):
    s = solvers.edict(COSINE, times.uniform(6, start=0.9))
    rows = jax.tree.map(jnp.asarray, s.rows)

    def f(tables, *args, memory):
        return loss(dataclasses.replace(s, rows=rows._replace(**tables)), *args, memory)

    tables = {k: getattr(rows, k) for k in ("t", "p", "u", "a", "b")}
    make = lambda memory: jax.jit(jax.grad(lambda *a: f(*a, memory=memory), (0, 1, 2, 3, 4)))
    (got, *others), (want, *plain) = (make(m)(tables, *arguments()) for m in ("reversible", "plain"))
    for k in tables:
        # entries that are zero in a reversible table may not be moved alone: compare the others
        free = np.asarray(tables[k]) != 0
        np.testing.assert_allclose(got[k][free], want[k][free], rtol=1e-9, atol=1e-12)
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        assert np.any(b != 0)


def test_memory_does_not_grow_with_the_number_of_steps():
    used = {}
    for memory, steps in (("plain", (50,)), ("reversible", (50, 1000))):
        for n in steps:
            solver = solvers.o_belm(COSINE, times.uniform(n, start=0.95, stop=0.05), solvers.V)
            f = jax.jit(jax.grad(lambda *a, s=solver, m=memory: loss(s, *a, m), (0, 1, 2, 3)))
            compiled = f.lower(*arguments(d=16, batch=64)).compile()
            used[memory, n] = compiled.memory_analysis().temp_size_in_bytes
    assert used["reversible", 1000] < used["reversible", 50] + 2**18, (
        used
    )  # the rows themselves, 1000 times a few numbers
    assert used["reversible", 50] < 0.2 * used["plain", 50], used


def test_stochastic_solvers_have_the_same_gradient_under_checkpoint():
    def f(params, x, memory):
        d = diffjax.denoiser(network, COSINE, diffjax.from_v, params).bind(jnp.full(8, 0.3))
        return jnp.sum(jnp.cos(diffjax.sample(KEY, d, solvers.ddpm(COSINE, times.uniform(9)), x, memory=memory)))

    a, b = (jax.jit(jax.grad(lambda *q, m=m: f(*q, m), (0, 1)))(parameters(), state()) for m in ("checkpoint", "plain"))
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-5), a, b)
    assert np.any(a[0]["w"] != 0)


def counting(d, state, x, t, cond, key):
    return Evaluation(diffjax.from_v(jnp.zeros_like(x), x, d.process, t), state + 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"solver": solvers.ddim(COSINE, times.uniform(4))}, "not exactly reversible.*memory='checkpoint'"),
        ({"solver": solvers.ddpm(COSINE, times.uniform(4))}, "not exactly reversible"),
        ({"keep": True}, "keep and on_step need another memory"),
        ({"on_step": print}, "keep and on_step need another memory"),
        (
            {"denoiser": Denoiser((), COSINE, init=lambda d, x, c: jnp.zeros((), jnp.int32), apply=counting)},
            "carries a state",
        ),
    ],
)
def test_reversible_memory_refuses(kwargs, message):
    d = diffjax.denoiser(lambda x, t: x, COSINE, diffjax.from_v)
    arguments = {"denoiser": d, "solver": solvers.bdia(COSINE, times.uniform(4)), "x": state()} | kwargs
    with pytest.raises(ValueError, match=message):
        diffjax.sample(KEY, memory="reversible", **arguments)


def test_reversible_memory_refuses_a_table_that_float32_cannot_undo(x64):
    s = solvers.edict(COSINE, times.uniform(150, start=0.95, stop=0.05), 0.93)  # fine in float64
    d = diffjax.denoiser(lambda x, t: x, COSINE, diffjax.from_v)
    with pytest.raises(ValueError, match="multiplies rounding errors by .* which float32"):
        diffjax.sample(KEY, d, s, state().astype(jnp.float32), memory="reversible")


# ------------------------------------------------------------------------------------------------------------ adjoint


def adjoint(run, n):
    s = solvers.dpmpp(COSINE, times.log_snr(COSINE, n, start=0.95, stop=0.02))

    def f(params, x, cond):
        d = diffjax.denoiser(network, COSINE, diffjax.from_v, params).bind(cond)
        return jnp.sum(jnp.cos(run(KEY, d, s, x)))

    return jax.jit(jax.grad(f, (0, 1, 2)))(parameters(), state(), jnp.full(8, 0.3))


def test_adjoint_gradients_converge_to_those_of_backpropagation(x64):
    errors = []
    for n in (25, 50):
        plain, got = adjoint(diffjax.sample, n), adjoint(diffjax.adjoint_sample, n)
        flat = [
            [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(part)]) for part in grads]
            for grads in (got, plain)
        ]
        errors.append([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*flat, strict=True)])
        cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*flat, strict=True)]
        assert min(cosine) > 0.999, cosine
    assert max(errors[1]) < 1e-2 and all(b < 0.5 * a for a, b in zip(*errors, strict=True)), errors


def test_the_adjoint_of_a_gaussian_is_the_closed_form(x64):
    """The flow of N(0, c^2) multiplies x by sqrt((alpha_s^2 c^2 + sigma_s^2) / (alpha_t^2 c^2 + sigma_t^2))."""
    process, c2, ends = processes.vp(), 0.25, np.array([0.9, 0.05])
    d = diffjax.testing.oracle(diffjax.testing.gaussian([0.0], c2), process)
    s = solvers.heun(process, times.log_snr(process, 60, start=0.9, stop=0.05))
    back = solvers.exp_ab(process, s.grid[::-1], 3, solvers.EPS, inverse=True)
    spread = process.alpha(ends) ** 2 * c2 + process.sigma(ends) ** 2
    for backward, limit in ((None, 3e-3), (back, 3e-2)):
        f = lambda x, backward=backward: diffjax.adjoint_sample(KEY, d, s, x, backward=backward).sum()
        gain = jax.jit(jax.grad(f))(jnp.ones((1, 1)))
        np.testing.assert_allclose(gain, np.sqrt(spread[1] / spread[0]), rtol=limit)


def test_adjoint_gradients_of_rows_and_process_are_zero_and_a_null_condition_has_one(x64):
    """Arrays that the custom derivative must not close over; a scalar condition is repeated for the batch."""
    grid = times.uniform(3, start=0.9, stop=0.2)
    net = lambda c, x, t, y: x * jnp.cos(t)[:, None] + c * y[:, None]

    def f(beta, qn, null):
        p = processes.vp(0.1, beta)
        s = solvers.ddim(processes.vp(), grid)
        s = dataclasses.replace(s, rows=s.rows._replace(qn=qn * s.rows.qn))
        d = guidance.cfg(2.0)(diffjax.denoiser(net, p, diffjax.from_v, 0.5, null=null)).bind(1.0)
        back = solvers.ddim(processes.vp(), grid[::-1], inverse=True)
        return diffjax.adjoint_sample(KEY, d, s, state(), backward=back).sum()

    one = jnp.ones(())
    in_process, in_rows, in_null = jax.jit(jax.grad(f, (0, 1, 2)))(20 * one, one, one)
    assert in_process == 0 and in_rows == 0 and abs(in_null) > 0.1
    many = jax.jit(jax.vmap(f, (0, 0, 0)))(*(jnp.array([v, v]) for v in (20.0, 1.0, 1.0)))
    np.testing.assert_allclose(many, f(20 * one, one, one), rtol=1e-10)


def test_adjoint_refuses_noise_and_the_ends():
    d = diffjax.denoiser(lambda x, t: x, COSINE, diffjax.from_v)
    with pytest.raises(ValueError, match="carries a state, which no ODE describes"):
        stateful = Denoiser((), COSINE, init=lambda d, x, c: jnp.zeros(()), apply=counting)
        diffjax.adjoint_sample(KEY, stateful, solvers.ddim(COSINE, times.uniform(4)), state())
    with pytest.raises(ValueError, match="needs alpha > 0 and sigma > 0"):
        diffjax.adjoint_sample(KEY, d, solvers.ddim(COSINE, times.uniform(4)), state())
    with pytest.raises(ValueError, match="draws noise"):
        diffjax.adjoint_sample(KEY, d, solvers.ddpm(COSINE, times.uniform(4)), state())
    s = solvers.ddim(COSINE, times.uniform(4, start=0.9, stop=0.1))
    with pytest.raises(ValueError, match="backward must run from 0.1 to 0.9"):
        diffjax.adjoint_sample(KEY, d, s, state(), backward=s)
