"""How tensors of another library become parameters of a network here, and back: one table serves both directions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.interop.kinds import Kind, dense, same, stacked
from diffjax.numerics import PyTree
from diffjax.training import CheckpointError, partial
from diffjax.training.patterns import pattern, substituted

SHOWN = 12  # names of a list in a message


class Rule(NamedTuple):
    """One array of ours, `a/b/c`, or several that are made together, and the names of the arrays of theirs they are made of."""

    ours: str | tuple[str, ...]
    theirs: tuple[str, ...]
    kind: Kind

    @property
    def paths(self) -> tuple[str, ...]:
        """The arrays of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


# -------------------------------------------------------------------------------------------------------------- tables


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
        new = substituted(name, renames)
        stored[new if new not in stored else name] = name
    missing = sorted(name for name in wanted if name not in stored)
    left = (name for name in stored if name not in wanted)
    unexpected = sorted(stored[name] for name in left if not any(pattern(p, "ignored").search(name) for p in ignored))
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
