"""The curves in the `(alpha, sigma)` plane that processes run along, and two guards against infinite derivatives."""

from __future__ import annotations

from typing import Any

from diffjax.types import Curve


def safe_log(xp: Any, a: Any) -> Any:
    """`log(a)`, `-inf` at zero, whose derivative at zero is zero instead of NaN."""
    positive = a > 0
    return xp.where(positive, xp.log(xp.where(positive, a, 1.0)), -xp.inf)


def _circle(xp: Any, a: Any, b: Any) -> Any:
    return xp.sqrt(a * a + b * b)


def _circle_gradient(xp: Any, a: Any, b: Any) -> tuple[Any, Any]:
    n = _circle(xp, a, b)
    return a / n, b / n


def _line(xp: Any, a: Any, b: Any) -> Any:
    return a + b


def _line_gradient(xp: Any, a: Any, b: Any) -> tuple[Any, Any]:
    one = xp.ones_like(a + b)
    return one, one


def _unit(xp: Any, a: Any, b: Any) -> Any:
    return a + xp.zeros_like(b)


def _unit_gradient(xp: Any, a: Any, b: Any) -> tuple[Any, Any]:
    one = xp.ones_like(a + b)
    return one, xp.zeros_like(one)


def _parabola(xp: Any, a: Any, b: Any) -> Any:
    # n solves n^2 = b n + a^2, which is sigma = 1 - alpha^2 at alpha = a / n, sigma = b / n.
    return 0.5 * (b + xp.sqrt(b * b + 4 * a * a))


def _parabola_gradient(xp: Any, a: Any, b: Any) -> tuple[Any, Any]:
    r = xp.sqrt(b * b + 4 * a * a)
    return 2 * a / r, 0.5 * (1 + b / r)


VARIANCE_PRESERVING = Curve("variance preserving", _circle, _circle_gradient)  # alpha^2 + sigma^2 = 1
LINEAR = Curve("linear", _line, _line_gradient)  # alpha + sigma = 1
UNIT = Curve("unit", _unit, _unit_gradient)  # alpha = 1
SUB_VARIANCE_PRESERVING = Curve("sub-variance preserving", _parabola, _parabola_gradient)  # sigma = 1 - alpha^2
