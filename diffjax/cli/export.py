"""`diffjax export`: the weights of a run as one file that other libraries read."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from diffjax import adapters, networks, training
from diffjax.cli import build, config, console
from diffjax.cli import run as runs


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the weights of a run, or its adapter, to one file, with all that is needed to use them."""

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
    if settings.adapter.kind != "none":
        return adapter(args, settings, found)
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


def adapter(args: Export, settings: config.Train, found: runs.Weights) -> int:
    """Write the adapter of a run, without the network that it stands beside."""
    if args.dtype is not None:
        raise ValueError(f"an adapter is written in the numbers it was trained in; leave out --dtype {args.dtype}")
    ((name, made),) = build.adapters(settings.adapter).items()
    default = pathlib.Path(args.run) / "export" / f"adapter-{found.name}-{found.step}.safetensors"
    own, base = found.params["adapters"][name], found.params["base"]
    about = {"config": config.to_json(settings), "step": found.step, "weights": found.name}
    path = default if args.out is None else pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path = adapters.save_adapter(path, made, own, base, about)
    console.show(
        f"adapter  {path}  ({settings.adapter.kind}, {found.name} of step {found.step}, {networks.parameter_count(own):,} "
        f"parameters, {path.stat().st_size:,} bytes)"
    )
    return 0
