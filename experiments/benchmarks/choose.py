"""How to choose a solver: every deterministic card measured on the same problems; the tables of the README.

`python -m experiments.benchmarks.choose` measures the cards (about two minutes) and stores choose.json beside this file;
`python tests/test_readme.py` then renders it, and the newest results of solver_accuracy, solver_networks and solver_rule.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from diffjax import processes, solvers
from experiments.benchmarks import convergence, solver_accuracy
from experiments.benchmarks.measure import RESULTS

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


def rows_of(table: list[list[str]]) -> str:
    """A Markdown table of a head and rows."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cards_table(found: dict[str, Any]) -> str:
    """Every card, best at 20 evaluations in 2-D first."""
    columns = [f"{title}, {n}" for title, (_, budgets, _) in PROBLEMS.items() for n in budgets]
    rank = sorted(found, key=lambda name: found[name].get("2-D, 20", np.inf))
    best = {c: min(v[c] for v in found.values() if c in v) for c in columns}
    cell = lambda v, c: "" if c not in v else f"**{v[c]:.2g}**" if v[c] == best[c] else f"{v[c]:.2g}"
    return rows_of([["solver", *columns], *([f"`{n}`", *(cell(found[n], c) for c in columns)] for n in rank)])


def newest(benchmark: str, **fields: Any) -> dict[str, Any]:
    """The last stored report of a benchmark whose fields have these values."""
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return [r for r in lines if r["benchmark"] == benchmark and all(r.get(k) == v for k, v in fields.items())][-1]


def accuracy_table() -> str:
    """`recommended` over the best peer: the stored mixture, then figures of many problems by dimension."""
    report = newest("solver_accuracy")
    pair = lambda v, scale=1.0: " / ".join(f"{scale * a:.3g}" for a in v)
    rows = [["limits", "rms / median", *(pair(v) for v in solver_accuracy.LIMITS.values())]]
    rows.append(["stored mixture", "rms / median", *(pair(v) for v in report["bar over the best peer"])])
    shown = (
        ("middle", "middle problem, rms / median", 1.0),
        ("worst", "worst problem, rms / median", 1.0),
        ("within", "% of problems within the limits, rms / median", 100.0),
        ("within without flips", "the same where no item flips, rms: problems / of", 1.0),
        ("pooled", "pooled rms", 1.0),
        ("flips", "% of items that flip", 100.0),
    )
    for d, found in report["dimensions"].items():
        for key, words, scale in shown:
            rows.append([f"{d}-D" if key == "middle" else "", words, *(pair(v, scale) for v in found[key])])
    return rows_of([["problems", "", *map(str, report["evaluations"])], *rows])


def networks_table() -> str:
    """rms distance to a fine trajectory: `recommended`, and the best of the others."""
    rows, head = [], []
    for network, words in (("run", "digits U-Net"), ("plane", "2-D MLP")):
        report = newest("solver_networks", network=network)
        head = ["network", "", *map(str, report["evaluations"])]
        for weight in (1, 3):
            found = {k: np.array(v)[:, 0] for k, v in report[f"guidance {weight} [rms, median]"].items()}
            mine = found.pop("recommended")
            best = np.argmin(list(found.values()), axis=0)
            names = [list(found)[i] for i in best]
            rows.append([f"{words}, w = {weight}", "recommended", *(f"{v:.2g}" for v in mine)])
            other = [f"{found[n][i]:.2g} ({n.split()[0]})" for i, n in enumerate(names)]
            rows.append(["", "best other", *other])
    return rows_of([head, *rows])


def rule_tables() -> str:
    """The rule's formal orders, its dependence on `data_std`, and what strong guidance does to high orders."""
    report = newest("solver_rule")
    numbers = lambda table: [[k, *(f"{v:g}" for v in row)] for k, row in table.items()]
    orders = ", ".join(f"{k} {v:g}" for k, v in report["formal_orders"].items())
    return f"""\
Formal order, slope from 80 to 160 steps on the smooth mixture, by (predictor, corrector) nodes: {orders}.
The first-order first step limits it to 3, with small constants.

rms error on the stored mixture, whose deviation is about 1, with `data_std` off by a factor: too small costs less than too large.

{rows_of([["data_std", "10", "20", "50"], *numbers(report["data_std"])])}
rms error by nodes under guidance (median of five 2-D mixtures): high orders are unstable where it is strong and steps are few.

{rows_of([["nodes", "8", "20"], *numbers(report["strong_guidance"])])}"""


def markdown() -> str:
    """The tables of the README's solver page."""
    report = newest("solver_accuracy")
    return f"""\
Root mean square error of every deterministic solver on sharp Gaussian mixtures (median of {len(SEEDS)} problems, linear VP from
sigma / alpha = 14 to .01, the better of the log-SNR and Karras grids; columns: dimension, guidance weight w, evaluations):

{cards_table(json.loads(STORED.read_text(encoding="utf-8")))}
Error of `recommended` over the best peer's, of all samplers and grids of k-diffusion, diffusers and azula, measured with their
own code on every problem: 128 choices on the stored mixture, and the 77 of them that come near the best on {report["problems"]} new
mixtures in each dimension, of {report["batch"]} items (experiments/peers/solver_bars.py). Pooled: over all items of all problems,
against the one peer that is best on all. An item flips where it ends in another mode than its exact trajectory, and one that
does is the rms of its problem:

{accuracy_table()}
Trained networks: rms distance to a trajectory of 1000 steps from the same start:

{networks_table()}
{rule_tables()}"""


if __name__ == "__main__":
    report = measure()
    STORED.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown())
