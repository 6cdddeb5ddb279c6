"""The entropy of attention, and logits scaled so that it grows with the number of tokens as it does when trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.networks.taps import tap_names, tapped


def attention_entropy(weights: Any) -> jax.Array:
    """The mean entropy of the rows of attention, in nats.   -mean sum_s w_s log w_s

    Args: weights: [..., S], with rows that sum to one.   Returns: a float32 scalar; log S where all are equal.

    Example:
        >>> round(float(attention_entropy(jnp.full((2, 4), 0.25))), 4)
        1.3863
    """
    w = jnp.asarray(weights, jnp.float32)
    return -jnp.mean(jnp.sum(jnp.where(w > 0, w * jnp.log(jnp.where(w > 0, w, 1.0)), 0.0), axis=-1))


@dataclasses.dataclass(frozen=True)
class ScaleLogits:
    """A writer of logits [B, H, T, S] that knows the number of keys of training; the identity for as many."""

    trained: int

    def __call__(self, logits: Any) -> Any:
        """Scale."""
        now = logits.shape[-1]
        if now == self.trained:
            return logits
        return logits * jnp.asarray(math.sqrt(math.log(now) / math.log(self.trained)), logits.dtype)


def entropy_scaling(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, ScaleLogits]:
    """Writers for `tapped` that scale the logits of self-attention where there are more or fewer tokens than in training.

    softmax(lambda q k^T),   lambda = sqrt(log_T(N) / d)

    T is the number of keys at the size of training, for every attention its own, N that of the call: at N = T the program
    does not change. For Gaussian logits of variance s^2 the entropy is log N - s^2 / 2; scaled, it is the same share of
    log N for all N.
    Args: apply: `module.apply` or a `from_linen` function.   args, kwargs: of a call at the size of training; only shapes
        matter, nothing is computed.
    Returns: `{tap: writer}` for every tap named `attention/logits`: `tapped(apply, write=entropy_scaling(apply, ...))`.
    Raises: ValueError: no such tap; an attention of a single key.

    Example:
        >>> from diffjax.networks.dit import DiT
        >>> net, x, t = DiT(width=8, depth=1, heads=2), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), x, t)
        >>> entropy_scaling(net.apply, v, x, t)
        {'block_0/attention/logits': ScaleLogits(trained=16)}

    Reference: Jin et al. 2023, arXiv:2306.08645.
    """
    names: list[str] = []

    def logits(*args: Any) -> dict[str, Any]:
        names.extend(n for n in tap_names(apply, *args, **kwargs) if n.endswith("attention/logits"))
        return tapped(apply, read=names)(*args, **kwargs)[1] if names else {}

    shapes = jax.eval_shape(logits, *args)
    if not names:
        raise ValueError("entropy_scaling needs a network with taps named `attention/logits`; got none")
    sizes = {name: jax.tree.leaves(shapes[name])[0].shape[-1] for name in names}
    if min(sizes.values()) < 2:
        raise ValueError(f"entropy_scaling needs at least two keys at the size of training; got {sizes}")
    return {name: ScaleLogits(n) for name, n in sizes.items()}
