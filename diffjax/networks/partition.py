"""How a network is cut over devices, told by names: `constrain` for activations, `partition_rules` for parameters.

A network names the axes of its activations; what the names mean is decided by the mesh of the program that is being
traced. Where there is no mesh, or only one device along an axis, nothing is added to the program.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

# name of an axis of an activation -> the mesh axes along which it is cut
MEANING = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),  # those of the state
    "some_tokens": ("sequence",),  # in a block, which may be given others: whole where the mesh does not divide them
    "heads": ("model",),
    "wide": ("model",),
    "experts": ("model",),
}
Rules = tuple[tuple[str, PartitionSpec], ...]

COLUMN, ROW = PartitionSpec("model"), PartitionSpec("model", None)  # of the last axis; of the last but one
# Tensor parallelism in pairs: the first layer is cut by outputs, the second by inputs, and the sum of the second over
# devices is the only message. The heads of attention are contiguous columns of q, k and v (see `attention.per_head`).
ATTENTION: Rules = (
    (r"(attention|cross)/(qkv|q_in|kv)/(kernel|bias)$", COLUMN),
    (r"(attention|cross)/out/kernel$", ROW),
)
CODE: Rules = ((r"code(_\d+)?/time/hidden/(kernel|bias)$", COLUMN), (r"code(_\d+)?/time/out/kernel$", ROW))
FILM: Rules = ((r"film/(kernel|bias)$", COLUMN),)  # the modulation itself is small, and gathered
BLOCK: Rules = ((r"block(s|_\d+)/hidden/(kernel|bias)$", COLUMN), (r"block(s|_\d+)/out/kernel$", ROW))
GATE: Rules = ((r"block(s|_\d+)/gate/(kernel|bias)$", COLUMN),)  # multiplied with what `hidden` of BLOCK gives
EXPERTS: Rules = (  # whole experts on each device
    (r"experts/(gate|up|down)/kernel$", PartitionSpec("model", None, None)),
    (r"experts/shared_(gate|up)/kernel$", COLUMN),
    (r"experts/shared_down/kernel$", ROW),
)
RESIDUAL: Rules = (
    (r"conv_in/(kernel|bias)$", COLUMN),
    (r"_\d+/norm_out/(scale|bias)$", COLUMN),
    (r"conv_out/kernel$", ROW),
)


def constrain(x: Any, *names: str | None | EllipsisType) -> Any:
    """`x`, laid out on the mesh of the program that is being traced; `x` itself where there is none.   y = x

    Args: x: array.   names: of its axes, each a key of `MEANING` or None for an axis that is whole; `...` stands for
        as many None as there are axes left.
    Returns: an array equal to x.
    Raises: ValueError: names that do not fit the axes; an axis that the mesh does not divide. A batch that it does not
        divide, such as one item inside `vmap`, is left as it is, and `some_tokens` are whole.

    Example:
        >>> constrain(jax.numpy.ones((4, 8)), "batch", ..., "wide").shape
        (4, 8)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if ... in names:
        i = names.index(...)
        names = (*names[:i], *[None] * (x.ndim - len(names) + 1), *names[i + 1 :])
    if len(names) != x.ndim:
        raise ValueError(f"constrain needs a name or None for each of the {x.ndim} axes of x; got {names}")
    automatic = {a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto}
    parts: list[Any] = []
    for name, n in zip(names, x.shape, strict=True):
        axes = tuple(a for a in MEANING[name] if a in automatic and mesh.shape[a] > 1) if name is not None else ()
        count = 1
        for a in axes:
            count *= mesh.shape[a]
        if n % count and name == "batch":
            parts.append(PartitionSpec.UNCONSTRAINED)
            continue
        if n % count and name == "some_tokens":
            parts.append(None)
            continue
        if n % count:
            raise ValueError(
                f"{n} {name} cannot be cut into {count} parts ({axes[0]}={count}); choose a layout with {axes[0]} a "
                f"divisor of {n}, or another size of the network"
            )
        parts.append((axes if len(axes) > 1 else axes[0]) if axes else None)
    cut = any(p is not None and p is not PartitionSpec.UNCONSTRAINED for p in parts)
    others = any(mesh.shape[a] > 1 for a in automatic)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts)) if cut or others else x
