"""What a training step will need on many devices, worked out from shapes alone: no device and no large array is touched.

State and gradients are exact for a layout. Activations are the values that the gradient's backward pass reads, for one
device's part of the batch; compilers keep some of them in other forms, so this is an estimate. Collectives are those that
the layout cannot do without; where the compiler joins or moves them, their number differs and their bytes do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from diffjax.numerics import PyTree
from diffjax.training import placement
from diffjax.training.layouts import AXES, Layout, shards
from diffjax.training.placement import without_fsdp
from diffjax.training.state import count_params
from diffjax.training.traced import Trace, named, size_of, specs, trace
from diffjax.training.trainable import split

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Messages of one kind in a step: `bytes` are those of the result on one device, all messages together.

    For a reduce-scatter they are the bytes of its operand. `count` is the number of arrays; compilers join some.
    """

    kind: str
    axes: tuple[str, ...]
    what: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of one training step; sizes in bytes on one device, operations per step. Made by `plan`."""

    layout: Layout
    batch: int
    accumulate: int
    parameters: int
    memory: dict[str, int]  # parameters, averages, optimiser, gradients, activations, batch
    collectives: tuple[Collective, ...]
    flops: int  # of the model's loss and gradient, over all devices
    executed: int  # with what is recomputed, over all devices
    per_device: int  # of `executed`, on one device
    limit: int | None = None  # bytes of memory of one device
    fitting: Layout | None = None  # of the same devices, the least cut that fits the limit

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether the device's memory holds all of it; None where its size is not known."""
        return None if self.limit is None else self.total <= self.limit

    def seconds(self, peak: int | float, utilisation: int | float) -> float:
        """An estimate of the time of a step: that of its operations at a share of the peak, without communication.

        Args: peak: FLOP/s of a device.   utilisation: in (0, 1], the share that is reached.
        Raises: ValueError: a share out of range.
        """
        if not 0 < utilisation <= 1:
            raise ValueError(f"utilisation must be in (0, 1], a share of the peak; got {utilisation}")
        return self.flops / (self.layout.size * peak * utilisation)


def plan(
    train_step: Any,
    params: PyTree,
    batch: Mapping[str, Any],
    layout: Layout,
    *,
    parallel: str = "mesh",
    limit: int | float | None = None,
) -> Plan:
    """The needs of `train_step` on a layout.

    Args:
        train_step: from `make_train_step`.
        params: the parameters, arrays or `ShapeDtypeStruct`s.
        batch: the batch of one step over all devices, arrays or `ShapeDtypeStruct`s.
        layout: sizes of the mesh axes and the network's rules; `data` and `fsdp` share the batch.
        parallel: `mesh`, where the compiler gathers parameters layer by layer, and once more for the backward pass if
            that recomputes or loops over layers, or `shard_map`, which gathers and holds them, and reduces the gradient,
            whole and once.
        limit: bytes of memory of one device.

    Raises: ValueError: a batch that the layout does not divide; a `model` axis that no rule uses; a `sequence` axis that
        does not divide the second axis of the data.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from diffjax import training
        >>> loss = lambda key, f, x0, cond, items=None: (((f(x0) - x0) ** 2).mean(-1), {})
        >>> step = training.make_train_step(lambda w: lambda x: jnp.dot(x, w), loss, optax.adam(1e-3))
        >>> shape = lambda *n: jax.ShapeDtypeStruct(n, "float32")
        >>> p = plan(step, shape(64, 64), {"x": shape(32, 64)}, Layout(data=2, fsdp=4))
        >>> p.parameters, p.memory["parameters"], p.memory["optimiser"], [c.kind for c in p.collectives]
        (4096, 4096, 8196, ['all-gather', 'reduce-scatter', 'all-reduce', 'all-reduce'])
    """
    traced = trace(train_step, params, batch, layout, parallel)
    made = _plan(traced, layout, limit)
    return dataclasses.replace(made, fitting=_fitting(traced, layout, limit)) if made.fits is False else made


def advice(plan: Plan) -> str:
    """One paragraph on what to change when the memory of a device does not hold a step.

    Example:
        >>> p = Plan(Layout(data=8), 64, 1, 10, {"parameters": 40, "activations": 80}, (), 0, 0, 0, limit=100)
        >>> print(advice(p))
        A device needs about 120 B, of which activations 80 B, and has 100 B. ...
    """
    memory = plan.memory
    largest = max(memory, key=memory.get)
    has = "" if plan.limit is None else f", and has {amount(plan.limit)}"
    text = [f"A device needs about {amount(plan.total)}, of which {largest} {amount(memory[largest])}{has}."]
    local = plan.batch // (plan.layout.data * plan.layout.fsdp * plan.accumulate)
    if plan.fits:
        return " ".join([*text, "It should fit; another program may hold part of the memory."])
    if plan.fitting is not None:
        text.append(f"fsdp={plan.fitting.fsdp} with data={plan.fitting.data} would fit.")
    elif largest != "activations" and plan.layout.data > 1:
        text.append(f"Cut the state: fsdp up to {plan.layout.data * plan.layout.fsdp} on these devices.")
    if plan.fitting is None:
        if local > 1:
            text.append(f"Each device computes {local} examples at once: raise accumulate, or lower the batch size.")
        text.append("Recompute activations (remat), compute in bfloat16, use more devices, or a smaller network.")
    return " ".join(text)


def amount(size: int | float) -> str:
    """Bytes for people.

    Example:
        >>> amount(96), amount(3 * 2**20), amount(2.5 * 2**30)
        ('96 B', '3.00 MiB', '2.50 GiB')
    """
    unit = next((u for u in ("GiB", "MiB", "KiB") if size >= UNITS[u]), None)
    return f"{size / UNITS[unit]:.2f} {unit}" if unit else f"{size} B"


def work(operations: int | float) -> str:
    """Operations for people.

    Example:
        >>> work(3.2e15), work(5e7)
        ('3,200.00 TFLOP', '50.00 MFLOP')
    """
    size, unit = next(
        (n, u) for n, u in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")) if operations >= 0.1 * n or n == 1e6
    )
    return f"{operations / size:,.2f} {unit}"


# ------------------------------------------------------------------------------------------------------------ layout


def _plan(t: Trace, layout: Layout, limit: int | float | None) -> Plan:
    """The plan of a traced step on a layout."""
    state, step = t.state, t.train_step
    cut = placement.shardings(layout, AbstractMesh(layout.shape, AXES), state)
    sizes = jax.tree.map(lambda a, s: _local(a, s.spec, layout), state, cut)
    size = lambda tree: sum(jax.tree.leaves(tree))
    parameters = size(sizes.params)
    entire = jax.tree.map(lambda a, s: _local(a, without_fsdp(s.spec), layout), state.params, cut.params)
    learned, _ = split(entire if t.parallel == "shard_map" else sizes.params, step.trainable)
    once = layout.fsdp > 1 and (t.parallel == "shard_map" or not t.again)
    memory = {
        "parameters": parameters,
        "averages": size(sizes.ema),
        "optimiser": size(sizes.opt_state),
        "gathered parameters": size(entire) if once else 0,
        # While parts of a batch are added up, there is the sum and the gradient of a part.
        "gradients": size(learned) * (1 + (step.accumulate > 1)),
        "activations": t.kept + (t.copies if once else t.copies // layout.fsdp),
        "batch and counters": t.per_device + size((sizes.step, sizes.key, sizes.skipped)),
    }
    parts = layout.data * layout.fsdp
    share = t.follower.local / t.follower.whole if t.follower.whole else 1.0
    return Plan(
        layout, t.batch, step.accumulate, count_params(state.params), memory, _collectives(t, layout), t.flops,
        t.executed, round(t.executed / parts * share), None if limit is None else int(limit),
    )  # fmt: skip


def _collectives(t: Trace, layout: Layout) -> tuple[Collective, ...]:
    """What the devices send each other in a step."""
    found: list[Collective] = []
    parts = t.train_step.accumulate
    # The compiler gathers where parameters are used and reduces each part's gradient; `shard_map` does both once.
    gathers, reduces = (1, 1) if t.parallel == "shard_map" else (parts * (1 + t.again), parts)
    known = specs(t.state.params, layout)
    leaves = [(a, known[path][1], t.types[path]) for path, a in named(t.state.params)]
    cut = [(a, spec, used) for a, spec, used in leaves if "fsdp" in spec]
    learned = [(a, known[path][1]) for path, a in named(split(t.state.params, t.train_step.trainable)[0])]
    scattered = [(a, spec) for a, spec in learned if "fsdp" in spec]
    if cut:
        entire = [_local(a, without_fsdp(spec), layout) for a, spec, _ in cut]
        used = [a.dtype if t.parallel == "shard_map" else used for a, _, used in cut]
        gathered = sum(n * u.itemsize // a.dtype.itemsize for n, u, (a, _, _) in zip(entire, used, cut, strict=True))
        found.append(Collective("all-gather", ("fsdp",), "parameters", gathers * len(cut), gathers * gathered))
    if scattered:
        sent = sum(_local(a, without_fsdp(spec), layout) for a, spec in scattered)
        found.append(Collective("reduce-scatter", ("fsdp",), "gradients", reduces * len(scattered), reduces * sent))
    for axes, group in (
        (("data", "sequence"), [_local(a, spec, layout) for a, spec in scattered]),
        (("data", "fsdp", "sequence"), [_local(a, spec, layout) for a, spec in learned if "fsdp" not in spec]),
    ):
        axes = tuple(axis for axis in axes if getattr(layout, axis) > 1)
        if axes and group:
            found.append(Collective("all-reduce", axes, "gradients", reduces * len(group), reduces * sum(group)))
    for (kind, axis), (count, size) in sorted(t.follower.sent.items()):
        found.append(Collective(kind, (axis,), "activations", parts * count, parts * size))
    axes = tuple(axis for axis in ("data", "fsdp") if getattr(layout, axis) > 1)
    if axes:
        found.append(Collective("all-reduce", axes, "metrics", len(t.scalars), sum(t.scalars)))
    return tuple(found)


def _fitting(t: Trace, layout: Layout, limit: int | float) -> Layout | None:
    """The layout with the least `fsdp` of the same devices that fits."""
    parts = layout.data * layout.fsdp
    for fsdp in (n for n in range(1, parts + 1) if parts % n == 0):
        tried = dataclasses.replace(layout, data=parts // fsdp, fsdp=fsdp)
        if _plan(t, tried, limit).fits:
            return tried
    return None


def _local(a: Any, spec: PartitionSpec, layout: Layout) -> int:
    """Bytes of a leaf on one device."""
    return size_of(a) // shards(spec, layout)
