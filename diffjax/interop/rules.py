"""How tensors of another library become parameters of a network here, and back: one table serves both directions."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.numerics import PyTree
from diffjax.training import CheckpointError, partial

SHOWN = 12  # names of a list in a message


class Kind(NamedTuple):
    """A pair of inverse functions.   read(*theirs) -> ours,   write(ours) -> theirs, a tuple

    Where several arrays of ours are made together, read returns a tuple and write takes as many. Both only move numbers.
    `write` uses methods of arrays alone, so that shapes can be traced through it. A kind of kernels sorts either their inputs
    or, if `outputs`, their outputs; `heads` is the number of heads that it sorts by.
    """

    name: str
    read: Callable[..., Any]
    write: Callable[..., tuple]
    outputs: bool = False
    heads: int = 0


class Rule(NamedTuple):
    """One array of ours, `a/b/c`, or several that are made together, and the names of the arrays of theirs they are made of."""

    ours: str | tuple[str, ...]
    theirs: tuple[str, ...]
    kind: Kind

    @property
    def paths(self) -> tuple[str, ...]:
        """The arrays of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


# -------------------------------------------------------------------------------------------------------------- kinds


same = Kind("same", lambda a: a, lambda a: (a,))
dense = Kind("dense", lambda a: a.T, lambda a: (a.T,))  # [out, in] <-> [in, out]; a vector stays


def _conv_read(a: Any) -> Any:
    return a.transpose(*range(2, a.ndim), 1, 0)


def _conv_write(a: Any) -> tuple:
    return (a.transpose(a.ndim - 1, a.ndim - 2, *range(a.ndim - 2)),)


conv = Kind("conv", _conv_read, _conv_write)  # [out, in, *k] <-> [*k, in, out], any number of axes


@functools.cache
def pointwise(axes: int) -> Kind:
    """A convolution of length one along so many axes, stored for a dense layer.   [out, in, 1, ...] <-> [in, out]"""
    write = lambda a: (a.T.reshape(*a.T.shape, *(1,) * axes),)
    return Kind(f"pointwise({axes})", lambda a: a.reshape(a.shape[:2]).T, write)


conv1x1 = pointwise(2)


@functools.cache
def by_head(heads: int, n: int) -> Kind:
    """n matrices [heads D, in], or their biases, as one whose columns are sorted by head, then kind.   [in, heads n D]

    See `networks.attention.per_head`.
    """

    def read(*arrays: Any) -> Any:
        rows = np.stack([a.reshape(heads, -1, *a.shape[1:]) for a in arrays], axis=1)
        return rows.reshape(-1, *rows.shape[3:]).T

    def write(a: Any) -> tuple:
        rows = a.T.reshape(heads, n, -1, *a.T.shape[1:])
        return tuple(rows[:, i].reshape(-1, *rows.shape[3:]) for i in range(n))

    return Kind(f"by_head({heads}, {n})", read, write, True, heads)


@functools.cache
def by_head_fused(heads: int, n: int) -> Kind:
    """The same, from one matrix whose rows are sorted by kind, then head.   [n heads D, in] <-> [in, heads n D]"""
    turn = lambda a, first, second: a.reshape(first, second, -1, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)
    write = lambda a: (turn(a.T, heads, n),)
    return Kind(f"by_head_fused({heads}, {n})", lambda a: turn(a, n, heads).T, write, True, heads)


def qkv(heads: int) -> Kind:
    """Queries, keys and values, three matrices or biases, as one; see `by_head`."""
    return by_head(heads, 3)


def kv(heads: int) -> Kind:
    """Keys and values as one; see `by_head`."""
    return by_head(heads, 2)


@functools.cache
def chunks(order: tuple[int, ...]) -> Kind:
    """Equal chunks of the outputs in another order: our i-th is their order[i]-th.   [n d, in] <-> [in, n d], or biases"""
    back = tuple(int(i) for i in np.argsort(order))
    move = lambda a, order: a.reshape(len(order), -1, *a.shape[1:])[np.asarray(order)].reshape(a.shape)
    return Kind(f"chunks{order}", lambda a: move(a, order).T, lambda a: (move(a.T, back),), True)


@functools.cache
def parted(n: int) -> Kind:
    """One matrix as n of ours, or biases: equal parts of its outputs.   [n d, in] <-> n of [in, d]"""
    read = lambda a: tuple(part.T for part in a.reshape(n, -1, *a.shape[1:]))
    write = lambda *parts: (parts[0].__array_namespace__().concatenate([part.T for part in parts]),)
    return Kind(f"parted({n})", read, write, True)


@functools.cache
def shaped(ours: tuple[int, ...], theirs: tuple[int, ...]) -> Kind:
    """The same numbers in another shape, such as a table with an axis of length one."""
    return Kind(f"shaped({ours}, {theirs})", lambda a: a.reshape(ours), lambda a: (a.reshape(theirs),))


@functools.cache
def beside(n: int) -> Kind:
    """One matrix for inputs behind each other as a kernel for each.   [out, n + m] <-> [n, out], [m, out]"""
    write = lambda a, b: (a.__array_namespace__().concatenate([a.T, b.T], axis=1),)
    return Kind(f"beside({n})", lambda a: (a[:, :n].T, a[:, n:].T), write)


@functools.cache
def copies(kind: Kind, n: int) -> Kind:
    """The same array under n names; the first is read."""
    return Kind(f"copies({kind.name}, {n})", lambda a, *more: kind.read(a), lambda a: kind.write(a) * n)


@functools.cache
def stacked(kind: Kind, depth: int, n: int = 1) -> Kind:
    """`depth` equal layers as one array with a leading axis; their names layer by layer, n of each."""

    def read(*arrays: Any) -> Any:
        found = [kind.read(*arrays[i : i + n]) for i in range(0, depth * n, n)]
        return tuple(map(np.stack, zip(*found, strict=True))) if isinstance(found[0], tuple) else np.stack(found)

    write = lambda *ours: tuple(part for i in range(depth) for part in kind.write(*(a[i] for a in ours)))
    return Kind(f"stacked({kind.name}, {depth})", read, write)


def blocks(ours: str, depth: int, rules_of: Callable[[int], list[Rule]], *, scan: bool = False) -> list[Rule]:
    """The rules of equal blocks as `layers.repeat` makes them: `ours/block_i/...`, or `ours/blocks/...` stacked.

    Args: ours: where they are, with a slash behind it unless empty.   rules_of: the rules of the i-th block, relative to it.
    """
    placed = lambda rule, name: tuple(f"{ours}{name}/{a}" for a in rule.paths)
    one = lambda rule, name: placed(rule, name)[0] if isinstance(rule.ours, str) else placed(rule, name)
    if not scan:
        return [rule._replace(ours=one(rule, f"block_{i}")) for i in range(depth) for rule in rules_of(i)]
    found = []
    for same_layer in zip(*(rules_of(i) for i in range(depth)), strict=True):
        first, names = same_layer[0], tuple(name for rule in same_layer for name in rule.theirs)
        found.append(Rule(one(first, "blocks"), names, stacked(first.kind, depth, len(first.theirs))))
    return found


def layer(ours: str, theirs: str, kind: Kind = dense, *, bias: bool = True) -> list[Rule]:
    """The rules of a layer with kernel and bias: `ours/kernel`, `ours/bias` and `theirs.weight`, `theirs.bias`."""
    found = [Rule(f"{ours}/kernel", (f"{theirs}.weight",), kind)]
    return [*found, Rule(f"{ours}/bias", (f"{theirs}.bias",), same)] if bias else found


def norm(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """The rules of a normalisation: `ours/scale`, `ours/bias` and `theirs.weight`, `theirs.bias`."""
    found = [Rule(f"{ours}/scale", (f"{theirs}.weight",), same)]
    return [*found, Rule(f"{ours}/bias", (f"{theirs}.bias",), same)] if bias else found


def joined(ours: str, theirs: Sequence[str], kind: Kind, *, bias: bool = True) -> list[Rule]:
    """The rules of a layer that is made of several of theirs, such as `to_q`, `to_k`, `to_v`."""
    found = [Rule(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), kind)]
    return [*found, Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), kind)] if bias else found


# ------------------------------------------------------------------------------------------------- both directions


class Comparison(NamedTuple):
    """What is there and what is wanted. `stored`: name in the rules -> name in the file."""

    stored: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]  # `name: shape in the file, shape wanted`

    def __str__(self) -> str:
        """What does not fit, by name; empty if all does."""
        parts = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.wrong}
        return "\n".join(f"{what} ({len(names)}): {shown(names)}" for what, names in parts.items() if names)


def shown(names: Sequence[str]) -> str:
    """The first of many names."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def shapes_of(rules: Sequence[Rule], template: PyTree) -> dict[str, tuple[int, ...]]:
    """The shapes of their arrays for parameters like `template`.

    Raises: ValueError: the rules are not of this network: an array without rule or with two, a rule without array.
    """
    leaves = dict(partial.named(template))
    ours = [name for rule in rules for name in rule.paths]
    odd = sorted(set(leaves) ^ set(ours)) + sorted({name for name in ours if ours.count(name) > 1})
    if odd:
        raise ValueError(f"the rules do not fit the network: {shown(odd)}")

    @functools.cache
    def theirs(kind: Kind, *shapes: tuple[int, ...]) -> Any:
        return jax.eval_shape(kind.write, *(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))

    found: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        shapes = (leaves[name].shape for name in rule.paths)
        for name, a in zip(rule.theirs, theirs(rule.kind, *shapes), strict=True):
            found[name] = a.shape
    return found


def compare(
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    template: PyTree,
    *,
    ignored: Sequence[str] = (),
    renames: Sequence[tuple[str, str]] = (),
) -> Comparison:
    """Hold the names and shapes of a file beside those that the rules want; reads no array.

    Args: shapes: by name in the file.   ignored: patterns of names that may be there and are not read, such as buffers.
    renames: pairs of a pattern and its replacement, applied in turn to each name of the file: older names of the same.
    """
    wanted = shapes_of(rules, template)
    stored: dict[str, str] = {}
    for name in shapes:
        new = functools.reduce(lambda a, pair: re.sub(*pair, a), renames, name)
        stored[new if new not in stored else name] = name
    missing = sorted(name for name in wanted if name not in stored)
    left = (name for name in stored if name not in wanted)
    unexpected = sorted(stored[name] for name in left if not any(re.search(p, name) for p in ignored))
    wrong = [
        f"{name}: {list(shapes[stored[name]])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and shapes[stored[name]] != shape
    ]
    return Comparison(stored, tuple(missing), tuple(unexpected), tuple(wrong))


def load(
    rules: Sequence[Rule],
    tensors: Any,
    template: PyTree,
    *,
    dtype: Any = None,
    ignored: Sequence[str] = (),
    renames: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Their tensors as our parameters, one array after the other.

    Args:
        tensors: `Tensors`, or a mapping of names to arrays.
        template: the parameters' shapes, by `jax.eval_shape` of the module's `init`.
        dtype: of floating-point parameters; default as in the file.
        ignored, renames: see `compare`.

    Raises:
        CheckpointError: what is missing, unexpected or of another shape, by name; then nothing was read.
    """
    shapes = {name: tuple(shape) for name, shape in _shapes(tensors).items()}
    found = compare(rules, shapes, template, ignored=ignored, renames=renames)
    if str(found):
        source = getattr(tensors, "source", "the mapping of tensors")
        raise CheckpointError(
            f"{source} does not fit its configuration. Tensors that are\n{found}\nTake the weights and the configuration "
            "from one place"
        )

    def copied(a: Any) -> np.ndarray:
        floating = dtype is not None and jnp.issubdtype(a.dtype, jnp.floating)
        return np.array(a, dtype if floating else a.dtype, order="C")

    def made(rule: Rule) -> list[np.ndarray]:
        parts = rule.kind.read(*(tensors[found.stored[name]] for name in rule.theirs))
        return [copied(a) for a in ((parts,) if isinstance(rule.ours, str) else parts)]

    leaves: dict[str, Any] = {}
    for rule in rules:  # the part of the file is let go before the copies for the device are made
        leaves |= {name: jnp.asarray(a) for name, a in zip(rule.paths, made(rule), strict=True)}
    return partial.nested({name: leaves[name] for name, _ in partial.named(template)})


def _shapes(tensors: Any) -> dict[str, Any]:
    return tensors.shapes if hasattr(tensors, "shapes") else {name: np.shape(a) for name, a in tensors.items()}


@dataclasses.dataclass(frozen=True)
class Saved(Mapping):
    """Their arrays, each made from ours when it is asked for."""

    places: Mapping[str, tuple[Rule, int] | None]
    leaves: Mapping[str, Any]
    buffers: Mapping[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.buffers:
            return np.asarray(self.buffers[name])
        rule, i = self.places[name]
        return np.asarray(rule.kind.write(*(np.asarray(self.leaves[name]) for name in rule.paths))[i])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def save(rules: Sequence[Rule], params: PyTree, buffers: Mapping[str, Any] | None = None) -> Saved:
    """Our parameters as their tensors: a mapping, the inverse of `load`.

    Args: buffers: what else the file shall hold, in the dtype of the parameters if they have one.
    Raises: ValueError: the rules are not of this network.
    """
    shapes_of(rules, params)
    places = {name: (rule, i) for rule in rules for i, name in enumerate(rule.theirs)}
    dtypes = {a.dtype for _, a in partial.named(params)}
    fixed = {name: np.asarray(a, *(dtypes if len(dtypes) == 1 else ())) for name, a in (buffers or {}).items()}
    return Saved(dict(sorted({**places, **dict.fromkeys(fixed)}.items())), dict(partial.named(params)), fixed)
