"""DivControl: a ControlNet for many kinds of pictures, in rank-one parts of which some are gated by the kind."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.adapters.copies import Blocks, patched
from diffjax.adapters.core import Change, Site, strength
from diffjax.adapters.maps import dense, zero
from diffjax.adapters.told import check_names, form_of
from diffjax.networks.taps import per_layer
from diffjax.numerics import PyTree
from diffjax.training.partial import named, nested

MATRICES = re.compile(r"^block(s|_\d+)/((attention|cross)/(qkv|q_in|kv|out)|hidden|out)/kernel$")


@dataclasses.dataclass(frozen=True)
class Diversion:
    """See `diversion`."""

    blocks: int
    tailors: int
    active: int

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"learngenes", "tailors": {path: {"u", "s", "v"}}, "rest", "gate", "in", "zero"}`."""
        net, (picture, instruction) = self._read(site)
        width = site.base["in"]["kernel"].shape[-1]
        copy = dict(named(net.copied(site.base)))
        parts = {path: components(a) for path, a in copy.items() if MATRICES.match(path)}
        ranks = {p["s"].shape[-1] for p in parts.values()}
        if min(ranks) <= self.tailors:
            raise ValueError(f"tailors must be less than the rank of each matrix, {min(ranks)}; got {self.tailors}")

        def cut(*ends: int | None) -> PyTree:
            own = slice(*ends)
            take = lambda p: {"u": p["u"][..., own], "s": p["s"][..., own], "v": p["v"][..., own, :]}
            return nested({f"{path}/{name}": a for path, p in parts.items() for name, a in take(p).items()})

        return {
            "learngenes": cut(None, -self.tailors),
            "tailors": cut(-self.tailors, None),
            "rest": nested({path: jnp.array(a) for path, a in copy.items() if path not in parts}),
            "gate": zero(instruction.shape[-1], self.tailors),
            "in": zero(picture.shape[-1], width),
            "zero": jax.tree.map(lambda a: jnp.zeros((self.blocks, *a.shape)), zero(width, width)),
        }

    def gates(self, params: PyTree, instruction: Any) -> jax.Array:
        """How much of each tailor an instruction asks for, one on average.   [B, e] -> [B, tailors]"""
        share = jax.nn.softmax(dense(params["gate"], jnp.asarray(instruction)), axis=-1)
        if self.active < self.tailors:
            best, chosen = jax.lax.top_k(share, self.active)
            share = (best[..., None] * jax.nn.one_hot(chosen, self.tailors, dtype=share.dtype)).sum(-2)
        return self.tailors * share

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """z_i' = z_i + w Z_i(z_i of the copy with the matrices of each item's instruction) after block i."""
        net, (picture, instruction) = self._read(site, params)
        gate, seen = self.gates(params, instruction), dense(params["in"], picture)
        rest, around = dict(named(params["rest"])), {"in": lambda call, z: _joined(call(z), seen)}
        for path in _paths(params["learngenes"]):
            module = path.removesuffix("/kernel")
            own = (*(_at(params[kind], path) for kind in ("learngenes", "tailors")), rest.get(f"{module}/bias"))
            if net.scanned:
                around[module] = per_layer(lambda i, call, x, own=own: _applied(x, *_layer(own, i), gate))
            else:
                around[module] = lambda call, x, own=own: _applied(x, *own, gate)
        # the matrices of the base stand where those of the copy were: what is wrapped around them does not call them
        copy = nested({path: rest.get(path, a) for path, a in named(net.copied(site.base))})
        more = strength(jax.vmap(dense)(params["zero"], net.read(site, copy, around)), weight)
        return Change(write=net.writers(more))

    def matrices(self, params: PyTree, gate: Any) -> dict[str, jax.Array]:
        """W(c) = sum_{i < N_G} s_i u_i v_i^T + sum_k g_k s_k u_k v_k^T of each kernel.   gate: [tailors]"""
        product = lambda p, g: (p["u"] * (p["s"] * jnp.broadcast_to(g, p["s"].shape))[..., None, :]) @ p["v"]
        genes, tailors = params["learngenes"], params["tailors"]
        return {path: product(_at(genes, path), 1.0) + product(_at(tailors, path), gate) for path in _paths(genes)}

    def _read(self, site: Site, params: Any = None) -> tuple[Blocks, tuple[Any, Any]]:
        """The blocks, and the condition: patches of the picture [B, N, c], the instruction [B, e]."""
        net, own = Blocks.of(site, self.blocks), site.own
        check_names(own, "diversion", ("image", "instruction"))
        e, sizes = own["instruction"], [None, None]
        if params is not None:
            sizes = [params[name]["kernel"].shape[-2] for name in ("in", "gate")]
        shape, floats = np.shape(e), jnp.issubdtype(getattr(e, "dtype", int), jnp.floating)
        if not floats or len(shape) != 2 or shape[0] != len(site.x) or sizes[1] not in (None, shape[1]):
            raise ValueError(
                "diversion reads {'image': [B, H, W, c], 'instruction': [B, e]} in the condition under its name, floats with "
                f"B = {len(site.x)}{f' and e = {sizes[1]}' if sizes[1] else ''}; got instruction {form_of(e)}"
            )
        return net, (patched(site._replace(own=own["image"]), net.patch, sizes[0]), jnp.asarray(e))


def diversion(blocks: int, tailors: int, *, active: int | None = None) -> Diversion:
    """A copy of a transformer's first blocks that sees a picture of a told kind, in gated rank-one parts.

    W(c) = sum_{i < N_G} s_i u_i v_i^T + sum_{k < N_T} g_k(c) s_k u_k v_k^T,  g = N_T softmax(G(e)), z_i' = z_i + w Z_i(of the copy)

    The parts are those of the singular value decomposition of the base's matrices: the largest, the learngenes, are shared by
    all kinds; the smallest, the tailors, are gated by the embedding e of an instruction that says what the picture shows, with
    one vector of gates for all matrices. The gate starts at one, and so W(c) at W: the factor N_T is not in the paper, where
    s_k takes it up. q, k and v are one matrix here. Gates are those of each item, and no matrix is made for it. Its condition
    under its name is `{"image": [B, H, W, c], "instruction": [B, e]}`. A new kind is learned with
    `trainable="^adapters/NAME/(tailors|gate)/"`.
    Args: blocks: how many are copied, as for `control_transformer`.   tailors: N_T, less than the rank of each matrix.
        active: how many tailors an instruction asks for at most, default all; the others are at zero.
    Raises: ValueError: out of range; at init and later, another network, a condition that does not fit.

    Example:
        >>> diversion(2, 8, active=4).tailors
        8

    Reference: Xie et al. 2026, DivControl, Eq. 2 to 4.
    """
    active = tailors if active is None else active
    if blocks < 1 or not 1 <= active <= tailors:
        raise ValueError(
            f"diversion needs blocks >= 1 and 1 <= active <= tailors; got {blocks}, active={active}, tailors={tailors}"
        )
    return Diversion(blocks, tailors, active)


def components(kernel: Any) -> dict[str, jax.Array]:
    """A matrix as a sum of rank-one parts, the largest first.   W = (u s) v,  u [..., n, r], s [..., r], v [..., r, m]

    Example:
        >>> p = components(jnp.diag(jnp.array([1.0, 3.0])))
        >>> p["s"].tolist()
        [3.0, 1.0]
    """
    u, s, v = jnp.linalg.svd(jnp.asarray(kernel), full_matrices=False)
    return {"u": u, "s": s, "v": v}


def _applied(x: Any, genes: PyTree, tailors: PyTree, bias: Any, gate: Any) -> jax.Array:
    """x W(c) + b, each item with its gates.   [B, ..., n], gate [B, tailors] -> [B, ..., m]"""
    cast = lambda a: a.astype(x.dtype)
    flat = lambda a: cast(a).reshape((1,) * (x.ndim - 1) + (-1,))
    gated = cast(gate).reshape(gate.shape[:1] + (1,) * (x.ndim - 2) + gate.shape[1:])
    y = (x @ cast(genes["u"]) * flat(genes["s"])) @ cast(genes["v"])
    y = y + (x @ cast(tailors["u"]) * flat(tailors["s"]) * gated) @ cast(tailors["v"])
    return y if bias is None else y + flat(bias)


def _joined(h: Any, seen: Any) -> jax.Array:
    return h + seen.astype(h.dtype)


def _layer(tree: PyTree, i: Any) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _paths(parts: PyTree) -> list[str]:
    return [path.removesuffix("/s") for path, _ in named(parts) if path.endswith("/s")]


def _at(tree: PyTree, path: str) -> PyTree:
    for name in path.split("/"):
        tree = tree[name]
    return tree
