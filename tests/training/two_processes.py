"""One of `n` processes of a run that saves, restores and goes on under two drivers, and goes back. Run by test_devices.

Arguments: process, number of processes, port, folder. Prints the sum of the weights, where the run got to, and the saves.
"""

import contextlib
import functools
import io
import json
import sys

import jax
import numpy as np
import optax
import toy

from diffjax.training import CheckpointStore, Hook, Layout, fit, init_sharded


class Part(toy.Batches):
    """The rows of each batch that belong to process `i` of `n`."""

    def __init__(self, i, n, bad=()):
        super().__init__(bad=bad)
        self.rows = slice(i * self.size // n, (i + 1) * self.size // n)

    def __next__(self):
        return {name: field[self.rows] for name, field in super().__next__().items()}


def main(i, n, port, folder):
    if n > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes=n, process_id=i, initialization_timeout=60, heartbeat_timeout_seconds=10
        )
    report = {}
    for name in ("mesh", "pmap"):
        state, train_step = toy.make()
        options = {"parallel": name, "stream": io.StringIO(), "per_dispatch": 2}
        if name == "mesh":  # no process ever holds the state whole
            init = lambda key: jax.tree.map(jax.numpy.asarray, toy.params())
            state = functools.partial(init_sharded, init, optax.adam(1e-2), 3, emas=toy.EMAS)
            options["layout"] = Layout(fsdp=jax.device_count())
        with contextlib.closing(CheckpointStore(f"{folder}/{name}")) as store:
            fit(state, train_step, Part(i, n), steps=3, store=store, **options)
            result = fit(state, train_step, Part(i, n), steps=5, store=store, resume=True, **options)
            weights = np.asarray(result.state.params["w"].addressable_shards[0].data)
            report[name] = [float(np.abs(weights).sum()), result.step, result.examples, store.steps()]
    state, train_step = toy.make()
    alone = Hook(3, lambda step, state: {"only": "here"} if i == 0 else None)  # on one process: nobody may wait for it
    with contextlib.closing(CheckpointStore(f"{folder}/rewind")) as store:
        result = fit(
            state, train_step, Part(i, n, bad=range(9, 12)), steps=24, store=store, save_every=8, hooks=[alone],
            on_bad="rewind", max_skipped=3, per_dispatch=2, stream=io.StringIO(),
        )  # fmt: skip
    weights = np.asarray(result.state.params["w"].addressable_shards[0].data)
    report["rewind"] = [float(np.abs(weights).sum()), result.step, result.examples, result.rewinds]
    print("REPORT", json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
