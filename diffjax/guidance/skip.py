"""Branches that are really skipped, and transforms as values: what every guide here is built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffjax.numerics import pytree_dataclass, static
from diffjax.types import Denoiser, Transform


def choose(flag: Any, on: Callable[[], Any], off: Callable[[], Any]) -> Any:
    """`on()` or `off()`, never both: a Python branch for a host flag, `lax.cond` for a traced one.

    Under a `vmap` over the flag both run; no transformation of JAX can skip there.
    """
    if isinstance(flag, (bool, np.bool_)):
        return on() if flag else off()
    return jax.lax.cond(flag, on, off)


@pytree_dataclass
class Opaque:
    """A transform of the user's that is a plain function, as static structure; it compares by identity."""

    f: Callable[[Denoiser], Denoiser] = static()

    def __call__(self, denoiser: Denoiser) -> Any:
        """Apply it."""
        return self.f(denoiser)


def as_value(transform: Any) -> Any:
    """The transform as a pytree, so that its numbers are leaves wherever it is stored.

    Raises: ValueError: not callable.
    """
    if not callable(transform):
        raise ValueError(f"a transform maps a denoiser to a denoiser; got {transform!r}. Use for example cfg(2.0)")
    opaque = jax.tree.structure(transform) == jax.tree.structure(0)
    return Opaque(transform) if opaque else transform


def apply_transform(transform: Transform, denoiser: Denoiser) -> Denoiser:
    """`transform(denoiser)`.   Raises: ValueError: the result is no denoiser (a factory that was not called)."""
    out = transform(denoiser)
    if not isinstance(out, Denoiser):
        raise ValueError(
            f"a transform must return a Denoiser; {transform!r} returned {type(out).__name__}. "
            "Call the factory first: cfg(2.0), not cfg; lift(fn) for a function of predictions"
        )
    return out


def host_number(name: str, value: Any) -> Any:
    """A number as a leaf: a host scalar becomes a float and must be finite; arrays and JAX values pass."""
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name} must be a number or an array of numbers; got {value!r}") from e
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite; got {value!r}")
    return float(array) if array.ndim == 0 else array
