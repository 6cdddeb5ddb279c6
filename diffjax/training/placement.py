"""A layout on real devices: the mesh, the shardings of a state, and a gradient whose messages are the fewest possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.numerics import PyTree
from diffjax.training.layouts import AXES, Layout
from diffjax.training.partial import named, path_name
from diffjax.training.state import TrainState

ROWS = ("data", "fsdp")  # the axes that share the batch
OFFLOADABLE, HOST = ("ema", "opt_state"), "pinned_host"


def grid(layout: Layout, devices: Sequence[Any]) -> Mesh:
    """The mesh of a layout. Its axes are Auto: networks from elsewhere cannot be traced with Explicit ones.

    Raises: ValueError: a layout of another size, or one that gives the same rows of a batch to several processes.
    """
    if layout.size != len(devices):
        sizes = " x ".join(f"{name}={n}" for name, n in zip(AXES, layout.shape, strict=True))
        raise ValueError(
            f"the layout {sizes} is for {layout.size} devices; got {len(devices)}. Change its sizes (layout.over(n) sets "
            "data to the rest), or give devices="
        )
    inside = layout.model * layout.sequence
    local = sum(d.process_index == jax.process_index() for d in devices)
    if jax.process_count() > 1 and local % inside:
        raise ValueError(
            f"model={layout.model} x sequence={layout.sequence} must divide the {local} devices of a process, because "
            "every process reads its own rows of the batch; use a smaller product, and fsdp for the rest"
        )
    return Mesh(np.array(devices).reshape(layout.shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(layout: Layout, mesh: Mesh | AbstractMesh, state: TrainState) -> PyTree:
    """How every leaf of a state is cut: averages and moments like the parameter whose path and shape they have.

    Other leaves of the optimizer, such as factored moments, are cut along `fsdp` alone.
    """
    known = {path: (leaf.shape, layout.spec(path, leaf.shape)) for path, leaf in named(state.params)}
    plain = dataclasses.replace(layout, rules=())

    def leaf(path: Any, a: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        for i in range(len(parts)):
            shape, spec = known.get("/".join(parts[i:]), (None, None))
            if shape == a.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, plain.spec(path_name(path), a.shape))

    return jax.tree_util.tree_map_with_path(leaf, state)


def offloaded(
    shardings: Callable[[TrainState], PyTree], mesh: Mesh, fields: tuple[str, ...]
) -> Callable[[TrainState], PyTree]:
    """`shardings` with some fields of the state in the memory of the host.

    Raises: ValueError: fields other than ema and opt_state; a backend without such memory.
    """
    if wrong := sorted(set(fields) - set(OFFLOADABLE)):
        raise ValueError(f"offload may name {' and '.join(OFFLOADABLE)}; got {', '.join(wrong)}")
    first = mesh.devices.flat[0]
    kinds = [memory.kind for memory in first.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(f"offload needs memory of the kind {HOST}; {first.device_kind} has {', '.join(kinds)}")

    def resting(state: TrainState) -> PyTree:
        moved = lambda tree: jax.tree.map(lambda s: s.with_memory_kind(HOST), tree)
        laid_out = shardings(state)
        return dataclasses.replace(laid_out, **{name: moved(getattr(laid_out, name)) for name in fields})

    return resting


def specs(layout: Layout, params: PyTree) -> PyTree:
    """The `PartitionSpec` of every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, a: layout.spec(path_name(path), a.shape), params)


def spread(layout: Layout, mesh: Mesh, gradients: Callable[..., Any]) -> Callable[..., Any]:
    """`gradients(key, params, batch, items) -> (grads, scalars)` of the whole batch, each device with its own rows.

    Cut parameters are gathered once, the gradient of the device's rows is taken, and then, once per step whatever
    happens inside, reduced: scattered along `fsdp`, summed along `data`.

        p = all_gather(p_cut);   g_cut = sum_data(reduce_scatter_fsdp(g(p, rows))) / (data fsdp)

    This is the gradient of `loss(all_gather(p_cut))`, because a reduce-scatter is the transpose of a gather. While it
    is taken a device holds parameters and gradient whole (but for the cut along `model`). `model` and `sequence` stay with
    the compiler: inside, the constraints of the network speak of these two alone.
    """
    parts = layout.data * layout.fsdp
    fully = lambda f, i, o: jax.shard_map(f, mesh=mesh, in_specs=i, out_specs=o, check_vma=False)
    # Axes of one device are manual too, so that without a cut of the network nothing is left to the compiler.
    manual = {name for name, n in zip(AXES, layout.shape, strict=True) if name in ROWS or n == 1}
    is_spec = lambda s: isinstance(s, PartitionSpec)

    def local(key: Any, params: PyTree, batch: PyTree, items: Any) -> PyTree:
        # A new leading axis: sums that are not yet taken over devices.
        return jax.tree.map(lambda a: a[None], gradients(key, params, batch, items))

    def everywhere(key: Any, params: PyTree, batch: PyTree, items: Any) -> tuple[PyTree, dict]:
        cut = specs(layout, params)
        whole = jax.tree.map(without_fsdp, cut, is_leaf=is_spec)
        if layout.fsdp > 1:
            params = fully(lambda p: jax.tree.map(_gather, p, cut), (cut,), whole)(params)
        own = jax.shard_map(
            local, mesh=mesh, axis_names=manual, check_vma=False,
            in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(ROWS), PartitionSpec(ROWS)),
            out_specs=PartitionSpec(ROWS),
        )  # fmt: skip
        grads, scalars = own(key, params, batch, items)
        # of the gradient, which lacks what is not trained
        cut = jax.tree_util.tree_map_with_path(lambda path, a: layout.spec(path_name(path), a.shape[1:]), grads)
        stacked = jax.tree.map(lambda s: PartitionSpec(ROWS, *without_fsdp(s)), cut, is_leaf=is_spec)

        def reduce(grads: PyTree, scalars: dict) -> tuple[PyTree, dict]:
            grads, scalars = jax.tree.map(lambda a: a[0] / parts, (grads, scalars))
            leaves, tree = jax.tree.flatten(grads)
            axes = [_axis(s) for s in jax.tree.leaves(cut, is_leaf=is_spec)]
            leaves = [_scatter(g, i) for g, i in zip(leaves, axes, strict=True)]
            # One message for all that is whole, one for all that was scattered.
            uncut = [g for g, i in zip(leaves, axes, strict=True) if i is None]
            rest = [g for g, i in zip(leaves, axes, strict=True) if i is not None]
            uncut, scalars = jax.lax.psum((uncut, scalars), ROWS)
            rest = jax.lax.psum(rest, "data") if layout.data > 1 else rest
            merged = [rest.pop(0) if i is not None else uncut.pop(0) for i in axes]
            return jax.tree.unflatten(tree, merged), scalars

        in_specs = (stacked, jax.tree.map(lambda _: PartitionSpec(ROWS), scalars))
        return fully(reduce, in_specs, (cut, jax.tree.map(lambda _: PartitionSpec(), scalars)))(grads, scalars)

    return everywhere


def without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    """The spec of a leaf that is gathered along `fsdp`.

    Example:
        >>> without_fsdp(PartitionSpec("fsdp", "model"))
        P(None, 'model')
    """
    return PartitionSpec(*[None if axis == "fsdp" else axis for axis in spec])


def _axis(spec: PartitionSpec) -> int | None:
    """The axis cut along `fsdp`."""
    return spec.index("fsdp") if "fsdp" in spec else None


def _gather(a: Any, spec: PartitionSpec) -> Any:
    axis = _axis(spec)
    return a if axis is None else jax.lax.all_gather(a, "fsdp", axis=axis, tiled=True)


def _scatter(a: Any, axis: int | None) -> Any:
    return a if axis is None else jax.lax.psum_scatter(a, "fsdp", scatter_dimension=axis, tiled=True)
