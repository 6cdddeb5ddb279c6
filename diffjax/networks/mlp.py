"""A residual multilayer perceptron for vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import Attention
from diffjax.networks.conditions import Code, condition_of, read_state, read_time
from diffjax.networks.embeddings import UNIT, Frequencies
from diffjax.networks.layers import Dense, at_least_float32, mark_layer, modulate, plain_norm, repeat, spread
from diffjax.networks.partition import ATTENTION, BLOCK, CODE, FILM, Rules, constrain
from diffjax.networks.taps import Tap


class MLPBlock(nn.Module):
    """One residual block.   h + gate * Dense(act(Dense(norm(h) (1 + scale) + shift))), then attention to tokens"""

    width: int
    expand: int
    heads: int
    act: Callable[[Any], Any]
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, layer: Any, c: Any, tokens: Any, mask: Any) -> tuple[Any, None]:
        """One block; see `layers.repeat` for the form."""
        mark_layer(layer)
        adaptive = Dense(3 * self.width, zero=True, dtype=self.dtype, name="film")(c)
        shift, scale, gate = jnp.split(constrain(adaptive, "batch", ...), 3, axis=-1)
        h = modulate(plain_norm(x), shift, scale)
        h = Dense(self.expand * self.width, dtype=self.dtype, name="hidden")(h)
        h = self.act(constrain(h, "batch", ..., "wide"))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        h = Dense(self.width, dtype=self.dtype, name="out")(h)
        x = constrain(x + spread(gate, x) * h, "batch", ...)
        if tokens is not None:
            flat = plain_norm(x).reshape(x.shape[0], -1, self.width)
            x = x + Attention(self.heads, zero=True, dtype=self.dtype, name="cross")(flat, tokens, mask).reshape(
                x.shape
            )
        return Tap(name="block")(x), None


class MLP(nn.Module):
    """A residual MLP for vectors, with adaptive layer normalisation by time and condition.   [B, ..., d] -> [B, ..., d]

    Conditions: label, vector, tokens (see `conditions`). Taps: `block_i/block` (`blocks/block` if scanned),
    `.../cross/{q,k,v,logits,weights}`. The output starts at zero.
    Args of a call: x: [B, ..., d].   t: scalar, [B], or a time for each of more leading axes of x.   train: use
    dropout.
    Returns: [B, ..., out_features or d], at least float32.
    Raises: ValueError: shapes or conditions that do not fit.

    Example:
        >>> v = jax.eval_shape(MLP(width=8, depth=2).init, jax.random.key(0), jnp.zeros((3, 2)), jnp.zeros(3))
        >>> v["params"]["out"]["kernel"].shape
        (8, 2)
    """

    width: int = 128
    depth: int = 3
    expand: int = 2
    heads: int = 4  # of the attention to tokens
    num_classes: int = 0
    vector_size: int = 0
    token_size: int = 0
    out_features: int | None = None  # default those of x
    frequencies: Frequencies = UNIT
    act: Callable[[Any], Any] = nn.silu
    dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (*ATTENTION, *BLOCK, *FILM, *CODE)  # along the mesh axis `model`

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, ..., d]")
        condition = condition_of(self, cond, x)
        t = read_time(t, x, axes=x.ndim - 1)
        code = Code(self.width, self.num_classes, self.vector_size, self.frequencies, self.act, self.dtype, name="code")
        c = code(t, condition)
        h = Dense(self.width, dtype=self.dtype, name="in")(x.astype(self.dtype))
        fields = dict(
            width=self.width,
            expand=self.expand,
            heads=self.heads,
            act=self.act,
            dropout=self.dropout,
            train=train,
            dtype=self.dtype,
        )
        args = (c, condition.tokens, condition.mask)
        h = repeat(MLPBlock, fields, self.depth, h, args, scan=self.scan_layers, remat=self.remat)
        film = constrain(Dense(2 * self.width, zero=True, dtype=self.dtype, name="film")(c), "batch", ...)
        shift, scale = jnp.split(film, 2, axis=-1)
        h = modulate(plain_norm(h), shift, scale)
        y = Dense(self.out_features or x.shape[-1], zero=True, dtype=self.dtype, name="out")(h)
        return y.astype(at_least_float32(x.dtype))
