import functools
import io
import json
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import PartitionSpec as P

from diffjax.training import devices, fit, init_state, make_train_step
from diffjax.training.layouts import Layout


def run(parallel, optimizer, n, dtype, steps=20, per_dispatch=4, **options):
    """Final state and the losses of `steps` steps on `n` devices."""
    state, train_step = toy.make(optimizer, dtype, **options)
    driver = devices.driver(parallel, train_step, devices=jax.devices()[:n], per_dispatch=per_dispatch)
    state = driver.place(state)
    losses = []
    for start in range(0, steps, per_dispatch):
        chunk = [toy.batch(i, dtype=dtype) for i in range(start, min(start + per_dispatch, steps))]
        state, metrics = driver.step(state, chunk)
        losses.append(np.asarray(metrics["loss"])[: len(chunk)])
    return jax.device_get(jax.tree.map(lambda a: a, (state.params, state.ema, state.opt_state))), np.concatenate(losses)


RULES = (("embed$", P("model", None)),)
WAYS = [
    *[(name, Layout(data=n)) for name, n in (("mesh", 8), ("shard_map", 8), ("pmap", 8))],
    *[(name, Layout(data=n)) for name, n in (("mesh", 2), ("shard_map", 4), ("pmap", 2))],
    ("mesh", Layout(data=2, fsdp=4)),
    ("shard_map", Layout(data=2, fsdp=4)),
    ("mesh", Layout(data=2, model=2, rules=RULES)),
    ("shard_map", Layout(fsdp=2, model=2, rules=RULES)),
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(1e-2)], ids=["sgd", "adam"])
def test_float64_is_the_same_on_any_devices_and_layout(optimizer, x64):
    """Losses, parameters, averages and moments over 50 steps, in calls of 25 and so in two."""
    reference = run("mesh", optimizer, 1, np.float64, steps=50, per_dispatch=25)
    for parallel, layout in WAYS:
        way = functools.partial(devices.PARALLEL[parallel], layout=layout)
        got = run(way, optimizer, layout.size, np.float64, steps=50, per_dispatch=25)
        toy.assert_close(got, reference, rtol=1e-9, atol=1e-9)


def test_clipping_sees_the_norm_of_the_whole_gradient_when_it_is_cut(x64):
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5))
    reference = run("mesh", clipped, 1, np.float64, steps=4)
    unclipped = run("mesh", optax.sgd(0.5), 1, np.float64, steps=4)
    assert np.abs(reference[0][0]["w"] - unclipped[0][0]["w"]).max() > 0.01
    for parallel in (devices.mesh, devices.shard_map):
        got = run(functools.partial(parallel, layout=Layout(data=2, fsdp=4)), clipped, 8, np.float64, steps=4)
        toy.assert_close(got, reference, rtol=1e-9, atol=1e-9)


def test_accumulation_on_a_layout_equals_the_whole_batch(x64):
    reference = run("mesh", optax.sgd(0.1), 1, np.float64, steps=4)
    for parallel in (devices.mesh, devices.shard_map):
        way = functools.partial(parallel, layout=Layout(data=2, fsdp=4))
        got = run(way, optax.sgd(0.1), 8, np.float64, steps=4, accumulate=2)
        toy.assert_close(got, reference, rtol=1e-9, atol=1e-9)


def test_float32_is_close_on_eight_devices_and_training_helps():
    reference, losses = run("mesh", optax.sgd(0.1), 1, np.float32, steps=40)
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()
    for parallel in devices.PARALLEL:
        got = run(parallel, optax.sgd(0.1), 8, np.float32, steps=40)
        toy.assert_close(got, (reference, losses), rtol=1e-4, atol=1e-5)


def test_fsdp_cuts_the_state_and_keeps_the_numbers():
    reference = run("mesh", optax.adam(1e-2), 1, np.float32, steps=8)
    sharded = functools.partial(devices.mesh, layout=Layout(data=2, fsdp=4))
    toy.assert_close(run(sharded, optax.adam(1e-2), 8, np.float32, steps=8), reference, rtol=1e-4, atol=1e-5)
    state, train_step = toy.make()
    driver = sharded(train_step, devices=jax.devices())
    placed = driver.place(state)
    assert placed.params["embed"].sharding.spec == P("fsdp")
    assert placed.opt_state[0].mu["embed"].addressable_shards[0].data.shape == (1, toy.D)
    after, _ = driver.step(placed, [toy.batch(0)])
    assert after.ema["wide"]["embed"].sharding.spec == P("fsdp")


def test_rules_choose_the_layout_of_a_leaf():
    state, train_step = toy.make()
    rules = (("embed$", P("model", None)),)
    driver = devices.mesh(train_step, devices=jax.devices(), layout=Layout(data=4, model=2, rules=rules))
    assert driver.place(state).params["embed"].sharding.spec == P("model")
    after, _ = driver.step(driver.place(state), [toy.batch(0)])
    assert after.params["embed"].sharding.spec == P("model")


@pytest.mark.parametrize("parallel", devices.PARALLEL)
def test_a_run_does_not_depend_on_how_it_is_cut_into_calls(parallel):
    state, train_step = toy.make()
    driver = devices.driver(parallel, train_step, per_dispatch=4)
    whole, _ = driver.step(driver.place(state), [toy.batch(i) for i in range(4)])
    parts = driver.place(state)
    for cut in ([0], [1, 2], [3]):
        parts, _ = driver.step(parts, [toy.batch(i) for i in cut])
    toy.assert_equal(parts, whole)


def test_one_trace_and_one_compilation_for_any_number_of_steps():
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return toy.loss(*args, **kwargs)

    optimizer = optax.sgd(0.1)
    train_step = make_train_step(toy.model, counted, optimizer)
    driver = devices.mesh(train_step, devices=jax.devices()[:1], per_dispatch=4)
    state = driver.place(toy.make(optimizer, emas={})[0])
    for n in (4, 1, 3):
        state, _ = driver.step(state, [toy.batch(i) for i in range(n)])
    assert len(traces) == 1 and driver.call._cache_size() == 1


def test_the_callers_arrays_survive_donation():
    params = jax.tree.map(jax.numpy.asarray, toy.params())

    optimizer = optax.sgd(0.1)
    state = init_state(params, optimizer, 0)
    _, train_step = toy.make(optimizer, emas={})
    for n in (1, 8):
        driver = devices.mesh(train_step, devices=jax.devices()[:n])
        placed = driver.place(state)
        driver.step(placed, [toy.batch(0)])
        assert placed.params["w"].is_deleted()
        assert np.isfinite(np.asarray(state.params["w"])).all() and np.isfinite(np.asarray(params["w"])).all()


@pytest.mark.parametrize("parallel", devices.PARALLEL)
def test_an_indivisible_batch_names_both_numbers(parallel):
    state, train_step = toy.make()
    driver = devices.driver(parallel, train_step)
    with pytest.raises(ValueError, match=r"batch of 10 examples .* 8 devices; choose a multiple of 8 such as 8"):
        driver.step(driver.place(state), [toy.batch(0, size=10)])


def test_bad_input():
    state, train_step = toy.make(accumulate=2)
    with pytest.raises(ValueError, match="mesh, shard_map, pmap; got 'gpu'"):
        devices.driver("gpu", train_step)
    with pytest.raises(ValueError, match="data=3 x fsdp=1 x model=1 x sequence=1 is for 3 devices; got 8"):
        devices.mesh(train_step, layout=Layout(data=3))
    with pytest.raises(ValueError, match="pmap keeps the whole state .* 'fsdp': 2.* Use mesh or shard_map"):
        devices.pmap(train_step, layout=Layout(data=4, fsdp=2))
    driver = devices.mesh(train_step)
    with pytest.raises(ValueError, match="batch of 8 examples .* 8 devices x 2 accumulation parts"):
        driver.step(driver.place(state), [toy.batch(0, size=8)])
    with pytest.raises(ValueError, match="'x'; got the fields"):
        driver.step(driver.place(state), [{"image": np.ones((16, 2))}])
    with pytest.raises(ValueError, match="1 to 1 batches"):
        driver.step(driver.place(state), [toy.batch(0)] * 2)


def test_more_steps_per_dispatch_only_for_small_models():
    tree = lambda n: {"w": np.ones(n)}
    assert [devices.steps_per_dispatch(tree(n), 64) for n in (10, 10**4, 10**5, 10**6)] == [16, 16, 16, 2]


COLLECTIVES = pathlib.Path(__file__).parent / "collectives.py"


@pytest.fixture(scope="module")
def report():
    """What `collectives.py` finds with the compiler's default flags, in a process of its own."""
    out = subprocess.run(
        [sys.executable, str(COLLECTIVES)],
        capture_output=True,
        text=True,
        timeout=300,
        env=toy.clean_environment(fast=False),
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_one_all_reduce_of_the_gradients_bytes_per_step(report):
    gradient = report["gradient"]
    assert set(report["toy"]) == {"mesh-1", *(f"{name}-4" for name in devices.PARALLEL)}
    for name, found in report["toy"].items():
        assert set(found) == {"all-reduce"}, (name, found)
        count, size = found["all-reduce"]
        assert count == 1 and gradient <= size <= gradient + 2 * 4, (name, found)


def test_accumulation_reduces_once_per_step_where_the_batch_is_cut_by_hand(report):
    """`mesh` reduces in every part: what a loop carries cannot be a sum that the compiler has yet to take."""
    for name, found in report["accumulate"].items():
        count, size = found["messages"]["all-reduce"]
        assert count == 1 and set(found["messages"]) == {"all-reduce"}
        assert report["gradient"] <= size <= report["gradient"] + 2 * 4
        assert found["in the loop"] == (1 if name == "mesh" else 0), (name, found)


TWO = pathlib.Path(__file__).parent / "two_processes.py"


@pytest.mark.slow
def test_two_processes_train_save_and_resume_like_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    commands = [[sys.executable, str(TWO), str(i), "2", str(port), str(tmp_path)] for i in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(c, env=toy.clean_environment(2), **pipes) for c in commands]
    reports = []
    for child in children:
        try:
            out, err = child.communicate(timeout=240)
        finally:
            child.kill()
        assert child.returncode == 0, err
        reports.append(json.loads(out.split("REPORT ")[1].splitlines()[0]))
    assert reports[0] == reports[1] and set(reports[0]) == {"mesh", "pmap", "rewind"}
    rewind = reports[0].pop("rewind")
    state, train_step = toy.make()
    one = fit(
        state, train_step, toy.Batches(), steps=5, devices=jax.devices()[:4], stream=io.StringIO(), per_dispatch=2
    )
    for weights, *rest in reports[0].values():
        assert rest == [5, 80, [3, 5]]
        np.testing.assert_allclose(weights, np.abs(one.state.params["w"]).sum(), rtol=1e-5)
    # Bad: 9 to 11. Back to 8, and on with batch 12: as if 8 to 11 had never been.
    assert rewind[1:] == [24, 24 * 16, 1]
    one_step = jax.jit(train_step)
    for i in [*range(8), *range(12, 28)]:
        state, _ = one_step(state, jax.tree.map(jnp.asarray, toy.batch(i)))
    np.testing.assert_allclose(rewind[0], np.abs(state.params["w"]).sum(), rtol=1e-5)
