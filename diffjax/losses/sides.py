"""Errors of what a network returns beside its output: of branches at lower resolutions, of masked states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.losses.denoising import mean_square
from diffjax.numerics import pytree_dataclass


@pytree_dataclass
class SideOutputs:
    """See `side_outputs`; the weights are leaves."""

    weights: Any = None

    def __call__(self, aux: Any, target: Any) -> jax.Array:
        """The sum of the weighted errors [B] of the outputs `aux` against `target` [B, H, W, C]."""
        if not isinstance(aux, dict) or not aux:
            raise ValueError(
                "side_outputs needs a network that returns (out, {name: another output}), with denoiser(..., aux=True); "
                f"got aux {aux!r}"
            )
        if self.weights is not None and set(self.weights) != set(aux):
            raise ValueError(f"weights must name the side outputs {sorted(aux)}; got {sorted(self.weights)}")
        total = jnp.zeros(target.shape[0], jnp.result_type(float))
        for name, y in aux.items():
            r = max(target.shape[1] // y.shape[1], 1)
            if target.shape != (y.shape[0], r * y.shape[1], r * y.shape[2], y.shape[3]):
                raise ValueError(
                    f"the side output {name!r} must be [B, H / r, W / r, C] of the target {target.shape}; got {y.shape}"
                )
            weight = 1 / r**2 if self.weights is None else self.weights[name]
            total += weight * mean_square(y - pooled(target, r).astype(y.dtype)).astype(total.dtype)
        return total


def side_outputs(weights: dict[str, Any] | None = None) -> SideOutputs:
    """Further outputs of a network, each compared with the target at its resolution.   sum_k w_k mean |y_k - r_k D(target)|^2

    D is the mean of r x r pixels and r the ratio of the sizes; the factor r leaves white noise its variance. For
    `denoising_loss(sides=...)`, where `space` must be what the network itself returns.
    Args: weights: `{name: w}`, default `1 / r^2`, which is one at full resolution.
    Returns: `f({name: [B, H / r, W / r, C]}, target [B, H, W, C]) -> [B]`.
    Raises: ValueError: when called without such outputs, with others than the weights name, or with other shapes.
    Reference: Liu et al. 2024, arXiv:2406.09416.

    Example:
        >>> side_outputs()({"low": jnp.ones((2, 1, 1, 3))}, jnp.ones((2, 2, 2, 3))).tolist()
        [0.25, 0.25]
    """
    return SideOutputs(weights)


def pooled(target: Any, r: int) -> jax.Array:
    """`r` times the mean of each r x r square.   [B, H, W, C] -> [B, H / r, W / r, C]"""
    b, h, w, c = target.shape
    return r * target.reshape(b, h // r, r, w // r, r, c).mean((2, 4))
