"""The gradient through the sampler under every memory policy: compiled temporary memory, and time against `plain`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import diffjax
from diffjax import processes, solvers, times
from diffjax.sampling import MEMORY
from experiments.benchmarks import measure

PROCESS = processes.cosine()


def compiled(network: Any, n: int, memory: str) -> Any:
    """The compiled gradient with respect to the parameters of |x_0|^2 after `n` steps of DDIM, and its arguments."""
    fn, params, x = network
    solver = solvers.ddim(PROCESS, times.uniform(n))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        denoiser = diffjax.denoiser(fn, PROCESS, diffjax.from_v, params)
        return jnp.sum(diffjax.sample(jax.random.key(0), denoiser, solver, x, memory=memory) ** 2)

    return jax.jit(jax.grad(loss)).lower(params, x).compile(), (params, x)


def run(quick: bool = False) -> dict[str, Any]:
    """MiB and time ratios.   `quick`: a tiny MLP in place of the DiT."""
    network = measure.mlp(64) if quick else measure.dit(batch=4, width=64)
    report: dict[str, Any] = {}
    for n in (5, 10) if quick else (50, 200):
        programs = {memory: compiled(network, n, memory) for memory in MEMORY}
        for memory, (program, _) in programs.items():
            mib = program.memory_analysis().temp_size_in_bytes / 2**20
            report.setdefault(memory, {})[f"MiB at {n}"] = round(mib, 2)
        cases = {memory: (lambda f=f, args=args: f(*args)) for memory, (f, args) in programs.items()}
        seconds = measure.interleaved(cases, 2 if quick else 5)
        for memory in MEMORY:
            report[memory][f"time at {n}"] = measure.ratio(seconds, memory, "plain")
    return report


if __name__ == "__main__":
    measure.record("gradient", run())
