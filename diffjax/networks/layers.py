"""Layers shared by all networks: dense, norms, residual stacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from diffjax.networks.taps import LayerIndex

Initializer = Callable[..., Any]


def fan_in_uniform(fan_in: int | None = None, gain: float = 1.0) -> Initializer:
    """An initialiser of variance `gain^2 / fan_in`.   U(-a, a),  a = gain sqrt(3 / fan_in)

    Uniform rather than normal: cheaper to compile, and a network has one draw per parameter.
    Args: fan_in: default all axes of the shape but the last.

    Example:
        >>> bool(jnp.abs(fan_in_uniform()(jax.random.key(0), (3, 5))).max() <= 1)
        True
    """

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        n = fan_in or math.prod(shape[:-1])
        bound = gain * math.sqrt(3 / n)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def product(x: Any, kernel: Any, dimensions: Any = None, **options: Any) -> jax.Array:
    """The product of a dense layer, as one of two matrices.   x W

    Merging the axes before the last changes no number, but the gradient of the kernel: XLA on a CPU sums over one axis 1.4
    to 5 times faster than over several, because for those it copies the gradient of y transposed. Where axes are cut over
    devices they stay as they are, since two cuts cannot be merged.
    Args: x: [..., c].   kernel: [c, d].   dimensions, options: what `nn.Dense` gives to its `dot_general`.
    Returns: [..., d].

    Example:
        >>> product(jnp.ones((2, 3, 4)), jnp.ones((4, 5))).shape
        (2, 3, 5)
    """
    if any(n > 1 for n in jax.sharding.get_abstract_mesh().shape.values()):
        return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)
    y = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def Dense(  # noqa: N802
    features: int,
    *,
    zero: bool = False,
    bias: bool = True,
    init: Initializer | None = None,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Dense:
    """`nn.Dense` with this library's initialiser, or another; `zero` starts it at zero.   y = x W + b"""
    init = nn.initializers.zeros if zero else init or fan_in_uniform()
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=init, dot_general=product, name=name)


# ---------------------------------------------------------------------------------------------------- norms and FiLM


def at_least_float32(dtype: Any) -> Any:
    """`dtype`, or float32 if that is wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def default_groups(channels: int) -> int:
    """As many groups as give at least four channels each, and at most 32.

    Example:
        >>> default_groups(24), default_groups(320)
        (6, 32)
    """
    return max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4))


class GroupNorm(nn.Module):
    """Group normalisation per item.   scale * (x - mean) / sqrt(var + eps) + bias

    The groups are `groups`, or `default_groups` of the channels. The statistics are taken in
    float32 over all axes but the batch. Written out because Flax's own refuses bfloat16 under strict dtype promotion.

    Example:
        >>> v = jax.eval_shape(GroupNorm().init, jax.random.key(0), jnp.zeros((1, 2, 2, 8)))
        >>> v["params"]["scale"].shape
        (8,)

    Raises: ValueError: groups that do not divide the channels.

    Reference: Wu & He 2018, arXiv:1803.08494, Eq. 1.
    """

    groups: int | None = None
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Normalise x; the dtype stays."""
        c = x.shape[-1]
        groups = self.groups or default_groups(c)
        if c % groups:
            raise ValueError(f"group normalisation needs channels divisible by groups={groups}; got {c} channels")
        scale = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        h = x.astype(at_least_float32(x.dtype)).reshape(x.shape[0], -1, groups, c // groups)
        h = h - h.mean((1, 3), keepdims=True)
        h = h * lax.rsqrt(jnp.square(h).mean((1, 3), keepdims=True) + self.eps)
        unit = (1,) * (x.ndim - 1) + (-1,)
        return (h.reshape(x.shape) * scale.astype(h.dtype).reshape(unit) + bias.astype(h.dtype).reshape(unit)).astype(
            x.dtype
        )


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, in float32.   scale * x / sqrt(mean(x^2) + 1e-6)

    Example:
        >>> RMSNorm().apply({"params": {"scale": jnp.ones(2)}}, jnp.array([3.0, 3.0])).round(3).tolist()
        [1.0, 1.0]

    Reference: Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4.
    """

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Normalise x; the dtype stays."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        h = x.astype(at_least_float32(x.dtype))
        h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)
        return (h * scale.astype(h.dtype).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def plain_norm(x: Any, eps: float = 1e-6) -> jax.Array:
    """Layer normalisation without parameters, computed in float32.   (x - mean) / sqrt(var + eps)

    Example:
        >>> plain_norm(jnp.asarray([1.0, 3.0])).round(3).tolist()
        [-1.0, 1.0]
    """
    h = x.astype(at_least_float32(x.dtype))
    h = h - h.mean(-1, keepdims=True)
    return (h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis.   scale * (x - mean) / sqrt(var + eps) + bias

    Reference: Ba et al. 2016, arXiv:1607.06450.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Normalise x; the dtype stays."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        h = plain_norm(x.astype(at_least_float32(x.dtype)), self.eps)
        unit = (1,) * (x.ndim - 1) + (-1,)
        return (h * scale.astype(h.dtype).reshape(unit) + bias.astype(h.dtype).reshape(unit)).astype(x.dtype)


def modulate(x: Any, shift: Any, scale: Any) -> jax.Array:
    """Feature-wise linear modulation.   x (1 + scale) + shift

    Args: x: [B, ..., c].   shift, scale: [B, c], or with as many axes as x.
    Reference: Perez et al. 2017, arXiv:1709.07871, Eq. 2.
    """
    return x * (1 + spread(scale, x)) + spread(shift, x)


def spread(c: Any, x: Any) -> jax.Array:
    """`c` of shape [B, ..., d] with unit axes put before the last, up to the rank of `x`."""
    return c.reshape(c.shape[:-1] + (1,) * (x.ndim - c.ndim) + c.shape[-1:])


# ---------------------------------------------------------------------------------------------------- equal blocks


# What a block keeps for its gradient where it is rematerialised; the rest is computed again.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,  # its input alone
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of dense layers, not of attention
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),  # those, kept by the host
}


def rematerialised(block: Any, policy: str, *, prevent_cse: bool = True) -> Any:
    """The module class `block`, which recomputes its activations in the backward pass.

    Args: policy: none, full, dots, offload (see `REMAT`); less memory and more work from none over dots to full.
    Raises: ValueError: unknown policy.

    Example:
        >>> rematerialised(nn.Dense, "none") is nn.Dense
        True
    """
    if policy == "none":
        return block
    if policy not in REMAT:
        raise ValueError(f"remat must be one of none, {', '.join(REMAT)}; got {policy!r}")
    return nn.remat(block, prevent_cse=prevent_cse, policy=REMAT[policy])


def repeat(
    block: Any, fields: dict[str, Any], depth: int, x: Any, args: tuple, *, scan: bool, remat: str, own: Any = None
) -> Any:
    """`depth` equal blocks after each other: a Python loop over `block_0, block_1, ...`, or `nn.scan` over `blocks`.

    A block is called as `block(**fields)(x, layer, *args)` and returns `(x, None)`; `layer` is its index when
    scanned, else None. `own` [depth, ...] has what each block is given before `args`, if anything. To be called inside a
    compact method.
    """
    block = rematerialised(block, remat, prevent_cse=not scan)
    if not scan:
        for i in range(depth):
            first = () if own is None else (own[i],)
            x, _ = block(**fields, name=f"block_{i}")(x, None, *first, *args)
        return x
    each = () if own is None else (own,)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "taps": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *(0 for _ in each), *(nn.broadcast for _ in args)),
        length=depth,
    )
    x, _ = scanned(**fields, name="blocks")(x, jnp.arange(depth), *each, *args)
    return x


def mark_layer(layer: Any) -> None:
    """Tell taps which layer a scanned block is."""
    if layer is not None:
        LayerIndex(name="layer")(layer)


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a looped network as those of the scanned one.   {block_0, block_1, ...} -> {blocks: stacked}

    Raises: ValueError: there are no `block_0, block_1, ...`.

    Example:
        >>> stack_blocks({"block_0": {"w": jnp.ones(2)}, "block_1": {"w": jnp.ones(2)}})["blocks"]["w"].shape
        (2, 2)
    """
    n = sum(name.startswith("block_") for name in params)
    if n == 0:
        raise ValueError(f"params must hold block_0, block_1, ...; got {sorted(params)}")
    blocks = [params[f"block_{i}"] for i in range(n)]
    rest = {name: p for name, p in params.items() if not name.startswith("block_")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a scanned network as those of the looped one.   {blocks: stacked} -> {block_0, block_1, ...}

    Raises: ValueError: there is no `blocks`.

    Example:
        >>> sorted(unstack_blocks({"blocks": {"w": jnp.ones((2, 3))}}))
        ['block_0', 'block_1']
    """
    if "blocks" not in params:
        raise ValueError(f"params must hold blocks; got {sorted(params)}")
    n = jax.tree.leaves(params["blocks"])[0].shape[0]
    rest = {name: p for name, p in params.items() if name != "blocks"}
    return rest | {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(n)}
