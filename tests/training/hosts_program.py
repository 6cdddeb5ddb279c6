"""One of the processes that test_hosts starts: trains, saves and goes on, and writes down what it did. Also for launchers.

Arguments: JSON of {"steps", "layouts", "save_every", "slow" (seconds a step), "per_dispatch"}, and folders of runs.
Every process writes REPORT-PROCESS.json: per layout the losses, the parameters' checksum, and the examples that it saw.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import socket
import sys
import time

import jax
import numpy as np
import toy

from diffjax import data
from diffjax.training import CheckpointStore, Layout, devices, fit, hosts

BATCH, ITEMS, SEED = 16, 40, 5


def dataset():
    """More batches than fit in an epoch, so that a position is more than a step."""
    rng = np.random.default_rng(0)
    return data.dataset.from_arrays(
        rng.normal(size=(ITEMS, toy.D)), np.arange(ITEMS) % 4, splits={"train": np.arange(ITEMS)}
    )


class Seen:
    """Batches of this process that remember the indices of what they gave."""

    def __init__(self, dtype, slow=0.0):
        self.dtype, self.slow, self.indices = dtype, slow, []
        self.stream = data.batches(
            dataset(), "train", BATCH, seed=SEED, process_index=jax.process_index(), process_count=jax.process_count()
        )
        self.get_state, self.set_state, self.close = self.stream.get_state, self.stream.set_state, self.stream.close

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.slow)
        batch = next(self.stream)
        self.indices.append(np.asarray(batch["index"]).tolist())
        return batch | {"x": np.asarray(batch["x"], self.dtype)}


def layout(name):
    """(driver, dtype): state whole on every device, or cut across all of them and so across processes."""
    cut = Layout(fsdp=jax.device_count()) if name.startswith("fsdp") else None
    return functools.partial(devices.mesh, layout=cut), np.float64 if name.endswith("64") else np.float32


def train(name, folder, steps, save_every=None, slow=0.0, per_dispatch=2, devices=None):
    """(result, what is to be reported); goes on from a checkpoint in `folder` if there is one."""
    driver, dtype = layout(name)
    with jax.enable_x64(dtype == np.float64):
        state, train_step = toy.make(dtype=dtype)
        batches = Seen(dtype, slow)
        log = pathlib.Path(folder) / f"{name}.jsonl"
        with contextlib.closing(batches), CheckpointStore(pathlib.Path(folder) / name) as store:
            result = fit(
                state, train_step, batches, steps=steps, parallel=driver, per_dispatch=per_dispatch, store=store,
                save_every=save_every, resume=bool(store.steps()), log_every=1, metrics_file=log, stream=io.StringIO(),
                devices=devices,
            )  # fmt: skip
            cut = not result.state.params["embed"].is_fully_replicated
            params = {k: np.asarray(v, np.float64).tolist() for k, v in hosts.gather(result.state.params).items()}
            saved = store.steps()
    return result, {
        "step": result.step, "examples": result.examples, "saved": saved, "cut": cut, "indices": batches.indices,
        "params": params, "exit": result.exit_code,
    }  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main(plan, *folders):
    hosts.start()
    plan, code = json.loads(plan), 0
    options = {k: plan[k] for k in ("save_every", "slow", "per_dispatch") if k in plan}
    for folder in map(pathlib.Path, folders):
        (folder / f"PID-{jax.process_index()}").write_text(str(os.getpid()))
        report = {}
        for name in plan["layouts"]:
            result, report[name] = train(name, folder, plan["steps"], **options)
            code = result.exit_code
        (folder / f"REPORT-{jax.process_index()}.json").write_text(json.dumps(report))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
