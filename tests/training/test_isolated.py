"""Runs side by side: no collectives in the program, and each is what it would be alone, in this process or another."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import toy

from diffjax.training import devices, fit_isolated, init_state, isolated

COLLECTIVE = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(-start)?\("
RUNS, STEPS = 8, 5


def start(k, optimizer=None):
    """State of run k: its own parameters and key."""
    params = jax.tree.map(lambda a: a * np.float32(1 + 0.1 * k), toy.params())
    return init_state(params, optimizer or optax.adam(1e-2), k, emas=toy.EMAS)


def data(k):
    """The batches of run k."""
    batches = toy.Batches()
    batches.i = 100 * k
    return batches


def alone(k):
    """Run k as its own training on one device."""
    driver = devices.mesh(toy.make()[1], devices=jax.devices()[:1], per_dispatch=STEPS)
    source = data(k)
    return driver.step(driver.place(start(k)), [next(source) for _ in range(STEPS)])


@pytest.fixture(scope="module")
def together():
    """Eight runs on eight devices."""
    return fit_isolated([start(k) for k in range(RUNS)], toy.make()[1], [data(k) for k in range(RUNS)], steps=STEPS,
                        per_dispatch=3)  # fmt: skip


def test_the_program_has_no_collectives():
    program = isolated(toy.make()[1], RUNS, per_dispatch=2)
    assert program.mesh.devices.size == RUNS
    state = program.place([start(k) for k in range(RUNS)])
    assert state.params["w"].addressable_shards[3].data.shape == (1, toy.D, toy.D)
    text = program.lower(state, [toy.batch(k) for k in range(RUNS)]).compile().as_text()
    assert re.findall(COLLECTIVE, text) == []
    shared = devices.mesh(toy.make()[1])  # the count sees them where they are
    text = shared.lower(shared.place(start(0)), toy.batch(0)).compile().as_text()
    assert re.findall(COLLECTIVE, text) != []


def test_each_run_is_what_it_would_be_alone(together):
    states, metrics = together
    for k in (0, 3, 7):
        state, expected = alone(k)
        toy.assert_equal(states[k].key, state.key)
        assert int(states[k].step) == STEPS
        toy.assert_equal(
            (states[k].params, states[k].ema, states[k].opt_state), (state.params, state.ema, state.opt_state)
        )
        np.testing.assert_array_equal(metrics[k]["loss"], expected["loss"])
    assert len({float(m["loss"][-1]) for m in metrics}) == RUNS


def test_the_devices_do_not_matter(together):
    two = fit_isolated([start(k) for k in range(RUNS)], toy.make()[1], [data(k) for k in range(RUNS)], steps=STEPS,
                       devices=jax.devices()[:2], per_dispatch=3)  # fmt: skip
    for a, b in zip(two[0], together[0], strict=True):
        toy.assert_equal(a, b)


def test_what_happens_to_one_run_does_not_reach_the_others(together):
    sources = [data(k) for k in range(RUNS)]
    sources[2].bad = range(200, 300)  # NaN in every batch of run 2
    states, metrics = fit_isolated([start(k) for k in range(RUNS)], toy.make()[1], sources, steps=STEPS, per_dispatch=3)
    assert int(states[2].skipped["total"]) == STEPS and np.isnan(metrics[2]["loss"]).all()
    for k in range(RUNS):
        if k != 2:
            toy.assert_equal(states[k], together[0][k])


def test_separate_processes_are_a_sequential_run():
    here = [alone(k)[0] for k in (1, 2)]
    for k, state in zip((1, 2), here, strict=True):
        child = subprocess.Popen(
            [sys.executable, __file__, str(k)], stdout=subprocess.PIPE, text=True, start_new_session=True,
            cwd=pathlib.Path(__file__).parent,
            env={**toy.clean_environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        try:
            out, _ = child.communicate(timeout=300)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        assert child.returncode == 0
        found = json.loads(out.splitlines()[-1])
        assert found == [a.tobytes().hex() for a in toy.leaves(state)]


def test_bad_arguments():
    step = toy.make()[1]
    with pytest.raises(ValueError, match="3 runs cannot be shared equally by 2 devices"):
        isolated(step, 3, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="runs must be at least 1"):
        isolated(step, 0)
    program = isolated(step, 2)
    with pytest.raises(ValueError, match="place takes 2 states of one architecture; got 1"):
        program.place([start(0)])
    with pytest.raises(ValueError, match="of 2 different shapes"):
        program.place([start(0), start(1, optax.sgd(0.1))])
    with pytest.raises(ValueError, match="every step needs 2 batches, one per run"):
        program.put([[toy.batch(0)]])
    with pytest.raises(ValueError, match="1 to 1 steps"):
        program.put([[toy.batch(0)] * 2] * 2)
    with pytest.raises(ValueError, match="every state needs an iterator"):
        fit_isolated([start(0)], step, [], steps=1)


if __name__ == "__main__":
    print(json.dumps([a.tobytes().hex() for a in toy.leaves(alone(int(sys.argv[1]))[0])]))
