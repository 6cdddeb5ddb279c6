"""RWKV-7 time mixing, and the same layer read by the tokens of a condition (CrossWKV)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.networks.delta_rule import delta_chunked
from diffjax.networks.layers import Dense
from diffjax.networks.partition import COLUMN, ROW, Rules, constrain
from diffjax.networks.taps import Tap

RWKV: Rules = (
    (r"mix\w*/(receptance|key|value)/kernel$", COLUMN),
    (r"mix\w*/\w+_lora/(up/kernel|bias)$", COLUMN),
    (r"mix\w*/out/kernel$", ROW),
)


def stretch(tokens: Any, length: int) -> jax.Array:
    """The tokens, repeated or left out so that there are `length`.   y_i = c_floor(i S / L)   [B, S, d] -> [B, L, d]

    Example:
        >>> stretch(jnp.arange(2.0).reshape(1, 2, 1), 4).ravel().tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    return jnp.asarray(tokens)[:, np.arange(length) * tokens.shape[1] // length]


def pad_left(tokens: Any, length: int) -> jax.Array:
    """The tokens after zeros.   [B, S, d] -> [B, L, d]

    Raises: ValueError: more tokens than `length`.

    Example:
        >>> pad_left(jnp.ones((1, 1, 1)), 3).ravel().tolist()
        [0.0, 0.0, 1.0]
    """
    missing = length - tokens.shape[1]
    if missing < 0:
        raise ValueError(
            f"pad_left needs at most as many tokens as the state has; got {tokens.shape[1]} tokens for {length}. "
            "Use stretch, or fewer tokens"
        )
    return jnp.pad(tokens, ((0, 0), (missing, 0), (0, 0)))


def shift(x: Any) -> jax.Array:
    """The token before each token, zero before the first.   [B, T, d] -> [B, T, d]"""
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]


class LowRank(nn.Module):
    """A matrix of low rank around a learned constant.   y = act(x A) B + c"""

    features: int
    rank: int
    act: Callable[[Any], Any] = lambda x: x
    bias: bool = True
    start: Any = nn.initializers.zeros  # of the constant
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Apply it to the last axis."""
        y = Dense(self.features, bias=False, dtype=self.dtype, name="up")(
            self.act(Dense(self.rank, bias=False, dtype=self.dtype, name="down")(x))
        )
        if not self.bias:
            return y
        c = self.param("bias", self.start, (self.features,), jnp.float32)
        return y + c.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def low_rank(width: int, gain: float, power: float) -> int:
    """Ranks of the released RWKV-7 models, multiples of 32; an eighth of the width for small networks."""
    return max(32, round(gain * width**power / 32) * 32) if width >= 256 else max(4, width // 8)


def decays(heads: int) -> Callable[..., Any]:
    """The start of the decays' constant: in each head from -6 (half-life 460 steps) to 0 (2.3 steps)."""

    def init(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        return jnp.asarray(np.tile(np.linspace(-6, 0, shape[0] // heads), heads), dtype)

    return init


class RWKV7(nn.Module):
    """RWKV-7 time mixing: linear time, constant state.   S_t = S_{t-1} (diag(w_t) - h_t^T (a_t h_t)) + v_t^T k_t

    From each token of x, blended with the one before it, come the decay w = exp(-e^(-1/2) sigmoid(lora)), key, value,
    learning rate a = sigmoid(lora) and gate g = lora; h is the normalised k k_k, and the key written is
    k (1 + (a - 1) k_a). The output is W (g (groupnorm(r S^T) + (r k r_k) v)), with the receptance r from x as well.

    With `tokens` (CrossWKV) r comes from them alone, brought to the length of x by `align`: the state runs over x and is
    read by the condition. Under `swapped` it runs over the tokens, and every token of x reads the last state.

    A mixer of `StateDiT`. Values of later layers are blended with those of the first one.
    Taps: `r`, `w` (the logarithm of the decay), `k`, `v`, `a` [B, T, H, D], float32.
    Args: x: [B, T, d].   first: the values of the first layer, None in it.   tokens: [B, S, e], zero where they are
        padding.   mask: bool of what the state runs over, [B, T] of x or under `swapped` [B, S]: it passes by what is
        False. Not needed where tokens only read.
    Returns: [B, T, d] and the values of the first layer.
    Raises: ValueError: d not divisible by heads.

    Example:
        >>> v = jax.eval_shape(RWKV7(2).init, jax.random.key(0), jnp.zeros((1, 4, 8)))
        >>> v["params"]["receptance"]["kernel"].shape
        (8, 8)

    Reference: Peng et al. 2025, arXiv:2503.14456; the cross form: Xiao et al. 2025, arXiv:2504.14260.
    """

    heads: int
    zero: bool = False  # start with a zero output
    dtype: Any = jnp.float32
    align: Callable[[Any, int], Any] = stretch
    swapped: bool = False
    reach: float = 1.0  # of the learning rate; up to 2, where the state can be reflected and not only erased
    form: Callable[..., tuple[Any, Any]] = delta_chunked  # or delta_scan

    @nn.compact
    def __call__(self, x: Any, first: Any = None, tokens: Any = None, mask: Any = None) -> tuple[jax.Array, Any]:
        """Mix along the tokens of x."""
        d = x.shape[-1]
        if d % self.heads:
            raise ValueError(f"RWKV-7 needs a width divisible by heads; got width {d} and heads={self.heads}")
        x = x.astype(self.dtype)
        swapped = self.swapped and tokens is not None
        source = tokens.astype(self.dtype) if swapped else x
        keep = mask if swapped or tokens is None else None  # what the state runs over and is to be passed by
        if keep is not None:
            source = jnp.where(keep[:, :, None], source, jnp.zeros((), source.dtype))
        change = shift(source) - source

        def vector(name: str, start: float) -> Any:
            return self.param(name, nn.initializers.constant(start), (d,), jnp.float32)

        def blend(name: str) -> Any:
            mu = self.param(name + "_shift", nn.initializers.constant(0.5), source.shape[-1:], jnp.float32)
            return source + change * mu.astype(self.dtype).reshape(1, 1, -1)

        def dense(name: str, y: Any) -> Any:
            return Dense(d, bias=False, dtype=self.dtype, name=name)(y)

        def lora(name: str, y: Any, gain: float, power: float, **how: Any) -> Any:
            return LowRank(d, low_rank(d, gain, power), dtype=self.dtype, name=name + "_lora", **how)(y)

        def split(y: Any) -> Any:
            y = y.reshape(*y.shape[:2], self.heads, -1).astype(jnp.float32)
            return constrain(y, "batch", None, "heads", None)

        def per_head(name: str, start: float) -> Any:
            return vector(name, start).reshape(1, 1, self.heads, -1)

        read = x if swapped else blend("r") if tokens is None else self.align(tokens.astype(self.dtype), x.shape[1])
        r = dense("receptance", read)
        k, valued = dense("key", blend("k")), blend("v")
        v = dense("value", valued)
        if first is not None:
            v = v + (first - v) * nn.sigmoid(lora("value", valued, 1.3, 0.5))
        first = v if first is None else first
        decay = lora("decay", blend("w"), 1.8, 0.5, act=jnp.tanh, start=decays(self.heads))
        log_w = -math.exp(-0.5) * nn.sigmoid(split(decay))
        a = self.reach * nn.sigmoid(split(lora("rate", blend("a"), 1.8, 0.5)))
        g = lora("gate", x if swapped else blend("g"), 0.6, 0.8, act=nn.sigmoid, bias=False)

        k = split(k)
        if keep is not None:  # neither decayed nor written to
            log_w, k = (jnp.where(keep[:, :, None, None], y, 0.0) for y in (log_w, k))
        sites = {"r": split(r), "w": log_w, "k": k, "v": split(v), "a": a}
        r, log_w, k, v, a = (Tap(name=name)(y) for name, y in sites.items())
        h = k * per_head("k_k", 0.85)
        h = h * jax.lax.rsqrt(jnp.sum(jnp.square(h), axis=-1, keepdims=True) + 1e-12)
        k = k * (1 + (a - 1) * per_head("k_a", 1.0))
        y, state = self.form(jnp.zeros_like(k) if swapped else r, log_w, k, v, -h, h * a)
        if swapped:
            y = jnp.einsum("bthi,bhji->bthj", r, state)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 64e-5)
        y = y * per_head("scale", 1.0) + per_head("bias", 0.0)
        if not swapped:
            y = y + jnp.sum(r * k * per_head("r_k", 0.0), axis=-1, keepdims=True) * v
        y = constrain(y.reshape(x.shape).astype(self.dtype) * g, "batch", None, "wide")
        return Dense(d, zero=self.zero, bias=False, dtype=self.dtype, name="out")(y), first
