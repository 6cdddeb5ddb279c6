"""A diffusion transformer whose tokens are mixed by a recurrence: linear in their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import Attention
from diffjax.networks.conditions import Code, condition_of, read_state, read_time
from diffjax.networks.dit import check_patch, patches, unpatches
from diffjax.networks.embeddings import UNIT, Frequencies, grid_positions
from diffjax.networks.layers import Dense, at_least_float32, modulate, plain_norm, rematerialised
from diffjax.networks.mamba import MAMBA
from diffjax.networks.partition import ATTENTION, BLOCK, CODE, FILM, Rules, constrain
from diffjax.networks.rwkv import RWKV, RWKV7
from diffjax.networks.s4 import S4
from diffjax.networks.taps import Tap

# A mixer is a module `mixer(heads, zero=, dtype=, name=)` that maps (x [B, T, d], first, tokens, mask) to (y [B, T, d],
# first): along the tokens of x, or from the tokens of a condition if they are given; `mask` is of those, or of x where
# there are none, and False is padding. `first` is what its first layer hands to the later ones; None there, and always for
# a mixer that hands on nothing.
Mixer = Callable[..., nn.Module]


class Softmax(nn.Module):
    """Attention as a mixer, to compare with; not causal. See `StateDiT` for mixers."""

    heads: int
    zero: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, first: Any = None, tokens: Any = None, mask: Any = None) -> tuple[jax.Array, Any]:
        """Mix by attention."""
        return Attention(self.heads, zero=self.zero, dtype=self.dtype, name="attention")(x, tokens, mask), first


class StateBlock(nn.Module):
    """Mix, MLP, mix with the condition.   x + gate * f(norm(x) (1 + scale) + shift), twice; x + cross(norm(x), tokens)"""

    width: int
    heads: int
    expand: int
    mix: Mixer
    cross: Mixer
    bidirectional: bool
    act: Callable[[Any], Any]
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, firsts: Any, c: Any, tokens: Any, mask: Any, present: Any = None) -> tuple[Any, Any]:
        """One block; `firsts` is what the mixers of the first block hand on, `present` [B, T] is False at padding of x."""
        ahead, back, crossed = firsts
        adaptive = constrain(Dense(6 * self.width, zero=True, dtype=self.dtype, name="film")(c), "batch", None)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(adaptive[:, None], 6, axis=-1)
        h = modulate(plain_norm(x), shift_a, scale_a)
        mixed, ahead = self.mix(self.heads, dtype=self.dtype, name="mix")(h, ahead, None, present)
        if self.bidirectional:
            turned = None if present is None else present[:, ::-1]
            reverse, back = self.mix(self.heads, dtype=self.dtype, name="mix_back")(h[:, ::-1], back, None, turned)
            mixed = mixed + reverse[:, ::-1]
        x = constrain(x + gate_a * Tap(name="mixed")(mixed), "batch", "some_tokens", None)
        h = modulate(plain_norm(x), shift_m, scale_m)
        h = Dense(self.expand * self.width, dtype=self.dtype, name="hidden")(h)
        h = self.act(constrain(h, "batch", "some_tokens", "wide"))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        h = Dense(self.width, dtype=self.dtype, name="out")(h)
        x = constrain(x + gate_m * Tap(name="mlp")(h), "batch", "some_tokens", None)
        if tokens is not None:
            cross = self.cross(self.heads, zero=True, dtype=self.dtype, name="mix_cross")
            h, crossed = cross(plain_norm(x), crossed, tokens, mask)
            x = constrain(x + h, "batch", "some_tokens", None)
        return Tap(name="block")(x), (ahead, back, crossed)


class StateDiT(nn.Module):
    """adaLN-zero blocks around a recurrence, for sequences, or images read row by row.   [B, L, C] or [B, H, W, C]

    Conditions: label and vector by adaLN, tokens by `cross` (see `conditions`). With `encoder` > 0 the tokens pass that
    many blocks of the same kind first, so that this is an encoder and a decoder. Mixers: `RWKV7`, `Mamba`, `S4D`, or
    `Softmax` to compare with (which knows no positions of sequences); other options of a mixer by a module-level
    function that passes them.
    Taps: `block_i/{mixed,mlp,block}`, those of the mixers under `block_i/{mix,mix_back,mix_cross}/`, the same under
    `encoder_block_i`. The output starts at zero. One direction alone is causal: no token knows of later ones.
    Args of a call: x: [B, L, C], or [B, H, W, C] cut into patches.   t: scalar or [B].   train: use dropout.
    Returns: as x with out_channels or C, at least float32.
    Raises: ValueError: H or W not divisible by patch; shapes or conditions that do not fit.

    Example:
        >>> net = StateDiT(width=8, depth=1, heads=2)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 6, 3)), jnp.zeros(1))
        >>> v["params"]["out"]["kernel"].shape
        (8, 3)

    Reference: Peebles & Xie 2022, arXiv:2212.09748, section 3.2 (the blocks); the mixers tell theirs.
    """

    width: int = 64
    depth: int = 4
    heads: int = 4
    patch: int = 2  # of images
    expand: int = 4
    mix: Mixer = RWKV7
    cross: Mixer = RWKV7
    bidirectional: bool = True
    encoder: int = 0  # blocks over the tokens of the condition
    num_classes: int = 0
    vector_size: int = 0
    token_size: int = 0
    out_channels: int | None = None  # default those of x
    frequencies: Frequencies = UNIT
    sinusoids: int | None = None  # of the time code; default as `width`
    act: Callable[[Any], Any] = nn.gelu
    dropout: float = 0.0
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (*RWKV, *MAMBA, *S4, *ATTENTION, *BLOCK, *FILM, *CODE)  # along the mesh axis `model`

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        image = jnp.ndim(x) == 4
        x = read_state(x, "[B, H, W, C]" if image else "[B, L, C]")
        p, channels = self.patch, x.shape[-1]
        if image:
            check_patch(self, x, p)
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
        fields = dict(
            width=self.width,
            heads=self.heads,
            expand=self.expand,
            mix=self.mix,
            cross=self.cross,
            bidirectional=self.bidirectional,
            act=self.act,
            dropout=self.dropout,
            train=train,
            dtype=self.dtype,
        )
        block = rematerialised(StateBlock, self.remat)

        def stack(z: Any, name: str, depth: int, *rest: Any) -> Any:
            firsts = (None, None, None)
            for i in range(depth):
                z, firsts = block(**fields, name=f"{name}_{i}")(z, firsts, c, *rest)
            return z

        tokens, mask = condition.tokens, condition.mask
        if tokens is not None and self.encoder:
            tokens = Dense(self.width, dtype=self.dtype, name="tokens_in")(tokens.astype(self.dtype))
            tokens = plain_norm(stack(tokens, "encoder_block", self.encoder, None, None, mask))
            tokens = jnp.where(mask[:, :, None], tokens, jnp.zeros((), tokens.dtype))  # padding stays zero
        z = x.astype(self.dtype)
        z = Dense(self.width, dtype=self.dtype, name="in")(patches(z, p) if image else z)
        if image:
            z = z + jnp.asarray(grid_positions(x.shape[1] // p, x.shape[2] // p, self.width), self.dtype)[None]
        z = stack(constrain(z, "batch", "tokens", None), "block", self.depth, tokens, mask)
        film = constrain(Dense(2 * self.width, zero=True, dtype=self.dtype, name="film")(c), "batch", None)
        shift, scale = jnp.split(film, 2, axis=-1)
        out = self.out_channels or channels
        y = Dense(out * (p * p if image else 1), zero=True, dtype=self.dtype, name="out")(
            modulate(plain_norm(z), shift, scale)
        )
        return (unpatches(y, p, *x.shape[1:3]) if image else y).astype(at_least_float32(x.dtype))
