"""Noise on what a model is conditioned on: `condition(key, cond, t, items) -> cond`, drawn afresh with every training time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax import numerics as nu
from diffjax.numerics import pytree_dataclass
from diffjax.types import Cond, Key, Scalar


@pytree_dataclass
class ConditionNoise:
    """See `condition_noise`; its numbers are leaves."""

    strength: Any
    exponent: Any = 5.0
    reach: Any = 1.0

    def __call__(self, key: Key, cond: Cond, t: Any, items: Any) -> Cond:
        """The condition with its image noised and `vector` [B, 1], the strength of that noise.

        Raises: ValueError: no image in the condition, or a `vector` that is there already.
        """
        if not isinstance(cond, dict) or "image" not in cond or "vector" in cond:
            got = sorted(cond) if isinstance(cond, dict) else type(cond).__name__
            raise ValueError(
                "condition_noise noises cond['image'] and writes its strength to cond['vector']; it needs a dict with an "
                f"image and without a vector, and got {got}"
            )
        keys, image = nu.item_keys(key, items), jnp.asarray(cond["image"])
        centre = self.reach * (2 * t**self.exponent - 1)
        n = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), (), image.dtype))(keys)
        beta = (self.strength * jax.nn.sigmoid(centre + n)).astype(image.dtype)
        z = nu.item_normal(keys, 1, image)
        return {**cond, "image": nu.add(image, nu.scale(beta, z)), "vector": beta[:, None]}


def condition_noise(strength: Scalar, *, exponent: Scalar = 5.0, reach: Scalar = 1.0) -> ConditionNoise:
    """Noise the image that a model continues from, the more the larger the training time (TimeNoise).

    image + beta z,   beta = strength sigmoid(n),   n ~ N(mu(t), 1),   mu(t) = reach (2 t^exponent - 1)

    Where nearly nothing is left of the data in x_t, a clean image is all that a network can read, and it learns to copy
    it; a noised one is no better a source than x_t. The network is told beta as the condition's `vector` [B, 1]
    (`vector_size=1`), and is sampled with the clean image and `vector` zero, or the smallest beta that it has seen.

    Args: strength: the largest beta, in the units of the image.   exponent: > 0; the larger, the later the noise rises.
    reach: of mu on either side of zero.
    Returns: `(key, cond, t [B], items [B]) -> cond`, for `denoising_loss(condition=...)`. `cond` is a dict with `image`.
    Reference: Zhao et al. 2024, arXiv:2406.15735 (TimeNoise).

    Example:
        >>> noise, t = condition_noise(15.0), jnp.array([0.1, 1.0])
        >>> cond = noise(jax.random.key(0), {"image": jnp.zeros((2, 4, 4, 1))}, t, jnp.arange(2))
        >>> cond["image"].shape, cond["vector"].shape, bool(jnp.all((cond["vector"] > 0) & (cond["vector"] < 15)))
        ((2, 4, 4, 1), (2, 1), True)
    """
    return ConditionNoise(strength, exponent, reach)
