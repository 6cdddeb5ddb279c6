"""Saving does not wait for the disk: measured on 100 MB, while steps that donate the state go on."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.training import CheckpointStore, manifest

PARTS, SHAPE = 25, (1024, 1024)  # 105 MB


def test_steps_go_on_while_a_state_of_100_megabytes_is_written(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    first = {str(i): rng.standard_normal(SHAPE, np.float32) for i in range(PARTS)}
    state = jax.device_put(first)
    bump = jax.jit(lambda s: jax.tree.map(lambda a: a * 1.5 + 1, s), donate_argnums=0)
    jax.block_until_ready(bump(jax.device_put(first)))
    written, write = [], manifest.write
    monkeypatch.setattr(manifest, "write", lambda *args: (write(*args), written.append(time.perf_counter())))
    with CheckpointStore(tmp_path, keep_latest=1) as store:
        store.save(0, {"small": jnp.zeros(1)})  # imports, and opens the folder
        store.wait()
        written.clear()
        began = time.perf_counter()
        assert store.save(1, state)
        returned = time.perf_counter()
        open_at_return = not written and store.steps() == [0]
        steps = 0
        while not written and steps < 1000:
            donated, state = state["0"], jax.block_until_ready(bump(state))
            steps += not written
        assert store.wait() and store.steps() == [1]
        restored = store.restore(first)
    assert open_at_return and steps >= 2, (returned - began, written[0] - began, steps)
    assert donated.is_deleted()  # steps really take the buffers; the first could not, the save still reads them
    for name, a in first.items():
        np.testing.assert_array_equal(restored.state[name], a)
    print(
        f"save returned after {returned - began:.2f} s, files complete after {written[0] - began:.2f} s, {steps} steps between"
    )
