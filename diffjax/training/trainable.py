"""Training some of the parameters: a tree is parted by the names of its arrays, and put together again."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax

from diffjax.numerics import PyTree
from diffjax.training.partial import named, path_name
from diffjax.training.patterns import pattern

Trainable = str | Callable[[str], bool]


def split(params: PyTree, trainable: Trainable | None) -> tuple[PyTree, PyTree]:
    """`params` as two trees, each with None in the place of what the other has: what is trained, and the rest.

    None is no array to JAX, so gradients, moments and averages of the first tree hold nothing of the second.
    Args: trainable: a regular expression that is found in the path `a/b/c` of an array that is trained, or a function of
        this path; None trains all.
    Raises: ValueError: no regular expression; nothing is trained.

    Example:
        >>> split({"base": {"w": 1.0}, "adapters": {"w": 2.0}}, "^adapters/")
        ({'adapters': {'w': 2.0}, 'base': {'w': None}}, {'adapters': {'w': None}, 'base': {'w': 1.0}})
    """
    if trainable is None:
        return params, jax.tree.map(lambda _: None, params)
    chosen = trainable if callable(trainable) else lambda path: pattern(trainable, "trainable").search(path) is not None
    marks = jax.tree_util.tree_map_with_path(lambda path, _: bool(chosen(path_name(path))), params)
    if not any(jax.tree.leaves(marks)):
        names = [name for name, _ in named(params)]
        raise ValueError(
            f"trainable={trainable!r} chooses none of the {len(names)} arrays, such as {', '.join(names[:3])}; give a "
            "regular expression that is found in some of their paths"
        )
    part = lambda keep: jax.tree.map(lambda mark, a: a if mark is keep else None, marks, params)
    return part(True), part(False)


def join(trained: PyTree, rest: PyTree) -> PyTree:
    """The tree of which `split` made these two; `trained` may be an average of the trained part.

    Example:
        >>> join({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
        {'a': 1.0, 'b': 2.0}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, trained, rest, is_leaf=lambda a: a is None)


def only(*names: str) -> str:
    """The regular expression of the parts of `params` with these names.   ("adapters/edge", ...) -> pattern

    Example:
        >>> only("adapters/edge", "out")
        '^(adapters/edge|out)(/|$)'
    """
    return f"^({'|'.join(map(re.escape, names))})(/|$)"
