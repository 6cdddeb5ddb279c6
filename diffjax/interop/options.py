"""Reading configurations of other libraries: every field known, and what has no counterpart here refused by name."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax


def gelu(x: Any) -> jax.Array:
    """The Gaussian error linear unit, exactly.   x Phi(x)"""
    return nn.gelu(x, approximate=False)


def gelu_tanh(x: Any) -> jax.Array:
    """Its approximation by tanh."""
    return nn.gelu(x, approximate=True)


def mish(x: Any) -> jax.Array:
    """x tanh(log(1 + e^x))."""
    return jax.nn.mish(x)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": nn.silu, "swish": nn.silu, "mish": mish, "gelu": gelu, "relu": nn.relu,
}  # fmt: skip


def read(kind: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """The fields of a configuration as attributes: those given over the defaults of the class; lists are tuples.

    Args: kind: name of the class, for messages.   defaults: every field that the class has.
    Raises: ValueError: a field that the class does not have. Names that begin with an underscore are not fields.

    Example:
        >>> read("Net", {"width": [1, 2], "_version": "0.1"}, {"width": (8,), "depth": 3})
        namespace(width=(1, 2), depth=3)
    """
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(
            f"{kind} has no field {', '.join(f'{name}={given[name]!r}' for name in unknown)}; it has "
            f"{', '.join(sorted(defaults))}. The configuration is of another class, or of a newer version"
        )
    return types.SimpleNamespace(**{name: frozen(value) for name, value in {**defaults, **given}.items()})


def frozen(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    return tuple(frozen(a) for a in value) if isinstance(value, (list, tuple)) else value


def accept(kind: str, field: str, value: Any, accepted: Any) -> Any:
    """The value of a field, which must be one of those accepted.

    Args: accepted: values, or a mapping of values to what they stand for, which is then returned.
    Raises: ValueError: another value.
    """
    if value not in accepted:
        raise ValueError(
            f"{kind}: {field}={value!r} has no counterpart here; accepted is {', '.join(map(repr, accepted))}"
        )
    return accepted[value] if isinstance(accepted, Mapping) else value


def name_of(mapping: Mapping[str, Any], value: Any, field: str) -> str:
    """The first name of a value: the inverse of `accept` with a mapping.   Raises: ValueError: it has none."""
    for name, found in mapping.items():
        if found == value:
            return name
    raise ValueError(f"{field}={value!r} has no name in the other library; it has {', '.join(mapping)}")


def only(module: Any, **accepted: tuple) -> None:
    """Refuse fields of a module that the other library has no counterpart of.

    Args: accepted: the values of each field that it has.
    Raises: ValueError: another value.
    """
    for field, values in accepted.items():
        value = getattr(module, field)
        if value not in values:
            raise ValueError(
                f"{type(module).__name__}.{field}={value!r} has no counterpart in the other library; accepted is "
                f"{', '.join(map(repr, dict.fromkeys(values)))}"
            )


def groups_of(groups: int | None, widths: tuple[int, ...]) -> int:
    """The one number of groups of all norms, see `networks.layers.GroupNorm`.   Raises: ValueError: there are several."""
    found = {groups or max(g for g in range(1, 33) if c % g == 0 and (g == 1 or c // g >= 4)) for c in widths}
    if len(found) > 1:
        raise ValueError(
            f"the other library has one number of groups for all norms; widths={widths} with groups=None have "
            f"{sorted(found)}. Train with groups given"
        )
    return found.pop()
