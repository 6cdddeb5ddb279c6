"""`diffjax ema`: averages of any length from the snapshots of a run."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from diffjax import training
from diffjax.cli import build, config, console, evaluate
from diffjax.cli import run as runs
from diffjax.training import snapshots
from diffjax.training.ema import std_to_exp
from diffjax.training.tensors import SUFFIX

POOR = 0.1  # residual of the fit above which the profile is not the one asked for


@dataclasses.dataclass(frozen=True)
class Ema:
    """Make averages of a run's parameters of any length; sample and eval take them as --weights posthoc_0.07."""

    run: Annotated[str, tyro.conf.Positional]
    """run folder, trained with --training.ema-power"""
    sigma_rel: tuple[float, ...]
    """relative widths of the averages, in (0, 0.2886]; several to compare them"""
    step: int | None = None
    """step of a snapshot at which the averages end; default the last"""
    out: str | None = None
    """folder for the files; default RUN/ema, where --weights finds them"""
    scores: bool = False
    """score samples of each as `diffjax eval` does, and name the best"""


def name_of(sigma_rel: float, step: int | None) -> str:
    """What `--weights` calls the average."""
    return f"{runs.POSTHOC}{sigma_rel:g}" + (f"_step_{step}" if step is not None else "")


def make(
    args: Ema, items: list[snapshots.Snapshot], settings: config.Train, about: dict[str, Any]
) -> list[tuple[str, snapshots.Reconstruction]]:
    """Every average asked for, written as it is made, as `diffjax export` writes; only its figures are kept."""
    folder = pathlib.Path(args.run) / "ema" if args.out is None else pathlib.Path(args.out)
    made = []
    for sigma_rel in args.sigma_rel:
        found = snapshots.reconstruct(items, sigma_rel, step=args.step)
        name = name_of(sigma_rel, args.step)
        meta = {"config": config.to_json(settings), "model": about, "step": found.step, "weights": name}
        meta |= {"sigma_rel": sigma_rel, "residual": found.fit.residual}
        params = build.of_network(settings.objective, found.params)
        training.export_safetensors(params, folder / f"{name}{SUFFIX}", meta)
        made.append((name, found._replace(params=None)))
    return made


def table(made: list[tuple[str, snapshots.Reconstruction]], scored: dict[str, dict[str, Any]]) -> Table:
    """One row an average: the fit, its weights, and the scores if there are any."""
    out = Table()
    names = list(next(iter(scored.values()), {}))
    for column in ("weights", "residual", "sum", "sum of sizes", "largest", *names):
        out.add_column(column, justify="left" if column == "weights" else "right", no_wrap=True)
    for name, found in made:
        c = found.fit.weights
        figures = [f"{found.fit.residual:.2e}", f"{c.sum():.5f}", f"{np.abs(c).sum():.3g}", f"{np.abs(c).max():.3g}"]
        out.add_row(name, *figures, *(f"{v:.4g}" for v in scored.get(name, {}).values()))
    return out


def main(args: Ema) -> int:
    """Run the command."""
    folder = pathlib.Path(args.run)
    settings, about = runs.read(folder)
    for sigma_rel in args.sigma_rel:
        std_to_exp(sigma_rel)
    if not args.sigma_rel:
        raise ValueError("--sigma-rel needs one or more relative widths, such as 0.05")
    if args.scores and args.out is not None:
        raise ValueError("--scores reads the averages from the run folder; leave out --out, or score them with eval")
    if not settings.training.ema_power:
        raise ValueError(
            f"{folder} was trained without power-function averages, which others are made from; train with "
            "--training.ema-power 0.05 0.1"
        )
    items = snapshots.load(folder / "ema", say=console.note)
    if not items:
        raise ValueError(f"{folder / 'ema'} has no undamaged snapshot: training stopped before the first was written")
    made = make(args, items, settings, about)
    scored = {}
    if args.scores:
        build.solver(settings.sampler, build.process(settings.process))
        dataset = evaluate.load_data(settings)
        for name, _ in made:
            run = runs.load(folder, weights=name)
            found = evaluate.scores(run.denoiser, settings, dataset, space=run.space)
            scored[name] = {k: e["score"] for k, e in found["scores"].items() if k.startswith(("frechet_", "fid_"))}
    first = made[0][1]
    console.show(
        f"averages at step {first.step} from {first.snapshots} snapshots of sigma_rel {snapshots.widths(items)}"
    )
    console.show(table(made, scored))
    console.show("residual: distance of the profile from the one asked for; sum of sizes: how rounding is amplified")
    for name, found in made:
        if found.fit.residual > POOR:
            console.note(
                f"{name} is far from the average asked for (residual {found.fit.residual:.2g}): choose a sigma_rel nearer to "
                f"the stored {snapshots.widths(items)}, or more snapshots"
            )
    if scored:
        score = next(iter(scored[made[0][0]]))
        finite = [name for name in scored if math.isfinite(scored[name][score])]
        best = min(finite, key=lambda n: scored[n][score], default=None)
        console.show(f"best     {best} by {score}" if best else f"best     none: no {score} is finite")
    where = folder / "ema" if args.out is None else pathlib.Path(args.out)
    console.show(f"written  {', '.join(str(where / f'{name}{SUFFIX}') for name, _ in made)}")
    if args.out is None:
        console.show(f"use      diffjax sample {folder} --weights {made[0][0]}")
    return 0
