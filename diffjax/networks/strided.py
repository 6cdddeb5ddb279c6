"""Convolution with a stride, in the two equal forms of `layers.Conv`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from diffjax.networks.layers import ConvForm, choose_form, fan_in_uniform, slices


class StridedConv(nn.Module):
    """Convolution to a `stride`-th of the size.   [B, H, W, c] -> [B, ceil(H / stride), ceil(W / stride), features]

    Args: before: zeros put left and above, default (kernel - 1) // 2; those on the right and below are as many as are needed.
    form: `layers.native`, `layers.slices` or None: the faster.

    Example:
        >>> v = jax.eval_shape(StridedConv(4).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> v["params"]["kernel"].shape
        (3, 3, 3, 4)
    """

    features: int
    kernel: int = 3
    stride: int = 2
    before: int | None = None
    bias: bool = True
    form: ConvForm | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Convolve x."""
        k, s, (h, w, c) = self.kernel, self.stride, x.shape[1:]
        kernel = self.param("kernel", fan_in_uniform(), (k, k, c, self.features), jnp.float32).astype(self.dtype)
        low = (k - 1) // 2 if self.before is None else self.before
        pads = [(low, max((-(-n // s) - 1) * s + k - n - low, 0)) for n in (h, w)]
        x = x.astype(self.dtype)
        if (self.form or choose_form(jax.default_backend())) is slices:
            x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
            h, w = -(-h // s), -(-w // s)
            x = jnp.concatenate([x[:, :, j : j + (w - 1) * s + 1 : s] for j in range(k)], axis=-1)
            kernel = kernel.reshape(k, k * c, self.features)
            y = sum(x[:, i : i + (h - 1) * s + 1 : s] @ kernel[i] for i in range(k))
        else:
            y = lax.conv_general_dilated(x, kernel, (s, s), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if not self.bias:
            return y
        b = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + b.astype(self.dtype).reshape(1, 1, 1, -1)
