"""How one training step meets many devices: `mesh` (jit and shardings), `shard_map` or `pmap`, with equal numerics.

A `Driver` runs up to `per_dispatch` steps per call with one compilation: a loop with a dynamic number of rounds over a
stack of batches, so that a run gives the same numbers wherever it is cut into calls.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.training import placement
from diffjax.training.layouts import AXES, Layout
from diffjax.training.state import TrainState, count_params, place

# Parameters x examples below which several steps per call pay: less host work, and faster code on a CPU.
DISPATCH_WORK = 2e8
MAX_PER_DISPATCH = 16
Step = Callable[..., tuple[TrainState, dict]]


@dataclasses.dataclass(frozen=True)
class Driver:
    """A training step on a set of devices. `step` donates its state: the one passed in may not be used again."""

    name: str
    devices: int  # parts that the global batch is cut into
    per_dispatch: int
    shardings: Callable[[TrainState], PyTree]  # state -> tree of shardings
    put: Callable[[PyTree], PyTree]  # stacked host batches [K, B, ...] -> device
    call: Callable[[TrainState, PyTree, Any], tuple[TrainState, dict]]
    accumulate: int = 1

    def place(self, state: TrainState) -> TrainState:
        """A copy of `state` on the devices of this driver."""
        return place(state, self.shardings(state))

    def step(self, state: TrainState, batches: Sequence[Mapping[str, Any]]) -> tuple[TrainState, dict]:
        """Run `len(batches) <= per_dispatch` steps; the state is donated.

        Returns: the state and metrics [per_dispatch], of which the first `len(batches)` are real.
        Raises: ValueError: too many batches, batches of different shapes, or a size that the devices do not divide.
        """
        if not 1 <= len(batches) <= self.per_dispatch:
            raise ValueError(f"batches must hold 1 to {self.per_dispatch} batches (per_dispatch); got {len(batches)}")
        for batch in batches:
            check_batch(batch, self.devices, self.accumulate)
        padded = [*batches, *[batches[-1]] * (self.per_dispatch - len(batches))]
        return self.call(state, self.put(jax.tree.map(_stack, *map(dict, padded))), np.int32(len(batches)))

    def lower(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
        """The lowered program, to inspect its collectives."""
        stacked = self.put(jax.tree.map(_stack, *[dict(batch)] * self.per_dispatch))
        return self.call.lower(state, stacked, np.int32(1))


def check_batch(batch: Mapping[str, Any], devices: int, accumulate: int = 1) -> int:
    """The batch size, if `devices` devices can share it in `accumulate` parts.

    Raises: ValueError: no field `x`, leading axes that differ, or an indivisible size.

    Example:
        >>> check_batch({"x": np.ones((16, 2))}, 8)
        16
    """
    if not isinstance(batch, Mapping) or "x" not in batch:
        raise ValueError(f"a batch must be a dict with the data under 'x'; got {_outline(batch)}")
    size = nu.batch_size(dict(batch))
    processes = jax.process_count()
    if size * processes % (devices * accumulate):
        parts = f"{devices} devices" + (f" x {accumulate} accumulation parts" if accumulate > 1 else "")
        unit = devices * accumulate
        near = max(unit, round(size * processes / unit) * unit)
        raise ValueError(
            f"a batch of {size * processes} examples cannot be shared equally by {parts}; "
            f"choose a multiple of {unit} such as {near}, or fewer devices"
        )
    return size


def steps_per_dispatch(params: PyTree, batch_size: int) -> int:
    """How many steps to run per call: 16 where starting a program dominates, 1 where the work does; a power of two.

    A fixed rule rather than a measurement, so that a run does not depend on how busy the machine is.

    Example:
        >>> steps_per_dispatch({"w": np.ones(1000)}, 32), steps_per_dispatch({"w": np.ones(10**7)}, 64)
        (16, 1)
    """
    work = max(count_params(params) * batch_size, 1)
    return int(2 ** min(max(math.floor(math.log2(DISPATCH_WORK / work)), 0), int(math.log2(MAX_PER_DISPATCH))))


def mesh(
    train_step: Step,
    *,
    devices: Sequence[Any] | None = None,
    per_dispatch: int = 1,
    layout: Layout | None = None,
    offload: Sequence[str] = (),
) -> Driver:
    """`jit` over the mesh of a layout; the compiler places the collectives. The default driver.

    The loss sees the whole batch, cut along `data` and `fsdp`. Parameters cut along `fsdp` are gathered where they are
    used, layer by layer. A gradient is reduced where the compiler finds it complete: with `accumulate` once per part,
    where `shard_map` reduces it once, because a value carried through a loop cannot stay a sum that is not yet taken.

    Args:
        train_step: from `make_train_step`.
        devices: default all.
        per_dispatch: most steps per call.
        layout: sizes of the mesh axes and rules for the parameters; default all devices on `data`.
        offload: fields of the state, of `ema` and `opt_state`, that lie in the memory of the host between calls. They
            travel to the devices and back in every call, so it pays with large models and several steps per call.

    Raises: ValueError: a layout that does not use every device, rules that do not fit the state, or a backend that has
        no memory of the host.
    """
    layout, grid, shardings, put = _laid_out(devices, layout)
    resting = placement.offloaded(shardings, grid, tuple(offload)) if offload else shardings

    def gradients(f: Callable) -> Callable:
        # Told here how a gradient is cut, the compiler need not reduce more of it than each device keeps.
        def pinned(key: Any, params: PyTree, *rest: Any) -> tuple[PyTree, dict]:
            grads, scalars = f(key, params, *rest)
            cut = jax.tree.map(
                lambda s: NamedSharding(grid, s), placement.specs(layout, grads),
                is_leaf=lambda s: isinstance(s, PartitionSpec),
            )  # fmt: skip
            return jax.lax.with_sharding_constraint(grads, cut), scalars

        return pinned

    def run(state: TrainState, batches: PyTree, n: Any) -> tuple[TrainState, dict]:
        state = jax.device_put(state, shardings(state)) if offload else state
        with jax.sharding.use_abstract_mesh(grid.abstract_mesh):  # what `constrain` in a network speaks of
            new, metrics = _many(_pin(train_step, shardings), per_dispatch, state, batches, n, spread=gradients)
        return jax.device_put(new, resting(new)) if offload else new, metrics

    return Driver(
        "mesh", layout.data * layout.fsdp, per_dispatch, resting, put,
        jax.jit(run, donate_argnums=0), getattr(train_step, "accumulate", 1),
    )  # fmt: skip


def shard_map(
    train_step: Step, *, devices: Sequence[Any] | None = None, per_dispatch: int = 1, layout: Layout | None = None
) -> Driver:
    """`jax.shard_map` over the batch: a loss sees its device's rows alone, and the gradient is reduced once per step.

    With `fsdp > 1` the state is cut, all parameters are gathered once and every gradient is scattered: the fewest bytes
    on any backend (see `placement.spread`). The update is computed on the cut state as a whole, so that whatever an
    optimizer does, such as clipping by the global norm, is right.

    Args and Raises: as `mesh`.
    """
    layout, grid, shardings, put = _laid_out(devices, layout)
    gradients = lambda f: placement.spread(layout, grid, f)
    shares = layout.data * layout.fsdp

    def run(state: TrainState, batches: PyTree, n: Any) -> tuple[TrainState, dict]:
        return _many(_pin(train_step, shardings), per_dispatch, state, batches, n, spread=gradients, shares=shares)

    return Driver(
        "shard_map", shares, per_dispatch, shardings, put,
        jax.jit(run, donate_argnums=0), getattr(train_step, "accumulate", 1),
    )  # fmt: skip


def pmap(
    train_step: Step, *, devices: Sequence[Any] | None = None, per_dispatch: int = 1, layout: Layout | None = None
) -> Driver:
    """`jax.pmap`, the classic per-device idiom: batches are `[K, devices, B / devices, ...]`, every device has the state.

    Raises: ValueError: a layout that cuts the state or the network.
    """
    devices = list(devices or jax.devices())
    if layout is not None and (layout.data != layout.size or layout.size != len(devices)):
        raise ValueError(
            f"pmap keeps the whole state on each of its {len(devices)} devices, and takes no layout but data={len(devices)}; "
            f"got {dict(zip(AXES, layout.shape, strict=True))}. Use mesh or shard_map"
        )
    grid = Mesh(np.array(devices), ("data",))
    local = sum(d.process_index == jax.process_index() for d in devices)

    def run(state: TrainState, batches: PyTree, n: Any) -> tuple[TrainState, dict]:
        size = jax.tree.leaves(batches)[0].shape[1]

        def mean(f: Callable) -> Callable:
            def gradients(key: Any, params: PyTree, batch: PyTree, items: Any) -> tuple[PyTree, dict]:
                return jax.lax.pmean(f(key, params, batch, jax.lax.axis_index("data") * size + items), "data")

            return gradients

        noise = {"shares": len(devices), "total": len(devices) * size}
        return _many(train_step, per_dispatch, state, batches, n, spread=mean, **noise)

    call = jax.pmap(
        run, axis_name="data", in_axes=(None, 1, None), out_axes=None, donate_argnums=0, devices=devices,
    )  # fmt: skip

    def call_everywhere(state: TrainState, batches: PyTree, n: Any) -> tuple[TrainState, dict]:
        # Across processes pmap returns arrays of this process alone; the state stays one array of all of them.
        state, metrics = call(state, batches, n)
        return jax.tree.map(lambda a: _as_global(a, NamedSharding(grid, PartitionSpec())), state), metrics

    def put(batches: PyTree) -> PyTree:
        return jax.tree.map(lambda a: a.reshape(a.shape[0], local, a.shape[1] // local, *a.shape[2:]), batches)

    return Driver(
        "pmap", len(devices), per_dispatch, lambda state: _replicated(state, grid), put,
        call if jax.process_count() == 1 else call_everywhere,
        getattr(train_step, "accumulate", 1),
    )  # fmt: skip


PARALLEL = {"mesh": mesh, "shard_map": shard_map, "pmap": pmap}


def driver(parallel: str | Callable[..., Driver], train_step: Step, **options: Any) -> Driver:
    """The driver of that name, or made by that function (such as `functools.partial(mesh, layout=Layout(fsdp=8))`).

    Raises: ValueError: unknown name.
    """
    if isinstance(parallel, str):
        if parallel not in PARALLEL:
            raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}; got {parallel!r}")
        parallel = PARALLEL[parallel]
    return parallel(train_step, **options)


def _many(step: Step, k: int, state: TrainState, batches: PyTree, n: Any, **options: Any) -> tuple:
    """`n <= k` steps over stacked batches; metrics [k]."""
    if k == 1:
        state, metrics = step(state, jax.tree.map(lambda a: a[0], batches), **options)
        return state, jax.tree.map(lambda m: m[None], metrics)

    # Traced once, by jit's cache: for the shapes of the metrics and for the body.
    one = jax.jit(lambda state, batch: step(state, batch, **options))
    _, shapes = jax.eval_shape(one, state, jax.tree.map(lambda a: a[0], batches))

    def body(i: Any, carry: tuple) -> tuple:
        state, kept = carry
        state, metrics = one(state, jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), batches))
        return state, jax.tree.map(lambda buffer, m: buffer.at[i].set(m), kept, metrics)

    return jax.lax.fori_loop(0, n, body, (state, jax.tree.map(lambda s: jnp.zeros((k, *s.shape), s.dtype), shapes)))


def _laid_out(devices: Sequence[Any] | None, layout: Layout | None) -> tuple[Layout, Mesh, Callable, Callable]:
    """The layout, its mesh, the shardings of a state, and the function that puts stacked batches on the devices."""
    devices = list(devices or jax.devices())
    layout = layout or Layout(data=len(devices))
    grid = placement.grid(layout, devices)
    rows = NamedSharding(grid, PartitionSpec(None, placement.ROWS))
    shardings = lambda state: placement.shardings(layout, grid, state)
    return layout, grid, shardings, lambda batches: _global(batches, rows)


def _pin(step: Step, shardings: Callable[[TrainState], PyTree]) -> Step:
    """`step`, whose new state is laid out as the old one."""

    def pinned(state: TrainState, batch: PyTree, **options: Any) -> tuple[TrainState, dict]:
        new, metrics = step(state, batch, **options)
        return jax.lax.with_sharding_constraint(new, shardings(state)), metrics

    return pinned


def _replicated(state: TrainState, grid: Mesh) -> PyTree:
    """Every leaf whole on every device."""
    return jax.tree.map(lambda _: NamedSharding(grid, PartitionSpec()), state)


def _as_global(a: Any, sharding: NamedSharding) -> Any:
    """The replicated array whose copies on this process's devices are those of `a`."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_as_global(jax.random.key_data(a), sharding), impl=jax.random.key_impl(a))
    return jax.make_array_from_single_device_arrays(a.shape, sharding, [s.data for s in a.addressable_shards])


def _global(batches: PyTree, sharding: NamedSharding) -> PyTree:
    """This process's rows as part of the global batch."""
    if jax.process_count() == 1:
        return jax.device_put(batches, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batches)


def _stack(*leaves: Any) -> Any:
    """Batches side by side, on the device if they are there already."""
    if len(leaves) == 1:
        return leaves[0][None]
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


def _outline(batch: Any) -> str:
    return f"the fields {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
