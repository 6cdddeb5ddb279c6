"""Sets in and out: set-transformer blocks, and an autoencoder of shapes as a set of vectors."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from diffjax.networks.attention import logits_of, softmax, weighted
from diffjax.networks.layers import Dense, LayerNorm, fan_in_uniform, mark_layer, repeat
from diffjax.networks.partition import COLUMN, ROW, Rules, constrain
from diffjax.networks.taps import Tap


class SetAttention(nn.Module):
    """What a set `y` tells each element of x, and a gated MLP.   x + attend(norm(x), norm(y)), then h + mlp(norm(h))

    The block of set transformers: without `y` elements of x attend to each other. Taps: `q`, `k`, `v` [B, T, H, D],
    `logits`, `weights` [B, H, T, S], `block`.
    Args: x: [B, T, d].   y: [B, S, e], default x.   mask: [B, S] bool, False is not read.   residual: whether x is added
        to what it attends to.
    Returns: [B, T, d]; elements of y may come in any order, elements of x are treated alike.
    Raises: ValueError: d not divisible by heads.

    Reference: Lee et al. 2019, arXiv:1810.00825, Eq. 6 (there with norms after the sums); the form with norms before and a
    gated MLP: Zhang et al. 2023, arXiv:2301.11445.
    """

    heads: int
    expand: int = 4  # of the MLP; 0 for none
    residual: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, y: Any = None, mask: Any = None) -> jax.Array:
        """Mix y into x."""
        d = x.shape[-1]
        if d % self.heads:
            raise ValueError(f"set attention needs a width divisible by heads; got width {d} and heads={self.heads}")
        x = x.astype(self.dtype)
        h = LayerNorm(1e-6, name="norm")(x)
        source = h if y is None else LayerNorm(1e-6, name="norm_y")(y.astype(self.dtype))
        cut = "heads" if self.heads > 1 else None  # one head alone is whole on every device
        split = lambda a: constrain(a.reshape(*a.shape[:2], self.heads, -1), "batch", None, cut, None)
        dense = lambda features, name, bias=True: Dense(features, bias=bias, dtype=self.dtype, name=name)
        q = split(dense(d, "q_in", False)(h))
        k, v = jnp.split(split(dense(2 * d, "kv", False)(source)), 2, axis=-1)
        q, k, v = Tap(name="q")(q), Tap(name="k")(k), Tap(name="v")(v)
        logits = Tap(name="logits")(logits_of(q * (d // self.heads) ** -0.5, k))
        weights = Tap(name="weights")(softmax(logits, mask))
        mixed = dense(d, "out")(constrain(weighted(weights, v).reshape(x.shape), "batch", None, "wide"))
        x = x + mixed if self.residual else mixed
        if self.expand:
            h = LayerNorm(1e-6, name="norm_mlp")(x)
            value, gate = (dense(self.expand * d, name)(h) for name in ("value", "gate"))
            h = constrain(value * nn.gelu(gate), "batch", None, "wide")
            x = x + dense(d, "mlp")(h)
        return Tap(name="block")(x)


class InducedSet(nn.Module):
    """Attention by way of `points` learned elements: linear in the size of the set.   MAB(x, MAB(I, x))

    Args: x: [B, T, d].   mask: [B, T] bool.   Returns: [B, T, d], equivariant.
    Reference: Lee et al. 2019, arXiv:1810.00825, Eq. 9 and 10.
    """

    heads: int
    points: int
    expand: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, mask: Any = None) -> jax.Array:
        """Gather, then spread."""
        gathered = SetPooling(self.heads, self.points, self.expand, self.dtype, name="gather")(x, mask)
        return SetAttention(self.heads, self.expand, dtype=self.dtype, name="spread")(x, gathered)


class SetPooling(nn.Module):
    """A set as `points` vectors, by learned queries.   MAB(S, x)

    Args: x: [B, T, d].   mask: [B, T] bool.   Returns: [B, points, d], whatever the order of x.
    Reference: Lee et al. 2019, arXiv:1810.00825, Eq. 11.
    """

    heads: int
    points: int
    expand: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, mask: Any = None) -> jax.Array:
        """Pool the set."""
        seeds = self.param("points", fan_in_uniform(1), (self.points, x.shape[-1]), jnp.float32)
        seeds = jnp.broadcast_to(seeds[None], (x.shape[0], *seeds.shape))
        return SetAttention(self.heads, self.expand, dtype=self.dtype, name="pool")(seeds, x, mask)


def farthest_points(x: Any, count: int, mask: Any = None) -> jax.Array:
    """Points that cover a cloud: the one farthest from the mean, then always the one farthest from those chosen.

    Args: x: [B, N, D].   count: how many.   mask: [B, N] bool, False is never chosen unless there are too few.
    Returns: [B, count, D]; the same in whatever order the points come, but for ties.
    Raises: ValueError: more than there are.

    Example:
        >>> farthest_points(jnp.array([[[0.0], [1.0], [5.0], [6.0]]]), 3).ravel().tolist()
        [0.0, 6.0, 1.0]

    Reference: Eldar et al. 1997, The farthest point strategy for progressive image sampling.
    """
    if count > x.shape[1]:
        raise ValueError(f"farthest_points needs count at most the number of points; got {count} of {x.shape[1]}")
    present = jnp.ones(x.shape[:2], bool) if mask is None else mask
    weight = present.astype(x.dtype)[:, :, None]
    mean = jnp.sum(jnp.where(present[:, :, None], x, jnp.zeros((), x.dtype)), 1, keepdims=True)
    mean = mean / jnp.maximum(weight.sum(1, keepdims=True), 1)
    square = lambda centre: jnp.where(present, jnp.sum(jnp.square(x - centre), axis=-1), -1.0)
    take = lambda i: jnp.take_along_axis(x, i[:, None, None], axis=1)

    def choose(carry: Any, _: Any) -> tuple[Any, Any]:
        distance, point = carry
        distance = jnp.minimum(distance, square(point))
        return (distance, take(jnp.argmax(distance, axis=1))), point[:, 0]

    start = take(jnp.argmax(square(mean), axis=1))
    infinite = jnp.where(present, jnp.inf, -1.0).astype(x.dtype)
    _, points = lax.scan(choose, (infinite, start), None, length=count)
    return points.swapaxes(0, 1)


def point_features(x: Any, bands: int = 8) -> jax.Array:
    """Sines and cosines of each coordinate in octaves, and the coordinates.   [B, N, D] -> [B, N, (2 bands + 1) D]

    Reference: Mildenhall et al. 2020, arXiv:2003.08934, Eq. 4.
    """
    w = jnp.pi * 2.0 ** jnp.arange(bands, dtype=jnp.float32)
    phase = (x.astype(jnp.float32)[..., None] * w[None, None, None]).reshape(*x.shape[:2], -1)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase), x.astype(jnp.float32)], axis=-1)


class VecBlock(nn.Module):
    """Self-attention among the vectors, for `layers.repeat`."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, layer: Any) -> tuple[Any, None]:
        """One block."""
        mark_layer(layer)
        return SetAttention(self.heads, dtype=self.dtype, name="mix")(x), None


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latent vectors."""

    mean: Any  # [B, M, l]
    log_var: Any


class VecSet(nn.Module):
    """A shape as a set of vectors: an encoder of points, and a decoder of values at any place.

    Encoder: `latents` points that cover the cloud, each read the whole cloud by one cross-attention. Decoder: self-attention
    among the vectors, then places read them by one cross-attention. With `latent_size` the vectors are narrowed
    to a Gaussian of that size, on which a diffusion model (`TokenDiT` without positions) may work. The defaults are the
    published autoencoder of width 512.
    Taps: `read/...` of the encoder, `blocks/block_i/mix/...`, `ask/...` of the decoder (see `SetAttention`).
    Args of a call: points: [B, N, D].   places: [B, Q, D].   mask: [B, N] bool, False is not a point.
    Returns: [B, Q, out_channels] float32, from the mean of the latents.
    Raises: ValueError: fewer points than latents; width not divisible by heads.

    Example:
        >>> net = VecSet(width=8, depth=1, heads=2, latents=3)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 5, 3)), jnp.zeros((1, 4, 3)))
        >>> v["params"]["points_in"]["kernel"].shape
        (51, 8)

    Reference: Zhang et al. 2023, arXiv:2301.11445 (3DShape2VecSet).
    """

    width: int = 512
    depth: int = 24
    heads: int = 8
    latents: int = 512
    latent_size: int = 0  # of the Gaussian bottleneck; 0 for none
    out_channels: int = 1
    bands: int = 8  # octaves of the point features
    scan_layers: bool = False
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (
        (r"/(q_in|kv|value|gate)/(kernel|bias)$", COLUMN),
        (r"(read|ask|mix)/(out|mlp)/kernel$", ROW),
    )

    def setup(self) -> None:
        """The parts of both halves."""
        dense = lambda features: Dense(features, dtype=self.dtype)
        self.points_in = dense(self.width)
        self.read = SetAttention(1, dtype=self.dtype)
        self.ask = SetAttention(1, expand=0, residual=False, dtype=self.dtype)
        self.values = dense(self.out_channels)
        if self.latent_size:
            self.mean, self.log_var, self.widen = dense(self.latent_size), dense(self.latent_size), dense(self.width)
        self.blocks = VecBlocks(self.heads, self.depth, self.scan_layers, self.remat, self.dtype)

    def __call__(self, points: Any, places: Any, mask: Any = None) -> jax.Array:
        """Values at places of the shape that points tell."""
        z = self.encode(points, mask)
        return self.decode(z.mean if self.latent_size else z, places)

    def encode(self, points: Any, mask: Any = None) -> Any:
        """The latent set of a cloud.   [B, N, D] -> [B, latents, width], or a `Gaussian` of [B, latents, latent_size]"""
        if mask is not None:  # zero, so that not even a NaN in the padding can reach the result
            points = jnp.where(mask[:, :, None], points, jnp.zeros((), points.dtype))
        chosen = farthest_points(points, self.latents, mask)
        embed = lambda x: self.points_in(point_features(x, self.bands).astype(self.dtype))
        z = self.read(embed(chosen), embed(points), mask)
        if not self.latent_size:
            return z
        clipped = jnp.clip(self.log_var(z).astype(jnp.float32), -30.0, 20.0)
        return Gaussian(self.mean(z).astype(jnp.float32), clipped)

    def decode(self, z: Any, places: Any) -> jax.Array:
        """Values at places.   [B, latents, width or latent_size], [B, Q, D] -> [B, Q, out_channels] float32"""
        z = z.astype(self.dtype)
        z = self.blocks(self.widen(z) if self.latent_size else z)
        asked = self.points_in(point_features(places, self.bands).astype(self.dtype))
        return self.values(self.ask(asked, z)).astype(jnp.float32)


class VecBlocks(nn.Module):
    """`depth` blocks among the vectors."""

    heads: int
    depth: int
    scan_layers: bool
    remat: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """All blocks."""
        fields = dict(heads=self.heads, dtype=self.dtype)
        return repeat(VecBlock, fields, self.depth, x, (), scan=self.scan_layers, remat=self.remat)
