"""`diffjax export`: the weights of a run as one file that other libraries read."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from diffjax import networks, training
from diffjax.cli import build, config, console
from diffjax.cli import run as runs
from diffjax.training import ema


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the weights of a run to one file, with all that is needed to use them."""

    run: Annotated[str, tyro.conf.Positional]
    """run folder"""
    weights: str | None = None
    """ema (the first average), ema_0.999, ... or params; default the first average"""
    checkpoint: int | None = None
    """step to export; default the newest"""
    format: Literal["safetensors"] = "safetensors"
    """kind of file"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the numbers in the file; default as they are"""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """file to write; default RUN/export/WEIGHTS-STEP.safetensors"""


def describe(settings: config.Train, about: dict[str, Any], found: training.Part, weights: str) -> dict[str, Any]:
    """The metadata of a file: configuration, data, step, and which average it holds."""
    average = found.page.get("ema", {}).get(weights)
    width = {} if (average or {}).get("kind") != "power" else {"sigma_rel": f"{ema.exp_to_std(average['gamma']):.6g}"}
    return {
        "config": config.to_json(settings), "model": about, "step": found.step, "weights": weights,
        **({} if average is None else {"average": average}), **width,
    }  # fmt: skip


def main(args: Export) -> int:
    """Run the command."""
    settings, about = runs.read(pathlib.Path(args.run))
    weights, found = runs.weights_of(pathlib.Path(args.run), args.weights, args.checkpoint)
    found = found._replace(tree=build.of_network(settings.objective, found.tree))
    default = pathlib.Path(args.run) / "export" / f"{weights}-{found.step}.safetensors"
    path = training.export_safetensors(
        found.tree, default if args.out is None else args.out, describe(settings, about, found, weights),
        dtype=None if args.dtype is None else jnp.dtype(args.dtype),
    )  # fmt: skip
    kinds = sorted({str(a.dtype) for a in jax.tree.leaves(found.tree)}) if args.dtype is None else [args.dtype]
    console.show(
        f"weights  {path}  ({weights} of step {found.step}, {networks.parameter_count(found.tree):,} parameters, "
        f"{', '.join(kinds)}, {path.stat().st_size:,} bytes)"
    )
    return 0
