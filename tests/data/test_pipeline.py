"""The endless stream: every item once an epoch, exact positions, disjoint hosts, devices, errors."""

import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from diffjax import data

N = 52  # train items of a set of 70


@pytest.fixture(scope="module")
def small():
    x = np.random.default_rng(0).normal(size=(70, 3))
    x[:, 0] = np.arange(70)  # the item can be read off its data
    return data.from_arrays(x, np.arange(70) % 7, name="small")


def take(stream, n):
    return [next(stream) for _ in range(n)]


def indices(elements):
    return np.concatenate([e["index"].ravel() for e in elements])


def test_fields_and_encoding(small):
    with data.batches(small, "train", 8, seed=0) as stream:
        batch = next(stream)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "x": ((8, 3), np.float32),
        "label": ((8,), np.int32),
        "index": ((8,), np.int32),
    }
    np.testing.assert_allclose(small.transform.decode(batch["x"])[:, 0], batch["index"], atol=1e-4)
    assert (batch["label"] == batch["index"] % 7).all() and len(small.split("train")) == N


@pytest.mark.parametrize("prefetch", [0, 3])
def test_each_epoch_is_a_fresh_permutation(small, prefetch):
    with data.batches(small, "train", 13, seed=0, prefetch=prefetch) as stream:
        first, second = indices(take(stream, 4)), indices(take(stream, 4))
        assert stream.epoch == 2.0
    assert sorted(first) == sorted(second) == sorted(small.splits["train"])
    assert not (first == second).all()
    with data.batches(small, "train", 13, seed=1, prefetch=prefetch) as stream:
        assert not (first == indices(take(stream, 4))).all()


def test_batches_are_full_and_cross_epochs(small):
    with data.batches(small, "train", 10, seed=0) as stream:
        elements = take(stream, 26)
    assert all(len(e["index"]) == 10 for e in elements)
    assert (np.bincount(indices(elements), minlength=70)[small.splits["train"]] == 5).all()


def test_a_batch_larger_than_the_split_repeats_it(small):
    with data.batches(small, "validation", 11, seed=0, prefetch=0) as stream:
        counts = np.bincount(next(stream)["index"], minlength=70)[small.splits["validation"]]
    assert counts.sum() == 11 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("prefetch", "steps"), [(0, None), (2, None), (5, 3)])
def test_resume_is_exact(small, prefetch, steps):
    make = lambda: data.batches(small, "train", 8, seed=3, prefetch=prefetch, steps_per_item=steps)
    with make() as stream:
        take(stream, 7)
        time.sleep(0.05)  # lets the thread run ahead of what was handed out
        state = json.loads(json.dumps(stream.get_state()))
        assert state["batches"] == 7 * (steps or 1)
        expected = take(stream, 4)
        stream.set_state(state)  # backwards on the same iterator
        again = take(stream, 4)
    with make() as fresh:
        next(fresh)
        fresh.set_state(state)
        assert fresh.get_state() == state
        resumed = take(fresh, 4)
    with data.batches(small, "train", 8, seed=3, steps_per_item=steps, start=state["batches"]) as started:
        begun = take(started, 4)
    for other in (again, resumed, begun):
        jax.tree.map(np.testing.assert_array_equal, expected, other)


def test_steps_per_item_stack_the_same_batches(small):
    with (
        data.batches(small, "train", 8, seed=0) as one,
        data.batches(small, "train", 8, seed=0, steps_per_item=3) as three,
    ):
        singles, element = take(one, 6), take(three, 2)[1]
        assert one.get_state() == three.get_state()
        assert element["x"].shape == (3, 8, 3) and element["label"].shape == (3, 8)
        for k in range(3):
            np.testing.assert_array_equal(element["x"][k], singles[3 + k]["x"])
        position = one.get_state()
        three.set_state(position)  # the grouping may change between runs
        assert (next(three)["index"][0] == next(one)["index"]).all()


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_are_disjoint_and_add_up_to_the_single_host_stream(small, count):
    single = take(data.batches(small, "train", 8, seed=0, prefetch=0), 13)
    hosts = [
        take(data.batches(small, "train", 8, seed=0, process_index=i, process_count=count, prefetch=0), 13)
        for i in range(count)
    ]
    for step, whole in enumerate(single):
        np.testing.assert_array_equal(np.concatenate([h[step]["index"] for h in hosts]), whole["index"])
    epoch = [set(indices(h[:6])) for h in hosts]  # 48 of 52 items: within one epoch
    assert all(not a & b for a, b in itertools.combinations(epoch, 2))


def test_prefetch_to_devices(small):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = jax.sharding.PartitionSpec
    sharding = jax.sharding.NamedSharding(mesh, spec("data"))
    stacked = jax.sharding.NamedSharding(mesh, spec(None, "data"))
    plain = take(data.batches(small, "train", 8, seed=0, prefetch=0, steps_per_item=2), 2)
    for device, steps in ((jax.devices()[1], 2), (stacked, 2), (sharding, None)):
        with data.batches(small, "train", 8, seed=0, device=device, steps_per_item=steps) as stream:
            got = take(stream, 4 // (steps or 1))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
        target = {device} if isinstance(device, jax.Device) else device.device_set
        assert got[0]["x"].devices() == target
        np.testing.assert_array_equal(indices(got), indices(plain))
    assert got[0]["x"].sharding.shard_shape((8, 3)) == (2, 3)
    function = lambda element: {"x": element["x"].reshape(2, 4, 3)}  # a layout of the caller's own
    with data.batches(small, "train", 8, seed=0, device=function) as stream:
        assert next(stream)["x"].shape == (2, 4, 3)


def test_threads_end_with_close_with_the_block_and_with_the_object(small):
    before = threading.active_count()
    with data.batches(small, "train", 8, seed=0) as stream:
        next(stream)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    stream.close()  # a second time
    assert stream.get_state()["batches"] == 1
    with pytest.raises(ValueError, match="closed; make a new one"):
        next(stream)
    stream = data.batches(small, "train", 8, seed=0)
    next(stream)
    del stream
    gc.collect()
    assert threading.active_count() == before


class Failing:
    """Reads ten items, then not one more."""

    def __init__(self, value=0.0):
        self.value = value

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i >= 10 and self.value == 0:
            raise OSError(f"item {i} is gone")
        return {"x": np.full(2, self.value if i >= 10 else 0.0, np.float32)}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_thread_reach_the_caller(prefetch):
    splits = {"train": np.arange(20)}
    transform = data.DataTransform(shape=(2,))
    bad = data.Dataset("bad", {}, splits, transform, source=Failing())
    with data.batches(bad, "train", 20, seed=0, prefetch=prefetch) as stream:
        with pytest.raises(OSError, match="item 1. is gone"):
            next(stream)
    nan = data.Dataset("nan", {}, splits, transform, source=Failing(np.nan))
    with data.batches(nan, "train", 20, seed=0, prefetch=prefetch) as stream:
        with pytest.raises(data.DataError, match="field 'x' of data set 'nan' has a NaN.*first at index 1"):
            next(stream)


def test_a_state_of_something_else_is_refused(small):
    with data.batches(small, "train", 8, seed=0) as stream:
        state = stream.get_state()
        for change, message in (
            ({"seed": 1}, "its seed is 1, here it is 0"),
            ({"batch_size": 16}, "its batch_size is 16, here it is 8"),
            ({"split": "test"}, "its split is 'test', here it is 'train'"),
            ({"checksum": 1}, "its checksum is 1"),
            ({"format": 2}, "format 2; this version reads 1"),
        ):
            with pytest.raises(data.DataError, match=message):
                stream.set_state(state | change)
        assert next(stream)["x"].shape == (8, 3)  # and nothing happened


def test_bad_arguments_are_named(small):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for arguments, message in (
        (
            {"batch_size": 10, "process_count": 4},
            "batch_size 10 is not divisible by process_count 4; use for example 8",
        ),
        ({"batch_size": 12, "device": sharding}, "batch_size 12 cannot be laid out on 8 devices"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"process_count": 2, "process_index": 2}, r"process_index must be in \[0, 2\); got 2"),
        ({"steps_per_item": 0}, "steps_per_item must be at least 1"),
        ({"seed": -5}, "at least 0; got None, 0, 2, -5"),
        ({"start": -1}, "start, prefetch and seed at least 0; got None, -1, 2, 0"),
        ({"split": "all"}, "no split 'all'; it has train"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.batches(**{"dataset": small, "split": "train", "batch_size": 8, "seed": 0} | arguments)
    empty = data.Dataset("e", {"x": np.zeros((3, 1))}, {"train": np.arange(0)}, data.DataTransform(shape=(1,)))
    with pytest.raises(data.DataError, match="split 'train' of data set 'e' is empty"):
        data.batches(empty, "train", 1, seed=0)


TWO_HOSTS = """
import sys

import jax

process = int(sys.argv[1])
jax.distributed.initialize("127.0.0.1:" + sys.argv[2], num_processes=2, process_id=process, initialization_timeout=60)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax import data

digits = data.load("digits")
mesh = Mesh(np.array(jax.devices()), ("data",))
for steps, spec, axis in ((None, PartitionSpec("data"), 0), (3, PartitionSpec(None, "data"), 1)):
    with data.batches(digits, "train", 8, seed=0, steps_per_item=steps, prefetch=0) as stream:
        whole = next(stream)
    sharding = NamedSharding(mesh, spec)
    hosts = dict(process_index=process, process_count=2, device=sharding)
    with data.batches(digits, "train", 8, seed=0, steps_per_item=steps, **hosts) as stream:
        mine = next(stream)
    for field, value in mine.items():
        assert value.shape == whole[field].shape, (field, value.shape)
        assert len(value.addressable_shards) == 2
        for shard in value.addressable_shards:
            assert shard.data.shape[axis] == 2
            assert (np.asarray(shard.data) == whole[field][shard.index]).all()
print("agreed")
"""


@pytest.mark.slow
def test_two_real_hosts_make_one_global_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_HOSTS, str(i), port],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert all("agreed" in text for text in outputs)


def test_a_program_that_never_closes_ends_quietly():
    program = (
        "import jax; from diffjax import data; digits = data.load('digits')\n"
        "a = data.batches(digits, 'train', 64, seed=0, device=jax.devices()[0]); next(a)\n"
        "b = data.batches(digits, 'train', 64, seed=0); next(b)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
