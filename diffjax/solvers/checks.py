"""Whether the options of a method are what it takes; JAX values, which may be traced, pass unseen."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from diffjax import numerics as nu


def is_zero(a: Any) -> bool:
    """Whether a hyper-parameter is concretely zero; a traced one never is, so that its gradient exists."""
    return nu.namespace(a) is np and float(a) == 0.0


def check_number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False, hint: str = ""
) -> None:
    """Refuse a host value that is not one number from `low` to `high`; `above`: it may not be `low` itself."""
    if isinstance(value, jax.Array):
        return
    scalar = isinstance(value, (int, float, np.number, np.ndarray)) and not isinstance(value, bool)
    if not scalar or np.shape(value) != () or not low <= value <= high or (above and value == low):
        least = f"{'>' if above else '>='} {low:g}" if low > -math.inf else "a number"
        accepted = least if high == math.inf else f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {accepted}{hint and ', ' + hint}; got {value!r}")


def check_integer(name: str, value: Any, accepted: tuple[int, ...], hint: str = "") -> None:
    """Refuse what is not one of the integers `accepted`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value not in accepted:
        listed = ", ".join(map(str, accepted[:-1]))
        raise ValueError(f"{name} must be {listed} or {accepted[-1]}{hint and ', ' + hint}; got {value!r}")


def check_inverse(inverse: bool, name: str, value: Any) -> None:
    """Refuse noise on the way from data to noise, where the option `name` is not concretely zero."""
    if inverse and not is_zero(value):
        raise ValueError(f"inversion is deterministic: {name} must be 0 with inverse=True; got {value}")


def check_noise_fits(eta: Any, gain: Any, rest: Any) -> None:
    """Refuse an eta that asks for more noise than there is: the share `rest = 1 - eta^2 gain` left of it is negative."""
    if nu.namespace(rest) is np and np.min(rest) < -1e-12:
        largest = float(np.max(gain)) ** -0.5
        raise ValueError(
            f"eta = {eta} asks for more noise than sigma_s; the largest that fits this grid is {largest:.6g}"
        )
