"""SCEdit: small maps on the skips of a U-Net, which may read pictures; no gradient passes the encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from diffjax.adapters.copies import encoder, outputs
from diffjax.adapters.core import Change, Site, strength
from diffjax.adapters.maps import conv, dense, fresh, fresh_hint, hint, picture_of, zero
from diffjax.numerics import PyTree


@dataclasses.dataclass(frozen=True)
class SkipTuner:
    """See `skip_tuner`."""

    rank: int
    conditions: tuple[str, ...]
    scales: tuple[float, ...]
    widths: tuple[int, ...]
    stop: bool

    @property
    def told(self) -> bool:
        """Whether it reads pictures."""
        return bool(self.conditions)

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"skip_k": {"down", "up"}}`, or for each condition these and `{"hint", "dense": {"skip_k"}}`."""
        shapes = _skips(site)
        channels = {name: a.shape[-1] for name, a in shapes.items()}
        if not self.conditions:
            return self._tuners(key, channels)
        pictures = self._pictures(site, self.conditions)
        params = {}
        for name, k in zip(self.conditions, jax.random.split(key, len(self.conditions)), strict=True):
            picture, _ = pictures[name]
            params[name] = self._tuners(k, channels) | self._hints(jax.random.fold_in(k, 1), picture, channels)
        return params

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """s_k' = s_k + w sum_m a_m U act(D (s_k + g_k(c_m)))."""
        tuners, hints = [(params, 1.0)], [{}]
        if self.conditions:
            scales = dict(zip(self.conditions, self.scales or (1.0,) * len(self.conditions), strict=True))
            channels = {name: params[name]["hint"]["in"]["kernel"].shape[-2] for name in self.conditions}
            pictures = self._pictures(site, channels=channels)
            tuners = [(params[name], scales[name]) for name in pictures]
            shapes = _skips(site)
            hints = [_cascade(params[name], *picture, shapes) for name, picture in pictures.items()]

        def tuned(skip: str, s: Any) -> Any:
            s = jax.lax.stop_gradient(s) if self.stop else s
            out = s
            for (p, scale), g in zip(tuners, hints, strict=True):
                h = s + g[skip].astype(s.dtype) if g else s
                more = dense(p[skip]["up"], jax.nn.gelu(dense(p[skip]["down"], h), approximate=False))
                out = out + strength(more if scale == 1.0 else scale * more, weight)
            return out

        write = {name: lambda s, name=name: tuned(name, s) for name in outputs(encoder(site.base))[:-1]}
        if self.stop:
            write["bottleneck"] = jax.lax.stop_gradient
        return Change(write=write)

    def _tuners(self, key: Any, channels: dict[str, int]) -> dict[str, Any]:
        keys = jax.random.split(key, len(channels))
        return {
            name: {"down": fresh(k, c, self.rank), "up": zero(self.rank, c)}
            for (name, c), k in zip(channels.items(), keys, strict=True)
        }

    def _hints(self, key: Any, picture: Any, channels: dict[str, int]) -> dict[str, Any]:
        axes, c = picture.ndim - 2, channels["skip_0"]
        first, last, *keys = jax.random.split(key, 2 + len(channels))
        start = fresh_hint(first, self.widths, axes, picture.shape[-1], c)
        start["out"] = fresh(last, *(3,) * axes, self.widths[-1], c)  # what follows starts at zero already
        maps = {}
        for (name, n), k in zip(channels.items(), keys, strict=True):
            maps[name], c = fresh(k, *(3,) * axes, c, n), n
        return {"hint": start, "dense": maps}

    def _pictures(
        self, site: Site, needed: tuple[str, ...] = (), channels: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """The conditions that are given, see `picture_of`.   Raises: ValueError: not a dict, unknown or needed names."""
        own = site.own
        if not isinstance(own, dict) or not set(needed) <= set(own) <= set(self.conditions):
            got = sorted(own) if isinstance(own, dict) else type(own).__name__
            raise ValueError(
                f"skip_tuner reads a dict of pictures under the adapter's name, any of {list(self.conditions)}"
                f"{', all of them at init' if needed else ''}; got {got}"
            )
        most, known = len(self.widths) - 1, channels or {}
        read = lambda n: picture_of(own[n], site.x, most, name=f"skip_tuner, {n},", channels=known.get(n))
        return {n: read(n) for n in self.conditions if n in own}


def skip_tuner(
    rank: int = 8,
    *,
    conditions: tuple[str, ...] = (),
    scales: tuple[float, ...] = (),
    widths: tuple[int, ...] = (16, 32, 96, 256),
    stop: bool = False,
) -> SkipTuner:
    """Bottlenecks on the skips of a U-Net.   s_k' = s_k + w sum_m a_m U act(D (s_k + g_k(c_m))),  D [c, r], U from zero

    Without conditions there is one sum term, of s_k alone. With them it reads a dict of pictures in the condition under its
    name, any of those it knows; their encoders end in a cascade of convolutions, one for each skip. Only the decoder lies
    between what is trained and the loss, so that the backward pass leaves the encoder out.
    Args: rank: r >= 1.   conditions: names m of pictures.   scales: a_m, default ones.   widths: channels of the encoders of
        pictures, see `controlnet`.   stop: cut the gradient at the skips and the bottleneck, so that also parameters and
        inputs of the encoder have none; not for guidance by gradients with respect to the state.
    Raises: ValueError: out of range; at init and later, not a U-Net, pictures that are unknown or do not fit.

    Example:
        >>> skip_tuner(4, conditions=("edge",)).rank
        4

    Reference: Jiang et al. 2023, arXiv:2312.11392 (SC-Tuner and CSC-Tuner).
    """
    if rank < 1 or not widths or min(widths) < 1 or len(scales) not in (0, len(conditions)):
        raise ValueError(
            f"skip_tuner needs rank >= 1, widths >= 1 and scales for none or all conditions; got rank={rank}, widths={widths}, "
            f"conditions={conditions}, scales={scales}"
        )
    return SkipTuner(rank, tuple(conditions), tuple(map(float, scales)), tuple(widths), stop)


def _skips(site: Site) -> dict[str, Any]:
    """Shapes of the skips, in the order in which they were made."""
    return site.shapes(*outputs(encoder(site.base))[:-1])


def _cascade(p: PyTree, picture: Any, halvings: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """The picture's features at every skip, each made of those before it."""
    g, found = hint(p["hint"], picture, halvings), {}
    for name, like in shapes.items():
        stride = g.shape[1] // like.shape[1]
        g = found[name] = conv(p["dense"][name], jax.nn.silu(g), stride)
    return found
