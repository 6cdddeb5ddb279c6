"""Layouts: how the axes of a mesh cut a training state, from sizes and rules alone, without devices.

A `Layout` gives the sizes of the mesh axes. A leaf is cut along `model` by the rules of its network, then along `fsdp`
on the longest axis that divides, the last one of several because the first is often one of layers; what no axis divides
is whole everywhere. The same rules serve parameters, averages and moments, whose paths end alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from diffjax.numerics import PyTree
from diffjax.training import patterns
from diffjax.training.partial import named

AXES = ("data", "fsdp", "model", "sequence")
Rules = Sequence[tuple[str, PartitionSpec]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, and the rules by which leaves are cut.

    Args: data: copies of the model that share the batch.   fsdp: parts of every parameter, which share the batch too.
        model: parts of the network's wide axes (tensor parallel).   sequence: parts of the sequence of tokens.
        rules: `(pattern, spec)` pairs; the first pattern found in a leaf's path (`re.search` on `a/b/c`) gives the spec
        of its last axes, so that a stack of layers needs no rules of its own.
    Raises: ValueError: a size below 1; a pattern that is no regular expression.

    Example:
        >>> layout = Layout(fsdp=4, model=2, rules=(("hidden/kernel$", PartitionSpec(None, "model")),))
        >>> layout.size, layout.spec("params/block_0/hidden/kernel", (64, 256))
        (8, P('fsdp', 'model'))
        >>> layout.spec("params/block_0/hidden/bias", (256,)), layout.spec("step", ())
        (P('fsdp',), P())
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1
    sequence: int = 1
    rules: Rules = ()

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise ValueError(f"layout axis {name} must be at least 1; got {getattr(self, name)}")
        patterns.checked("rules", *(text for text, _ in self.rules))

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return tuple(getattr(self, name) for name in AXES)

    def over(self, devices: int) -> Layout:
        """This layout with `data` set to what the other axes leave of `devices`.

        Raises: ValueError: they do not divide it.

        Example:
            >>> Layout(fsdp=4).over(8).shape
            (2, 4, 1, 1)
        """
        inside = self.size // self.data
        if devices % inside:
            sizes = " x ".join(f"{name}={getattr(self, name)}" for name in AXES[1:])
            raise ValueError(
                f"{sizes} needs a multiple of {inside} devices; got {devices}. Choose sizes whose product divides {devices}"
            )
        return dataclasses.replace(self, data=devices // inside)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How the leaf of that path and shape is cut.

        Raises: ValueError: a rule that names an unknown axis, has more axes than the leaf, or does not divide it.
        """
        parts = self._ruled(path, shape)
        free = [i for i, n in enumerate(shape) if parts[i] is None and n % self.fsdp == 0 and n >= self.fsdp]
        if self.fsdp > 1 and free and "fsdp" not in parts:
            parts[max(free, key=lambda i: (shape[i], i))] = "fsdp"
        while parts and parts[-1] is None:
            parts.pop()
        return PartitionSpec(*parts)

    def _ruled(self, path: str, shape: tuple[int, ...]) -> list[Any]:
        """The part of each axis that the rules fix."""
        found = next(
            (spec for pattern, spec in self.rules if patterns.pattern(pattern, "rules").search(path)), PartitionSpec()
        )
        if len(found) > len(shape):
            raise ValueError(f"the rule {found} for {path} has more axes than its shape {shape}")
        parts: list[Any] = [None] * (len(shape) - len(found)) + list(found)
        for i, axis in enumerate(parts):
            if axis is None:
                continue
            if axis not in AXES:
                raise ValueError(f"the rule {found} for {path} names {axis!r}; the axes are {', '.join(AXES)}")
            count = getattr(self, axis)
            if shape[i] % count:
                raise ValueError(
                    f"axis {i} of {path} with shape {shape} cannot be cut into {count} parts ({axis}={count}); choose a "
                    f"divisor of {shape[i]}, or another rule"
                )
            if count == 1:
                parts[i] = None
        return parts


def check(layout: Layout, init: Callable[..., PyTree], *args: Any) -> PyTree:
    """The shapes of the parameters `init(*args)`, if the layout fits them and the network; nothing is computed.

    Raises: ValueError: a rule that does not fit, or an axis that the network names (heads, tokens) and a size does not
    divide.
    """
    mesh = AbstractMesh(layout.shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        params = jax.eval_shape(init, *args)
    for path, leaf in named(params):
        layout.spec(path, leaf.shape)
    return params


def shards(spec: PartitionSpec, layout: Layout) -> int:
    """Into how many different parts a leaf of that spec is cut.

    Example:
        >>> shards(PartitionSpec("fsdp", "model"), Layout(data=3, fsdp=4, model=2))
        8
    """
    return math.prod(getattr(layout, axis) for axis in spec if axis is not None)
