"""A network that sees its state moved by an image: how a process with a shifted mean reaches an existing network.

The process x_t = alpha x0 + sigma eps + image is the plain process of y_t = x_t - image, with the same transitions and
posteriors, and starts at x_1 ~ N(image, sigma(1)^2 I). So losses, solvers and guidance work on y, and the shift is only
what the network is given: y + image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Offset:
    """What `offset_by_image` returns: `fn(params, y, t, cond, key)`, equal to another one of an equal function."""

    fn: Callable[..., Any]
    keep: bool

    def __call__(self, params: Any, x: Any, t: Any, cond: Any = None, key: Any = None, **options: Any) -> Any:
        """The output at the moved state; the noise and the clean data that it tells of are not moved."""
        x, cond = self._split(x, cond)
        return self.fn(params, x, t, cond, key, **options)

    def init(self, key: Any, x: Any, t: Any, cond: Any = None) -> Any:
        """Fresh parameters of the network inside."""
        return self.fn.init(key, x, t, self._split(x, cond)[1])

    def _split(self, x: Any, cond: Any) -> tuple[Any, Any]:
        if not isinstance(cond, dict) or "image" not in cond:
            got = sorted(cond) if isinstance(cond, dict) else type(cond).__name__
            raise ValueError(f"offset_by_image needs the condition {{'image': [B, H, W, C], ...}}; got {got}")
        image = cond["image"]
        if getattr(image, "shape", None) != x.shape:
            raise ValueError(
                f"the image moves the state, so both need one shape; got an image {getattr(image, 'shape', None)} and a "
                f"state {x.shape}"
            )
        if self.keep:
            return x + image, cond
        rest = {name: value for name, value in cond.items() if name != "image"}
        return x + image, rest or None


def offset_by_image(fn: Any, *, keep: bool = False) -> Offset:
    """`fn` at the state moved by the condition's image.   fn(params, y + image, t, the other conditions)

    Args: fn: from `from_linen`.   keep: give the network the image as a condition too, as the released code of DiffuseVAE
    does; otherwise it sees nothing of it but the sum.
    Returns: a function that is used like `fn`, whose condition has an `image` of the shape of the state. A sample of it
    is x0 itself: the image is not to be subtracted at the end.
    Raises: ValueError: at the call, a condition without an image, or of another shape than the state.

    Example:
        >>> import numpy as np
        >>> f = offset_by_image(lambda params, x, t, cond, key: x)
        >>> f(None, np.ones(2), 0.5, {"image": np.array([3.0, 4.0])}).tolist()
        [4.0, 5.0]

    Reference: Pandey et al. 2022, arXiv:2201.00308, formulation 2.
    """
    return Offset(fn, keep)
