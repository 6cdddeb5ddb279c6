"""One of two processes that share the parameters of a run with snapshots. Run by test_posthoc.

Arguments: process, port, folder. Prints the parts of a reconstruction that lie here, and what was tracked directly.
"""

import functools
import io
import sys

import jax
import numpy as np
import toy
from two_processes import Part

from diffjax.training import abstract, devices, ema, fit, snapshots
from diffjax.training.layouts import Layout


def main(i, port, folder):
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=i, initialization_timeout=60, heartbeat_timeout_seconds=10
    )
    stored = {"power_0.05": ema.power(0.05), "power_0.1": ema.power(0.1)}
    state, train_step = toy.make(emas=stored | {"direct": ema.power(0.07)})
    cut = functools.partial(devices.mesh, layout=Layout(fsdp=2))  # the table of labels lies half here, half there
    hook = snapshots.hook(folder, 5, stored)
    end = fit(state, train_step, Part(i, 2), steps=60, hooks=[hook], parallel=cut, stream=io.StringIO()).state
    like = abstract(end, cut(train_step).shardings(end)).params
    made = snapshots.reconstruct(folder, 0.07, like=like).params
    here = lambda tree: np.asarray(tree["embed"].addressable_shards[0].data)
    assert made["embed"].sharding == end.params["embed"].sharding and here(made).shape == (2, 3)
    np.testing.assert_allclose(here(made), here(end.ema["direct"]), rtol=2e-3)
    print("REPORT", float(np.abs(here(made)).sum()), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
