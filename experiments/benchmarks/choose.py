"""How to choose a solver: every deterministic card measured on the same problems; writes the table of the README.

`python -m experiments.benchmarks.choose` measures (about two minutes) and stores choose.json beside this file;
`python tests/test_readme.py` then renders it.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from diffjax import processes, solvers
from experiments.benchmarks import convergence

STORED = pathlib.Path(__file__).parent / "choose.json"
SEEDS = (0, 1, 2, 3, 4)
PROBLEMS = {  # name -> (dimension, evaluations, guidance weight)
    "2-D": (2, (5, 10, 20, 50), 1.0),
    "8-D": (8, (10, 20), 1.0),
    "2-D, w = 4": (2, (10, 20), 4.0),
}


def cards() -> list[str]:
    """Every card that has an error against the flow, and the rule."""
    found = [n for n, c in solvers.CATALOGUE.items() if not c.noise and "nonlinear" not in c.flags]
    return [*(["recommended"] if hasattr(solvers, "recommended") else []), *found]


def label(guidance: float, component_count: int) -> np.ndarray:
    """Two classes, so that the first is a strict part of the mixture."""
    return np.arange(component_count) % 2 if guidance != 1 else np.arange(component_count)


def measure() -> dict[str, Any]:
    """`{card: {column: rms}}`: the median over seeds of the rms error, on the better of two grids."""
    process, out = processes.vp(), {name: {} for name in cards()}
    for title, (dim, budgets, guidance) in PROBLEMS.items():
        found: dict[tuple[str, int], list[list[float]]] = {}
        for seed in SEEDS:
            m = convergence.sharp_mixture(dim, 1000 + seed)
            m = m.__class__(m.log_weights, m.means, m.spectra, m.bases, label(guidance, len(m.log_weights)))
            cases = [(n, g) for n in out for g in (("log_snr", "karras") if n != "recommended" else ("log_snr",))]
            for n in budgets:
                measured = convergence.errors(cases, process, m, (n,), guidance=guidance)
                for name in out:
                    values = [measured[c][0][1] for c in cases if c[0] == name and measured[c]]
                    found.setdefault((name, n), []).append(values or [np.nan])
        for (name, n), values in found.items():
            over_seeds = np.median(np.asarray(values, float), axis=0)
            if np.isfinite(over_seeds).any():
                out[name][f"{title}, {n}"] = float(f"{np.nanmin(over_seeds):.3g}")
    return out


def markdown(found: dict[str, Any]) -> str:
    """The table, best at 20 evaluations in 2-D first."""
    columns = [f"{title}, {n}" for title, (_, budgets, _) in PROBLEMS.items() for n in budgets]
    head = ["solver", *columns]
    rank = sorted(found, key=lambda name: found[name].get("2-D, 20", np.inf))
    best = {c: min(v[c] for v in found.values() if c in v) for c in columns}
    cell = lambda v, c: "" if c not in v else f"**{v[c]:.2g}**" if v[c] == best[c] else f"{v[c]:.2g}"
    rows = [head, ["---"] * len(head)] + [[f"`{n}`", *(cell(found[n], c) for c in columns)] for n in rank]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
    report = measure()
    STORED.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(report))
