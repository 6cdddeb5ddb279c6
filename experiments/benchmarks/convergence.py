"""Error against evaluations of chosen cards, as a table and a PNG: `python -m experiments.benchmarks.convergence CARD ...`.

The problem is an exact Gaussian mixture (sharp: standard deviations .2 to .35 as in solver_bar_2d.json; or smooth), the
truth its flow to 1e-12, the error the root mean square over 256 trajectories, in float64.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import diffjax
from diffjax import processes, solvers, times
from diffjax.testing import draw, flow, mixture, oracle, smooth_mixture

BUDGETS = (5, 8, 10, 15, 20, 30, 50, 100)
GRIDS = {"log_snr": times.log_snr, "karras": times.karras, "curvature": times.curvature}
PROCESSES = ("vp", "cosine", "edm", "rectified", "ve")
RESULTS = pathlib.Path(__file__).parent.parent / "results" / "benchmarks"


def sharp_mixture(dim: int = 2, seed: int = 0, components: int = 6) -> Any:
    """Components of standard deviation .2 to .35, means of about unit spread, uneven weights."""
    rng = np.random.RandomState(seed)
    weights, means = rng.dirichlet(np.full(components, 3.0)), rng.randn(components, dim)
    return mixture(weights, means, stds=rng.uniform(0.2, 0.35, components))


def build(
    name: str, process: Any, grid: str, evaluations: int, ends: tuple[float, float], guidance: float = 1.0
) -> Any | None:
    """The table of a card with as many steps as the evaluations allow, or None where none fits.

    `recommended` has a grid of its own, and is told the weight of guidance.

    Raises: ValueError: a card that is no table, or draws noise.
    """
    if name == "recommended":
        return solvers.recommended(process, evaluations, guidance=guidance, start=ends[0], stop=ends[1])
    card = solvers.CATALOGUE[name]
    if card.noise or "nonlinear" in card.flags:
        raise ValueError(f"{name} has no error against the flow: it draws noise, or is no table")
    for steps in range(evaluations, 0, -1):
        if steps * max(1, int(card.evals or 1)) > evaluations + 1:
            continue
        made = card.build(process, GRIDS[grid](process, steps, start=ends[0], stop=ends[1]))
        if made.evaluations <= evaluations:
            return made
    return None


@jax.jit
def run(denoiser: Any, stacked: Any, x: Any) -> Any:
    """The end points of many tables at once."""
    return jax.vmap(diffjax.sample, (None, None, 0, None))(jax.random.key(0), denoiser, stacked, x)


def errors(
    cases: Sequence[tuple[str, str]], process: Any, m: Any, budgets: Sequence[int] = BUDGETS, batch: int = 256,
    span: tuple[float, float] = (14.0, 0.01), guidance: float = 1.0,
) -> dict[tuple[str, str], list[tuple[int, float, float]]]:  # fmt: skip
    """`(card, grid) -> [(evaluations, rms, median)]`, all cases of one budget in one compiled call.

    Args: span: sigma / alpha at the start and at the end.   guidance: weight of classifier-free guidance towards the first
    half of the components; the truth is then a table of 2000 steps and fourth order.
    """
    out: dict[tuple[str, str], list[tuple[int, float, float]]] = {case: [] for case in cases}
    with jax.enable_x64(True):
        ends = tuple(float(process.time_of_log_snr(-np.log(r))) for r in span)
        x, _ = draw(jax.random.key(1), m, batch, process, ends[0])
        denoiser = oracle(m, process)
        if guidance == 1:
            exact = flow(m, process, x, *ends)
        else:
            denoiser = diffjax.guidance.cfg(guidance)(denoiser.bind(jax.numpy.zeros(batch, int)))
            fine = solvers.exp_ab(process, times.log_snr(process, 2000, start=ends[0], stop=ends[1]), 4, solvers.EPS)
            exact = np.asarray(run(denoiser, solvers.stack([fine]), x))[0]
        for n in budgets:
            tables = {case: build(case[0], process, case[1], n, ends, guidance) for case in cases}
            tables = {case: table for case, table in tables.items() if table is not None}
            got = run(denoiser, solvers.stack(list(tables.values())), x)
            for case, end in zip(tables, np.asarray(got), strict=True):
                gap = np.sqrt(((end - exact) ** 2).sum(-1)) / process.alpha(ends[1])
                out[case].append((tables[case].evaluations, float(np.sqrt((gap**2).mean())), float(np.median(gap))))
    return out


def plot(found: dict[tuple[str, str], list[tuple[int, float, float]]], path: pathlib.Path, title: str) -> None:
    """Two panels, rms and median, over evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, column, words in zip(figure.subplots(1, 2), (1, 2), ("rms error", "median error"), strict=True):
        for (name, grid), points in found.items():
            axes.loglog([p[0] for p in points], [p[column] for p in points], ".-", lw=1.2, label=f"{name}, {grid}")
        axes.set(xlabel="evaluations", ylabel=words)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Read the command line, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ["ddim", "heun", "dpmpp_2m", "dpmpp_3m", "exp_ab3_v", "exp_ab4_eps"]
    parser.add_argument("cards", nargs="*", default=default)
    parser.add_argument("--grid", choices=list(GRIDS), action="append", help="may be given several times")
    parser.add_argument("--process", choices=PROCESSES, default="vp")
    parser.add_argument("--dim", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the mixture")
    parser.add_argument("--smooth", action="store_true", help="standard deviations of .8 and more: orders are seen")
    parser.add_argument("--png", type=pathlib.Path, default=RESULTS / "convergence.png")
    args = parser.parse_args()
    unknown = [c for c in args.cards if c not in ("recommended", *solvers.CATALOGUE)]
    if unknown:
        parser.error(f"unknown cards {unknown}; `diffjax list solvers` shows them")
    m = smooth_mixture(args.dim) if args.smooth else sharp_mixture(args.dim, args.seed)
    cases = [(card, grid) for card in args.cards for grid in args.grid or ["log_snr"]]
    try:
        found = errors(cases, getattr(processes, args.process)(), m)
    except ValueError as e:
        parser.error(str(e))
    for (name, grid), points in found.items():
        print(f"{name:18s} {grid:10s} " + "  ".join(f"{n}: {rms:.2e}" for n, rms, _ in points))
    plot(found, args.png, f"{args.process}, {args.dim}-D {'smooth' if args.smooth else 'sharp'} mixture")
    print(args.png)


if __name__ == "__main__":
    main()
