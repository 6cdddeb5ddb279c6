"""`diffjax plan`: what a training step needs on many devices, without them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.table import Table

from diffjax import training
from diffjax.cli import build, check, config, console, evaluate, latents
from diffjax.cli import model as models
from diffjax.cli import run as runs
from diffjax.training import flops
from diffjax.training import plan as plans
from diffjax.training.layouts import AXES, Layout


@dataclasses.dataclass(frozen=True)
class Plan:
    """Print the memory, the messages and the operations of one training step on many devices, without them.

    Options of `diffjax train` change the configuration: --training.layout.fsdp 8 --training.batch-size 4096 --model.remat
    full.
    """

    what: Annotated[str, tyro.conf.Positional]
    """a config.json, a run folder, or a data set as for train"""
    devices: int
    """how many; what --training.layout.fsdp, .model and .sequence leave over are copies (data)"""
    shape: tuple[int, ...] | None = None
    """shape of an item, so that no data are read: --shape 32 32 4"""
    classes: int | None = None
    """number of labels, with --shape"""
    kind: str | None = None
    """device, as "TPU v5p" or "H100": its memory and its peak"""
    memory: float | None = None
    """GiB of memory of a device; default that of --kind"""
    utilisation: float | None = None
    """share of the peak of --kind that is reached, for an estimate of the time of a step"""
    json: bool = False
    """print JSON"""


def settings_of(what: str) -> config.Train:
    """The configuration in a file or a run folder, or the preset of a data set.   Raises: ValueError: no such file."""
    path = pathlib.Path(what)
    if path.exists() or path.suffix == ".json":
        return runs.read_config(path)
    return config.preset(what)


def item(args: Plan, settings: config.Train) -> tuple[tuple[int, ...], int | None]:
    """The shape of an item and the number of labels: as given, of the run folder, or of the data set."""
    if args.shape is not None:
        check.number("shape", args.shape, (lambda s: 1 <= len(s) <= 4 and min(s) >= 1, "one to four numbers"))
        check.number("classes", args.classes, check.COUNT)
        return args.shape, args.classes
    if args.classes is not None:
        raise ValueError("--classes goes with --shape; without it both come from the data set")
    folder = pathlib.Path(args.what)
    if folder.is_dir():
        about = runs.read(folder)[1]
        return tuple(about["shape"]), about["num_classes"]
    try:
        dataset = evaluate.load_data(settings)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{error}. Without the data, give the shape of an item: --shape 32 32 3 --classes 10"
        ) from None
    shape = build.shape_of(dataset)
    return shape if settings.latent is None else latents.shape_of(settings, shape), dataset.num_classes


def make(args: Plan, settings: config.Train) -> plans.Plan:
    """The plan.   Raises: ValueError: sizes that do not fit each other."""
    check.number("devices", args.devices, check.COUNT)
    check.number("memory", args.memory, check.POSITIVE)
    check.number("utilisation", args.utilisation, (lambda v: 0 < v <= 1, "in (0, 1]"))
    known = None if args.kind is None else flops.device(args.kind)
    if args.kind is not None and known is None:
        raise ValueError(f"--kind {args.kind!r} is not known; there are {', '.join(flops.DEVICES)}. Or give --memory")
    if args.utilisation is not None and known is None:
        raise ValueError("--utilisation needs the peak of a device; give --kind")
    limit = args.memory * 2**30 if args.memory is not None else known and known[1]
    return of(settings, *item(args, settings), args.devices, limit)


def of(
    settings: config.Train, shape: tuple[int, ...], classes: int | None, devices: int, limit: float | int | None
) -> plans.Plan:
    """The plan of a run's step for items of a shape.   Raises: ValueError: sizes that do not fit each other."""
    check.numbers(settings, devices)
    t = settings.training
    net = models.network(settings.model, shape, classes, build.vector_size(t))
    layout = build.layout(t, net, devices) or Layout(data=devices)
    params = training.layouts.check(layout, runs.initialiser(settings, shape, classes), jax.random.key(0))
    parallel = "mesh" if t.parallel == "mesh" else "shard_map"  # which with copies alone sends what pmap does
    step = build.train_step(settings, shape, classes)
    return plans.plan(step, params, batch_of(t, shape, classes), layout, limit=limit, parallel=parallel)


def batch_of(t: config.Training, shape: tuple[int, ...], classes: int | None) -> dict[str, Any]:
    """The shapes of a batch over all devices."""
    batch = {"x": jax.ShapeDtypeStruct((t.batch_size, *shape), np.float32)}
    return batch | {
        name: jax.ShapeDtypeStruct((t.batch_size,), np.int32) for name in ("index", *["label"] * bool(classes))
    }


def seconds(args: Plan, plan: plans.Plan) -> float | None:
    """The estimated time of a step, if a share of the peak is given."""
    return None if args.utilisation is None else plan.seconds(flops.peak(args.kind), args.utilisation)


def as_json(args: Plan, plan: plans.Plan) -> dict[str, Any]:
    """The plan as plain data: bytes, operations, seconds."""
    sizes = lambda layout: None if layout is None else dict(zip(AXES, layout.shape, strict=True))
    return {
        "layout": sizes(plan.layout),
        "batch": plan.batch,
        "parameters": plan.parameters,
        "bytes_per_device": {**plan.memory, "total": plan.total},
        "memory": plan.limit,
        "fits": plan.fits,
        "fitting": sizes(plan.fitting),
        "collectives": [dataclasses.asdict(c) for c in plan.collectives],
        "flops": {"model": plan.flops, "executed": plan.executed, "executed_per_device": plan.per_device},
        "estimated_seconds": seconds(args, plan),
    }


def tables(plan: plans.Plan) -> list[Table]:
    """The memory and the messages."""
    memory = Table(title="memory of a device")
    memory.add_column("what")
    memory.add_column("size", justify="right")
    for name, size in [*plan.memory.items(), ("total", plan.total)]:
        if size:
            memory.add_row(name, plans.amount(size))
    sent = Table(title="messages of a step, on a device")
    for column, justify in (("kind", "left"), ("axes", "left"), ("of", "left"), ("arrays", "right"), ("size", "right")):
        sent.add_column(column, justify=justify)
    for c in plan.collectives:
        sent.add_row(c.kind, " ".join(c.axes), c.what, str(c.count), plans.amount(c.bytes))
    return [memory, *([sent] if plan.collectives else [])]


def main(args: Plan, settings: config.Train) -> int:
    """Run the command."""
    plan = make(args, settings)
    if args.json:
        console.show(json.dumps(as_json(args, plan), indent=2))
        return 0
    sizes = " x ".join(f"{name} {n}" for name, n in zip(AXES, plan.layout.shape, strict=True))
    console.show(f"{settings.model.network} with {plan.parameters:,} parameters, batches of {plan.batch}")
    console.show(f"{plan.layout.size} devices: {sizes}")
    for table in tables(plan):
        console.show("")
        console.show(table)
    again = f", {plans.work(plan.executed)} with what is recomputed" if plan.executed != plan.flops else ""
    console.show(f"\noperations of a step: {plans.work(plan.flops)}{again}; {plans.work(plan.per_device)} on a device")
    if (time := seconds(args, plan)) is not None:
        console.show(
            f"estimate, without communication: {time:.3g} s a step at {args.utilisation:.0%} of {args.kind}'s peak"
        )
    if plan.fits is not None:
        console.show(f"{'fits' if plan.fits else 'does not fit'} in {plans.amount(plan.limit)}")
    if plan.fits is False:
        console.show(plans.advice(plan))
    return 0
