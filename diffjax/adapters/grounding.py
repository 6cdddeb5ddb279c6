"""Objects at places: tokens of what is where, to which the places of a picture attend through a gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.adapters.attention import attentions, fresh_mlp, located, mlp, read_tokens
from diffjax.adapters.copies import encoder, features, outputs
from diffjax.adapters.core import Change, Site, strength
from diffjax.adapters.maps import dense, zero
from diffjax.adapters.told import check_names, form_of
from diffjax.networks.attention import logits_of, softmax, weighted
from diffjax.networks.embeddings import sinusoids
from diffjax.networks.layers import fan_in_uniform, plain_norm
from diffjax.networks.taps import per_layer, tapped
from diffjax.numerics import PyTree
from diffjax.training.partial import nested
from diffjax.training.patterns import checked

RADIANS = (1.0, 100.0)  # from the slowest to the fastest sinusoid over the whole picture


@dataclasses.dataclass(frozen=True)
class Grounding:
    """See `grounding`."""

    hidden: int
    frequencies: int
    targets: str

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"tokens": ..., "at": {block: {"query", "key_value", "out", "objects", "gate"}}}`, `gate` from zero."""
        return {"tokens": self.fresh_tokens(key, site), "at": self.fresh_layers(key, site)}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The gated attention after each block."""
        return Change(write=self.writers(params, site, weight))

    def fresh_tokens(self, key: Any, site: Site) -> PyTree:
        """Parameters of the tokens: an MLP, and what it reads where there is no object."""
        size, n = read_objects(site.own, site.x)[0].shape[-1], 8 * self.frequencies
        net = fresh_mlp(key, size + n, self.hidden, self.hidden)
        return {"mlp": net, "no_word": jnp.zeros(size), "no_box": jnp.zeros(n)}

    def fresh_layers(self, key: Any, site: Site) -> PyTree:
        """Parameters of the attentions, by the path of the block."""
        fresh = {}
        for i, (path, (layers, heads, size)) in enumerate(attentions(site, self.targets).items()):
            d, at = heads * size, path.removesuffix("attention") + "block/"
            keys = jax.random.split(jax.random.fold_in(key, i), 4)
            fresh[at + "query"] = fan_in_uniform(d)(keys[0], (*layers, d, heads, size))
            fresh[at + "key_value"] = fan_in_uniform(d)(keys[1], (*layers, 2, d, heads, size))
            fresh[at + "out"] = fan_in_uniform(d)(keys[2], (*layers, heads, size, d))
            fresh[at + "objects"] = fan_in_uniform(self.hidden)(keys[3], (*layers, self.hidden, d))
            fresh[at + "gate"] = jnp.zeros(layers)
        return nested(fresh)

    def writers(self, params: PyTree, site: Site, weight: Any = None) -> dict[str, Any]:
        """The writers of the taps after blocks."""
        own = read_objects(site.own, site.x, params["tokens"]["no_word"].shape[0])
        tokens = objects(params["tokens"], *own, self.frequencies)
        plain = lambda own: lambda v: v + strength(attended(own, v, tokens), weight)

        def writer(own: dict[str, Any]) -> Any:
            if own["gate"].ndim == 0:
                return plain(own)
            return per_layer(lambda v, layer: plain(jax.tree.map(lambda a: a[layer], own))(v))

        return {path: writer(own) for path, own in located(params["at"]).items()}


def grounding(*, hidden: int = 64, frequencies: int = 8, targets: str = r"(^|/)attention$") -> Grounding:
    """Gated attention to tokens of objects after each block that has attention.   v' = v + w tanh(g) attend(v, [v, u])

    u_n = MLP([word_n, sin and cos of the numbers of box_n]), with a learned word and box where there is no object; g from zero.
    Its condition is `{"tokens": words [B, N, n], "boxes": [B, N, 4] in [0, 1]}`, with an optional `mask` [B, N] bool (False is
    no object). The published place is inside the block, before its attention to text; here it is after the block, so that it
    works for every network whose blocks end in a tap.
    Args: hidden: size of the MLP and of its tokens.   frequencies: of each of the four numbers of a box.   targets: regular
        expression of the attentions after whose blocks it is.
    Raises: ValueError: out of range; at init, targets that name no attention; a condition of another form.

    Example:
        >>> grounding(hidden=32).frequencies
        8

    Reference: Li et al. 2023, arXiv:2301.07093 (grounding tokens, gated self-attention).
    """
    if hidden < 1 or frequencies < 1:
        raise ValueError(f"hidden and frequencies must be at least 1; got {hidden} and {frequencies}")
    checked("targets", targets)
    return Grounding(hidden, frequencies, targets)


@dataclasses.dataclass(frozen=True)
class GroundedControl:
    """See `grounded_control`."""

    hidden: int
    frequencies: int

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"copy": of the encoder, "tokens", "at": of `grounding` in it, "zero": {tap: 1x1 convolution}}`."""
        copy, own = encoder(site.base), self.reading
        shapes = site.shapes(*outputs(copy))
        return {
            "copy": jax.tree.map(jnp.array, copy),
            "tokens": own.fresh_tokens(key, site),
            "at": own.fresh_layers(key, site),
            "zero": {name: zero(a.shape[-1], a.shape[-1]) for name, a in shapes.items()},
        }

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """y' = y + w Z(y_copy) for the skips and the bottleneck y."""
        reading = tapped(site.net, write=self.reading.writers(params, site))
        found = features(site._replace(net=reading), params["copy"], {})
        more = {name: strength(dense(params["zero"][name], value), weight) for name, value in found.items()}
        add: Callable[[Any], Any] = lambda a: lambda value: value + a
        return Change(write={name: add(a) for name, a in more.items()})

    @property
    def reading(self) -> Grounding:
        """How the copy reads the objects."""
        return Grounding(self.hidden, self.frequencies, r"^(down|middle)_.*attention$")


def grounded_control(*, hidden: int = 64, frequencies: int = 8) -> GroundedControl:
    """A trainable copy of a U-Net's encoder that reads objects and their boxes.   y' = y + w Z(F(x; copy, objects)), Z from zero

    The copy is that of `controlnet`, but without a picture: it reads the condition of `grounding` by gated attention after
    its blocks, and what it hands to its decoder is added to the skips and the bottleneck of the frozen network.
    Args: hidden, frequencies: see `grounding`.
    Raises: ValueError: out of range; at init, not a U-Net, no attention in its encoder; a condition of another form.

    Example:
        >>> grounded_control(hidden=32).hidden
        32

    Reference: Suleyman & Biricik 2025, arXiv:2501.09194.
    """
    if hidden < 1 or frequencies < 1:
        raise ValueError(f"hidden and frequencies must be at least 1; got {hidden} and {frequencies}")
    return GroundedControl(hidden, frequencies)


def objects(params: PyTree, words: Any, boxes: Any, mask: Any, frequencies: int) -> jax.Array:
    """Tokens of objects.   [B, N, n], [B, N, 4], [B, N] -> [B, N, hidden]"""
    places = sinusoids(boxes, 2 * frequencies, RADIANS).reshape(*boxes.shape[:2], -1).astype(words.dtype)
    there = mask[..., None]
    words = jnp.where(there, words, params["no_word"].reshape(1, 1, -1))
    places = jnp.where(there, places, params["no_box"].reshape(1, 1, -1))
    return mlp(params["mlp"], jnp.concatenate([words, places], axis=-1))


def attended(own: dict[str, Any], v: Any, tokens: Any) -> jax.Array:
    """tanh(g) attend(norm(v), [norm(v), tokens]).   [B, *n, d], [B, N, hidden] -> [B, *n, d]"""
    own = {name: a.astype(v.dtype) for name, a in own.items()}
    h = plain_norm(v.reshape(v.shape[0], -1, v.shape[-1]))
    all_of = jnp.concatenate([h, plain_norm(tokens.astype(v.dtype) @ own["objects"])], axis=1)
    q = jnp.einsum("btd,dhe->bthe", h, own["query"]) * own["query"].shape[-1] ** -0.5
    k, value = jnp.einsum("bsd,ndhe->nbshe", all_of, own["key_value"])
    y = weighted(softmax(logits_of(q, k)), value)
    y = jnp.einsum("bthe,hed->btd", y, own["out"])
    return jnp.tanh(own["gate"]) * y.reshape(v.shape)


def read_objects(own: Any, x: Any, size: int | None = None) -> tuple[Any, Any, Any]:
    """Words, boxes and mask of what is told about objects.   size: of words.   Raises: ValueError: another form."""
    check_names(own, "this adapter", ("tokens", "boxes"), ("mask",))
    words, mask = read_tokens({name: own.get(name) for name in ("tokens", "mask")}, x, size=size)
    boxes, wanted = own["boxes"], (*words.shape[:2], 4)
    if getattr(boxes, "shape", None) != wanted or not jnp.issubdtype(boxes.dtype, jnp.floating):
        raise ValueError(f"boxes must be floats {list(wanted)}; got {form_of(boxes)}")
    return words, jnp.asarray(boxes), jnp.ones(words.shape[:2], bool) if mask is None else mask
