"""Which saved array belongs to which array of a template: names, rename rules, and what is left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.numerics import PyTree
from diffjax.training.manifest import CheckpointError
from diffjax.training.patterns import substituted

SHOWN = 6  # lines of a list in a message
WAY_OUT = "\nGive renames={pattern: replacement}, or strict=False to keep the values of the template"


class Match(NamedTuple):
    """`found`: name in the template -> saved name.   `missing`: names of the template.   `unused`: saved names."""

    found: dict[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def outline(state: PyTree) -> dict[str, str]:
    """`path -> "dtype[shape]"` of every leaf.

    Example:
        >>> import numpy as np
        >>> outline({"w": np.ones((2, 3), np.float32)})
        {'w': 'float32[2,3]'}
    """
    return {name: f"{a.dtype}[{','.join(map(str, a.shape))}]" for name, a in named(state)}


def named(tree: PyTree) -> list[tuple[str, Any]]:
    """`(path, leaf)` of every leaf, the path as `a/b/c`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(path_name(path), leaf) for path, leaf in leaves]


def path_name(path: Any) -> str:
    """The path of a leaf, as JAX gives it, as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from `path -> leaf`, the path as `a/b/c`.

    Example:
        >>> nested({"a/w": 1, "a/b": 2})
        {'a': {'w': 1, 'b': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return tree


def match(
    saved: Mapping[str, str],
    template: PyTree,
    *,
    renames: Mapping[str, str] | None = None,
    strict: bool = True,
    source: str = "the checkpoint",
) -> Match:
    r"""Give every array of `template` the saved one of its name.

    Args:
        saved: `outline` of what is saved.
        template: arrays, or `ShapeDtypeStruct`s.
        renames: regular expression -> replacement, applied in turn to each saved name, as `re.sub` does.
        strict: nothing may be missing or left over; otherwise what is missing keeps the template's values.
        source: what to call it in messages.

    Raises:
        CheckpointError: another shape or kind of number; two saved names that become one; with `strict`, arrays that
            are missing or left over; without, arrays that are missing and have no value in the template.
        ValueError: renames that are no regular expressions, or replacements that do not go with them.

    Example:
        >>> import numpy as np
        >>> template = {"out": {"w": np.ones(3, np.float32)}}
        >>> match({"head/w": "float32[3]"}, template, renames={"^head/": "out/"}).found
        {'out/w': 'head/w'}
    """
    wanted, leaves = outline(template), dict(named(template))
    origin: dict[str, str] = {}
    for old in saved:
        new = substituted(old, (renames or {}).items())
        if new in origin:
            raise CheckpointError(f"renames turn both {origin[new]} and {old} of {source} into {new}")
        origin[new] = old
    found = {name: origin[name] for name in wanted if name in origin}
    missing = tuple(name for name in wanted if name not in origin)
    unused = tuple(old for new, old in origin.items() if new not in wanted)
    called = lambda name: name if found[name] == name else f"{name} (saved as {found[name]})"
    wrong = [
        f"{called(name)}: saved as {saved[old]}, expected {wanted[name]}"
        for name, old in found.items()
        if not _fits(saved[old], wanted[name])
    ]
    way_out = ""
    if strict or any(isinstance(leaves[name], jax.ShapeDtypeStruct) for name in missing):
        wrong = [f"{name}: not saved, expected {wanted[name]}" for name in missing] + wrong
    if strict:
        wrong += [f"{name}: saved as {saved[name]}, not expected" for name in unused]
        way_out = WAY_OUT
    if wrong:
        raise CheckpointError(f"{source} does not fit:\n  " + shorten(wrong) + way_out)
    return Match(found, missing, unused)


def difference(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """What differs, in a few lines. Found before loading: Orbax casts dtypes silently, and drowns the rest in noise."""
    lines = [f"{name}: not saved, expected {wanted[name]}" for name in wanted if name not in saved]
    lines += [f"{name}: saved as {saved[name]}, not expected" for name in saved if name not in wanted]
    both = [name for name in wanted if name in saved and saved[name] != wanted[name]]
    lines += [f"{name}: saved as {saved[name]}, expected {wanted[name]}" for name in both]
    return shorten(lines)


def shorten(lines: list[str]) -> str:
    """The first lines, and how many more there are."""
    return "\n  ".join(lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []))


def _fits(saved: str, wanted: str) -> bool:
    """Equal shapes, and equal dtypes or two kinds of floating point: averages are wider than half-precision weights."""
    (a, shape), (b, other) = (text.split("[") for text in (saved, wanted))
    return shape == other and (a == b or all(_floating(name) for name in (a, b)))


def _floating(name: str) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:  # a key
        return False
