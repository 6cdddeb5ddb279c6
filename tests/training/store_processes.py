"""One of two processes that save, fail and restore together. Run by test_store_hosts.

Arguments: process, port, folder. Prints what every process must report alike.
"""

import json
import pathlib
import sys
import time

import jax
import numpy as np
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.training import CheckpointError, CheckpointStore, files, manifest


def main(i, port, folder):
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=i, initialization_timeout=60, heartbeat_timeout_seconds=20
    )
    folder, said, report = pathlib.Path(folder), [], {}
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    value = lambda n: {
        "w": jax.make_array_from_callback((8, 64), sharding, lambda index: np.full((8, 64), n, "f4")[index])
    }
    whole = lambda a: sorted({float(s.data.mean()) for s in a.addressable_shards})
    store = CheckpointStore(folder, say=said.append)
    for n in (1, 2):
        assert store.save(n, {"params": value(n)}) and store.wait()

    # Process 1 cannot write its part; process 0 would wait for it 20 minutes.
    open_ = tensorstore.open

    def refuse(*args, **options):
        raise OSError(28, "No space left on device")

    if i == 1:
        tensorstore.open = refuse
    start = time.monotonic()
    report["part"] = [bool(store.save(3, {"params": value(3)}) and store.wait()), store.steps()]
    report["part_fast"] = time.monotonic() - start < 60
    tensorstore.open = open_
    report["after_part"] = [bool(store.save(4, {"params": value(4)}) and store.wait()), store.steps()]

    write = manifest.write
    if i == 0:
        manifest.write = refuse
    report["manifest"] = [bool(store.save(5, {"params": value(5)}) and store.wait()), store.steps()]
    manifest.write = write
    report["after_manifest"] = [bool(store.save(6, {"params": value(6)}) and store.wait()), store.steps()]

    read = files.read
    if i == 1:
        files.read = refuse
    try:
        store.restore({"params": value(0)})
    except CheckpointError as error:
        report["read"] = "process 1" in str(error) and "no undamaged checkpoint" in str(error)
    files.read = read

    newest = folder / "6"
    if i == 0:
        victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])
    restored = store.restore({"params": value(0)})
    report["fallback"] = [restored.step, whole(restored.state["params"]["w"]), len(restored.report)]
    part = store.restore_part(value(0))
    report["part_of"] = [part.step, whole(part.tree["w"])]
    report["aside"] = [bool(store.save(6, {"params": value(7)}) and store.wait()), store.steps()]
    report["failures"] = [text.partition(f"{folder}: ")[2] for text in store.failures]
    store.close()
    report["said"] = len(said) > 0
    print("REPORT", json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
