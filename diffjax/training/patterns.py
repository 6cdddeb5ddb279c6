"""Regular expressions of paths, as arguments: compiled here alone, so that a wrong one is named."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any


@functools.lru_cache(maxsize=1024)
def pattern(text: Any, name: str) -> re.Pattern[str]:
    """A compiled regular expression.

    Args: text: the expression.   name: of the argument that it is, for messages.
    Raises: ValueError: not one.

    Example:
        >>> pattern("^block_[01]/", "targets").search("block_1/out/kernel") is not None
        True
    """
    try:
        return re.compile(text)
    except (re.error, TypeError, RecursionError) as error:
        raise ValueError(
            f"{name} must be a regular expression that is found in paths a/b/c, such as '^block_0/' or 'kernel$'; got "
            f"{text!r}: {error}. For a name as it stands give re.escape(name)"
        ) from None


def substituted(name: str, renames: Iterable[tuple[str, str]]) -> str:
    r"""A name after some replacements in turn.   renames: pairs (regular expression, replacement)

    Raises: ValueError: no regular expression, or a replacement with groups that it lacks.

    Example:
        >>> substituted("model.out.weight", [(r"^model\.", ""), (r"\.", "/")])
        'out/weight'
    """
    for text, replacement in renames:
        try:
            name = pattern(text, "renames").sub(replacement, name)
        except (re.error, IndexError) as error:
            raise ValueError(
                f"renames has {text!r} with the replacement {replacement!r}: {error}. Groups are \\1, \\2, ..., of those in "
                "the expression"
            ) from None
    return name


def checked(name: str, *texts: Any) -> None:
    """Refuse what is no regular expression.   Raises: ValueError: naming the argument."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a regular expression, a string; got {text!r}")
        pattern(text, name)
