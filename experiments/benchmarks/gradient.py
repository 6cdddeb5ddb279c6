"""The gradient through the sampler under every memory policy: compiled temporary memory, and time against `plain`.

`reversible` runs the two-step leapfrog in the angle, the other policies DDIM; both evaluate the network once a step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import processes, solvers, times
from diffjax.sampling import MEMORY
from experiments.benchmarks import measure

PROCESS = processes.cosine()


def build(n: int, memory: str) -> Any:
    """The solver that a policy is measured with."""
    grid = times.uniform(n)
    return solvers.o_belm(PROCESS, grid, solvers.V) if memory == "reversible" else solvers.ddim(PROCESS, grid)


def compiled(network: Any, n: int, memory: str, solver: Any = None) -> Any:
    """The compiled gradient with respect to the parameters of |x_0|^2 after `n` steps, and its arguments."""
    fn, params, x = network
    solver = build(n, memory) if solver is None else solver

    def loss(params: Any, x: jax.Array) -> jax.Array:
        denoiser = diffjax.denoiser(fn, PROCESS, diffjax.from_v, params)
        return jnp.sum(diffjax.sample(jax.random.key(0), denoiser, solver, x, memory=memory) ** 2)

    return jax.jit(jax.grad(loss)).lower(params, x).compile(), (params, x)


def temporary(program: Any) -> int:
    """Bytes of temporary memory of a compiled program."""
    return program.memory_analysis().temp_size_in_bytes


def gradient_error(network: Any, n: int) -> float:
    """The relative difference of the reversible gradient from the stored one, same solver."""
    flat = []
    for memory in ("checkpoint", "reversible"):
        program, args = compiled(network, n, memory, build(n, "reversible"))
        flat.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(program(*args))]))
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


def run(quick: bool = False) -> dict[str, Any]:
    """Memory in MiB and as ratios, time ratios.   `quick`: a tiny MLP in place of the DiT."""
    network = measure.mlp(64) if quick else measure.dit(batch=4, width=64)
    few, more, many = (5, 10, 40) if quick else (50, 200, 1000)
    programs = {memory: compiled(network, few, memory) for memory in MEMORY}
    used = {memory: {few: temporary(program)} for memory, (program, _) in programs.items()}
    for n, policies in {more: MEMORY, many: MEMORY[1:]}.items():
        for memory in policies:
            used[memory][n] = temporary(compiled(network, n, memory)[0])
    cases = {memory: (lambda f=f, args=args: f(*args)) for memory, (f, args) in programs.items()}
    seconds = measure.interleaved(cases, 2 if quick else 7)
    state = network[2].nbytes
    report: dict[str, Any] = {}
    for memory in MEMORY:
        report[memory] = {f"MiB at {n}": round(b / 2**20, 2) for n, b in used[memory].items()}
        report[memory][f"plain over it at {few}"] = round(used["plain"][few] / used[memory][few], 1)
        growth = (used[memory][more] - used[memory][few]) / (more - few)
        report[memory]["states a step"] = round(growth / state, 3)  # DDIM has one state register
        report[memory][f"time at {few}"] = measure.ratio(seconds, memory, "plain")
    report["reversible"][f"gradient error at {few}"] = gradient_error(network, few)
    return report


if __name__ == "__main__":
    measure.record("gradient", run())
