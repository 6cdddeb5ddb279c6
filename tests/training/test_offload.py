"""Averages and moments in the memory of the host between calls: the same numbers, from start to checkpoint."""

import functools
import io

import jax
import pytest
import toy

from diffjax.training import CheckpointStore, Layout, devices, fit

FIELDS = ("ema", "opt_state")


def kinds(tree):
    return {a.sharding.memory_kind for a in jax.tree.leaves(tree)}


@pytest.mark.parametrize("layout", [None, Layout(data=2, fsdp=4)], ids=["copies", "fsdp"])
def test_the_numbers_are_the_same_and_the_state_rests_with_the_host(layout):
    state, train_step = toy.make()
    out = []
    for offload in ((), FIELDS):
        driver = devices.mesh(train_step, layout=layout, per_dispatch=2, offload=offload)
        placed = driver.place(state)
        for i in range(0, 6, 2):
            placed, metrics = driver.step(placed, [toy.batch(i), toy.batch(i + 1)])
        out.append((placed, metrics))
    toy.assert_equal(out[1], out[0])
    after = out[1][0]
    assert kinds((after.ema, after.opt_state)) == {"pinned_host"} and kinds(after.params) == {"device"}


def test_a_run_is_saved_and_resumed(tmp_path):
    state, train_step = toy.make()
    options = {"parallel": functools.partial(devices.mesh, offload=FIELDS), "stream": io.StringIO(), "per_dispatch": 2}
    with CheckpointStore(tmp_path) as store:
        fit(state, train_step, toy.Batches(), steps=4, store=store, **options)
        resumed = fit(state, train_step, toy.Batches(), steps=8, store=store, resume=True, **options).state
    assert kinds(resumed.opt_state) == {"pinned_host"}
    options["parallel"] = "mesh"
    toy.assert_equal(resumed, fit(state, train_step, toy.Batches(), steps=8, **options).state)


def test_other_fields_are_refused():
    with pytest.raises(ValueError, match="offload may name ema and opt_state; got params"):
        devices.mesh(toy.make()[1], offload=("params",))
