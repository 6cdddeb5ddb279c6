"""What `recommended` depends on: its formal orders, the scale of the data, strong guidance.

`python -m experiments.benchmarks.solver_rule` takes some seconds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import guidance, processes, solvers, testing, times
from experiments.benchmarks import convergence, measure, solver_accuracy

NODES = ((1, 2), (2, 3), (3, 4), (4, 5), (5, 5))
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
WEIGHTS = (3.0, 7.5)


def formal_orders() -> dict[str, float]:
    """The slope from 80 to 160 steps on the smooth mixture, for (predictor, corrector) nodes."""
    process = processes.cosine()
    grid = lambda n: times.log_snr(process, n, start=0.9, stop=0.1)
    slope = lambda o: testing.measured_order(lambda p, g: solvers.angle_abm(p, g, *o), process, grid)[0]
    return {str(o): round(slope(o), 2) for o in NODES}


def data_scales(counts: tuple[int, ...] = (10, 20, 50)) -> dict[str, list[float]]:
    """rms error on the stored mixture, whose deviation is about 1, with `data_std` off by a factor."""
    with jax.enable_x64(True):
        process = solver_accuracy.PROCESS
        m, x, _ = solver_accuracy.bar()
        exact = testing.flow(m, process, x, 1.0, 0.0)
        tables = [solvers.recommended(process, n, data_std=c) for c in SCALES for n in counts]
        end = solver_accuracy.RUN(jax.random.key(0), testing.oracle(m, process), solvers.stack(tables), jnp.asarray(x))
        rms = np.sqrt(((np.asarray(end) - exact) ** 2).sum(-1).mean(-1)).reshape(len(SCALES), -1)
    return {f"{c:g}": [float(f"{v:.2g}") for v in row] for c, row in zip(SCALES, rms, strict=True)}


def strong_guidance(counts: tuple[int, ...] = (8, 20), seeds: int = 5) -> dict[str, list[float]]:
    """The median over mixtures of the rms error by (predictor, corrector) nodes, guided towards half of the components."""
    process, out = processes.vp(), {}
    with jax.enable_x64(True):
        ends = [float(process.time_of_log_snr(-np.log(r))) for r in (14.0, 0.01)]
        fine = solvers.exp_ab(process, times.log_snr(process, 2000, start=ends[0], stop=ends[1]), 4, solvers.EPS)
        grids = [solvers.recommended(process, n, guidance=3.0, start=ends[0], stop=ends[1]).grid for n in counts]
        tables = solvers.stack([solvers.angle_abm(process, g, *o) for o in NODES for g in grids])
        for weight in WEIGHTS:
            found = []
            for seed in range(seeds):
                m = convergence.sharp_mixture(2, 2000 + seed)
                m = m.__class__(m.log_weights, m.means, m.spectra, m.bases, np.arange(len(m.log_weights)) % 2)
                x, _ = testing.draw(jax.random.key(1), m, 128, process, ends[0])
                guided = guidance.cfg(weight)(testing.oracle(m, process)).bind(jnp.zeros(128, int))
                exact = convergence.run(guided, solvers.stack([fine]), x)[0]
                end = convergence.run(guided, tables, x)
                found.append(np.sqrt(((end - exact[None]) ** 2).sum(-1).mean(-1)).reshape(len(NODES), -1))
            for o, row in zip(NODES, np.median(found, axis=0), strict=True):
                out[f"{o} at w = {weight:g}"] = [float(f"{v:.2g}") for v in row]
    return out


def run() -> dict[str, Any]:
    """All three."""
    return {"formal_orders": formal_orders(), "data_std": data_scales(), "strong_guidance": strong_guidance()}


if __name__ == "__main__":
    measure.record("solver_rule", run())
