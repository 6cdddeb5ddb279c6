"""A diffusion transformer: patches, adaptive layer normalisation that starts as the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import Attention, Mixing, full
from diffjax.networks.conditions import Code, condition_of, read_state, read_time
from diffjax.networks.embeddings import UNIT, Frequencies, grid_positions
from diffjax.networks.feed_forward import mlp, ragged, sparse
from diffjax.networks.layers import Dense, at_least_float32, mark_layer, modulate, plain_norm, repeat
from diffjax.networks.partition import ATTENTION, BLOCK, CODE, EXPERTS, FILM, Rules, constrain
from diffjax.networks.positions import Rope, Table
from diffjax.networks.taps import Tap


def check_patch(net: Any, x: Any, p: int) -> None:
    """Refuse a picture that squares of side p do not tile.   Raises: ValueError."""
    if x.shape[1] % p or x.shape[2] % p:
        name = type(net).__name__
        raise ValueError(f"{name} needs height and width divisible by patch={p}; got a state of shape {x.shape}")


def patches(x: Any, p: int) -> jax.Array:
    """Cut into squares.   [B, H, W, C] -> [B, (H/p) (W/p), p p C]

    Example:
        >>> patches(jnp.zeros((1, 4, 6, 3)), 2).shape
        (1, 6, 12)
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatches(x: Any, p: int, h: int, w: int) -> jax.Array:
    """The inverse of `patches`.   [B, (H/p) (W/p), p p C] -> [B, H, W, C]"""
    b, _, d = x.shape
    x = x.reshape(b, h // p, w // p, p, p, d // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h, w, d // (p * p))


class DiTBlock(nn.Module):
    """Attention, attention to tokens, feed-forward, each gated from zero.   x + gate * f(norm(x) (1 + scale) + shift)"""

    width: int
    heads: int
    expand: int
    qk_norm: bool
    act: Callable[[Any], Any]
    dropout: float
    train: bool
    dtype: Any
    feed_forward: Callable[..., Any] = mlp
    route: Callable[..., Any] | None = None
    mixing: Mixing = full
    grid: tuple[int, int] | None = None
    qkv_bias: bool = True
    mlp_eps: float = 1e-6

    @nn.compact
    def __call__(
        self, x: Any, layer: Any, c: Any, tokens: Any, mask: Any, angles: Any = None, time: Any = None
    ) -> tuple[Any, None]:
        """One block; see `layers.repeat` for the form."""
        mark_layer(layer)
        if self.route is not None:
            whole, share = x, self.route(x, time, dtype=self.dtype)
            x = share * x
        adaptive = Dense(6 * self.width, zero=True, dtype=self.dtype, name="film")(c)
        adaptive = constrain(adaptive, "batch", None)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(adaptive[:, None], 6, axis=-1)
        h = modulate(plain_norm(x), shift_a, scale_a)
        fields = dict(dtype=self.dtype, qkv_bias=self.qkv_bias, mixing=self.mixing)
        h = Attention(self.heads, self.qk_norm, **fields, name="attention")(h, angles=angles, grid=self.grid)
        x = constrain(x + gate_a * Tap(name="attended")(h), "batch", "some_tokens", None)
        if tokens is not None:
            cross = Attention(self.heads, self.qk_norm, zero=True, dtype=self.dtype, name="cross")
            x = constrain(x + cross(plain_norm(x), tokens, mask), "batch", "some_tokens", None)
        h = modulate(plain_norm(x, self.mlp_eps), shift_m, scale_m)
        fields = dict(expand=self.expand, act=self.act, dropout=self.dropout, train=self.train, dtype=self.dtype)
        h = self.feed_forward(h, **fields)
        x = constrain(x + gate_m * Tap(name="mixed")(h), "batch", "some_tokens", None)
        if self.route is not None:
            x = x + (1 - share) * whole
        return Tap(name="block")(x), None


class DiT(nn.Module):
    """A diffusion transformer with adaLN-zero, for images of sizes divisible by `patch`.   [B, H, W, C] -> [B, H, W, C]

    Conditions: label and vector by adaLN, tokens by cross-attention, image by channels (see `conditions`). Taps:
    `block_i/{attended,mixed,block}` (`blocks/...` if scanned), `.../attention/{q,k,v,logits,weights}`, `.../cross/...`;
    also `.../experts/probabilities` with `feed_forward=sparse(...)`, `.../switch/gates` with `route=switch(...)`. The output
    starts at zero.
    Args of a call: x: [B, H, W, C].   t: scalar or [B].   train: use dropout.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: H or W not divisible by patch; width by heads or 4; a grid that `positions` refuses; shapes or
        conditions that do not fit.

    Example:
        >>> net = DiT(width=8, depth=1, heads=2)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
        >>> v["params"]["out"]["kernel"].shape
        (8, 12)

    Reference: Peebles & Xie 2022, arXiv:2212.09748, section 3.2.
    """

    width: int = 64
    depth: int = 4
    heads: int = 4
    patch: int = 2
    expand: int = 4
    num_classes: int = 0
    vector_size: int = 0
    token_size: int = 0
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    qk_norm: bool = False
    positions: Table | None = grid_positions  # added to the patches, see `positions`
    rope: Rope | None = None
    frequencies: Frequencies = UNIT
    sinusoids: int | None = None  # of the time code; default as `width`
    act: Callable[[Any], Any] = nn.gelu
    feed_forward: Callable[..., Any] = mlp  # or `sparse(...)`, see `diffjax.networks.feed_forward`
    route: Callable[..., Any] | None = None  # how much of its input a block sees: `switch(...)`, see `task_routing`
    dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    mixing: Mixing = full  # of self-attention, or `local.Circle(radius)`: same parameters
    qkv_bias: bool = True
    mlp_eps: float = 1e-6  # of the norm before the feed-forward part
    own_codes: bool = False  # each block has a code of its own; the last modulation reads the first
    RULES: ClassVar[Rules] = (*ATTENTION, *BLOCK, *EXPERTS, *FILM, *CODE)  # along the mesh axis `model`

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        _, h, w, channels = x.shape
        p = self.patch
        check_patch(self, x, p)
        condition = condition_of(self, cond, x)
        c, codes, time = self._code(read_time(t, x), condition)
        z = condition.joined(x, self.dtype)
        z = Dense(self.width, dtype=self.dtype, name="in")(patches(z, p))
        if self.positions is not None:
            z = z + jnp.asarray(self.positions(h // p, w // p, self.width), self.dtype)[None]
        angles = None if self.rope is None else jnp.asarray(self.rope(h // p, w // p, self.width // self.heads))
        z = constrain(z, "batch", "tokens", None)
        fields = dict(
            width=self.width,
            heads=self.heads,
            expand=self.expand,
            qk_norm=self.qk_norm,
            act=self.act,
            dropout=self.dropout,
            train=train,
            dtype=self.dtype,
            feed_forward=self.feed_forward,
            route=self.route,
            mixing=self.mixing,
            grid=(h // p, w // p),
            qkv_bias=self.qkv_bias,
            mlp_eps=self.mlp_eps,
        )
        args = (condition.tokens, condition.mask, angles, time)
        args = args if self.own_codes else (c, *args)
        z = repeat(DiTBlock, fields, self.depth, z, args, scan=self.scan_layers, remat=self.remat, own=codes)
        film = constrain(Dense(2 * self.width, zero=True, dtype=self.dtype, name="film")(c), "batch", None)
        shift, scale = jnp.split(film, 2, axis=-1)
        z = modulate(plain_norm(z), shift, scale)
        out = self.out_channels or channels
        y = Dense(p * p * out, zero=True, dtype=self.dtype, name="out")(z)
        return unpatches(y, p, h, w).astype(at_least_float32(x.dtype))

    def _code(self, t: Any, condition: Any) -> tuple[Any, Any, Any]:
        """The code, those of the blocks if they have their own, and that of time alone if blocks are routed by it."""
        fields = dict(dtype=self.dtype, sinusoids=self.sinusoids)
        routed = self.route is not None

        def code(name: str) -> tuple[Any, Any]:
            made = Code(self.width, self.num_classes, self.vector_size, self.frequencies, **fields, name=name)
            c = made(t, condition, with_time=routed)
            return c if routed else (c, None)

        if not self.own_codes:
            c, time = code("code")
            return c, None, time
        codes = [code(f"code_{i}") for i in range(self.depth)]
        return codes[0][0], jnp.stack([c for c, _ in codes]), codes[0][1]


# width, depth, heads: Table 1 of arXiv:2212.09748; arXiv:2401.08740 (SiT) has the same four networks
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
PRESETS = {
    f"{family}-{name}{patches}": (DiT, dict(width=w, depth=d, heads=h, patch=patch, sinusoids=256))
    for family in ("dit", "sit")
    for name, (w, d, h) in SIZES.items()
    for patches, patch in (("", 2), ("/2", 2), ("/4", 4), ("/8", 8))
}

# The sizes of arXiv:2407.11633 and its released code: experts have the width of the DiT's MLP, the shared part is one MLP
# of width 2 d. Named by routed and activated experts.
PRESETS |= {
    f"dit-moe-{name}/2-{e}e2a": (
        DiT,
        dict(width=w, depth=d, heads=h, sinusoids=256, act=nn.silu, feed_forward=sparse(e, 2, 2, ragged)),
    )
    for name, (w, d, h), e in (
        ("s", SIZES["s"], 8),
        ("s", SIZES["s"], 16),
        ("b", SIZES["b"], 8),
        ("xl", SIZES["xl"], 8),
        ("g", (1408, 40, 16), 16),
    )
}
