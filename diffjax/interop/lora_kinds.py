"""Low-rank factors through the rules of kernels: what sorts inputs moves the first factor, what sorts outputs the second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffjax.adapters.lora import KINDS, PROJECTION
from diffjax.interop.rules import Rule


class Factors(NamedTuple):
    """Of ours: a change down up of a kernel.   [n_in, r], [r, n_out] or, of one part of q, k, v, [r, heads, D]"""

    down: Any
    up: Any


def read_factors(
    rule: Rule, i: int, down: np.ndarray, up: np.ndarray, leaves: Mapping[str, tuple[int, ...]]
) -> dict[str, Factors]:
    """Their factors of the i-th weight of a rule as ours, by path.   [r, n_in, *k], [n_out, r, ...] ->

    Args: leaves: the shapes of our kernels.
    Raises: ValueError: shapes that do not fit, or a rule that has no factors.
    """
    kind, r = rule.kind, down.shape[0]
    plain(rule)
    flat, wide = down.reshape(r, -1).T, up.reshape(up.shape[0], r)
    tuples = lambda made: (made,) if isinstance(rule.ours, str) else made
    if len(rule.theirs) > 1:
        path = rule.ours
        parts = KINDS[PROJECTION.match(path)[2]]
        by_head = wide.reshape(kind.heads, -1, r).transpose(2, 0, 1)
        made = {f"{path}/{parts[i]}": Factors(flat, by_head)}
        widths = {name: leaves[path][-1] // len(parts) for name in made}
    else:
        if kind.outputs:
            pairs = [(flat, a) for a in tuples(kind.read(wide))]
        else:
            pairs = [(a.reshape(-1, r), wide.T) for a in tuples(kind.read(down))]
        made = {path: Factors(*map(np.ascontiguousarray, pair)) for path, pair in zip(rule.paths, pairs, strict=True)}
        widths = {name: leaves[name][-1] for name in made}
    for name, factors in made.items():
        kernel = leaves[name if name in leaves else name.rpartition("/")[0]]
        if factors.down.shape[0] != np.prod(kernel[:-1]) or np.prod(factors.up.shape[1:]) != widths[name]:
            raise ValueError(f"factors of {list(factors.down.shape)} and {list(factors.up.shape)} for {name}")
    return made


def write_factors(
    rule: Rule, own: Mapping[str, Factors], scale: Mapping[str, float], leaves: Mapping[str, tuple[int, ...]]
) -> dict[int, tuple[np.ndarray, np.ndarray, float]]:
    """Our factors as theirs of the weights of a rule: both factors and the scale, by the place of the weight.

    Args: own: by path.   scale: of the change, by path.   leaves: the shapes of our kernels.
    """
    if not any(path in own or any(f"{path}/{a}" in own for a in "qkv") for path in rule.paths):
        return {}
    plain(rule)
    kind = rule.kind
    if len(rule.theirs) > 1:
        path = rule.ours
        parts = KINDS[PROJECTION.match(path)[2]]
        if path in own:  # one matrix for all of them: they share the first factor
            down, up = own[path]
            return {i: (down.T, wide, scale[path]) for i, wide in enumerate(kind.write(up))}
        there = [(i, f"{path}/{a}") for i, a in enumerate(parts) if f"{path}/{a}" in own]
        flat = lambda up: up.reshape(up.shape[0], -1).T
        return {i: (own[name].down.T, flat(own[name].up), scale[name]) for i, name in there}
    downs, ups, factor = together(rule, own, scale, leaves)
    if kind.outputs:
        (wide,) = kind.write(*ups)
        return {0: (downs[0].T, wide, factor)}
    (down,) = kind.write(*(a.reshape(*leaves[path][:-1], -1) for path, a in zip(rule.paths, downs, strict=True)))
    wide = ups[0].T
    return {0: (down, wide.reshape(*wide.shape, *(1,) * (down.ndim - 2)), factor)}


def together(
    rule: Rule, own: Mapping[str, Factors], scale: Mapping[str, float], leaves: Mapping[str, tuple[int, ...]]
) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """The factors of all kernels of a rule with one rank, and their scale: as they are, or in blocks of a higher rank.

    Kernels that are one weight there share the factor on the side that is not cut. Where ours do not, each has rows and
    columns of its own in both factors.   [A_1 0; 0 A_2], [B_1; B_2]
    """
    there = [path for path in rule.paths if path in own]
    outputs = rule.kind.outputs
    shared = [own[path].down if outputs else own[path].up for path in there]
    same = all(np.array_equal(a, shared[0]) for a in shared[1:]) and len({scale[path] for path in there}) == 1
    if there == list(rule.paths) and same:
        return [own[path].down for path in there], [own[path].up for path in there], scale[there[0]]
    ranks = [own[path].down.shape[1] for path in there]
    ends = np.cumsum([0, *ranks])
    place = {path: slice(ends[i], ends[i + 1]) for i, path in enumerate(there)}
    scaled = {path: np.float32(scale[path]) * own[path].up for path in there}
    downs, ups = [], []
    for path in rule.paths:
        side = leaves[path][-1] if outputs else int(np.prod(leaves[path][:-1]))
        block = np.zeros((ends[-1], side) if outputs else (side, ends[-1]), np.float32)
        if path in own and outputs:
            block[place[path]] = scaled[path]
        elif path in own:
            block[:, place[path]] = own[path].down
        (ups if outputs else downs).append(block)
    if outputs:
        return [np.concatenate([own[path].down for path in there], axis=1)], ups, 1.0
    return downs, [np.concatenate([scaled[path] for path in there])], 1.0


def plain(rule: Rule) -> None:
    """Refuse weights of several layers at once.   Raises: ValueError."""
    if rule.kind.name.startswith(("copies", "stacked")):
        raise ValueError(
            f"{rule.paths[0]} is one array for {len(rule.theirs)} of their layers, from {rule.theirs[0]}, which factors for "
            "one of them do not fit; use the network with these layers apart (own_codes=True, scan_layers=False)"
        )
