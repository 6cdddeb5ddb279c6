import functools
import io
import json
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import toy
from collectives import BATCH, DIT, SIDE, dit_parts
from jax.sharding import PartitionSpec as P

from diffjax import networks
from diffjax.networks import DiT
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


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(1e-2)], ids=["sgd", "adam"])
def test_float64_is_the_same_on_one_device_and_on_eight(optimizer, x64):
    reference = run("mesh", optimizer, 1, np.float64, steps=22)
    for parallel in devices.PARALLEL:
        got = run(parallel, optimizer, 8, np.float64, steps=22)
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


SCALAR = 4


def dit_bytes(spec=lambda path, shape: True):
    """Bytes of the transformer's parameters that `spec` chooses."""
    params = dit_parts(depth=1)[1]
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    return sum(a.nbytes for p, a in named if spec(path(p), a.shape))


def leaves_cut(n):
    """How many parameters have an axis that n divides, and their bytes."""
    cut = lambda path, shape: any(size % n == 0 for size in shape)
    return sum(any(s % n == 0 for s in a.shape) for a in jax.tree.leaves(dit_parts(depth=1)[1])), dit_bytes(cut)


def test_fsdp_gathers_parameters_and_scatters_gradients_once(report):
    """gather: bytes of the parameters;   scatter: of a device's part;   all-reduce: of what is not cut, and scalars."""
    n, size = leaves_cut(8)
    found = report["dit"]["fsdp"]
    assert found["all-gather"] == [n, size] and found["reduce-scatter"] == [n, size // 8]
    rest = dit_bytes() - size
    count, reduced = found["all-reduce"]
    assert rest <= reduced <= rest + SCALAR * (n + 4) and count <= 2  # loss and its aux; the norm, one number a leaf
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_data_and_fsdp_reduce_between_copies_only_the_part_of_a_device(report):
    n, size = leaves_cut(4)
    found = report["dit"]["data and fsdp"]
    assert found["all-gather"] == [n, size] and found["reduce-scatter"] == [n, size // 4]
    floor = size // 4 + dit_bytes() - size
    assert floor <= found["all-reduce"][1] <= floor + SCALAR * (n + 4)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_fsdp_by_the_compiler_moves_the_bytes_of_theory(report):
    """On a CPU the compiler has no reduce-scatter and reduces whole gradients; GPUs and TPUs turn that into scatters.

    Where a table is looked up it exchanges rows instead of gathering the table, which is less.
    """
    n, size = leaves_cut(8)
    found = report["dit"]["fsdp by the compiler"]
    ids = BATCH * 4  # the labels are told to all
    table = 5 * DIT["width"] * 4
    assert found["all-gather"][0] <= n and size - table <= found["all-gather"][1] <= size + ids
    assert found["all-reduce"][1] <= dit_bytes() + SCALAR * (n + 4)
    assert found.get("all-to-all", [0, 0])[1] <= table


def test_tensor_parallelism_sends_two_sums_of_activations_per_block_and_direction(report):
    """all-reduce over model: attention and MLP, forward and backward; the projection to q, k, v and the split send nothing."""
    found = report["dit"]["model"]
    b, tokens, d = BATCH // 4, (SIDE // DIT["patch"]) ** 2, DIT["width"]
    layout = Layout(data=4, model=2, rules=networks.partition_rules(DiT()))
    cut = dit_bytes(lambda path, shape: "model" in layout.spec(path, shape))
    gradient = dit_bytes() - cut // 2
    blocks = 4 * b * tokens * d * 4
    code = (1 + 3) * b * d * 4  # of time forward; its gradients from the two modulations, and through its hidden layer
    low = gradient + blocks
    assert low <= found["all-reduce"][1] <= low + code + SCALAR * 100, (found, low, code)
    modulation = (6 + 2) * b * d * 4
    assert found["all-gather"] == [2, modulation]  # one of the block, one of the output
    assert set(found) == {"all-reduce", "all-gather"}


def test_sequence_parallelism_gathers_keys_and_values(report):
    """Gathered forward, summed backward; the gradient is summed along sequence, then along data, each its own message.

    Two messages, because a weight's gradient sums over items and over tokens, two axes of one product, and the compiler
    sends one message for each that is cut.
    """
    found = report["dit"]["sequence"]
    b, tokens, d = BATCH // 4, (SIDE // DIT["patch"]) ** 2, DIT["width"]
    kv = 2 * b * tokens * d * 4
    assert found["all-gather"] == [2, kv]
    gradient = dit_bytes()
    assert gradient + kv <= found["all-reduce"][1] <= 2 * gradient + kv + SCALAR * 200
    assert set(found) == {"all-reduce", "all-gather"}


def test_all_axes_by_hand_and_by_the_compiler_together(report):
    """FSDP of what tensor parallelism leaves to a device, and no message of parameters along `model`."""
    found = report["dit"]["data, fsdp and model"]
    layout = Layout(data=2, fsdp=2, model=2, rules=networks.partition_rules(DiT()))
    own = 0
    for path, a in jax.tree_util.tree_flatten_with_path(dit_parts(depth=1)[1])[0]:
        spec = layout.spec(jax.tree_util.keystr(path, simple=True, separator="/"), a.shape)
        own += ("fsdp" in spec) * a.nbytes // (2 if "model" in spec else 1)
    modulation = (6 + 2) * BATCH // 4 * DIT["width"] * 4
    assert found["all-gather"][1] == own + modulation
    assert found["reduce-scatter"][1] == own // 2
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}


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
    assert reports[0] == reports[1] and set(reports[0]) == {"mesh", "pmap"}
    state, train_step = toy.make()
    one = fit(
        state, train_step, toy.Batches(), steps=5, devices=jax.devices()[:4], stream=io.StringIO(), per_dispatch=2
    )
    for weights, *rest in reports[0].values():
        assert rest == [5, 80, [3, 5]]
        np.testing.assert_allclose(weights, np.abs(one.state.params["w"]).sum(), rtol=1e-5)
