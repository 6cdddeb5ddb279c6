"""A diffusion transformer of two views: conditions gathered into one vector, and masked modelling while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import Attention
from diffjax.networks.conditions import Code, condition_of, read_state, read_time
from diffjax.networks.dit import SIZES, DiTBlock, check_patch, patches, unpatches
from diffjax.networks.embeddings import UNIT, Frequencies, grid_positions
from diffjax.networks.layers import (
    Dense,
    LayerNorm,
    at_least_float32,
    fan_in_uniform,
    modulate,
    plain_norm,
    rematerialised,
)
from diffjax.networks.partition import ATTENTION, BLOCK, CODE, COLUMN, FILM, ROW, Rules, constrain
from diffjax.networks.taps import Tap


class Pool(nn.Module):
    """One vector of a fixed number of tokens.   norm(act(sum_l w_l h_l + b))

    Args: h: [B, L, d].   mask: [B, L] bool or None; what is False adds nothing.
    Raises: ValueError: another number of tokens than the parameters are for.
    """

    act: Callable[[Any], Any]

    @nn.compact
    def __call__(self, h: Any, mask: Any = None) -> Any:
        """The vector [B, d]."""
        n = h.shape[1]
        made = self.get_variable("params", "kernel").shape[0] if self.has_variable("params", "kernel") else n
        if made != n:
            raise ValueError(
                f"the parameters pool {made} tokens with a weight each; got {n} tokens. Tokens and states must have the "
                "lengths and sizes of the training"
            )
        w = self.param("kernel", fan_in_uniform(), (n, 1), jnp.float32).astype(h.dtype)[:, 0]
        bias = self.param("bias", nn.initializers.zeros, (1,), jnp.float32).astype(h.dtype)
        if mask is not None:
            h = h * mask[:, :, None].astype(h.dtype)
        y = jnp.einsum("bld,l->bd", h, w) + bias[None]
        return LayerNorm(1e-6, name="norm")(self.act(y))


class Aggregate(nn.Module):
    """All tokens of the conditions as one vector.   norm(act(W sum_k pool_k))"""

    width: int
    parts: tuple[int, ...]  # sizes of the features that lie side by side in the tokens
    act: Callable[[Any], Any]
    dtype: Any

    @nn.compact
    def __call__(self, source: Any, tokens: Any, mask: Any) -> Any:
        """The vector [B, width] of source [B, N, width] and tokens [B, L, sum of parts], either of them or None."""
        found = []
        if tokens is not None:
            start = 0
            for k, size in enumerate(self.parts):
                h = Dense(self.width, dtype=self.dtype, name=f"tokens_{k}")(tokens[:, :, start : start + size])
                found.append(Pool(self.act, name=f"pool_{k}")(LayerNorm(1e-6, name=f"norm_{k}")(self.act(h)), mask))
                start += size
        if source is not None:
            found.append(Pool(self.act, name="pool_source")(source))
        h = self.act(Dense(self.width, dtype=self.dtype, name="mix")(sum(found)))
        return Tap(name="vector")(LayerNorm(1e-6, name="norm")(h))


class CrossBlock(nn.Module):
    """Attention to other tokens, then an MLP, each gated from zero, as in `DiTBlock`."""

    width: int
    heads: int
    expand: int
    qk_norm: bool
    act: Callable[[Any], Any]
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, c: Any, tokens: Any) -> Any:
        """One block at code c; tokens [B, S, d]."""
        film = constrain(Dense(6 * self.width, zero=True, dtype=self.dtype, name="film")(c), "batch", None)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(film[:, None], 6, axis=-1)
        attention = Attention(self.heads, self.qk_norm, dtype=self.dtype, name="cross")
        x = x + gate_a * attention(modulate(plain_norm(x), shift_a, scale_a), tokens)
        h = Dense(self.expand * self.width, dtype=self.dtype, name="hidden")(modulate(plain_norm(x), shift_m, scale_m))
        h = self.act(constrain(h, "batch", "some_tokens", "wide"))
        return x + gate_m * Dense(self.width, dtype=self.dtype, name="out")(h)


class MaskedDiT(nn.Module):
    """A diffusion transformer that also learns to fill in masked places from another view.   [B, H, W, C] -> [B, H, W, C]

    The image of the condition is a source view of the same size and channels: its patches share the layer of those of x.
    They, the tokens, the vector and the label become one vector, which with the time drives adaLN-zero: no token of a
    condition takes part in attention. With `auxiliary` the result is `(y, aux)`; while training (`train=True`),
    `aux["masked"]` is the output of the same blocks when a share `mask_ratio` of the patches is left out of all but the last
    `decode` of them: between, an interpolater puts a learned token in their places and lets them attend to the others, then
    to the source view, whose features take no gradient. Both are compared with the target, see `losses.side_outputs`. Without,
    nothing of it is computed or has parameters. Taps: `aggregate/vector`, `block_i/...` as in `DiT`. The output starts at zero.
    Args of a call: x: [B, H, W, C].   t: scalar or [B].   train: mask, and use dropout.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: H or W not divisible by patch; `decode`, `mask_ratio` or `token_parts` out of range; an image of
    other channels than x; shapes or conditions that do not fit.

    Example:
        >>> net = MaskedDiT(width=8, depth=2, heads=2, decode=1, image_channels=3)
        >>> x = jnp.zeros((1, 4, 4, 3))
        >>> v = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), {"image": x})
        >>> v["params"]["aggregate"]["pool_source"]["kernel"].shape
        (4, 1)

    Reference: Pham et al. 2024, arXiv:2402.01516; the interpolater: Gao et al. 2023, arXiv:2303.14389.
    """

    width: int = 64
    depth: int = 4
    heads: int = 4
    patch: int = 2
    expand: int = 4
    decode: int = 2  # last blocks, which see all places
    mask_ratio: float = 0.3
    auxiliary: bool = False  # return the masked output while training
    num_classes: int = 0
    vector_size: int = 0
    token_size: int = 0
    token_parts: tuple[int, ...] | None = None  # features side by side in the tokens, gathered one by one; default one
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    qk_norm: bool = False
    frequencies: Frequencies = UNIT
    sinusoids: int | None = None  # of the time code; default as `width`
    act: Callable[[Any], Any] = nn.gelu
    dropout: float = 0.0
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (  # along the mesh axis `model`
        *ATTENTION,
        *BLOCK,
        (r"side_(self|cross)/hidden/(kernel|bias)$", COLUMN),
        (r"side_(self|cross)/out/kernel$", ROW),
        *FILM,
        *CODE,
    )

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> Any:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        self._check(x)
        _, h, w, channels = x.shape
        p, d, dtype = self.patch, self.width, self.dtype
        condition = condition_of(self, cond, x)
        place = jnp.asarray(grid_positions(h // p, w // p, d), dtype)[None]
        embed = Dense(d, dtype=dtype, name="in")
        z = constrain(embed(patches(x.astype(dtype), p)) + place, "batch", "tokens", None)
        source, vector = None, ()
        if condition.image is not None:
            source = embed(patches(jnp.asarray(condition.image).astype(dtype), p)) + place
        if source is not None or condition.tokens is not None:
            aggregate = Aggregate(d, self.token_parts or (self.token_size,), self.act, dtype, name="aggregate")
            tokens = None if condition.tokens is None else condition.tokens.astype(dtype)
            vector = (aggregate(source, tokens, condition.mask),)
        code = Code(
            d, self.num_classes, self.vector_size, self.frequencies, dtype=dtype, sinusoids=self.sinusoids, name="code"
        )
        c = code(read_time(t, x), condition, *vector)
        fields = dict(width=d, heads=self.heads, expand=self.expand, qk_norm=self.qk_norm, act=self.act, dtype=dtype)
        make = rematerialised(DiTBlock, self.remat)
        blocks = [make(**fields, dropout=self.dropout, train=train, name=f"block_{i}") for i in range(self.depth)]
        run = lambda part, z: [z := block(z, None, c, None, None)[0] for block in part][-1] if part else z
        encode, decode = blocks[: self.depth - self.decode], blocks[self.depth - self.decode :]
        film_out = Dense(2 * d, zero=True, dtype=dtype, name="film")
        last = Dense(p * p * (self.out_channels or channels), zero=True, dtype=dtype, name="out")

        def finish(z: Any) -> Any:
            shift, scale = jnp.split(constrain(film_out(c), "batch", None), 2, axis=-1)
            y = last(modulate(plain_norm(run(decode, z)), shift, scale))
            return unpatches(y, p, h, w).astype(at_least_float32(x.dtype))

        y = finish(run(encode, z) + place)
        if not self.auxiliary:
            return y
        if not (train or self.is_initializing()):
            return y, {}
        kept, back = self._hide(*z.shape[:2])
        seen = run(encode, jnp.take_along_axis(z, kept, axis=1))
        token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, d), jnp.float32).astype(dtype)
        fill = jnp.broadcast_to(token, (z.shape[0], z.shape[1] - kept.shape[1], d))
        seen = jnp.take_along_axis(jnp.concatenate([seen, fill], axis=1), back, axis=1) + place
        guess, _ = DiTBlock(**fields, dropout=self.dropout, train=train, name="side_self")(seen, None, c, None, None)
        if source is not None:
            context = jax.lax.stop_gradient(run(encode, source))
            guess = CrossBlock(**fields, name="side_cross")(guess, c, context)
        return y, {"masked": finish(jnp.where(back >= kept.shape[1], guess, seen))}

    def _hide(self, items: int, n: int) -> tuple[Any, Any]:
        """Places that each item keeps, at random [B, kept, 1], and where each place is among these and the rest [B, N, 1]."""
        order = jnp.argsort(jax.random.uniform(self.make_rng("dropout"), (items, n)), axis=1)[:, :, None]
        return order[:, : max(1, int(n * (1 - self.mask_ratio)))], jnp.argsort(order, axis=1)

    def _check(self, x: Any) -> None:
        p = self.patch
        check_patch(self, x, p)
        if not 0 <= self.decode <= self.depth or not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"decode must be in [0, {self.depth}] and mask_ratio in (0, 1); got {self.decode} and {self.mask_ratio}"
            )
        if self.image_channels not in (0, x.shape[-1]):
            raise ValueError(
                f"the source view shares the layer of the state, so image_channels must be {x.shape[-1]} or 0; got "
                f"{self.image_channels}"
            )
        if self.token_parts is not None and sum(self.token_parts) != self.token_size:
            raise ValueError(f"token_parts must sum to token_size={self.token_size}; got {self.token_parts}")


# Sizes of arXiv:2402.01516 and its released code: those of DiT with patches of 2, and two kinds of tokens of 768 and 1536
# features, 257 of each. The published numbers of parameters are without the masked branch and tables of positions.
PRESETS = {
    f"x-mdpt-{name}": (
        MaskedDiT,
        dict(width=w, depth=d, heads=h, sinusoids=256, token_size=2304, token_parts=(768, 1536), image_channels=4),
    )
    for name, (w, d, h) in SIZES.items()
    if name != "xl"
}
