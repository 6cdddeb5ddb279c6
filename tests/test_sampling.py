import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import diffjax
from diffjax import processes, solvers, times
from diffjax.types import Denoiser, Evaluation

PROCESS = processes.cosine()
NET = diffjax.denoiser(lambda params, x, t, cond: params * jnp.sin(x), PROCESS, diffjax.from_v, 0.8)
KEY = jax.random.key(7)


def solver(name="ddpm", n=6):
    return solvers.CATALOGUE[name].build(PROCESS, times.uniform(n))


def start(n=8, d=3):
    return PROCESS.prior(jax.random.key(1), (n, d))


def test_the_same_key_gives_the_same_sample_and_noise_is_per_item():
    x = start()
    whole = diffjax.sample(KEY, NET, solver(), x)
    np.testing.assert_array_equal(whole, diffjax.sample(KEY, NET, solver(), x))
    part = diffjax.sample(KEY, NET, solver(), x[3:6], items=jnp.arange(3, 6))
    np.testing.assert_allclose(whole[3:6], part, rtol=1e-5, atol=1e-6)
    assert not np.allclose(whole[3:6], diffjax.sample(KEY, NET, solver(), x[3:6]))


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_do_not_change_samples(chunk):
    labels = (jnp.arange(8) % 3).astype(jnp.float32)
    net = diffjax.denoiser(lambda x, t, y: jnp.sin(x) + y[:, None], PROCESS, diffjax.from_v).bind(labels)
    whole = diffjax.sample(KEY, net, solver(), PROCESS.prior(KEY, (8, 3)))
    seen = []
    parts = diffjax.sample_chunks(KEY, net, solver(), (8, 3), chunk=chunk, on_chunk=lambda *a: seen.append(a))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert seen[-1] == (8, 8)


def test_sharded_equals_unsharded_on_8_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = start()
    run = jax.jit(diffjax.sample)
    sharded = run(KEY, NET, solver(), jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, run(KEY, NET, solver(), x), rtol=1e-5, atol=1e-6)
    local = jax.shard_map(
        lambda x, items: diffjax.sample(KEY, NET, solver(), x, items=items),
        mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec("data")), out_specs=PartitionSpec("data"), check_vma=False,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(local)(x, jnp.arange(8)), sharded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
def test_kept_trajectories_hold_grid_points_only(name):
    x = start(2)
    s = solver(name, 5)
    end, kept = jax.jit(lambda s: diffjax.sample(KEY, NET, s, x, keep=True))(s)
    assert kept.x.shape == (6, 2, 3)
    np.testing.assert_allclose(kept.t, times.uniform(5), rtol=1e-6)
    np.testing.assert_array_equal(kept.x[0], x)
    np.testing.assert_array_equal(kept.x[-1], end)
    for i in range(1, 5):  # the trajectory is the trajectory of the shorter grid
        part = solvers.CATALOGUE[name].build(PROCESS, times.uniform(5)[: i + 1])
        np.testing.assert_allclose(kept.x[i], diffjax.sample(KEY, NET, part, x), rtol=1e-5, atol=1e-5)
    _, norms = diffjax.sample(KEY, NET, s, x, keep=lambda x: {"norm": jnp.linalg.norm(x, axis=-1)})
    assert norms.x["norm"].shape == (6, 2)


def test_progress_under_jit():
    seen = []
    run = jax.jit(
        lambda x: diffjax.sample(KEY, NET, solver("ddim", 4), x, on_step=lambda i, n, t: seen.append((int(i), n)))
    )
    run(start()).block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == [(i, 4) for i in (1, 2, 3, 4)]


def counting(d, state, x, t, cond, key):
    return Evaluation(diffjax.from_v(jnp.zeros_like(x), x, d.process, t), state + 1)


def test_denoisers_carry_state_through_the_scan():
    d = Denoiser(leaves=(), process=PROCESS, init=lambda d, x, cond: jnp.zeros((), jnp.int32), apply=counting)
    _, calls = jax.jit(lambda x: diffjax.sample(KEY, d, solver("heun", 5), x, return_state=True))(start())
    assert calls == solver("heun", 5).evaluations == 8  # first and last step are first order on this process


@pytest.mark.parametrize("memory", ["checkpoint", "nested"])
def test_memory_policies_change_nothing_but_memory(memory):
    def loss(params, x, memory):
        d = diffjax.denoiser(lambda p, x, t, c: p * jnp.sin(x), PROCESS, diffjax.from_v, params)
        return jnp.sum(diffjax.sample(KEY, d, solver("ddpm", 7), x, memory=memory) ** 2)

    x = start()
    plain = jax.value_and_grad(loss, (0, 1))(0.8, x, "plain")
    other = jax.value_and_grad(loss, (0, 1))(0.8, x, memory)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, other)


def test_differentiable_in_parameters_start_condition_table_and_grid():
    x = start(4)

    def loss(params, x, cond, rows, stop):
        d = diffjax.denoiser(lambda p, x, t, c: p * jnp.sin(x) + c[:, None], PROCESS, diffjax.from_v, params).bind(cond)
        s = solvers.ddim(PROCESS, jnp.linspace(0.95, stop, 5))
        a = diffjax.sample(KEY, d, s, x)
        b = diffjax.sample(KEY, d, table.__class__(**{**table.__dict__, "rows": rows}), x)
        return jnp.sum(a**2) + jnp.sum(b**2)

    table = solver("dpmpp_2m", 5)
    rows = jax.tree.map(lambda r: jnp.asarray(r, jnp.float32) if r.dtype.kind == "f" else jnp.asarray(r), table.rows)
    grads = jax.grad(loss, (0, 1, 2, 4))(0.8, x, jnp.ones(4), rows, 0.05)
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in grads)
    by_rows = jax.grad(lambda qn: loss(0.8, x, jnp.ones(4), rows._replace(qn=qn), 0.05))(rows.qn)
    bump = lambda e: loss(0.8, x, jnp.ones(4), rows._replace(qn=rows.qn.at[2].add(e)), 0.05)
    np.testing.assert_allclose(by_rows[2], (bump(1e-2) - bump(-1e-2)) / 2e-2, rtol=2e-2)


def test_pytree_states_and_frame_times():
    x = {"a": start(4, 3), "b": start(4, 2)}
    d = diffjax.denoiser(lambda x, t: jax.tree.map(jnp.sin, x), PROCESS, diffjax.from_v)
    end = diffjax.sample(KEY, d, solver("ddpm"), x)
    assert end["a"].shape == (4, 3) and end["b"].shape == (4, 2)
    video = jax.random.normal(KEY, (2, 5, 3))
    s = solver("ddim", 4)
    frames = jax.tree.map(  # every coefficient and time with a frame axis, as diffusion forcing needs
        lambda r: np.broadcast_to(r.reshape(r.shape + (1, 1)), (*r.shape, 1, 5)) if r.dtype.kind == "f" else r, s.rows
    )
    d = diffjax.denoiser(lambda x, t: jnp.sin(x), PROCESS, diffjax.from_v)
    per_frame = diffjax.sample(KEY, d, s.__class__(**{**s.__dict__, "rows": frames}), video)
    np.testing.assert_allclose(per_frame, diffjax.sample(KEY, d, s, video), rtol=1e-5)


def test_bfloat16_starts_are_raised_to_float32():
    assert diffjax.sample(KEY, NET, solver(), start().astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": jnp.zeros((0, 3))}, "batch is empty"),
        ({"x": jnp.zeros((2, 3), jnp.int32)}, "must be floating"),
        ({"items": jnp.arange(3)}, r"shape \(8,\); got \(3,\)"),
        ({"memory": "lots"}, "memory must be one of"),
        ({"denoiser": NET.bind(jnp.zeros(5))}, "has 5 items and the state 8"),
    ],
)
def test_bad_input(kwargs, message):
    arguments = {"denoiser": NET, "solver": solver(), "x": start()} | kwargs
    with pytest.raises(ValueError, match=message):
        diffjax.sample(KEY, **arguments)
