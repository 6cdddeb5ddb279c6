"""Multi-head attention, used by all networks: of a sequence to itself, or to the tokens of a condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.layers import Dense, Initializer, RMSNorm, at_least_float32, fan_in_uniform
from diffjax.networks.partition import constrain
from diffjax.networks.positions import rotate
from diffjax.networks.taps import Tap

# How queries, keys and values are mixed, inside a module: (q / sqrt(D), k, v [B, T or S, H, D], mask [B, S] or None,
# height and width of the grid of tokens or None) -> [B, T, H, D]
Mixing = Callable[[Any, Any, Any, Any, Any], Any]
MATMUL_LENGTH = 256  # up to this many queries, heads-first matrix products beat einsum on a CPU


def logits_of(q: Any, k: Any) -> jax.Array:
    """`q k^T` per head, in float32.   [B, T, H, D], [B, S, H, D] -> [B, H, T, S]"""
    if q.shape[1] <= MATMUL_LENGTH:
        q, k = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1)
        return jnp.matmul(q, k, preferred_element_type=at_least_float32(q.dtype))
    return jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=at_least_float32(q.dtype))


def weighted(weights: Any, v: Any) -> jax.Array:
    """The values, mixed per head.   [B, H, T, S], [B, S, H, D] -> [B, T, H, D]"""
    if weights.shape[2] <= MATMUL_LENGTH:
        return (weights.astype(v.dtype) @ v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    return jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)


def softmax(logits: Any, mask: Any = None) -> jax.Array:
    """Softmax over the last axis of what `mask` lets through; all zeros where it lets nothing through.

    Args: logits: [B, H, T, S].   mask: [B, S] bool, a bias of the logits [B, H, T, S], or None.

    Example:
        >>> softmax(jnp.zeros((1, 1, 1, 2)), jnp.array([[True, False]])).ravel().tolist()
        [1.0, 0.0]
    """
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    if mask.ndim == 4:
        return jax.nn.softmax(logits + mask.astype(logits.dtype), axis=-1)
    mask = mask[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min), axis=-1)
    return jnp.where(mask, weights, jnp.zeros((), weights.dtype))


def per_head(heads: int, n: int) -> Initializer:
    """The initialiser of a kernel whose columns are sorted by head, then by kind (q, k, v).   [d, heads n D]

    So a cut of the columns into equal parts gives each device whole heads with all they need, and no message is sent
    between the projection and the attention.
    Args: heads: of the attention.   n: kinds that share the kernel.

    Reference: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        kernel = fan_in_uniform()(key, shape, dtype)
        return kernel.reshape(shape[0], n, heads, -1).swapaxes(1, 2).reshape(shape)

    return init


def full(q: Any, k: Any, v: Any, mask: Any = None, grid: Any = None) -> jax.Array:
    """Every query attends to every key that the mask lets through; taps `logits` and `weights`.   softmax(q k^T) v

    Args: q: [B, T, H, D], already divided by sqrt(D).   k, v: [B, S, H, D].   mask: [B, S] bool or None.
    Returns: [B, T, H, D]. To be called inside a compact method.
    """
    k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))  # gathered where tokens are cut
    logits = Tap(name="logits")(logits_of(q, k))
    weights = Tap(name="weights")(softmax(logits, mask))
    return weighted(weights, v)


class Attention(nn.Module):
    """Multi-head attention.   y = softmax(q k^T / sqrt(D)) v W

    Taps: `q`, `k`, `v` [B, T, H, D]; `logits` [B, H, T, S] before the mask, `weights` after the softmax, both float32;
    a written `weights` is used as it is.
    Args: x: [B, T, d].   tokens: [B, S, e] to attend to, default x itself.   mask: [B, S] bool, False is not attended
    to, or a bias of the logits [B, H, T, S]. Where all is masked by False the result is exactly zero: attention to tokens
    has no output bias, unless `out_bias`.   angles: [T, D / 2] by which q and k turn, see `positions.Rope`; of x itself
    only.   grid: height and width of the tokens of x, for a `mixing` that is local.
    Returns: [B, T, d].
    Raises: ValueError: d not divisible by heads.

    Example:
        >>> v = jax.eval_shape(Attention(2).init, jax.random.key(0), jnp.zeros((1, 4, 8)))
        >>> v["params"]["qkv"]["kernel"].shape
        (8, 24)

    Reference: Vaswani et al. 2017, arXiv:1706.03762, Eq. 1; qk_norm: Dehghani et al. 2023, arXiv:2302.05442, section
    2.1.
    """

    heads: int
    qk_norm: bool = False
    zero: bool = False  # start with a zero output
    dtype: Any = jnp.float32
    qkv_bias: bool = True
    out_bias: bool | None = None  # default: unless it attends to tokens
    mixing: Mixing = full  # or `local.Circle(radius)`: same parameters

    @nn.compact
    def __call__(self, x: Any, tokens: Any = None, mask: Any = None, angles: Any = None, grid: Any = None) -> jax.Array:
        """Mix `v` of `tokens`, or of x itself."""
        d = x.shape[-1]
        if d % self.heads:
            raise ValueError(f"attention needs a width divisible by heads; got width {d} and heads={self.heads}")
        size = d // self.heads

        def project(x: Any, n: int, name: str) -> list[Any]:
            y = Dense(n * d, bias=self.qkv_bias, init=per_head(self.heads, n), dtype=self.dtype, name=name)(x)
            y = y.reshape(*y.shape[:2], self.heads, n * size)
            return jnp.split(constrain(y, "batch", "some_tokens" if n != 2 else None, "heads", None), n, axis=-1)

        if tokens is None:
            q, k, v = project(x, 3, "qkv")
        else:
            (q,) = project(x, 1, "q_in")
            k, v = project(tokens.astype(self.dtype), 2, "kv")
        if self.qk_norm:
            q = RMSNorm(name="q_norm")(q)
            k = RMSNorm(name="k_norm")(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = Tap(name="q")(q), Tap(name="k")(k), Tap(name="v")(v)
        y = self.mix(q * size**-0.5, k, v, mask, grid)
        y = constrain(y, "batch", "some_tokens", "heads", None).reshape(x.shape)
        y = constrain(y, "batch", "some_tokens", "wide")
        bias = tokens is None if self.out_bias is None else self.out_bias
        return Dense(d, zero=self.zero, bias=bias, dtype=self.dtype, name="out")(y)

    def mix(self, q: Any, k: Any, v: Any, mask: Any = None, grid: Any = None) -> jax.Array:
        """The mixing of values, to be changed from outside by `tapped(around={"PATH.mix": f})`; see `Mixing`."""
        return self.mixing(q, k, v, mask, grid)
