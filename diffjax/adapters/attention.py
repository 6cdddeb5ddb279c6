"""Adapters of attention: a branch beside it that reads tokens of its own, and other values under its own attention map.

They change how a module of attention mixes its values (`PATH.mix`), by layer where layers are scanned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.adapters.core import Change, Site, strength
from diffjax.adapters.maps import dense, fresh
from diffjax.adapters.told import check_names, form_of
from diffjax.networks.attention import logits_of, softmax, weighted
from diffjax.networks.layers import at_least_float32, fan_in_uniform, plain_norm
from diffjax.networks.taps import per_layer, tap_names
from diffjax.numerics import PyTree
from diffjax.training.partial import named, nested
from diffjax.training.patterns import checked, pattern


@dataclasses.dataclass(frozen=True)
class ParallelAttention:
    """See `parallel_attention`."""

    hidden: int
    targets: str

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"at": {attention: {"key", "value"}}, "encoder": ...}`, `value` from zero."""
        tokens, _ = read_tokens(site.own, site.x)
        size, encoder = tokens.shape[-1], {}
        if self.hidden:
            encoder = {"encoder": fresh_mlp(key, size, self.hidden, self.hidden)}
            size = self.hidden
        at = {}
        for i, (path, (layers, heads, features)) in enumerate(attentions(site, self.targets).items()):
            shape = (*layers, size, heads, features)
            at[path + "/key"] = fan_in_uniform(size)(jax.random.fold_in(key, i), shape)
            at[path + "/value"] = jnp.zeros(shape)
        return {**encoder, "at": nested(at)}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """Attention with the branch beside it."""
        first = params["encoder"]["0"]["kernel"] if self.hidden else leading(params["at"])
        tokens, mask = read_tokens(site.own, site.x, size=first.shape[-2 if self.hidden else -3])
        if self.hidden:
            tokens = plain_norm(mlp(params["encoder"], tokens))

        def mix(at: Any, call: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
            key, value = (heads_of(tokens, at[name], q.dtype) for name in ("key", "value"))
            branch = weighted(softmax(logits_of(q, key), mask), value)
            return call(q, k, v, *rest) + strength(branch, weight)

        return Change(around=mixing(params["at"], mix))


def parallel_attention(*, hidden: int = 0, targets: str = "") -> ParallelAttention:
    """A branch beside attention that attends to tokens of its own, such as features of reference pictures.

    y = softmax(Q K^T / sqrt(D)) V + w softmax(Q K'^T / sqrt(D)) V',   K' = e W'_k,  V' = e W'_v,  W'_v from zero

    Its condition are the tokens e [B, S, n], or `{"tokens": [B, S, n], "mask": [B, S] bool}` (False is not attended to); with
    all masked the network is unchanged.
    Args: hidden: with h > 0 an encoder of each token is trained too, e = norm(W_2 gelu(W_1 token + b_1) + b_2) of size h.
        targets: regular expression of the attentions, default those to tokens (`cross`), or all if there are none.
    Raises: ValueError: negative hidden; at init, targets that name no attention; tokens of another form.

    Example:
        >>> parallel_attention(hidden=64).hidden
        64

    Reference: Xu et al. 2023, arXiv:2312.03556 (parallel visual attention); Ye et al. 2023, arXiv:2308.06721 (decoupled
    cross-attention).
    """
    if hidden < 0:
        raise ValueError(f"hidden must be at least 0; got {hidden}")
    checked("targets", targets)
    return ParallelAttention(hidden, targets)


@dataclasses.dataclass(frozen=True)
class ValueMixing:
    """See `value_mixing`."""

    targets: str

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"at": {attention: {"value"}}, "lift" [N, S], "zero" [n, n]}`, `zero` from zero."""
        tokens, _ = read_tokens(site.own, site.x)
        n, size = tokens.shape[1:]
        found = attentions(site, self.targets)
        counts = {k.shape[-3] for k in site.shapes(*(path + "/k" for path in found)).values()}
        if len(counts) != 1:
            raise ValueError(
                f"value mixing gives each key a second value, so the attentions must have equally many keys; {sorted(found)} "
                f"have {sorted(counts)}. Choose by targets"
            )
        at = {}
        for i, (path, (layers, heads, features)) in enumerate(found.items()):
            shape = (*layers, size, heads, features)
            at[path + "/value"] = fan_in_uniform(size)(jax.random.fold_in(key, i), shape)
        lift = fan_in_uniform(n)(jax.random.fold_in(key, len(found)), (n, counts.pop()))
        return {"at": nested(at), "lift": lift, "zero": jnp.zeros((size, size))}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """Attention whose map has mixed a second set of values too."""
        length, size = params["lift"].shape[0], params["zero"].shape[0]
        tokens, _ = read_tokens(site.own, site.x, length, size)  # zero where they are padding
        lifted = jnp.einsum("bne,ns->bse", tokens, params["lift"])
        features = plain_norm(lifted) @ params["zero"]

        def mix(at: Any, call: Any, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any) -> Any:
            value = heads_of(features, at["value"], q.dtype)
            branch = weighted(softmax(logits_of(q, k), mask), value)
            return call(q, k, v, mask, *rest) + strength(branch, weight)

        return Change(around=mixing(params["at"], mix))


def value_mixing(*, targets: str = "") -> ValueMixing:
    """Other values under the attention map of the network: attributes that do not change what is attended to.

    A = softmax(Q K^T / sqrt(D)),  y = A V + w A V',  V' = f W',  f = norm(L e) Z,  Z from zero

    Its condition are embeddings e [B, N, n] of the labels of attributes, or `{"tokens": ..., "mask": [B, N] bool}`; L takes N
    embeddings to as many as the attention has keys.
    Args: targets: regular expression of the attentions, default those to tokens (`cross`), or all if there are none.
    Raises: ValueError: at init, targets that name no attention or some of different numbers of keys.

    Example:
        >>> value_mixing(targets="cross$").targets
        'cross$'

    Reference: Wu et al. 2024, arXiv:2412.20800 (value-mixed cross-attention).
    """
    checked("targets", targets)
    return ValueMixing(targets)


# ------------------------------------------------------------------------------------------------------- in common


def attentions(site: Site, targets: str = "") -> dict[str, tuple[tuple[int, ...], int, int]]:
    """The attentions of a network by path: the number of scanned layers or (), of heads, and of features of a head.

    Args: targets: regular expression of paths; default those that end in `cross`, or all if there are none.
    Raises: ValueError: it names none.
    """
    names = tap_names(site.net, site.base, site.x, site.t, site.cond, site.key)
    paths = [name[:-2] for name in names if name.endswith("/q")]
    chosen = [path for path in paths if pattern(targets or "cross$", "targets").search(path)] or (
        [] if targets else paths
    )
    if not chosen:
        raise ValueError(f"targets={targets!r} names no attention of the network; it has {paths or 'none'}")
    shapes = site.shapes(*(path + "/q" for path in chosen))
    return {name[:-2]: (tuple(q.shape[:-4]), *q.shape[-2:]) for name, q in shapes.items()}


def located(at: PyTree) -> dict[str, dict[str, Any]]:
    """Parameters by the path of the module that they belong to.   {path: {name: array}}"""
    found: dict[str, dict[str, Any]] = {}
    for name, a in named(at):
        path, _, last = name.rpartition("/")
        found.setdefault(path, {})[last] = a
    return found


def mixing(at: PyTree, f: Callable[..., Any]) -> dict[str, Any]:
    """What `Change.around` takes: `f(parameters, call, q, k, v, ...)` around the mixing of each attention.

    Args: at: kernels [n, H, D] by path, [layers, n, H, D] where layers are scanned.
    """

    def one(own: dict[str, Any]) -> Any:
        if next(iter(own.values())).ndim == 3:
            return lambda call, *args: f(own, call, *args)
        return per_layer(lambda layer, call, *args: f({n: a[layer] for n, a in own.items()}, call, *args))

    return {f"{path}.mix": one(own) for path, own in located(at).items()}


def heads_of(tokens: Any, kernel: Any, dtype: Any) -> jax.Array:
    """Tokens as keys or values.   [B, S, n], [n, H, D] -> [B, S, H, D]"""
    return jnp.einsum("bsn,nhd->bshd", tokens, kernel).astype(dtype)


def fresh_mlp(key: Any, *sizes: int) -> PyTree:
    """Parameters of `mlp` of these sizes.   {"0": {"kernel", "bias"}, "1": ...}"""
    layers = zip(sizes[:-1], sizes[1:], jax.random.split(key, len(sizes) - 1), strict=True)
    return {str(i): fresh(k, n, m) for i, (n, m, k) in enumerate(layers)}


def mlp(params: PyTree, x: Any) -> jax.Array:
    """Dense layers with gelu between them.   [..., n] -> [..., m]"""
    for i in range(len(params)):
        x = dense(params[str(i)], jax.nn.gelu(x) if i else x)
    return x


def leading(at: PyTree) -> Any:
    """The first of some arrays."""
    return jax.tree.leaves(at)[0]


def read_tokens(own: Any, x: Any, length: int | None = None, size: int | None = None) -> tuple[Any, Any]:
    """The tokens of an adapter, at least float32 and zero where they are padding, and their mask or None.

    Args: length, size: of tokens that the adapter was made for.
    Raises: ValueError: another form.
    """
    if isinstance(own, dict):
        check_names(own, "this adapter", ("tokens",), ("mask",))
    tokens = own["tokens"] if isinstance(own, dict) else own
    mask = own.get("mask") if isinstance(own, dict) else None
    shape = np.shape(tokens) if hasattr(tokens, "dtype") else ()
    fits = len(shape) == 3 and shape[0] == x.shape[0] and length in (None, shape[1]) and size in (None, shape[2])
    if not fits or not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise ValueError(
            f"this adapter reads tokens [{x.shape[0]}, {length or 'S'}, {size or 'n'}] of floats from the condition under its "
            f"name, or a dict of `tokens` and `mask`; got {form_of(tokens)}"
        )
    if mask is not None and (np.shape(mask) != shape[:2] or str(getattr(mask, "dtype", "")) != "bool"):
        raise ValueError(f"the mask of tokens must be bool {list(shape[:2])}; got {form_of(mask)}")
    tokens = jnp.asarray(tokens).astype(at_least_float32(tokens.dtype))
    return (tokens, None) if mask is None else (jnp.where(mask[..., None], tokens, 0.0), jnp.asarray(mask))
