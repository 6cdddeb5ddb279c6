"""Cocktail: one control network for any subset of pictures, which scales and shifts, and attention held to regions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.adapters.copies import encoder, features, outputs
from diffjax.adapters.core import Change, Site, strength
from diffjax.adapters.maps import dense, fresh, fresh_hint, hint, normalised, picture_of, zero
from diffjax.networks.layers import modulate
from diffjax.networks.resample import halve
from diffjax.networks.taps import tap_names
from diffjax.numerics import PyTree

BOXES = "boxes"


@dataclasses.dataclass(frozen=True)
class ControlNorm:
    """See `control_norm`."""

    pictures: tuple[str, ...]
    widths: tuple[int, ...]

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"copy", "hints": {picture}, "fuse", "norm", "pair": {tap}}`."""
        own = {name: a for name, a in _told(site).items() if name != BOXES}
        if set(own) != set(self.pictures):
            raise ValueError(f"control_norm must see all its pictures {list(self.pictures)} at init; got {sorted(own)}")
        copy = encoder(site.base)
        shapes = site.shapes(*outputs(copy))
        stem = shapes["skip_0"].shape[-1]
        *keys, last = jax.random.split(key, len(own) + 1)
        axes = site.x.ndim - 2
        hints = {
            name: fresh_hint(k, self.widths, axes, own[name].shape[-1], stem)
            for name, k in zip(self.pictures, keys, strict=True)
        }
        return {
            "copy": jax.tree.map(jnp.array, copy),
            "hints": hints,
            "fuse": fresh(last, len(own) * stem, 2 * stem),
            "norm": {"scale": jnp.ones(stem), "bias": jnp.zeros(stem)},
            "pair": {name: zero(a.shape[-1], 2 * a.shape[-1]) for name, a in shapes.items()},
        }

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """y' = y (1 + w gamma) + w beta for the skips and the bottleneck y."""
        own = dict(_told(site))
        boxes = own.pop(BOXES, None)
        unknown = sorted(set(own) - set(self.pictures))
        if unknown:
            raise ValueError(f"control_norm has no encoders for {unknown}; it knows {list(self.pictures)} and {BOXES}")
        if boxes is None:
            found = self._controls(params, site, own)
        else:
            _check_boxes(boxes, own, site.x)
            nothing = self._controls(params, site, {})
            each = jax.vmap(lambda some: self._controls(params, site, some), in_axes=1)(own)  # [K, B, *n, 2 c]
            masks = lambda like: blurred(boxes, like.shape[1:-1]).astype(like.dtype)
            blend = lambda some, no: no + (masks(no) * (some - no[None])).sum(0)
            found = {name: blend(each[name], nothing[name]) for name in nothing}
        pairs = {name: jnp.split(strength(c, weight), 2, axis=-1) for name, c in found.items()}
        return Change(write={n: lambda y, gamma=g, beta=b: modulate(y, beta, gamma) for n, (g, b) in pairs.items()})

    def _controls(self, params: PyTree, site: Site, own: dict[str, Any]) -> dict[str, Any]:
        """gamma and beta of every tap, with zero in the place of pictures that are not given.   {tap: [B, *n, 2 c]}"""
        codes = []
        for name in self.pictures:
            p = params["hints"][name]
            channels = p["in"]["kernel"].shape[-2]
            shown = own.get(name, jnp.zeros((*site.x.shape[:-1], channels), site.x.dtype))
            of = dict(name=f"control_norm, {name},", channels=channels)
            picture, halvings = picture_of(shown, site.x, len(self.widths) - 1, **of)
            codes.append(normalised(hint(p, picture, halvings)))
        gamma, beta = jnp.split(dense(params["fuse"], jnp.concatenate(codes, axis=-1)), 2, axis=-1)
        norm = params["norm"]

        def joined(call: Callable, x: Any) -> Any:
            h = call(x)
            wide = lambda a: a.astype(h.dtype).reshape((1,) * (h.ndim - 1) + (-1,))
            h = normalised(h) * wide(norm["scale"]) + wide(norm["bias"])
            return modulate(h, beta.astype(h.dtype), gamma.astype(h.dtype))

        found = features(site, params["copy"], {"in": joined})
        return {name: dense(params["pair"][name], value) for name, value in found.items()}


def control_norm(pictures: tuple[str, ...], widths: tuple[int, ...] = (16, 32, 96, 256)) -> ControlNorm:
    """One copy of a U-Net's encoder for any of several pictures.   y' = y (1 + gamma) + beta, both from zero

    It reads a dict of pictures in the condition under its name; what is left out counts as a picture of zeros. Each has an
    encoder, whose normalised outputs are joined and mapped to a scale and a shift of the normalised first features of the
    copy; what the copy hands to its decoder is mapped to scales and shifts of the skips and the bottleneck of the frozen
    network. (The published normalisations are over the batch; these are over each item.)
    With `boxes` [B, K, 4] (top, left, bottom, right in [0, 1]) in that dict there are K objects, and every picture is
    [B, K, *n, c]: the controls are those of nothing, and inside the box of each object, blurred, its own.
    Args: pictures: their names.   widths: see `controlnet`.
    Raises: ValueError: no names; at init and later, not a U-Net, unknown pictures, shapes that do not fit.

    Example:
        >>> control_norm(("edge", "blob"), (8,)).pictures
        ('edge', 'blob')

    Reference: Hu et al. 2023, arXiv:2306.00964, as in the released code.
    """
    if not pictures or BOXES in pictures or not widths or min(widths) < 1:
        raise ValueError(
            f"control_norm needs names of pictures, none of them {BOXES!r}, and widths >= 1; got {pictures}, {widths}"
        )
    return ControlNorm(tuple(pictures), tuple(widths))


def blurred(boxes: Any, axes: tuple[int, ...]) -> jax.Array:
    """Boxes as masks, blurred with a standard deviation of a sixteenth of each axis.   [B, K, 4] -> [K, B, h, w, 1]

    Example:
        >>> blurred(jnp.array([[[0.0, 0.0, 1.0, 0.5]]]), (2, 4)).shape
        (1, 1, 2, 4, 1)
    """

    def side(low: Any, high: Any, n: int) -> Any:  # the share of a blurred interval, [B, K, n]
        at, width = (jnp.arange(n, dtype=low.dtype) + 0.5) / n, 1 / 16
        edge = lambda end: jax.lax.erf((at.reshape(1, 1, -1) - end[..., None]) / (width * math.sqrt(2)))
        return (edge(low) - edge(high)) / 2

    top, left, bottom, right = jnp.moveaxis(jnp.asarray(boxes), -1, 0)
    mask = side(top, bottom, axes[0])[..., :, None] * side(left, right, axes[1])[..., None, :]
    return jnp.moveaxis(mask, 1, 0)[..., None]


@dataclasses.dataclass(frozen=True)
class RegionBias:
    """See `region_bias`."""

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"strength": 0}`."""
        _regions(site, math.prod(site.x.shape[1:-1]))
        return {"strength": jnp.zeros(())}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """S' = S + w strength log(1 + (1 - t)^2) std(S) mask."""
        taps = [n for n in tap_names(site.net, site.base, site.x, site.t, site.cond) if n.endswith("cross/logits")]
        if not taps:
            raise ValueError(
                "region_bias needs a network that attends to tokens (token_size > 0): it has no cross/logits"
            )
        t = jnp.asarray(site.t)
        early = jnp.log1p(jnp.square(1 - t)).reshape(-1, 1, 1, 1)
        scale = strength(params["strength"], weight)

        def bias(logits: Any) -> Any:  # [B, H, T, S]
            spread = logits.std(axis=(1, 2, 3), keepdims=True)
            mask = _regions(site, logits.shape[2]).astype(logits.dtype)[:, None]
            return logits + (scale * early).astype(logits.dtype) * spread * mask

        return Change(write=dict.fromkeys(taps, bias))


def region_bias() -> RegionBias:
    """Attention to tokens that is drawn to regions.   softmax(S + w strength log(1 + (1 - t)^2) std(S) mask)

    It reads masks [B, *n, S] in the condition under its name: how much each place of the state belongs to each of S tokens.
    Its one parameter, `strength`, starts at zero and is usually set, not trained; 1.5 is published. The time t is what the
    network is given and must be in [0, 1], 0 for data.
    Raises: ValueError: at init and later, masks that do not fit, a network without attention to tokens.

    Reference: Hu et al. 2023, arXiv:2306.00964 (spatial guidance), as in the released code.
    """
    return RegionBias()


def _regions(site: Site, places: int) -> jax.Array:
    """The masks by means at `places` of attention.   [B, T, S]"""
    own, x = site.own, site.x
    tokens = site.cond.get("tokens") if isinstance(site.cond, dict) else None
    wanted = (*x.shape[:-1], -1 if tokens is None else tokens.shape[1])
    if tokens is None or getattr(own, "shape", None) != wanted:
        got = list(own.shape) if hasattr(own, "shape") else type(own).__name__
        raise ValueError(
            f"region_bias reads masks {list(wanted)} of places and tokens under the adapter's name; got {got}"
        )
    factor = round((math.prod(x.shape[1:-1]) / places) ** (1 / (x.ndim - 2)))
    small = halve(jnp.asarray(own), factor) if factor > 1 else jnp.asarray(own)
    return small.reshape(x.shape[0], -1, own.shape[-1])


def _told(site: Site) -> dict[str, Any]:
    """The pictures that are given, none if nothing is.   Raises: ValueError: not a dict."""
    if site.own is not None and not isinstance(site.own, dict):
        raise ValueError(
            f"control_norm reads a dict of pictures under the adapter's name; got {type(site.own).__name__}"
        )
    return site.own or {}


def _check_boxes(boxes: Any, own: dict[str, Any], x: Any) -> None:
    shape = tuple(getattr(boxes, "shape", ()))
    floats = jnp.issubdtype(getattr(boxes, "dtype", int), jnp.floating)
    if x.ndim != 4 or len(shape) != 3 or shape[0] != x.shape[0] or shape[2] != 4 or not floats:
        raise ValueError(
            f"boxes must be floats [{x.shape[0]}, objects, 4] beside a state [B, H, W, C]; got {list(shape)}"
        )
    wrong = {name: list(a.shape) for name, a in own.items() if a.shape[:2] != shape[:2]}
    if wrong or not own:
        raise ValueError(
            f"with boxes of {shape[1]} objects pictures must be [B, {shape[1]}, H, W, c]; got {wrong or 'none'}"
        )
