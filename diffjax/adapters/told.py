"""What adapters are told in the condition, for messages where it does not fit."""

from __future__ import annotations

from typing import Any


def form_of(value: Any) -> str:
    """What a condition is, for messages.

    Example:
        >>> import numpy as np
        >>> form_of({"tokens": np.ones((2, 3), np.float32)}), form_of("edge")
        ("{'tokens': float32 [2, 3]}", 'str')
    """
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {form_of(a)}' for name, a in value.items())}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(form_of, value))})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def check_names(own: Any, name: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Refuse a condition that is no dict with these names.   name: of the adapter.   Raises: ValueError."""
    if not isinstance(own, dict) or not set(needed) <= set(own) <= {*needed, *optional}:
        more = f", and may have {list(optional)}" if optional else ""
        raise ValueError(
            f"{name} reads a dict with {list(needed)}{more} in the condition under the adapter's name; got {form_of(own)}"
        )
