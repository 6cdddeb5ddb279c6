"""A small classifier of noisy states: what a router is made of."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from diffjax.networks.mlp import MLP


class Classifier(nn.Module):
    """Logits of a noisy state from the residual MLP.   [B, ...] -> [B, classes]

    Conditions: a label, if `num_classes` is given. The logits start at zero: every class is as probable.
    Args of a call: x: [B, ...], flattened per item.   t: [B].   train: use dropout.

    Example:
        >>> import jax.numpy as jnp
        >>> v = jax.eval_shape(Classifier(classes=4, width=8).init, jax.random.key(0), jnp.zeros((3, 8, 8, 1)), jnp.zeros(3))
        >>> v["params"]["mlp"]["out"]["kernel"].shape
        (8, 4)
    """

    classes: int
    width: int = 64
    depth: int = 2
    num_classes: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The logits at state x, time code t and condition."""
        mlp = MLP(
            width=self.width,
            depth=self.depth,
            num_classes=self.num_classes,
            out_features=self.classes,
            dropout=self.dropout,
            name="mlp",
        )
        return mlp(x.reshape(x.shape[0], -1), t, cond, train=train)
