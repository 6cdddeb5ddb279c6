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
    """Memory in MiB and as ratios, for a wide DiT that is compiled only; time ratios, for a narrow one.

    `quick`: a tiny MLP in place of both.
    """
    wide, narrow = (measure.mlp(64),) * 2 if quick else (measure.dit(batch=4, width=w) for w in (256, 64))
    few, more, many = (5, 10, 40) if quick else (50, 200, 1000)
    memories = {few: MEMORY, more: MEMORY[1:], many: MEMORY[1:]}  # plain at 200 steps takes four times its memory at 50
    used = {n: {m: temporary(compiled(wide, n, m)[0]) for m in policies} for n, policies in memories.items()}
    programs = {memory: compiled(narrow, few, memory) for memory in MEMORY}
    cases = {memory: (lambda f=f, args=args: f(*args)) for memory, (f, args) in programs.items()}
    seconds = measure.interleaved(cases, 2 if quick else 5)
    report: dict[str, Any] = {}
    for memory in MEMORY:
        report[memory] = {f"MiB at {n}": round(b[memory] / 2**20, 2) for n, b in used.items() if memory in b}
        report[memory][f"plain over it at {few}"] = round(used[few]["plain"] / used[few][memory], 1)
        if memory != "plain":  # growth in states; DDIM has one state register
            growth = (used[many][memory] - used[few][memory]) / (many - few)
            report[memory]["states a step"] = round(growth / wide[2].nbytes, 3)
        report[memory][f"time at {few}"] = measure.ratio(seconds, memory, "plain")
    report["reversible"][f"gradient error at {few}"] = gradient_error(narrow, few)
    return report


if __name__ == "__main__":
    measure.record("gradient", run())
