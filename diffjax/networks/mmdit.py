"""A multimodal diffusion transformer: text and image have weights of their own and one attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import Attention
from diffjax.networks.conditions import condition_of, read_state, read_time
from diffjax.networks.dit import check_patch, patches, unpatches
from diffjax.networks.embeddings import UNIT, Frequencies, LabelEmbedding, TimeCode, grid_positions
from diffjax.networks.joint import JOINT, JointAttention
from diffjax.networks.layers import Dense, at_least_float32, mark_layer, modulate, plain_norm, rematerialised, repeat
from diffjax.networks.partition import ATTENTION, COLUMN, ROW, Rules, constrain
from diffjax.networks.positions import Rope, Sincos, Table
from diffjax.networks.taps import Tap

TEXT = "_text"  # how the names of a block's layers for the text end


def adaptive(c: Any, n: int, width: int, dtype: Any, name: str) -> list[Any]:
    """`n` modulations of a block from the code, zero at the start.   [B, d] -> n x [B, 1, width]"""
    film = constrain(Dense(n * width, zero=True, dtype=dtype, name=name)(c), "batch", None)
    return jnp.split(film[:, None], n, axis=-1)


class JointBlock(nn.Module):
    """Joint attention and an MLP per stream, each gated from zero.   x + gate * f(norm(x) (1 + scale) + shift)

    The last block of a network is that of the image alone: the text gives keys and values, and ends there.
    """

    width: int
    heads: int
    expand: int
    qk_norm: bool
    act: Callable[[Any], Any]
    dropout: float
    train: bool
    dtype: Any
    alone: bool = False  # a second attention, of the image to itself
    last: bool = False

    @nn.compact
    def __call__(self, streams: Any, layer: Any, c: Any, mask: Any, angles: Any) -> tuple[Any, None]:
        """One block; see `layers.repeat` for the form."""
        mark_layer(layer)
        x, y = streams
        shift, scale, *image = adaptive(c, 9 if self.alone else 6, self.width, self.dtype, "film")
        text_shift, text_scale, *text = adaptive(c, 2 if self.last else 6, self.width, self.dtype, "film" + TEXT)
        h = modulate(plain_norm(x), shift, scale), modulate(plain_norm(y), text_shift, text_scale)
        asking = 1 if self.last else None
        mixed = JointAttention(self.heads, self.qk_norm, asking, dtype=self.dtype, name="attention")(h, mask, angles)
        more = 0.0
        if self.alone:
            shift, scale, gate = image[4:]
            own = Attention(self.heads, self.qk_norm, dtype=self.dtype, name="own_attention")
            turn = None if angles is None else angles[: x.shape[1]]
            more = gate * Tap(name="attended_own")(own(modulate(plain_norm(x), shift, scale), angles=turn))
        x = self._rest(x, mixed[0], image[:4], "", more)
        if self.last:
            return x, None
        return (x, self._rest(y, mixed[1], text, TEXT)), None

    def _rest(self, x: Any, mixed: Any, film: list[Any], end: str, more: Any = 0.0) -> Any:
        """The block of one stream after attention."""
        tokens = None if end else "tokens"
        gate, shift, scale, gate_m = film
        h = Dense(self.width, dtype=self.dtype, name="project" + end)(mixed)
        x = constrain(x + gate * Tap(name="attended" + end)(h) + more, "batch", tokens, None)
        h = modulate(plain_norm(x), shift, scale)
        h = Dense(self.expand * self.width, dtype=self.dtype, name="hidden" + end)(h)
        h = self.act(constrain(h, "batch", tokens, "wide"))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        h = Dense(self.width, dtype=self.dtype, name="out" + end)(h)
        return Tap(name="block" + end)(constrain(x + gate_m * Tap(name="mixed" + end)(h), "batch", tokens, None))


class SingleBlock(nn.Module):
    """One stream of all tokens, attention and MLP side by side.   z + gate * (attend(h) W + act(h W) W),  h = modulate(z)"""

    width: int
    heads: int
    expand: int
    qk_norm: bool
    act: Callable[[Any], Any]
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, z: Any, layer: Any, c: Any, mask: Any, angles: Any) -> tuple[Any, None]:
        """One block; see `layers.repeat` for the form."""
        mark_layer(layer)
        shift, scale, gate = adaptive(c, 3, self.width, self.dtype, "film")
        h = modulate(plain_norm(z), shift, scale)
        (mixed,) = JointAttention(self.heads, self.qk_norm, dtype=self.dtype, name="attention")((h,), mask, angles)
        mixed = Dense(self.width, dtype=self.dtype, name="project")(mixed)
        h = Dense(self.expand * self.width, dtype=self.dtype, name="hidden")(h)
        h = self.act(constrain(h, "batch", None, "wide"))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        h = Dense(self.width, bias=False, dtype=self.dtype, name="out")(h)
        return Tap(name="block")(z + gate * (Tap(name="attended")(mixed) + Tap(name="mixed")(h))), None


class Stack(nn.Module):
    """Equal blocks under a name of their own; see `layers.repeat`."""

    block: Any
    fields: tuple[tuple[str, Any], ...]
    depth: int
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, x: Any, *args: Any) -> Any:
        """All blocks after each other."""
        return repeat(self.block, dict(self.fields), self.depth, x, args, scan=self.scan, remat=self.remat)


class MMDiT(nn.Module):
    """A diffusion transformer of two streams, image patches and text tokens, that share one attention.

    [B, H, W, C] -> [B, H, W, C], for sizes divisible by `patch`. `depth` blocks of two streams, the last of them without
    an output of text, as in SD3; with `single` > 0 all of them are whole, and as many blocks of one stream follow, as in
    Flux. Time, pooled text and label modulate all blocks (adaLN-zero).

    Conditions: tokens, label, vector, image (by channels); `token_size` is needed. The output starts at zero. Taps:
    `block_i/{attended,mixed,block}` and the same names with `_text`, `.../attention/{q,k,v,logits,weights}` of all
    tokens, image first; those blocks are in `dual/` where `alone` counts them, in `last/` and in `single/`.
    Args of a call: x: [B, H, W, C].   t: scalar or [B].   train: use dropout.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: no token_size; guided without a vector; H or W not divisible by patch; width by heads; a grid that
        `positions` refuses; `alone` out of range; shapes or conditions that do not fit.

    Example:
        >>> net = MMDiT(width=8, depth=2, heads=2, token_size=6)
        >>> cond = {"tokens": jnp.zeros((1, 5, 6))}
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), cond)
        >>> v["params"]["block_0"]["attention"]["qkv_1"]["kernel"].shape
        (8, 24)

    Reference: Esser et al. 2024, arXiv:2403.03206, section 4 and Figure 2.
    """

    width: int = 64
    depth: int = 4
    heads: int = 4
    patch: int = 2
    expand: int = 4
    num_classes: int = 0
    vector_size: int = 0  # of pooled text
    token_size: int = 0
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    qk_norm: bool = False
    positions: Table | None = grid_positions  # added to the patches, see `positions`
    rope: Rope | None = None  # of the patches; text does not turn
    alone: int = 0  # how many blocks, from the first, have a second attention of the image to itself (SD3.5-medium)
    single: int = 0  # blocks of one stream (Flux)
    guided: bool = False  # the last number of the vector is a guidance weight, coded as the time is
    frequencies: Frequencies = UNIT
    sinusoids: int = 256  # of the time code
    act: Callable[[Any], Any] = nn.gelu
    dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (
        *((r"own_" + pattern, spec) for pattern, spec in ATTENTION),
        *JOINT,
        (r"(^|/)film(_text)?/(kernel|bias)$", COLUMN),
        (r"((time|guidance)/|vector_)hidden/(kernel|bias)$", COLUMN),
        (r"((time|guidance)/|vector_)out/kernel$", ROW),
    )

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        b, h, w, channels = x.shape
        p = self.patch
        if not self.token_size:
            raise ValueError("MMDiT needs token_size > 0: the size of its text tokens. Without text, take DiT")
        if self.guided and self.vector_size < 2:
            raise ValueError(
                "guided reads the guidance weight from the end of cond['vector'], so that vector_size must be at least 2; got "
                f"{self.vector_size}"
            )
        check_patch(self, x, p)
        pairs = self.depth - (not self.single)  # whole blocks of two streams
        if not 0 <= self.alone <= pairs or self.depth < 1:
            raise ValueError(
                f"alone must be in 0 .. {max(pairs, 0)}, the whole blocks of two streams; got {self.alone}"
            )
        condition = condition_of(self, cond, x)
        c = self._code(read_time(t, x), condition)
        z = condition.joined(x, self.dtype)
        z = Dense(self.width, dtype=self.dtype, name="in")(patches(z, p))
        n = z.shape[1]
        if self.positions is not None:
            z = z + jnp.asarray(self.positions(h // p, w // p, self.width), self.dtype)[None]
        z = constrain(z, "batch", "tokens", None)
        y = Dense(self.width, dtype=self.dtype, name="in" + TEXT)(condition.tokens.astype(self.dtype))
        mask = jnp.concatenate([jnp.ones((b, n), bool), condition.mask], axis=1)
        angles = None
        if self.rope is not None:
            angles = jnp.asarray(self.rope(h // p, w // p, self.width // self.heads))
            angles = jnp.concatenate([angles, jnp.zeros((y.shape[1], angles.shape[1]), angles.dtype)])
        z = self._blocks(z, y, (c, mask, angles), train)
        film = constrain(Dense(2 * self.width, zero=True, dtype=self.dtype, name="film")(c), "batch", None)
        z = modulate(plain_norm(z[:, :n]), *jnp.split(film, 2, axis=-1))
        y = Dense(p * p * (self.out_channels or channels), zero=True, dtype=self.dtype, name="out")(z)
        return unpatches(y, p, h, w).astype(at_least_float32(x.dtype))

    def _code(self, t: Any, condition: Any) -> Any:
        """The code of time, pooled text and label.   act(time(t) + W act(W v) + label[l])"""
        code = lambda a, name: TimeCode(self.width, self.sinusoids, self.frequencies, dtype=self.dtype, name=name)(a)
        c = code(t, "time")
        if self.num_classes:
            c = c + LabelEmbedding(self.num_classes, self.width, self.dtype, name="label")(condition.label)
        if self.vector_size:
            v = jnp.asarray(condition.vector)
            if self.guided:
                c = c + code(v[:, -1], "guidance")
                v = v[:, :-1]
            v = nn.silu(Dense(self.width, dtype=self.dtype, name="vector_hidden")(v.astype(self.dtype)))
            c = c + Dense(self.width, dtype=self.dtype, name="vector_out")(v)
        return constrain(nn.silu(c), "batch", ...)

    def _blocks(self, z: Any, y: Any, args: tuple, train: bool) -> Any:
        """All blocks.   [B, N, d], [B, L, d] -> [B, N or N + L, d]"""
        fields = dict(
            width=self.width,
            heads=self.heads,
            expand=self.expand,
            qk_norm=self.qk_norm,
            act=self.act,
            dropout=self.dropout,
            train=train,
            dtype=self.dtype,
        )
        form = dict(scan=self.scan_layers, remat=self.remat)
        streams = (z, y)
        if self.alone:
            dual = tuple((fields | {"alone": True}).items())
            streams = Stack(JointBlock, dual, self.alone, **form, name="dual")(streams, *args)
        rest = self.depth - (not self.single) - self.alone
        if rest:
            streams = repeat(JointBlock, fields, rest, streams, args, **form)
        if not self.single:
            return rematerialised(JointBlock, self.remat)(**fields, last=True, name="last")(streams, None, *args)[0]
        z = jnp.concatenate(streams, axis=1)
        return Stack(SingleBlock, tuple(fields.items()), self.single, **form, name="single")(z, *args)


# Time codes of 1000 t, as published.
THOUSAND: Frequencies = (10000 ** (-127 / 128), 1.0)
# Sizes and positions of the released networks: the configurations of SD3Transformer2DModel (stable-diffusion-3-medium,
# 3.5-medium, 3.5-large) and FluxTransformer2DModel (FLUX.1-dev, FLUX.1-schnell). Their inputs are 16 channels of latents, and
# for Flux the 64 of 2 x 2 patches of them.
RELEASED = dict(patch=2, token_size=4096, vector_size=2048, frequencies=THOUSAND)
CROPPED = Sincos(crop=192, scale=1 / 3, columns_first=True)
FLUX = dict(width=3072, depth=19, single=38, heads=24, patch=2, token_size=4096, qk_norm=True, frequencies=THOUSAND)
FLUX |= dict(positions=None, rope=Rope(features=(56, 56)))
PRESETS = {
    "sd3-medium": (MMDiT, dict(width=1536, depth=24, heads=24, positions=CROPPED, **RELEASED)),
    "sd3.5-medium": (
        MMDiT,
        dict(
            width=1536,
            depth=24,
            heads=24,
            alone=13,
            qk_norm=True,
            positions=Sincos(crop=384, scale=1 / 6, columns_first=True),
            **RELEASED,
        ),
    ),
    "sd3.5-large": (MMDiT, dict(width=2432, depth=38, heads=38, qk_norm=True, positions=CROPPED, **RELEASED)),
    "flux-dev": (MMDiT, dict(vector_size=769, guided=True, **FLUX)),
    "flux-schnell": (MMDiT, dict(vector_size=768, **FLUX)),
}
# width 64 d and d heads for a depth of d: arXiv:2403.03206, section 5.3
PRESETS |= {f"mmdit-{d}": (MMDiT, dict(width=64 * d, depth=d, heads=d, **RELEASED)) for d in (15, 18, 21, 30, 38)}
