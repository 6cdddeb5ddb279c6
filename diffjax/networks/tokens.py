"""A transformer for sequences and sets: tokens as they come, motion, molecules, points, embeddings of words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import Attention
from diffjax.networks.conditions import Code, condition_of, read_elements, read_state, read_time
from diffjax.networks.embeddings import UNIT, Frequencies, sinusoids
from diffjax.networks.layers import Dense, at_least_float32, fan_in_uniform, mark_layer, modulate, plain_norm, repeat
from diffjax.networks.partition import ATTENTION, BLOCK, CODE, FILM, Rules, constrain
from diffjax.networks.taps import Tap

ABSENT = -1e30  # added to logits: finite, so that an item without elements gives no NaN


class InducedAttention(nn.Module):
    """Attention by way of `points` learned queries: linear in the tokens.   attend(x, z),  z = norm(I + attend(I, x))

    Args: x: [B, T, d].   mask: [B, T] bool, False is not read.
    Returns: [B, T, d]. Exchanging tokens of x exchanges those of the result.

    Reference: Lee et al. 2019, arXiv:1810.00825, Eq. 9 and 10 (there with norms after the sums).
    """

    heads: int
    points: int
    qk_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, mask: Any = None) -> jax.Array:
        """Gather into the learned queries, then spread."""
        d = x.shape[-1]
        queries = self.param("points", fan_in_uniform(1), (self.points, d), jnp.float32).astype(self.dtype)
        queries = jnp.broadcast_to(queries[None], (x.shape[0], self.points, d))
        attention = lambda name: Attention(self.heads, self.qk_norm, dtype=self.dtype, name=name)
        z = plain_norm(queries + attention("gather_attention")(queries, x, mask))
        return attention("spread_attention")(x, z)


class TokenBlock(nn.Module):
    """Attention among elements, attention to tokens, MLP, each gated from zero or zero at the start."""

    width: int
    heads: int
    expand: int
    latents: int
    qk_norm: bool
    act: Callable[[Any], Any]
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Any, layer: Any, c: Any, present: Any, pairs: Any, tokens: Any, mask: Any
    ) -> tuple[Any, None]:
        """One block; see `layers.repeat` for the form."""
        mark_layer(layer)
        adaptive = constrain(Dense(6 * self.width, zero=True, dtype=self.dtype, name="film")(c), "batch", None)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(adaptive[:, None], 6, axis=-1)
        h = modulate(plain_norm(x), shift_a, scale_a)
        seen = present
        if pairs is not None:
            bias = Dense(self.heads, bias=False, dtype=self.dtype, name="pairs")(pairs.astype(self.dtype))
            seen = Tap(name="bias")(bias.transpose(0, 3, 1, 2).astype(jnp.float32))
            if present is not None:
                seen = jnp.where(present[:, None, None, :], seen, ABSENT)
        if self.latents:
            h = InducedAttention(self.heads, self.latents, self.qk_norm, self.dtype, name="induced")(h, seen)
        else:
            h = Attention(self.heads, self.qk_norm, dtype=self.dtype, name="attention")(h, None, seen)
        x = constrain(x + gate_a * Tap(name="attended")(h), "batch", "some_tokens", None)
        if tokens is not None:
            cross = Attention(self.heads, self.qk_norm, zero=True, dtype=self.dtype, name="cross")
            x = constrain(x + cross(plain_norm(x), tokens, mask), "batch", "some_tokens", None)
        h = modulate(plain_norm(x), shift_m, scale_m)
        h = Dense(self.expand * self.width, dtype=self.dtype, name="hidden")(h)
        h = self.act(constrain(h, "batch", "some_tokens", "wide"))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        h = Dense(self.width, dtype=self.dtype, name="out")(h)
        x = constrain(x + gate_m * Tap(name="mixed")(h), "batch", "some_tokens", None)
        return Tap(name="block")(x), None


class TokenDiT(nn.Module):
    """adaLN-zero blocks over the elements of a sequence or, without positions, of a set.   [B, L, C] -> [B, L, C]

    Conditions: label and vector by adaLN, tokens by cross-attention; for the elements themselves `present` [B, L] bool
    (False is padding: never read, zero in the result) and `pairs` [B, L, L, pair_size], a bias of the attention. See
    `conditions`. Taps: `block_i/{attended,mixed,block}` (`blocks/...` if scanned), `.../bias` of pairs,
    `.../attention/{q,k,v,logits,weights}` or `.../induced/{gather,spread}_attention/...`, `.../cross/...`. The output
    starts at zero.
    Args of a call: x: [B, L, C].   t: scalar or [B].   train: use dropout.
    Returns: [B, L, out_channels or C], at least float32. Without positions, exchanging elements exchanges the results.
    Raises: ValueError: width not divisible by heads; pairs together with latents; shapes or conditions that do not fit.

    Example:
        >>> net = TokenDiT(width=8, depth=1, heads=2, positions=False)  # a cloud of points
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 5, 3)), jnp.zeros(1))
        >>> v["params"]["out"]["kernel"].shape
        (8, 3)

    Reference: Peebles & Xie 2022, arXiv:2212.09748, section 3.2 (blocks); Lee et al. 2019, arXiv:1810.00825 (latents).
    """

    width: int = 64
    depth: int = 4
    heads: int = 4
    expand: int = 4
    positions: bool = True  # sinusoidal ones; False for sets
    latents: int = 0  # learned points through which attention goes, so that it is linear in L; 0: all to all
    pair_size: int = 0
    num_classes: int = 0
    vector_size: int = 0
    token_size: int = 0
    out_channels: int | None = None  # default those of x
    qk_norm: bool = False
    frequencies: Frequencies = UNIT
    sinusoids: int | None = None  # of the time code; default as `width`
    act: Callable[[Any], Any] = nn.gelu
    dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (*ATTENTION, *BLOCK, *FILM, *CODE)  # along the mesh axis `model`

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, L, C]")
        if self.pair_size and self.latents:
            raise ValueError(
                f"TokenDiT has pairs of elements (pair_size={self.pair_size}) or attention through learned points "
                f"(latents={self.latents}), not both: elements do not meet there. Set one of them to 0"
            )
        cond, present, pairs = read_elements(cond, x, self.pair_size)
        condition = condition_of(self, cond, x)
        code = Code(
            self.width,
            self.num_classes,
            self.vector_size,
            self.frequencies,
            dtype=self.dtype,
            sinusoids=self.sinusoids,
            name="code",
        )
        c = code(read_time(t, x), condition)
        zero = jnp.zeros((), x.dtype)
        z = x if present is None else jnp.where(present[:, :, None], x, zero)
        z = Dense(self.width, dtype=self.dtype, name="in")(z.astype(self.dtype))
        if self.positions:
            places = sinusoids(jnp.arange(x.shape[1], dtype=jnp.float32), self.width, (1e-4, 1.0))
            z = z + places.astype(self.dtype)[None]
        fields = dict(
            width=self.width,
            heads=self.heads,
            expand=self.expand,
            latents=self.latents,
            qk_norm=self.qk_norm,
            act=self.act,
            dropout=self.dropout,
            train=train,
            dtype=self.dtype,
        )
        args = (c, present, pairs, condition.tokens, condition.mask)
        z = constrain(z, "batch", "tokens", None)
        z = repeat(TokenBlock, fields, self.depth, z, args, scan=self.scan_layers, remat=self.remat)
        film = constrain(Dense(2 * self.width, zero=True, dtype=self.dtype, name="film")(c), "batch", None)
        shift, scale = jnp.split(film, 2, axis=-1)
        out = Dense(self.out_channels or x.shape[-1], zero=True, dtype=self.dtype, name="out")
        y = out(modulate(plain_norm(z), shift, scale)).astype(at_least_float32(x.dtype))
        return y if present is None else jnp.where(present[:, :, None], y, jnp.zeros((), y.dtype))
