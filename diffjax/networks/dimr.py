"""DiMR: branches of rising resolution, a transformer at the lowest and ConvNeXt blocks above, told the time by their norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from diffjax.networks.attention import Attention
from diffjax.networks.conditions import condition_of, read_state, read_time
from diffjax.networks.convolution import Conv, ConvForm
from diffjax.networks.dit import check_patch, patches
from diffjax.networks.embeddings import LabelEmbedding, grid_positions
from diffjax.networks.layers import Dense, at_least_float32, fan_in_uniform, rematerialised
from diffjax.networks.partition import ATTENTION, COLUMN, ROW, Rules, constrain
from diffjax.networks.taps import Tap


class Branch(NamedTuple):
    """One resolution.   heads: 0 for ConvNeXt blocks.   depth: odd.   patch: pixels of the state to one of the branch."""

    width: int
    depth: int
    patch: int
    heads: int = 0


def flow_log_snr(t: Any) -> jax.Array:
    """log(alpha^2 / sigma^2) / 4 of a time in [0, 1] where alpha = 1 - t and sigma = t, in [-7, 7].   log(1 / t - 1) / 2

    Example:
        >>> flow_log_snr(jnp.array([0.0, 0.5])).tolist()
        [7.0, 0.0]
    """
    t = jnp.clip(jnp.asarray(t, jnp.float32), 1e-7, 1 - 1e-7)
    return jnp.clip((jnp.log1p(-t) - jnp.log(t)) / 2, -7.0, 7.0)


class TimeNorm(nn.Module):
    """A norm whose scale, and bias if centred, go from one vector to another with the time.   norm(x) p(u)

    p(u) = s p0 + (1 - s) p1,   s = sigmoid((1 + w) u + b) for each channel. With p0 = p1 the time has exactly no effect.
    Args: x: [B, ..., d].   u: [B], log(alpha^2 / sigma^2) / 4.   centred: layer norm with a bias, of eight vectors; else
    division by the root mean square, of four.
    Returns: as x.

    Example:
        >>> v = jax.eval_shape(TimeNorm().init, jax.random.key(0), jnp.zeros((1, 3, 8)), jnp.zeros(1))
        >>> sorted(v["params"]), v["params"]["scale_0"].shape
        (['scale_0', 'scale_1', 'scale_shift', 'scale_slope'], (8,))

    Reference: Liu et al. 2024, arXiv:2406.09416.
    """

    centred: bool = False

    @nn.compact
    def __call__(self, x: Any, u: Any) -> jax.Array:
        """Normalise x at time u; the dtype stays."""
        h = x.astype(at_least_float32(x.dtype))
        u = u.astype(h.dtype)[:, None]

        def vector(name: str, start: Any) -> Any:
            make = lambda end, init: self.param(f"{name}_{end}", init, x.shape[-1:], jnp.float32).astype(h.dtype)[None]
            zeros = nn.initializers.zeros
            p0, p1, w, b = (make(0, start), make(1, start), make("slope", zeros), make("shift", zeros))
            p = p1 + jax.nn.sigmoid((1 + w) * u + b) * (p0 - p1)
            return p.reshape(p.shape[0], *[1] * (x.ndim - 2), p.shape[-1])

        if self.centred:
            h = h - h.mean(-1, keepdims=True)
        h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6) * vector("scale", nn.initializers.ones)
        if self.centred:
            h = h + vector("bias", nn.initializers.zeros)
        return h.astype(x.dtype)


def depthwise(x: Any, kernel: Any) -> jax.Array:
    """Each channel convolved with its own kernel, zero padded to the same size.   [B, H, W, c], [k, k, 1, c] -> [B, H, W, c]

    On a CPU as shifted products, as XLA's gradient of a grouped convolution is slow there, above all inside a loop; both are
    equal. Milliseconds of the gradient, 16 items, 2 busy cores, plain / in `lax.scan`: 8 x 8 x 16 with k = 3 2.1 / 6.7 and
    0.2 / 0.2, 8 x 8 x 32 with k = 7 4.8 / 69 and 3.1 / 1.4.
    """
    k, c = kernel.shape[0], x.shape[-1]
    if jax.default_backend() != "cpu":
        form = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form, feature_group_count=c)
    h, w, near, dtype = x.shape[1], x.shape[2], ((k - 1) // 2, k // 2), x.dtype
    wide = at_least_float32(dtype)  # the sum, as that of a convolution
    x = jnp.pad(x, ((0, 0), near, near, (0, 0))).astype(wide)
    kernel = kernel.reshape(k, k, 1, 1, 1, c).astype(wide)
    return sum(x[:, i : i + h, j : j + w] * kernel[i, j] for i in range(k) for j in range(k)).astype(dtype)


class Block(nn.Module):
    """Mixing over places, then a gated MLP, both residual.   x + mix(x),  x + W (act(W_g h) * W_h h),  h = norm(x)"""

    width: int
    heads: int  # 0: a depthwise convolution
    kernel: int
    expand: int
    norm: Callable[..., Any]
    act: Callable[[Any], Any]
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, u: Any) -> Any:
        """One block; x is [B, T, d] with heads, else [B, H, W, d]."""
        d, drop = self.width, lambda h: nn.Dropout(self.dropout, deterministic=not self.train)(h)
        names = ("batch", "some_tokens" if self.heads else None, *[None] * (x.ndim - 3))
        if self.heads:
            h = Attention(self.heads, dtype=self.dtype, name="attention")(self.norm(name="norm_attention")(x, u))
        else:
            kernel = self.param(
                "depthwise", fan_in_uniform(self.kernel**2), (self.kernel, self.kernel, 1, d), jnp.float32
            )
            bias = self.param("bias", nn.initializers.zeros, (d,), jnp.float32).astype(self.dtype)
            h = depthwise(x, kernel.astype(self.dtype)) + bias.reshape((1,) * (x.ndim - 1) + (-1,))
        x = constrain(x + drop(Tap(name="attended" if self.heads else "convolved")(h)), *names, None)
        h = self.norm(name="norm_mlp")(x, u)
        gate = self.act(Dense(self.expand * d, dtype=self.dtype, name="gate")(h))
        h = constrain(gate * Dense(self.expand * d, dtype=self.dtype, name="hidden")(h), *names, "wide")
        h = Tap(name="mixed")(Dense(d, dtype=self.dtype, name="out")(h))
        return Tap(name="block")(constrain(x + drop(h), *names, None))


class Resolution(nn.Module):
    """One branch: the state in patches plus what the branch below found, blocks with long skips, an output."""

    branch: Branch
    fields: tuple[tuple[str, Any], ...]  # of the blocks
    size: tuple[int, int] | None
    form: ConvForm | None
    remat: str

    @nn.compact
    def __call__(self, x: Any, u: Any, below: Any, codes: tuple[Any, ...], out: int) -> tuple[Any, Any]:
        """The output [B, h, w, out] (None for `out=0`), and the input and all blocks joined [B, h, w, (1 + depth) d]."""
        d, depth, p, heads = self.branch
        fields = dict(self.fields)
        dtype = fields["dtype"]
        b, h, w = x.shape[0], x.shape[1] // p, x.shape[2] // p
        z = Dense(d, dtype=dtype, name="in")(patches(x, p)).reshape(b, h, w, d)
        z = z + self._positions(h, w).astype(dtype)[None]
        if below is not None:
            r = h // below.shape[1]
            up = Dense(d * r * r, dtype=dtype, name="up")(TimeNorm(centred=True, name="norm_below")(below, u))
            up = up.reshape(b, h // r, w // r, r, r, d).transpose(0, 1, 3, 2, 4, 5).reshape(z.shape)
            z = z + Tap(name="cascade")(TimeNorm(centred=True, name="norm_up")(up, u))
        first = len(codes)
        if heads:
            z = jnp.concatenate([*(c[:, None] for c in codes), z.reshape(b, h * w, d)], axis=1)
        make, skips, found = rematerialised(Block, self.remat), [], [z]
        for i in range(depth):
            if i > depth // 2:
                z = Dense(d, dtype=dtype, name=f"join_{i}")(jnp.concatenate([z, skips.pop()], axis=-1))
            z = make(width=d, heads=heads, **fields, name=f"block_{i}")(z, u)
            found.append(z)
            if i < depth // 2:
                skips.append(z)
        place = lambda z: z[:, first:].reshape(b, h, w, d) if heads else z
        y = None
        if out:
            y = TimeNorm(centred=True, name="norm_out")(place(z), u)
            y = Conv(out, form=self.form, zero=True, dtype=dtype, name="out")(y)
        return y, jnp.concatenate([place(z) for z in found], axis=-1)

    def _positions(self, h: int, w: int) -> Any:
        d = self.branch.width
        if self.size is None:
            return jnp.asarray(grid_positions(h, w, d)).reshape(h, w, d)
        high, wide = (n // self.branch.patch for n in self.size)
        if h > high or w > wide:
            raise ValueError(
                f"positions are learned for states of up to {self.size}, that is {high} x {wide} patches; got {h} x {w}. Use "
                "size=None for fixed positions of any size"
            )
        return self.param("positions", nn.initializers.normal(0.02), (high, wide, d), jnp.float32)[:h, :w]


class DiMR(nn.Module):
    """Branches of rising resolution with time-dependent norms, for images.   [B, H, W, C] -> [B, H, W, C]

    Each branch takes the state in patches of its own size and, by pixel shuffle, all that the branch below it computed.
    The lowest is a transformer with long skips; the others are ConvNeXt blocks. Only norms know the time. Conditions: label
    and vector as tokens of the transformers, image by channels (see `conditions`). With `auxiliary` the result is
    `(y, {branch_i: [B, H / patch, W / patch, out]})`, an output of every branch below the last, for
    `denoiser(..., aux=True)` and `losses.side_outputs()`; without, they cost nothing. Taps:
    `branch_i/block_j/{attended or convolved, mixed, block}`, `branch_i/cascade`, `.../attention/...`. The output starts
    at zero.
    Args of a call: x: [B, H, W, C].   t: scalar or [B].   train: use dropout.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: branches that do not rise to patch 1 or have even depths; H or W not divisible; shapes or
    conditions that do not fit.

    Example:
        >>> net = DiMR(branches=(Branch(8, 1, 2, heads=2), Branch(4, 1, 1)))
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
        >>> v["params"]["branch_1"]["up"]["kernel"].shape
        (16, 16)

    Reference: Liu et al. 2024, arXiv:2406.09416.
    """

    branches: tuple[Branch, ...] = (Branch(64, 3, 2, heads=4), Branch(32, 3, 1))
    expand: int = 2
    kernel: int = 7
    num_classes: int = 0
    vector_size: int = 0
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    auxiliary: bool = False  # return outputs of the lower branches as well
    size: tuple[int, int] | None = None  # learned positions for states of up to this size; default fixed ones
    log_snr: Callable[[Any], Any] = flow_log_snr  # of the time code, log(alpha^2 / sigma^2) / 4
    norm: Callable[..., Any] = TimeNorm  # of the blocks: `norm(name=...)(x, u)`
    act: Callable[[Any], Any] = nn.gelu
    dropout: float = 0.0
    conv: ConvForm | None = None  # of the outputs, see `convolution.Conv`
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (  # along the mesh axis `model`
        *ATTENTION,
        (r"block_\d+/(gate|hidden)/(kernel|bias)$", COLUMN),
        (r"block_\d+/out/kernel$", ROW),
        (r"branch_\d+/(up|join_\d+)/kernel$", PartitionSpec("model", None)),
    )

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> Any:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        self._check(x)
        condition = condition_of(self, cond, x)
        u = self.log_snr(read_time(t, x))
        out = self.out_channels or x.shape[-1]
        fields = dict(
            kernel=self.kernel,
            expand=self.expand,
            norm=self.norm,
            act=self.act,
            dropout=self.dropout,
            train=train,
            dtype=self.dtype,
        )
        z = condition.joined(x, self.dtype)
        below, side, last = None, {}, len(self.branches) - 1
        for i, branch in enumerate(self.branches):
            codes = self._codes(condition, branch.width, i) if branch.heads else ()
            part = Resolution(branch, tuple(fields.items()), self.size, self.conv, self.remat, name=f"branch_{i}")
            wanted = out if i == last or self.auxiliary else 0
            y, below = part(z, u, below, codes, wanted)
            side[f"branch_{i}"] = None if y is None else y.astype(at_least_float32(x.dtype))
        y = side.pop(f"branch_{last}")
        return (y, side) if self.auxiliary else y

    def _codes(self, condition: Any, width: int, i: int) -> tuple[Any, ...]:
        """Tokens [B, width] that tell a transformer the label and the vector."""
        codes = []
        if self.num_classes:
            codes.append(LabelEmbedding(self.num_classes, width, self.dtype, name=f"label_{i}")(condition.label))
        if self.vector_size:
            v = jnp.asarray(condition.vector).astype(self.dtype)
            codes.append(Dense(width, bias=False, dtype=self.dtype, name=f"vector_{i}")(v))
        return tuple(codes)

    def _check(self, x: Any) -> None:
        patch = [b.patch for b in self.branches]
        if not patch or patch[-1] != 1 or any(a <= b or a % b for a, b in zip(patch, patch[1:], strict=False)):
            raise ValueError(
                f"the patches of branches must be falling multiples down to 1, such as 4, 2, 1; got {patch}"
            )
        if any(b.depth < 1 or b.depth % 2 == 0 for b in self.branches):
            raise ValueError(f"depths of branches must be odd; got {[b.depth for b in self.branches]}")
        if (self.num_classes or self.vector_size) and not any(b.heads for b in self.branches):
            raise ValueError("labels and vectors are tokens of transformers; give a branch heads > 0")
        check_patch(self, x, patch[0])


# Widths and depths of XL/2R and G/2R: the configurations released with arXiv:2406.09416, whose depths are rounded up to odd
# numbers, and whose projections of q, k and v have no bias while ours do. Those of XL/3R are inferred: its third branch
# continues the first two, and only a depth of 21 gives the published 525M parameters and 206 Gflops.
PRESETS = {
    "dimr-xl/2r": (DiMR, dict(branches=(Branch(960, 39, 2, heads=16), Branch(480, 21, 1)), size=(32, 32))),
    "dimr-g/2r": (DiMR, dict(branches=(Branch(1152, 57, 2, heads=16), Branch(576, 29, 1)), size=(32, 32))),
    "dimr-xl/3r": (
        DiMR,
        dict(branches=(Branch(960, 39, 4, heads=16), Branch(480, 21, 2), Branch(240, 21, 1)), size=(64, 64)),
    ),
}
