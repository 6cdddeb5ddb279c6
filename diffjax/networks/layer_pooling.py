"""All layers of a frozen encoder as one condition: attention across the layers, for each token apart."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import Attention
from diffjax.networks.feed_forward import mlp
from diffjax.networks.layers import Dense, LayerNorm, plain_norm
from diffjax.networks.taps import Tap


class PoolingBlock(nn.Module):
    """Attention and an MLP, each as x + f(norm(x)), of the layers of one token to each other.   [B, N, h] -> [B, N, h]"""

    heads: int
    expand: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """One block."""
        x = x + Attention(self.heads, dtype=self.dtype, name="attention")(LayerNorm(name="norm_attention")(x))
        return x + mlp(LayerNorm(name="norm_mlp")(x), expand=self.expand, act=nn.gelu, dtype=self.dtype)


class LayerPooling(nn.Module):
    """Layerwise attention pooling: what all layers of an encoder say of a token, as one vector.   c = sum_n w_n X''_n

    X [N, h] are the states of one token in N layers; X'' is X after `blocks` transformer blocks that see all its layers, and
    nothing of other tokens; w is a linear map of the layers to one. Each layer is normalised first and has a learned
    vector of its own, by which attention tells it from the others: neither is in the paper. Tap: `pooled`.
    Args of a call: layers: [B, S, N, h], such as the taps of a frozen encoder, stacked.
    Returns: [B, S, features or h], for the tokens of a condition.
    Raises: ValueError: not four axes; h not divisible by heads.

    Example:
        >>> v = jax.eval_shape(LayerPooling(2).init, jax.random.key(0), jnp.zeros((1, 3, 5, 8)))
        >>> v["params"]["layers"]["kernel"].shape
        (5, 1)

    Reference: Li et al. 2025, arXiv:2510.12789 (layerwise attention pooling).
    """

    heads: int = 4
    blocks: int = 2
    expand: int = 4
    features: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, layers: Any) -> jax.Array:
        """Pool the layers of each token."""
        if jnp.ndim(layers) != 4:
            raise ValueError(f"layers must be [B, S, N, h]: tokens by layers; got shape {jnp.shape(layers)}")
        b, s, n, h = layers.shape
        own = self.param("own", nn.initializers.normal(0.02), (n, h), jnp.float32)
        x = plain_norm(jnp.asarray(layers).astype(self.dtype)).reshape(b * s, n, h) + own.astype(self.dtype)[None]
        for i in range(self.blocks):
            x = PoolingBlock(self.heads, self.expand, self.dtype, name=f"block_{i}")(x)
        c = Dense(1, dtype=self.dtype, name="layers")(x.swapaxes(1, 2))[..., 0].reshape(b, s, h)
        if self.features is not None:
            c = Dense(self.features, dtype=self.dtype, name="out")(c)
        return Tap(name="pooled")(c)
