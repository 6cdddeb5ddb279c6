"""Signals as functions of coordinates: grids read between their points, a network of what is read there, and the
autoencoder that decodes a latent into such a function.

Coordinates lie in [-1, 1]; axis k of a coordinate goes with axis k of the grid, and the points of a grid are the centres
of its cells, `(2 i + 1) / n - 1`, whatever its size: grids of different sizes cover the same square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.autoencoders import CLIP, check_picture
from diffjax.networks.codec import Posterior
from diffjax.networks.coders import Block, Encoder
from diffjax.networks.convolution import Conv, ConvForm
from diffjax.networks.layers import Dense, GroupNorm, at_least_float32
from diffjax.networks.partition import BLOCK, RESIDUAL, Rules
from diffjax.networks.resample import double
from diffjax.networks.taps import Tap

PLANES = ((0, 1), (0, 2), (1, 2))  # the axes of space that each of three planes spans
HATS = 256  # grid points up to which all of them are weighted, and none gathered


def cell_centres(*shape: int) -> jax.Array:
    """The coordinates of the points of a grid, in order.   [prod(shape), len(shape)]

    Example:
        >>> cell_centres(1, 2).tolist()
        [[0.0, -0.5], [0.0, 0.5]]
    """
    axes = [(2 * jnp.arange(n, dtype=jnp.float32) + 1) / n - 1 for n in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))


def interpolate(grid: Any, coords: Any) -> jax.Array:
    """Bilinear interpolation of a grid of vectors.   sum_ij hat(y - i) hat(x - j) grid_ij,  hat(u) = max(0, 1 - |u|)

    Exact for functions that are affine between the outermost points; beyond these, the value at the border. On small
    grids this is one product with the matrix of all weights (the gradient of a gather is up to six times slower on a CPU),
    on others four points are gathered.
    Args: grid: [B, H, W, C].   coords: [N, 2], the same for all items, or [B, N, 2], in [-1, 1].
    Returns: [B, N, C].
    Raises: ValueError: other shapes.

    Example:
        >>> grid = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> interpolate(grid, jnp.array([[-0.5, -0.5], [0.0, 0.0], [0.5, 0.0]]))[0, :, 0].tolist()
        [0.0, 1.5, 2.5]
    """
    grid = jnp.asarray(grid)
    coords = _check_coords(coords, grid, 2)
    b, h, w, c = grid.shape
    flat = grid.reshape(b, h * w, c)
    one = _weigh if h * w <= HATS else _gather
    return jax.vmap(lambda f, at: one(f, at, h, w), (0, None if coords.ndim == 2 else 0))(flat, coords)


def _place(coords: Any, n: int) -> Any:
    """Where a coordinate is among the n points of an axis, in [0, n - 1]."""
    return jnp.clip((coords + 1) * (n / 2) - 0.5, 0, n - 1)


def _weigh(flat: Any, coords: Any, h: int, w: int) -> Any:
    hat = lambda at, n: jnp.maximum(0, 1 - jnp.abs(at[:, None] - jnp.arange(n, dtype=at.dtype)[None]))
    weights = hat(_place(coords[:, 0], h), h)[:, :, None] * hat(_place(coords[:, 1], w), w)[:, None]
    return weights.reshape(-1, h * w).astype(flat.dtype) @ flat


def _gather(flat: Any, coords: Any, h: int, w: int) -> Any:
    corners = []
    for axis, n in ((0, h), (1, w)):
        at = _place(coords[:, axis], n)
        low = jnp.clip(jnp.floor(at), 0, max(n - 2, 0))
        i = low.astype(jnp.int32)
        corners.append(((i, 1 - (at - low)), (jnp.minimum(i + 1, n - 1), at - low)))
    rows, columns = corners
    return sum((fy * fx)[:, None].astype(flat.dtype) * flat[y * w + x] for y, fy in rows for x, fx in columns)


def interpolate_planes(planes: Any, coords: Any) -> jax.Array:
    """A function of space from three planes: each is read at the projection of the point on it.   sum_k plane_k(P_k c)

    Args: planes: three grids [B, H, W, C], of the axes (0, 1), (0, 2) and (1, 2).   coords: [N, 3] or [B, N, 3].
    Returns: [B, N, C].
    Raises: ValueError: not three planes; other shapes.

    Reference: Park et al. 2024, arXiv:2401.12517; planes: Chan et al. 2021, arXiv:2112.07945.
    """
    if len(planes) != len(PLANES):
        raise ValueError(f"planes must be three grids, of the axes {PLANES}; got {len(planes)}")
    coords = _check_coords(coords, jnp.asarray(planes[0]), 3)
    project = lambda axes: jnp.stack([coords[..., k] for k in axes], -1)
    return sum(interpolate(plane, project(axes)) for plane, axes in zip(planes, PLANES, strict=True))


def _check_coords(coords: Any, grid: Any, dimensions: int) -> jax.Array:
    coords = jnp.asarray(coords)
    fits = coords.ndim in (2, 3) and coords.shape[-1] == dimensions and jnp.issubdtype(coords.dtype, jnp.floating)
    if not fits or (coords.ndim == 3 and coords.shape[0] != grid.shape[0]):
        raise ValueError(
            f"coords must be floats [N, {dimensions}] or [{grid.shape[0]}, N, {dimensions}], in [-1, 1]; got "
            f"{coords.dtype} of shape {coords.shape}"
        )
    if grid.ndim != 4:
        raise ValueError(f"a grid must be [B, H, W, C]; got shape {grid.shape}")
    return coords


# ---------------------------------------------------------------------------------------------------------- networks


class PointBlock(nn.Module):
    """Two dense layers beside a linear path.   skip(h) + W act(V act(h))"""

    width: int
    act: Callable[[Any], Any]
    dtype: Any

    @nn.compact
    def __call__(self, h: Any) -> Any:
        """One block at every point: [B, N, c] -> [B, N, width]."""
        r = Dense(self.width, dtype=self.dtype, name="hidden")(self.act(h))
        r = Dense(self.width, dtype=self.dtype, name="out")(self.act(r))
        return Tap(name="block")(Dense(self.width, dtype=self.dtype, name="skip")(h) + r)


class Implicit(nn.Module):
    """The value of a signal at coordinates, from its basis fields, coarse to fine.

    h_1 = block(p_1),  h_k = block([h_{k-1}, p_k]),  value = W act(h),  p_k = the k-th field read at the coordinates

    A field is a grid (`interpolate`), or three planes of space (`interpolate_planes`). Blocks beyond the number of fields
    read nothing more. Taps: `block_k/block`, `embedding_k`.
    Args of a call: fields: from coarse to fine, each [B, H_k, W_k, c] or three of these.   coords: [N, d] or [B, N, d],
    d = 2, or 3 for planes.
    Returns: [B, N, out_channels], at least float32.
    Raises: ValueError: no fields, or fewer blocks than fields; shapes that do not fit.

    Example:
        >>> net = Implicit(width=8, out_channels=1, blocks=2)
        >>> fields = [jnp.zeros((3, n, n, 4)) for n in (2, 4)]
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), fields, cell_centres(5, 5))[0].shape
        (3, 25, 1)

    Reference: Park et al. 2024, arXiv:2401.12517.
    """

    width: int = 64
    out_channels: int = 3
    blocks: int = 4
    act: Callable[[Any], Any] = nn.silu
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = BLOCK  # along the mesh axis `model`

    @nn.compact
    def __call__(self, fields: Any, coords: Any) -> jax.Array:
        """The values at the coordinates."""
        if not 1 <= len(fields) <= self.blocks:
            raise ValueError(f"Implicit with {self.blocks} blocks reads 1 to {self.blocks} fields; got {len(fields)}")
        h = None
        for k in range(self.blocks):
            if k < len(fields):
                planes = isinstance(fields[k], (tuple, list))
                p = (interpolate_planes if planes else interpolate)(fields[k], coords)
                p = Tap(name=f"embedding_{k}")(p.astype(self.dtype))
                h = p if h is None else jnp.concatenate([h, p], -1)
            h = PointBlock(self.width, self.act, self.dtype, name=f"block_{k}")(h)
        y = Dense(self.out_channels, dtype=self.dtype, name="out")(self.act(h))
        return y.astype(at_least_float32(y.dtype))


class BasisFields(nn.Module):
    """Grids of basis vectors at several scales, from a latent.   [B, h, w, c] -> ([B, H / 2^i, W / 2^i, features] ...)

    The decoder of `KLAutoencoder`, which shows a field at each of the `levels`.
    """

    widths: tuple[int, ...]
    blocks: int
    features: int
    levels: tuple[int, ...]
    groups: int | None
    act: Callable[[Any], Any]
    form: ConvForm | None
    dtype: Any

    @nn.compact
    def __call__(self, z: Any) -> tuple[jax.Array, ...]:
        """The fields of z, in the order of `levels`."""
        block = lambda n, name: Block(n, self.groups, self.act, self.form, self.dtype, name=name)
        conv = lambda n, name: Conv(n, form=self.form, dtype=self.dtype, name=name)
        h = block(self.widths[-1], "middle")(conv(self.widths[-1], "in")(z.astype(self.dtype)))
        shown: dict[int, Any] = {}
        for i, n in reversed(tuple(enumerate(self.widths))):
            for j in range(self.blocks + 1):
                h = block(n, f"up_{i}_{j}")(h)
            for k in (k for k, level in enumerate(self.levels) if level == i):
                shown[k] = conv(self.features, f"field_{k}")(self.act(GroupNorm(self.groups, name=f"norm_{k}")(h)))
            if i:
                h = conv(n, f"double_{i}")(double(h))
        return tuple(shown[k] for k in range(len(self.levels)))


class ImplicitAutoencoder(nn.Module):
    """Pictures to a Gaussian latent, and the latent to a function of coordinates: the D2C-VAE.   x -> z -> value(c)

    The encoder is that of `KLAutoencoder`; the decoder makes basis fields (`BasisFields`), which are read and evaluated
    coarse to fine (`Implicit`) wherever they are asked for. Taps: `encoder/...`, `fields/...`, `values/...`.
    Methods: `encode(x) -> Posterior`; `decode(z, coords=None)`: [B, N, out_channels] at the coordinates, by default the
    pictures [B, H, W, out_channels] at the resolution of the latent times patch 2^(levels - 1); `decode_grid(z, shape)`: the
    pictures at another resolution; the call is `decode(encode(x).mean, coords)`.
    Raises: ValueError: scales or levels that do not exist; at a call, shapes that do not fit.

    Example:
        >>> net = ImplicitAutoencoder(widths=(8, 8), features=4, width=8, out_channels=1)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
        >>> picture = lambda v: net.apply(v, jnp.zeros((2, 2, 2, 4)), (7, 9), method="decode_grid")
        >>> jax.eval_shape(picture, v).shape
        (2, 7, 9, 1)

    Reference: Park et al. 2024, arXiv:2401.12517.
    """

    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    latent_channels: int = 4
    attention: tuple[int, ...] = ()  # levels of the encoder with attention after each block
    patch: int = 1  # pixels are folded into channels by squares of this side: level i works at H / (patch 2^i)
    features: int = 16  # channels of a basis field
    scales: tuple[int, ...] | None = None  # levels with a basis field, coarse to fine; default all
    width: int = 64  # of the network of coordinates
    point_blocks: int | None = None  # its blocks; default one more than fields
    out_channels: int = 3
    groups: int | None = None  # of the norms; default: of four channels or more, at most 32
    act: Callable[[Any], Any] = nn.silu
    conv: ConvForm | None = None
    remat: str = "none"  # of the encoder; see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (*RESIDUAL, *BLOCK)  # along the mesh axis `model`

    def setup(self) -> None:
        """Encoder, fields, and the network of coordinates."""
        n = len(self.widths)
        scales = tuple(reversed(range(n))) if self.scales is None else self.scales
        if not scales or any(not 0 <= i < n for i in scales):
            raise ValueError(f"scales must name levels 0 to {n - 1} of widths={self.widths}; got {self.scales}")
        self.encoder = Encoder(
            widths=self.widths, blocks=self.blocks, out=2 * self.latent_channels, attention=self.attention,
            middle_attention=False, groups=self.groups, act=self.act, patch=self.patch, form=self.conv, remat=self.remat,
            dtype=self.dtype,
        )  # fmt: skip
        self.fields = BasisFields(
            self.widths, self.blocks, self.features, scales, self.groups, self.act, self.conv, self.dtype
        )
        self.values = Implicit(
            self.width, self.out_channels, self.point_blocks or len(scales) + 1, self.act, self.dtype
        )

    def encode(self, x: Any) -> Posterior:
        """The Gaussian posterior of x."""
        h = self.encoder(check_picture(self, x)).astype(at_least_float32(jnp.asarray(x).dtype))
        mean, log_variance = jnp.split(h, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, *CLIP))

    def decode(self, z: Any, coords: Any = None) -> jax.Array:
        """The values of the function that z stands for."""
        if coords is None:
            factor = self.patch * 2 ** (len(self.widths) - 1)
            return self.decode_grid(z, (factor * z.shape[1], factor * z.shape[2]))
        return self.values(self.fields(z), coords)

    def decode_grid(self, z: Any, shape: tuple[int, int]) -> jax.Array:
        """The picture of z with this height and width, read at the centres of its pixels."""
        return self.decode(z, cell_centres(*shape)).reshape(z.shape[0], *shape, self.out_channels)

    def __call__(self, x: Any, coords: Any = None) -> jax.Array:
        """Encode and decode."""
        return self.decode(self.encode(x).mean, coords)
