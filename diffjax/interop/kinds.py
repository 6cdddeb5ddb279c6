"""How the numbers of one array of another library lie in one here: pairs of inverse functions, which only move them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


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
