"""ControlNeXt: a few convolutions read a picture, and what they say enters once, with the statistics of what is there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.adapters.core import Change, Site, strength
from diffjax.adapters.lora import stacked
from diffjax.adapters.maps import conv, dense, fresh, normalised, picture_of
from diffjax.networks.layers import at_least_float32
from diffjax.networks.resample import halve
from diffjax.networks.taps import per_layer
from diffjax.numerics import PyTree


def cross_normalised(c: Any, h: Any, eps: float = 1e-6) -> jax.Array:
    """`c` with the mean and standard deviation that `h` has.   (c - mean c) std h / (std c + eps) + mean h

    The statistics are those of each item, over all its places and channels, in float32.
    Args: c, h: [B, ..., C].

    Example:
        >>> y = cross_normalised(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[0.0, 0.0, 6.0]]))
        >>> round(float(y.mean()), 3), round(float(y.std()), 3)
        (2.0, 2.828)

    Reference: Peng et al. 2024, arXiv:2408.06070 (cross normalisation), as in the released code.
    """
    wide = lambda a: a.astype(at_least_float32(a.dtype))

    def moments(a: Any) -> tuple[Any, Any, Any]:
        axes = tuple(range(1, a.ndim))
        mean = a.mean(axes, keepdims=True)
        far = a - mean
        # inside the root, because the gradient of a root at zero is not finite: a fresh picture may be constant
        return far, jnp.sqrt(jnp.square(far).mean(axes, keepdims=True) + 1e-12), mean

    far, std, _ = moments(wide(c))
    _, wanted, mean = moments(wide(h))
    unit = lambda a: a.reshape(a.shape[:1] + (1,) * (c.ndim - 1))
    return (far * (unit(wanted) / (std + eps)) + unit(mean)).astype(h.dtype)


@dataclasses.dataclass(frozen=True)
class ControlNext:
    """See `control_next`."""

    tap: str
    widths: tuple[int, ...]

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"in", "block_i": {"first", "second", "skip"}, "out"}`."""
        picture, _ = picture_of(site.own, site.x, len(self.widths), name="control_next")
        (like,) = site.shapes(self.tap).values()
        window = (3,) * (picture.ndim - 2)
        keys = iter(jax.random.split(key, 2 + 3 * len(self.widths)))
        p = {"in": fresh(next(keys), *window, picture.shape[-1], self.widths[0])}
        for i, (a, b) in enumerate(zip((self.widths[0], *self.widths), self.widths, strict=False)):
            p[f"block_{i}"] = {
                "first": fresh(next(keys), *window, a, b),
                "second": fresh(next(keys), *window, b, b),
                "skip": fresh(next(keys), a, b),
            }
        return p | {"out": fresh(next(keys), self.widths[-1], like.shape[-1])}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """h' = h + w c^ at one tap."""
        c = self.features(params, site)
        add = lambda h: h + strength(cross_normalised(_sized(c, h), h), weight)
        if stacked(self.tap):  # the tap of all layers, of which the first is meant
            return Change(write={self.tap: per_layer(lambda h, layer: jnp.where(layer == 0, add(h), h))})
        return Change(write={self.tap: add})

    def features(self, params: PyTree, site: Site) -> jax.Array:
        """c, before it is normalised.   [B, *n, channels of the tap]"""
        channels = params["in"]["kernel"].shape[-2]
        picture, halvings = picture_of(site.own, site.x, len(self.widths), name="control_next", channels=channels)
        c = conv(params["in"], picture)
        for i in range(len(self.widths)):
            c = _block(params[f"block_{i}"], halve(c) if i < halvings else c)
        return dense(params["out"], c)


def control_next(tap: str = "down_0_0/block", widths: tuple[int, ...] = (16, 16)) -> ControlNext:
    """A few residual convolutions of a picture, added at one place with its statistics.   h' = h + w c^, see `cross_normalised`

    It reads a picture in the condition under its name, of the state's axes, or 2, 4 .. 2^len(widths) times as long. It is to be
    trained with a small part of the base: beside `difference(targets)`, which can be taken back and weighted likewise. Fresh
    it is **not** the base, as other adapters are: what has the statistics of h is not zero. With the weight zero it is.
    Args: tap: where it enters, early in the network; of pictures [B, *n, C] or of their patches [B, N, C]; of
        scanned layers it is that of the first.   widths: of the residual blocks.
    Raises: ValueError: out of range; at init and later, an unknown tap, a picture that does not fit.

    Example:
        >>> control_next("block_0/block", (8,)).tap
        'block_0/block'

    Reference: Peng et al. 2024, arXiv:2408.06070; the weight is 1 in training, and may be less in use.
    """
    if not widths or min(widths) < 1 or not tap:
        raise ValueError(f"control_next needs a tap and widths >= 1, one at least; got {tap!r} and {widths}")
    return ControlNext(tap, tuple(widths))


def _block(p: PyTree, x: Any) -> jax.Array:
    """A residual block of two convolutions, normalised over each item.   W x + conv(act(norm(conv(act(norm(x))))))"""
    h = conv(p["first"], jax.nn.silu(normalised(x)))
    return dense(p["skip"], x) + conv(p["second"], jax.nn.silu(normalised(h)))


def _sized(c: Any, h: Any) -> jax.Array:
    """`c` [B, *n, C] by means at the places of `h`: [B, *(n / r), C], or patches [B, N, C]."""
    places = math.prod(h.shape[1:-1])
    factor = round((math.prod(c.shape[1:-1]) / places) ** (1 / (c.ndim - 2)))
    small = halve(c, factor) if factor > 1 else c
    if math.prod(small.shape[1:-1]) != places:
        raise ValueError(
            f"a picture of {list(c.shape[1:-1])} places cannot be brought to a tap of shape {list(h.shape)}"
        )
    return small.reshape(*h.shape[:-1], c.shape[-1])
