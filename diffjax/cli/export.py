"""`diffjax export`: the weights of a run as one file that other libraries read."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from diffjax import networks, training
from diffjax.cli import config, console
from diffjax.cli import run as runs


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the weights of a run to one file, with all that is needed to use them."""

    run: Annotated[str, tyro.conf.Positional]
    """run folder"""
    weights: str | None = None
    """ema (the first average), ema_0.999, ..., posthoc_0.07 (see `diffjax ema`) or params; default the first average"""
    checkpoint: int | None = None
    """step to export; default the newest"""
    format: Literal["safetensors"] = "safetensors"
    """kind of file"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the numbers in the file; default as they are"""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """file to write; default RUN/export/WEIGHTS-STEP.safetensors"""


def describe(settings: config.Train, about: dict[str, Any], found: runs.Weights) -> dict[str, Any]:
    """The metadata of a file: configuration, data, step, and which average it holds."""
    source = {"config": config.to_json(settings), "model": about}
    return {**source, "step": found.step, "weights": found.name, **found.about}


def main(args: Export) -> int:
    """Run the command."""
    settings, about = runs.read(pathlib.Path(args.run))
    found = runs.weights_of(pathlib.Path(args.run), args.weights, args.checkpoint)
    default = pathlib.Path(args.run) / "export" / f"{found.name}-{found.step}.safetensors"
    path = training.export_safetensors(
        found.params, default if args.out is None else args.out, describe(settings, about, found),
        dtype=None if args.dtype is None else jnp.dtype(args.dtype),
    )  # fmt: skip
    kinds = sorted({str(a.dtype) for a in jax.tree.leaves(found.params)}) if args.dtype is None else [args.dtype]
    console.show(
        f"weights  {path}  ({found.name} of step {found.step}, {networks.parameter_count(found.params):,} parameters, "
        f"{', '.join(kinds)}, {path.stat().st_size:,} bytes)"
    )
    return 0
