"""The convolution of XLA with its gradients in the one layout for which XLA's CPU backend has a fast kernel everywhere."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


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
