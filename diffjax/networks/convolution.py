"""Convolution in three equal forms: that of XLA, the same with gradients that are fast in loops on a CPU, and slices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from diffjax.networks.layers import fan_in_uniform
from diffjax.networks.resample import per_axis

ConvForm = Callable[..., Any]  # (x [B, *n, c], kernel [*k, c, d], stride, before) -> [B, *ceil(n / stride), d]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def laid_out(x: Any, kernel: Any, strides: tuple[int, ...], pads: tuple[tuple[int, int], ...]) -> jax.Array:
    """A convolution whose gradients are convolutions of channels-last arrays too.   [B, *n, c], [*k, c, d] -> [B, *m, d]

    The gradients that JAX derives name the axes in other orders. Inside a loop, where training steps and samplers run, XLA
    then falls back to a naive kernel, up to 60 times slower. Here the tangents are written as convolutions with such names
    that their transposes have the plain order, on arrays that are transposed beforehand; values are the same.
    Args: strides, pads: of every axis n.

    Example:
        >>> g = jax.grad(lambda k: laid_out(jnp.ones((1, 2, 1)), k, (1,), ((1, 1),)).sum())(jnp.ones((3, 1, 1)))
        >>> g.ravel().tolist()
        [1.0, 2.0, 1.0]
    """
    a = "DHW"[3 - len(strides) :]
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=(f"N{a}C", f"{a}IO", f"N{a}C"))


def _tangent(strides: tuple[int, ...], pads: tuple, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    x, kernel = primals
    dx, dk = tangents
    y = laid_out(x, kernel, strides, pads)
    n = len(strides)
    a = "DHW"[3 - n :]
    parts = []
    if type(dx) is not SymbolicZero:  # transposed: kernel [*k, d, c] read as HWIO
        names = (f"N{a}C", f"{a}OI", f"N{a}C")
        parts.append(lax.conv_general_dilated(dx, kernel.swapaxes(-2, -1), strides, pads, dimension_numbers=names))
    if type(dk) is not SymbolicZero:  # transposed: x [c, *n, B] as NHWC, the gradient [*m, B, d] as HWIO
        names = (f"C{a}N", f"I{a}O", f"{a}NC")
        x, dk = x.swapaxes(0, -1), jnp.moveaxis(dk, -2, 0)
        part = lax.conv_general_dilated(x, dk, strides, pads, dimension_numbers=names)
        parts.append(jnp.moveaxis(part, -2, 0))
    return y, sum(parts) if parts else jnp.zeros_like(y)


laid_out.defjvp(_tangent, symbolic_zeros=True)


def native(x: Any, kernel: Any, stride: int | tuple[int, ...] = 1, before: int | None = None) -> jax.Array:
    """The convolution of XLA, zero padded to the same size, or to a `stride`-th.   [B, *n, c] -> [B, *ceil(n / stride), d]

    Args: x: [B, *n, c], one to three axes n.   kernel: [*k, c, d].   stride: of all axes, or of each.   before: zeros put
    before each axis, default (k - 1) // 2 of each.
    """
    strides = per_axis(stride, x, "stride")
    axes = "DHW"[3 - len(strides) :]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(x, kernel, strides, _pads(x, kernel, strides, before), dimension_numbers=names)


def canonical(x: Any, kernel: Any, stride: int | tuple[int, ...] = 1, before: int | None = None) -> jax.Array:
    """The same convolution, with gradients that are fast in loops on a CPU, see `laid_out`.

    Example:
        >>> canonical(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()
        [[4.0, 4.0], [4.0, 4.0]]
    """
    strides = per_axis(stride, x, "stride")
    return laid_out(x, kernel, strides, tuple(_pads(x, kernel, strides, before)))


def slices(x: Any, kernel: Any, stride: int | tuple[int, ...] = 1, before: int | None = None) -> jax.Array:
    """The same convolution as pad, shifted slices and matrix products.   [B, *n, c] -> [B, *ceil(n / stride), d]

    The slices along the last axis are joined into channels, those along the others are summed.

    Example:
        >>> slices(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()
        [[4.0, 4.0], [4.0, 4.0]]
    """
    *others, kw, c, d = kernel.shape
    strides = per_axis(stride, x, "stride")
    out = [-(-n // s) for n, s in zip(x.shape[1:-1], strides, strict=True)]
    x = jnp.pad(x, ((0, 0), *_pads(x, kernel, strides, before), (0, 0)))

    def shifted(x: Any, axis: int, i: int) -> Any:
        n, s = out[axis], strides[axis]
        return lax.slice_in_dim(x, i, i + (n - 1) * s + 1, s, axis + 1)

    x = jnp.concatenate([shifted(x, len(others), j) for j in range(kw)], axis=-1)
    kernel = kernel.reshape(*others, kw * c, d)

    def window(x: Any, at: tuple[int, ...]) -> Any:
        for axis, i in enumerate(at):
            x = shifted(x, axis, i)
        return x

    return sum(window(x, at) @ kernel[at] for at in np.ndindex(*others))


def _pads(x: Any, kernel: Any, strides: tuple[int, ...], before: int | None) -> list[tuple[int, int]]:
    """Zeros before and after each axis, so that windows of the kernel's length k fit ceil(n / s) times."""
    pads = []
    for n, k, s in zip(x.shape[1:-1], kernel.shape[:-2], strides, strict=True):
        low = (k - 1) // 2 if before is None else before
        pads.append((low, max((-(-n // s) - 1) * s + k - n - low, 0)))
    return pads


def choose_form(backend: str) -> ConvForm:
    """The form to use on a backend: `canonical` on a CPU, else `native`.

    On a CPU the gradients that JAX derives for a convolution are slow inside a loop, where K training steps per dispatch
    and samplers run. The gradient in `lax.scan`, batch 64 (16 at 16 x 16, 8 at 32 x 32), over that of `canonical`, medians on
    2 cores, JAX 0.10.2 (experiments/benchmarks/networks.py):

        size x channels   8 x 16   8 x 64   16 x 64   16 x 128   32 x 64
        native                31       63        33         65        32
        slices               1.4      1.1        .8        1.5       1.2

    The forward pass is that of `native`, and it compiles in half the time of `slices`.
    """
    return canonical if backend == "cpu" else native


class Conv(nn.Module):
    """Convolution with zero padding over any number of axes, in equal forms of equal parameters.   y = x * W + b

    Args: x: [B, *n, c].   kernel: its lengths, or one for all axes.   form: `native`, `canonical`, `slices`, or None:
    `choose_form` for the default backend.   stride, before: see `native`.
    Returns: [B, *ceil(n / stride), features].
    Raises: ValueError: `kernel` or `stride` has another number of axes than x.

    Example:
        >>> v = jax.eval_shape(Conv(4).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> v["params"]["kernel"].shape
        (3, 3, 3, 4)
    """

    features: int
    kernel: int | tuple[int, ...] = 3
    form: ConvForm | None = None
    zero: bool = False
    dtype: Any = jnp.float32
    stride: int | tuple[int, ...] = 1
    before: int | None = None
    bias: bool = True

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Convolve x."""
        c = x.shape[-1]
        init = nn.initializers.zeros if self.zero else fan_in_uniform()
        kernel = self.param("kernel", init, (*per_axis(self.kernel, x, "kernel"), c, self.features), jnp.float32)
        form = self.form or choose_form(jax.default_backend())
        plain = self.stride == 1 and self.before is None  # then a form of two arguments will do
        options = () if plain else (self.stride, self.before)
        y = form(x.astype(self.dtype), kernel.astype(self.dtype), *options)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
