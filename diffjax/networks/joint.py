"""Attention over the tokens of several streams at once, each with a projection of its own."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.attention import full, per_head
from diffjax.networks.layers import Dense, RMSNorm
from diffjax.networks.partition import COLUMN, ROW, Rules, constrain
from diffjax.networks.positions import rotate
from diffjax.networks.taps import Tap

# of a block that holds a `JointAttention` named attention, `project` after it, and an MLP `hidden`, `out`, for each stream
JOINT: Rules = (
    (r"attention/qkv(_\d)?/(kernel|bias)$", COLUMN),
    (r"(^|/)project(_text)?/kernel$", ROW),
    (r"(^|/)hidden(_text)?/(kernel|bias)$", COLUMN),
    (r"block(s|_\d+)/out(_text)?/kernel$", ROW),
    (r"last/out/kernel$", ROW),
)


class JointAttention(nn.Module):
    """Multi-head attention of all streams to all streams, without projection of the output.

    [q; k; v] = concat_s(h_s W_s),   y = softmax(q k^T / sqrt(D)) v, cut into the streams again

    Taps: `q`, `k`, `v` [B, T, H, D] of all tokens, `logits` [B, H, T, T], `weights`, as those of `attention.Attention`.
    Args: streams: arrays [B, T_s, d] of equal d; stream s has the projection `qkv`, `qkv_1`, `qkv_2`, ...
        mask: [B, T] bool of all tokens or None.   angles: [T, D / 2] of all tokens, see `positions.Rope`, or None.
    Returns: the mixed values of the streams that ask, [B, T_s, d] each.
    Raises: ValueError: d not divisible by heads.

    Example:
        >>> x, y = jnp.zeros((1, 4, 8)), jnp.zeros((1, 3, 8))
        >>> v = jax.eval_shape(JointAttention(2).init, jax.random.key(0), (x, y))
        >>> sorted(v["params"])
        ['qkv', 'qkv_1']

    Reference: Esser et al. 2024, arXiv:2403.03206, Figure 2.
    """

    heads: int
    qk_norm: bool = False  # RMS norm of q and k per head, with scales for each stream
    asking: int | None = None  # how many streams, from the first, have queries; default all
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, streams: tuple[Any, ...], mask: Any = None, angles: Any = None) -> tuple[jax.Array, ...]:
        """Mix the values of all streams."""
        d = streams[0].shape[-1]
        if d % self.heads:
            raise ValueError(f"attention needs a width divisible by heads; got width {d} and heads={self.heads}")

        own = "tokens" if len(streams) > 1 else None  # one stream holds other tokens beside those of the grid

        def project(h: Any, end: str) -> tuple[Any, Any, Any]:
            y = Dense(3 * d, init=per_head(self.heads, 3), bias=self.bias, dtype=self.dtype, name="qkv" + end)(h)
            y = y.reshape(*y.shape[:2], self.heads, -1)
            q, k, v = jnp.split(constrain(y, "batch", own if not end else None, "heads", None), 3, axis=-1)
            if self.qk_norm:
                q, k = RMSNorm(name="q_norm" + end)(q), RMSNorm(name="k_norm" + end)(k)
            return q, k, v

        parts = [project(h, f"_{i}" if i else "") for i, h in enumerate(streams)]
        q, k, v = (a[0] if len(a) == 1 else jnp.concatenate(a, axis=1) for a in zip(*parts, strict=True))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        lengths = [h.shape[1] for h in streams[: self.asking]]
        q = q[:, : sum(lengths)]
        q, k, v = Tap(name="q")(q), Tap(name="k")(k), Tap(name="v")(v)
        y = self.mix(q * (d // self.heads) ** -0.5, k, v, mask)
        y = y.reshape(*y.shape[:2], d)
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
        return tuple(constrain(a, "batch", None, "wide") for a in jnp.split(y, ends, axis=1))

    def mix(self, q: Any, k: Any, v: Any, mask: Any = None) -> jax.Array:
        """The mixing of values, to be changed from outside by `tapped(around={"PATH.mix": f})`; see `attention.Mixing`."""
        return full(q, k, v, mask)
