"""Pictures as conditions of a transformer: a branch of condition tokens, whose keys and values the network reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.adapters.attention import attentions, located
from diffjax.adapters.core import Change, Site, added
from diffjax.adapters.told import form_of
from diffjax.networks.attention import logits_of, softmax, weighted
from diffjax.networks.conditions import FIELDS, null_condition
from diffjax.networks.functional import FromLinen
from diffjax.networks.layers import fan_in_uniform
from diffjax.networks.taps import per_layer, tapped
from diffjax.numerics import PyTree
from diffjax.training.partial import nested
from diffjax.training.patterns import checked


@dataclasses.dataclass(frozen=True)
class EasyControl:
    """See `easy_control`."""

    rank: int
    time: float
    targets: str

    def init(self, key: Any, site: Site) -> PyTree:
        """`{attention: {"down" [3, d, r], "up" [3, r, H, D], "gate"}}`, `up` and `gate` from zero."""
        check_picture(site)
        fresh = {}
        for i, (path, (layers, heads, features)) in enumerate(attentions(site, self.targets).items()):
            d = heads * features
            fresh[path + "/down"] = fan_in_uniform(d)(jax.random.fold_in(key, i), (*layers, 3, d, self.rank))
            fresh[path + "/up"] = jnp.zeros((*layers, 3, self.rank, heads, features))
            fresh[path + "/gate"] = jnp.zeros(layers)
        return nested(fresh)

    def cache(self, params: PyTree, site: Site) -> dict[str, Any]:
        """Keys and values of the condition tokens in every attention, the same at all times.

        Its result may stand in the condition in the place of the picture. Args: site: its `own` is the picture.
        Returns: {attention: (k, v)} of [B, S, H, D], [B, layers, S, H, D] where layers are scanned.
        """
        if isinstance(site.own, dict):
            check_cache(site.own, located(params), site.x.shape[0])
            return site.own
        check_picture(site)
        at = located(params)
        net, patches = branch(site)
        base = added(site.base, {f"{path}/qkv/kernel": low_rank(p) for path, p in at.items()})
        names = [f"{path}/{kind}" for path in at for kind in "kv"]
        cond = nothing(net.module, site.own)
        t = jnp.full(site.own.shape[:1], self.time, jnp.float32)
        read = tapped(net, read=names)(base, site.own, t, cond)[1]
        first = lambda a: a[..., :patches, :, :] if a.ndim == 4 else jnp.moveaxis(a[..., :patches, :, :], 0, 1)
        return {path: tuple(first(read[f"{path}/{kind}"]) for kind in "kv") for path in at}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """Attention to the condition tokens too."""
        cache, around = self.cache(params, site), {}
        for path, own in located(params).items():
            gate = own["gate"] if weight is None else own["gate"] * jnp.asarray(weight, own["gate"].dtype)
            k, v = (jnp.moveaxis(a, 1, 0) if gate.ndim else a for a in cache[path])
            beside = Beside(((k, v, gate),), scanned=gate.ndim > 0)
            around[f"{path}.mix"] = per_layer(beside) if gate.ndim else beside
        return Change(around=around)


def easy_control(rank: int = 4, *, time: float = 0.0, targets: str = r"(^|/)attention$") -> EasyControl:
    """A picture as further tokens of a transformer, whose keys and values the network's tokens attend to.

    The picture runs through the frozen network as a clean state, at a fixed time, without any condition, with W + B A in the
    place of the kernels W of q, k and v; so its tokens attend to themselves alone, and their keys K_c and values V_c are those of
    every step. The network's own tokens attend to all, the picture's with attention weights times a gate:

    y = (exp(Q K^T) V + g exp(Q K_c^T) V_c) / (sum exp(Q K^T) + |g| sum exp(Q K_c^T)),   B and g from zero

    g = 1 is plain attention to all tokens; several of these adapters share one denominator, in any order. Its condition is
    the picture [B, h, w, C] with the state's channels; where it is smaller than the state, its positions are stretched to
    the state's. What `adapt(...).cache(params, x, t, cond)` returns has the keys and values in the picture's place, to be
    computed once for all steps.
    Args: rank: of A and B, for each of q, k and v.   time: the time code at which a picture is clean.   targets: regular
        expression of the attentions, of the network's tokens to each other.
    Several of them commute; what `parallel_attention` adds at the same attention is added to y, in whatever order they are given.
    Raises: ValueError: rank < 1; at init, targets that name none, a picture of another form, one that patches do not tile.

    Example:
        >>> easy_control(rank=8).time
        0.0

    Reference: Zhang et al. 2025, arXiv:2503.07027 (there without the gate, g = 1).
    """
    if rank < 1:
        raise ValueError(f"easy_control needs rank >= 1; got {rank}")
    checked("targets", targets)
    return EasyControl(rank, float(time), targets)


@dataclasses.dataclass(frozen=True, eq=False)
class Beside:
    """Around the mixing of an attention: further keys and values, each with a gate.   parts: ((k, v, gate), ...)"""

    parts: tuple[tuple[Any, Any, Any], ...]
    scanned: bool = False  # its parts are those of all layers, and it is called with the layer first

    def __call__(self, *args: Any) -> Any:
        """The mixed values of all keys."""
        if self.scanned:
            layer, *args = args
            return Beside(jax.tree.map(lambda a: a[layer], self.parts))(*args)
        return self._mix(*args)

    def _mix(self, call: Any, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any) -> Any:
        y = call(q, k, v, mask, *rest)
        logits = logits_of(q, k)
        if mask is not None:
            masked = logits + mask.astype(logits.dtype) if mask.ndim == 4 else None
            logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf) if masked is None else masked
        sizes, means = [jax.nn.logsumexp(logits, axis=-1)], []
        for key, value, _ in self.parts:
            logits = logits_of(q, key.astype(q.dtype))
            sizes.append(jax.nn.logsumexp(logits, axis=-1))
            means.append(weighted(softmax(logits), value.astype(v.dtype)))
        own, *more = jax.nn.softmax(jnp.stack(sizes), axis=0)  # sums of exponentials [B, H, T], up to a common factor
        gates = [gate for _, _, gate in self.parts]
        total = own + sum(jnp.abs(gate) * z for gate, z in zip(gates, more, strict=True))
        shares = [(gate * z / total).transpose(0, 2, 1)[..., None] for gate, z in zip(gates, more, strict=True)]
        return y + sum(share.astype(y.dtype) * (mean - y) for share, mean in zip(shares, means, strict=True))

    def joined(self, other: Beside) -> Beside:
        """Both at once, with one denominator."""
        return Beside(self.parts + other.parts, self.scanned)


@dataclasses.dataclass(frozen=True)
class Stretched:
    """Positions of a smaller grid in those of a larger one: place i of n is at i N / n, between two places linearly.

    Args: table: of positions, or angles.   height, width: of the larger grid.   Args and result of a call: those of `table`.

    Example:
        >>> from diffjax.networks.positions import Rope
        >>> float(Stretched(Rope(), 2, 4)(1, 2, 8)[1, 2])  # column 1 of 2 is column 2 of 4
        2.0

    Reference: Zhang et al. 2025, arXiv:2503.07027 (position-aware interpolation).
    """

    table: Any
    height: int
    width: int

    def __call__(self, height: int, width: int, size: int) -> jax.Array:
        """The table of the smaller grid."""
        whole = jnp.asarray(self.table(self.height, self.width, size)).reshape(self.height, self.width, -1)
        weights = [
            np.maximum(0, 1 - abs(np.arange(n)[:, None] * (m / n) - np.arange(m)[None])).astype(np.float32)
            for n, m in ((height, self.height), (width, self.width))
        ]
        return jnp.einsum("ih,jw,hws->ijs", *weights, whole).reshape(height * width, -1)


def branch(site: Site) -> tuple[FromLinen, int | None]:
    """The network for the picture, with the positions of its grid, and how many tokens it has (None: all)."""
    module = site.net.module
    p = getattr(module, "patch", None)
    if p is None:
        return site.net, None
    (h, w), large = ([n // p for n in a.shape[1:3]] for a in (site.own, site.x))
    stretched = {
        name: Stretched(getattr(module, name), *large)
        for name in ("positions", "rope")
        if [h, w] != large and getattr(module, name, None) is not None
    }
    return FromLinen(module.clone(**stretched)) if stretched else site.net, h * w


def nothing(module: Any, x: Any) -> Any:
    """No condition, of the kinds that a network takes, for the batch of x."""
    sizes = {field: getattr(module, field, 0) for field in FIELDS.values()}
    channels = sizes.pop("image_channels")
    null = null_condition(**sizes, image_shape=(*x.shape[1:-1], channels) if channels else None)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (x.shape[0], *np.shape(a))), null)


def low_rank(params: dict[str, Any]) -> jax.Array:
    """B A of q, k and v as one kernel, its columns by head, then kind, see `attention.per_head`.   [d, 3 d]"""
    whole = jnp.einsum("...kdr,...krhe->...dhke", params["down"], params["up"])
    return whole.reshape(*whole.shape[:-3], -1)


def check_cache(cache: dict[str, Any], at: dict[str, dict[str, Any]], items: int) -> None:
    """Refuse what is no cache of this adapter for this batch.   at: its parameters, see `located`.   Raises: ValueError."""
    anew = "Make it anew by adapt(...).cache(params, x, t, cond) with the picture in the condition"
    if set(cache) != set(at):
        raise ValueError(
            "easy_control reads a picture, or a cache of keys and values by attention; got a dict of "
            f"{sorted(map(str, cache))[:4]} where this adapter has {sorted(at)[:4]}, of another adapter. {anew}"
        )
    tokens = set()
    for path, own in at.items():
        lead, heads = (items, *own["gate"].shape), own["up"].shape[-2:]
        pair = cache[path] if isinstance(cache[path], (tuple, list)) else ()
        shapes = [tuple(getattr(a, "shape", ())) for a in pair]
        if len(shapes) != 2 or shapes[0] != shapes[1] or (*shapes[0][1:-3], *shapes[0][-2:]) != (*lead[1:], *heads):
            raise ValueError(
                f"the cache has {form_of(pair)} of {path}, where this adapter needs keys and values {[*lead, 'S', *heads]}: it "
                f"is of another network. {anew}"
            )
        if shapes[0][0] != items:
            raise ValueError(
                f"the cache is of a batch of {shapes[0][0]}, the state has {items} items: keys of {path} are "
                f"{list(shapes[0])}. {anew}"
            )
        tokens.add(shapes[0][-3])
    if len(tokens) > 1:
        raise ValueError(f"the cache has keys of {sorted(tokens)} tokens, of different pictures in one. {anew}")


def check_picture(site: Site) -> None:
    """Refuse what is no picture for this network.   Raises: ValueError."""
    if not hasattr(site.net, "module"):
        raise ValueError("easy_control runs the network on its picture, so it needs a from_linen network")
    p = getattr(site.net.module, "patch", 1)
    x, own = site.x, site.own
    shape = getattr(own, "shape", ())
    batch, channels = x.shape[0], x.shape[-1]
    fits = len(shape) == x.ndim and (shape[0], shape[-1]) == (batch, channels)
    fits = fits and jnp.issubdtype(own.dtype, jnp.floating)
    if not fits or any(n % p for n in shape[1:-1]):
        raise ValueError(
            f"easy_control reads a picture [{batch}, h, w, {channels}] of floats from the condition under its name, "
            f"with h and w divisible by {p}, or what `cache` made of it; got {form_of(own)}"
        )
