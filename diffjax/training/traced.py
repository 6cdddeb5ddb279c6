"""What one device's part of a training step computes, keeps and sends: read from its traced program, nothing is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import PartitionSpec

from diffjax.numerics import PyTree, batch_size
from diffjax.training import flops
from diffjax.training.cuts import Cut, Follower, local_bytes
from diffjax.training.layouts import Layout
from diffjax.training.partial import named
from diffjax.training.state import TrainState, init_state
from diffjax.training.trainable import split

REMAT = ("remat", "remat2", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Trace:
    """What does not depend on how `data` and `fsdp` share their devices."""

    train_step: Any
    parallel: str
    state: TrainState
    batch: int
    per_device: int  # bytes of the batch on one device
    kept: int  # bytes of what the backward pass reads, on one device
    copies: int  # the same of what depends on parameters alone, such as their copies in bfloat16
    again: bool  # parameters are needed once more for the backward pass: it recomputes, or loops over layers
    follower: Follower
    types: dict[str, Any]  # path of a parameter -> dtype that it is used in
    scalars: tuple[int, ...]  # bytes of each metric
    flops: int
    executed: int


def trace(train_step: Any, params: PyTree, batch: Mapping[str, Any], layout: Layout, parallel: str) -> Trace:
    """The trace of a step; see `plan.plan` for arguments and errors."""
    if parallel not in ("mesh", "shard_map"):
        raise ValueError(f"parallel must be mesh or shard_map; got {parallel!r}")
    params, batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, dict(batch)))
    if "x" not in batch:
        raise ValueError(f"batch must have the data under 'x'; got the fields {sorted(batch)}")
    size, parts = batch_size(batch), layout.data * layout.fsdp * train_step.accumulate
    if size % parts:
        near = max(parts, round(size / parts) * parts)
        raise ValueError(
            f"a batch of {size} examples cannot be shared equally by data={layout.data} x fsdp={layout.fsdp} devices x "
            f"{train_step.accumulate} accumulation parts; choose a multiple of {parts} such as {near}"
        )
    emas, optimizer = dict(train_step.emas), train_step.optimizer
    options = dict(emas=emas, trainable=getattr(train_step, "trainable", None))
    state = jax.eval_shape(lambda p: init_state(p, optimizer, 0, **options), params)
    known = specs(state.params, layout)
    if layout.model > 1 and not any("model" in spec for _, spec in known.values()):
        raise ValueError(
            f"layout has model={layout.model}, but no rule cuts a parameter along it; give rules, or model=1"
        )
    x = jax.tree.leaves(batch["x"])[0]
    if layout.sequence > 1 and (x.ndim < 3 or x.shape[1] % layout.sequence):
        raise ValueError(
            f"layout has sequence={layout.sequence}, which must divide the first axis of an item, of at least two; "
            f"got items of shape {x.shape[1:]}"
        )

    local = size // parts
    loss = flops.mean_loss(train_step)
    # Twice, for one and for two shares of the batch: what does not grow with it depends on parameters alone.
    shares = [flops.inputs(train_step, batch, n * local) for n in (1, 2)]
    programs = [jax.make_jaxpr(loss)(params, *inputs) for inputs in shares]
    forward, cuts = programs[0].jaxpr, _cuts(known, shares[0], layout)
    follower = Follower({"model": layout.model, "sequence": layout.sequence})
    follower.run(forward, cuts)
    trained = dict(named(split(params, options["trainable"])[0]))
    chosen = [i for i, (path, _) in enumerate(named(params)) if path in trained]
    lean = _gradient(programs, chosen, cuts, follower.sizes)
    rich, blocks, kept = lean, _recomputed(forward), lean.kept
    if blocks:  # the backward pass holds what one recomputed block keeps, beside what all keep
        rich = _gradient([flops.keep_all(p) for p in programs], chosen, cuts, follower.sizes)
        kept += (rich.kept - lean.kept) // blocks
    over_all = lambda work: work[0] + (work[1] - work[0]) * (parts - 1)
    return Trace(
        train_step, parallel, state, size, sum(map(size_of, jax.tree.leaves(batch))) // (layout.data * layout.fsdp), kept,
        lean.copies, blocks > 0 or _loops(forward), follower, dict(zip(known, _used(forward, len(known)), strict=True)),
        tuple(max(v.aval.dtype.itemsize, 4) for v in forward.outvars), over_all(rich.work), over_all(lean.work),
    )  # fmt: skip


def _cuts(known: dict, inputs: tuple, layout: Layout) -> list[Cut]:
    """The cuts of a loss's inputs: parameters along `model`, the data's first axis inside an item along `sequence`."""
    _, batch, _ = inputs
    cuts = [
        tuple(a if a == "model" else None for a in (*spec, *[None] * (len(n) - len(spec))))
        for n, spec in known.values()
    ]

    def field(path: str, a: Any) -> Cut:
        along = layout.sequence > 1 and path.split("/")[0] == "x" and a.ndim > 2
        return tuple("sequence" if along and i == 1 else None for i in range(a.ndim))

    return [*cuts, (), *(field(path, a) for path, a in named(batch)), (None,)]


class _Gradient(NamedTuple):
    """Of a loss: bytes on one device that its backward pass reads, and the operations for one and two shares."""

    kept: int  # of the values of examples
    copies: int  # of what depends on parameters alone
    work: list[int]


def _gradient(programs: list, chosen: list[int], cuts: list[Cut], sizes: Any) -> _Gradient:
    """Trace the gradient with respect to the chosen inputs of a loss's programs, for one and for two shares."""

    def both(program: Any) -> Any:
        fn = core.jaxpr_as_fun(program)

        def run(*args: Any) -> Any:
            def loss(*params: Any) -> Any:
                given = dict(zip(chosen, params, strict=True))
                return fn(*(given.get(i, a) for i, a in enumerate(args)))[0]

            value, backward = jax.vjp(loss, *(args[i] for i in chosen))
            return jax.tree.leaves(backward), backward(jnp.ones_like(value))

        return jax.make_jaxpr(run)(
            *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in program.jaxpr.invars)
        ).jaxpr

    one, two = map(both, programs)
    outs = Follower(sizes).run(one, cuts)
    kept, copies, seen = 0, 0, {id(v) for v in (*one.invars, *one.constvars)}
    for v, other, cut in list(zip(one.outvars, two.outvars, outs, strict=True))[: -len(chosen)]:
        if isinstance(v, core.Literal) or id(v) in seen or v.aval.memory_space == jax.memory.Space.Host:
            continue  # constants, what is there anyway, and what the host keeps
        seen.add(id(v))
        if v.aval.shape == other.aval.shape:
            copies += local_bytes(v, cut, sizes)
        else:
            kept += local_bytes(v, cut, sizes)
    return _Gradient(kept, copies, [flops.of_jaxpr(p).total for p in (one, two)])


def _recomputed(jaxpr: core.Jaxpr) -> int:
    """How many runs of `jax.checkpoint` a forward pass has."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in REMAT:
            total += 1
            continue
        inner = [getattr(p, "jaxpr", p) for p in eqn.params.values() if isinstance(p, (core.Jaxpr, core.ClosedJaxpr))]
        total += eqn.params.get("length", 1) * sum(map(_recomputed, inner))
    return total


def _loops(jaxpr: core.Jaxpr) -> bool:
    """Whether matrix products are computed inside a loop, as of a stack of layers."""
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None and flops.count_product(eqn):
            if eqn.primitive.name == "scan" or _loops(getattr(inner, "jaxpr", inner)):
                return True
    return False


def _used(jaxpr: core.Jaxpr, n: int) -> list[Any]:
    """The dtypes in which the first `n` inputs are used: a parameter is cast before it is gathered."""
    found = [v.aval.dtype for v in jaxpr.invars[:n]]
    owners = {id(v): i for i, v in enumerate(jaxpr.invars[:n])}

    def look(jaxpr: core.Jaxpr, owners: dict[int, int]) -> None:
        for eqn in jaxpr.eqns:
            mine = {k: owners[id(v)] for k, v in enumerate(eqn.invars) if id(v) in owners}
            if not mine:
                continue
            if eqn.primitive.name == "convert_element_type":
                found[mine[0]] = eqn.params["new_dtype"]
            for p in eqn.params.values():
                if isinstance(p, (core.Jaxpr, core.ClosedJaxpr)):
                    inner = getattr(p, "jaxpr", p)
                    skip = len(inner.invars) - len(eqn.invars)
                    look(inner, {id(inner.invars[k + skip]): i for k, i in mine.items() if k + skip >= 0})

    look(jaxpr, owners)
    return found


def specs(params: PyTree, layout: Layout) -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
    """Path of a parameter -> its shape and how it is cut."""
    return {path: (a.shape, layout.spec(path, a.shape)) for path, a in named(params)}


def size_of(a: Any) -> int:
    """Bytes of an array; a typed key is its words."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.eval_shape(jax.random.key_data, a)
    return math.prod(a.shape) * a.dtype.itemsize
