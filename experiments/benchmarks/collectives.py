"""Collectives of one training step under every driver, and of a sampler whose batch is cut over eight devices.

Compiled in processes of their own: eight CPU devices and the compiler's default flags. One all-reduce of the gradient's
bytes and a few scalars is expected of a step that only shares the batch, a gather of the parameters and a scatter of the
gradient of one with FSDP (see tests/training/test_messages.py for each layout), nothing of the sampler.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
SOLVERS = ("dpmpp_2m", "edm_heun")  # several registers; noise


def child(*command: str) -> dict[str, Any]:
    """The JSON that a Python program prints last, run with default flags on eight CPU devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def count(program: str) -> int:
    """How many collectives a compiled program holds."""
    return len(re.findall(rf" (?:{KINDS})(?:-start)?\(", program))


def sampler() -> dict[str, int]:
    """Collectives of `sample` with its batch cut over all devices: by solver, of a guided model, and of an all-reduce."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import diffjax
    from diffjax import guidance, networks, processes, solvers, times

    mesh = Mesh(np.array(jax.devices()), ("data",))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    process = processes.cosine()
    x = jnp.zeros((64, 2))
    label = jnp.zeros(64, jnp.int32)
    module = networks.MLP(width=16, depth=1, num_classes=3)
    params = networks.random_parameters(module, x, jnp.zeros(64), label)
    network = diffjax.denoiser(networks.from_linen(module), process, diffjax.from_v, params, null=3)
    grid = times.log_snr(process, 6, start=0.98, stop=0.01)

    def program(solver: Any, denoiser: Any) -> str:
        # the batch is cut, everything else is whole on every device
        run = jax.jit(
            lambda key, d, s, x, y: diffjax.sample(key, d.bind(y), s, x),
            in_shardings=(whole, whole, whole, cut, cut), out_shardings=cut,
        )  # fmt: skip
        return run.lower(jax.random.key(0), denoiser, solver, x, label).compile().as_text()

    tables = {name: solvers.CATALOGUE[name].build(process, grid) for name in SOLVERS}
    report = {name: count(program(table, network)) for name, table in tables.items()}
    report["dpmpp_2m with guidance"] = count(program(tables["dpmpp_2m"], guidance.cfg(2.0)(network)))
    total = jax.jit(lambda x: x.sum(), in_shardings=cut, out_shardings=whole)  # what the count must not miss
    report["a sum, to compare"] = count(total.lower(x).compile().as_text())
    return report


def run(quick: bool = False) -> dict[str, Any]:
    """Collectives of the sampler and, unless `quick`, of the training step."""
    report = {"sampler": child("-m", "experiments.benchmarks.collectives", "sampler")}
    if not quick:
        report["train_step"] = child("tests/training/collectives.py", "layouts")
    return report


if __name__ == "__main__":
    if sys.argv[1:] == ["sampler"]:
        print(json.dumps(sampler()))
    else:
        from experiments.benchmarks import measure

        measure.record("collectives", run())
