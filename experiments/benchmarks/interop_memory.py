"""Memory while weights of another library are loaded: an autoencoder of about 1 GB, in one file and in shards.

`python -m experiments.benchmarks.interop_memory` writes the files into a temporary folder and loads each in a process of
its own. The figure is the peak of the resident memory (`VmHWM`: all pages, those of mapped files as well) over what the
process had before, divided by the bytes of the tensors; beside it the whole process, with Python and JAX, and what stays.
Limit: <= 1.2.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffjax import interop
from diffjax.interop import pretrained, rules
from experiments.benchmarks.measure import record

LIMIT = 1.2
CONFIG = dict(
    _class_name="AutoencoderKL", block_out_channels=[128, 256, 1024], layers_per_block=2,
    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
)  # fmt: skip


class Random(Mapping):
    """Random tensors, each made when it is asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return np.random.default_rng(sum(name.encode())).standard_normal(self.shapes[name], np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def load(folder: str) -> dict[str, float]:
    """What loading takes, in this process."""
    jax.block_until_ready(jax.numpy.zeros(1))
    before, start = memory("VmRSS"), time.perf_counter()
    found = interop.load_pretrained(folder)
    jax.block_until_ready(found.params)
    seconds, size = time.perf_counter() - start, sum(a.nbytes for a in jax.tree.leaves(found.params))
    gain = (memory("VmHWM") - before) / size
    stays, whole = (memory("VmRSS") - before) / size, memory("VmHWM") / size
    return {"bytes": size, "peak": gain, "stays": stays, "whole_process": whole, "seconds": seconds}


def write(folder: pathlib.Path, gigabytes: float, shard: int) -> None:
    """An autoencoder with as many blocks as make this size."""
    peer = interop.CLASSES[CONFIG["_class_name"]]
    for blocks in range(1, 100):
        config = CONFIG | {"layers_per_block": blocks}
        module = peer.network(config)
        shapes = rules.shapes_of(peer.rules(module), pretrained.template_of(peer, module, config))
        if 4 * sum(int(np.prod(s)) for s in shapes.values()) >= gigabytes * 1e9:
            break
    folder.mkdir()
    interop.write_folder(folder, Random(shapes), {"format": "pt"}, shard=shard)
    (folder / "config.json").write_text(json.dumps(config))


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--load", help="only load this folder, and print the figures")
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load)))
        return 0
    report: dict[str, Any] = {"limit": LIMIT}
    for name, shard in (("one file", 10**12), ("shards of 0.2 GB", 2 * 10**8)):
        with tempfile.TemporaryDirectory() as folder:
            write(pathlib.Path(folder) / "net", args.gigabytes, shard)
            command = [sys.executable, "-m", __spec__.name, "--load", f"{folder}/net"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        report[name] = {k: v if k == "bytes" else round(v, 3) for k, v in found.items()}
        print(name, report[name], flush=True)
    report["passes"] = all(report[name]["peak"] <= LIMIT for name in report if name != "limit")
    record("interop_memory", report)
    return 0 if report["passes"] else 1


if __name__ == "__main__":
    sys.exit(main())
