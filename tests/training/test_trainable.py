"""Training of a part of the parameters: on any devices and layout, through `fit`, and through a checkpoint."""

import functools
import io

import jax
import numpy as np
import optax
import pytest
import toy

from diffjax.training import CheckpointStore, devices, fit, init_sharded, init_state, make_train_step
from diffjax.training.layouts import Layout

CHOSEN = "^(w|embed)$"
OPTIMIZER = optax.adam(1e-2)
QUIET = {"stream": io.StringIO(), "watchdog": None}


def make(**options):
    """(state, train_step) that train w and embed, and leave b."""
    chosen = dict(emas=toy.EMAS, trainable=CHOSEN)
    step = make_train_step(toy.model, toy.loss, OPTIMIZER, **chosen, **options)
    return init_state(toy.params(), OPTIMIZER, 3, **chosen), step


@functools.cache
def alone():
    """The final state of four steps on one device, and the mean losses."""
    state, step = make()
    losses = []
    for i in range(4):
        state, metrics = jax.jit(step)(state, toy.batch(i))
        losses.append(float(metrics["loss"]))
    return state, losses


WAYS = {
    "mesh": (devices.mesh, Layout(data=8), 1),
    "mesh, accumulated": (devices.mesh, Layout(data=8), 2),
    "mesh, fsdp": (devices.mesh, Layout(data=2, fsdp=4), 1),
    "shard_map, accumulated": (devices.shard_map, Layout(data=8), 2),
    "shard_map, fsdp": (devices.shard_map, Layout(data=2, fsdp=4), 1),
    "shard_map, fsdp, accumulated": (devices.shard_map, Layout(data=2, fsdp=4), 2),
    "pmap": (devices.pmap, Layout(data=8), 1),
    "pmap, accumulated": (devices.pmap, Layout(data=8), 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_driver_gives_what_one_device_gives(way):
    parallel, layout, parts = WAYS[way]
    state, step = make(accumulate=parts)
    driver = parallel(step, devices=jax.devices(), layout=layout, per_dispatch=4)
    placed = driver.place(state)
    if "fsdp" in way:  # what is trained is cut with its moments and averages
        for tree in (placed.params, placed.opt_state[0].mu, placed.ema["wide"]):
            assert tree["embed"].addressable_shards[0].data.shape == (1, toy.D)
    after, metrics = driver.step(placed, [toy.batch(i) for i in range(4)])
    want, losses = alone()
    np.testing.assert_array_equal(after.params["b"], toy.params()["b"])
    assert after.opt_state[0].mu["b"] is None and after.ema["wide"]["b"] is None
    got = jax.device_get((after.params, after.ema, after.opt_state))
    toy.assert_close(got, (want.params, want.ema, want.opt_state), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    assert np.abs(got[0]["w"] - toy.params()["w"]).max() > 1e-2


def test_the_part_that_is_trained_is_trained_as_if_the_rest_were_constant():
    """Against a loss of w and embed alone, with b closed over."""
    rest = toy.params()["b"]
    part = {k: v for k, v in toy.params().items() if k != "b"}
    step = make_train_step(lambda p: toy.model({**p, "b": rest}), toy.loss, OPTIMIZER, emas=toy.EMAS)
    state = init_state(part, OPTIMIZER, 3, emas=toy.EMAS)
    for i in range(4):
        state, _ = jax.jit(step)(state, toy.batch(i))
    want = alone()[0]
    got = {k: v for k, v in want.params.items() if k != "b"}
    toy.assert_close((got, want.opt_state[0].nu), (state.params, state.opt_state[0].nu), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", [Layout(data=8), Layout(data=2, fsdp=4)], ids=["data", "fsdp"])
def test_fit_saves_restores_and_goes_on_bit_equal(tmp_path, layout):
    state, step = make()
    batches = toy.Batches()
    train = lambda steps, batches, **options: fit(state, step, batches, steps=steps, layout=layout, **QUIET, **options)
    whole = train(5, toy.Batches()).state
    with CheckpointStore(tmp_path) as store:
        train(3, batches, store=store)
        resumed = train(5, batches, store=store, resume=True).state
    toy.assert_equal(resumed, whole)
    np.testing.assert_array_equal(resumed.params["b"], toy.params()["b"])


def test_a_state_born_in_its_layout_has_no_moments_of_the_rest():
    _, step = make()
    driver = devices.mesh(step, devices=jax.devices(), layout=Layout(data=2, fsdp=4))
    born = init_sharded(lambda key: toy.params(), OPTIMIZER, 3, driver, emas=toy.EMAS, trainable=CHOSEN)
    assert born.opt_state[0].mu["b"] is None and born.opt_state[0].mu["embed"].shape == (4, toy.D)
    after, _ = driver.step(born, [toy.batch(0)])
    np.testing.assert_array_equal(after.params["b"], toy.params()["b"])
