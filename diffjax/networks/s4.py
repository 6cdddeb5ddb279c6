"""Diagonal structured state spaces (S4D): long convolutions that are recurrences as well."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffjax.networks.layers import Dense
from diffjax.networks.partition import COLUMN, ROW, Rules
from diffjax.networks.rwkv import stretch
from diffjax.networks.taps import Tap

S4: Rules = ((r"mix\w*/(gated_a|gated_b)/(kernel|bias)$", COLUMN), (r"mix\w*/out/kernel$", ROW))


def discretised(a: Any, c: Any, step: Any) -> tuple[jax.Array, jax.Array]:
    """Zero-order hold of h' = a h + u, y = 2 Re(c h).   p = exp(s a),  q = c (p - 1) / a

    Args: a, c: [D, N] complex, one of each conjugate pair.   step: [D] > 0.
    Returns: p, q [D, N] complex.

    Reference: Gu et al. 2022, arXiv:2206.11893, section 3.1 and 3.2.
    """
    p = jnp.exp(step.astype(a.dtype)[:, None] * a)
    return p, c * (p - 1) / a


def kernel_of(p: Any, q: Any, length: int) -> jax.Array:
    """The response to a unit pulse.   K_l = 2 Re(sum_n q_n p_n^l)   [D, N], [D, N] -> [D, length]"""
    powers = jnp.exp(jnp.log(p)[..., None] * jnp.arange(length).astype(p.dtype)[None, None])
    return 2 * jnp.einsum("dn,dnl->dl", q, powers).real


def long_convolution(u: Any, kernel: Any) -> jax.Array:
    """A causal convolution as long as the sequence, by Fourier transforms.   y_t = sum_l K_l u_{t-l}

    Args: u: [B, T, D].   kernel: [D, T].
    Returns: [B, T, D] float32.

    Example:
        >>> long_convolution(jnp.ones((1, 3, 1)), jnp.ones((1, 3))).round().astype(int).ravel().tolist()
        [1, 2, 3]
    """
    n = 2 * u.shape[1]  # no wrapping round
    spectrum = jnp.fft.rfft(u.astype(jnp.float32), n, axis=1) * jnp.fft.rfft(kernel, n, axis=1).T[None]
    return jnp.fft.irfft(spectrum, n, axis=1)[:, : u.shape[1]]


def diagonal_scan(u: Any, p: Any, q: Any, state: Any = None) -> tuple[jax.Array, jax.Array]:
    """The same as a recurrence, for one token after another.   h_t = p h_{t-1} + u_t,  y_t = 2 Re(q h_t)

    Args: u: [B, T, D].   p, q: [D, N] complex.   state: [B, D, N] complex, default zero.
    Returns: y [B, T, D] and the state after the last token.
    """

    def token(h: Any, u: Any) -> tuple[Any, Any]:
        h = p[None] * h + u[..., None].astype(p.dtype)
        return h, 2 * jnp.sum(q[None] * h, axis=-1).real

    start = jnp.zeros((u.shape[0], *p.shape), p.dtype) if state is None else state
    state, y = lax.scan(token, start, jnp.moveaxis(u, 1, 0))
    return jnp.moveaxis(y, 0, 1), state


class S4D(nn.Module):
    """A diagonal state space per channel, then a gated projection.   out(gelu(y) A sigmoid(gelu(y) B)),  y = K * u + D u

    Linear and the same at every token, so that the whole sequence is one convolution: n log n in its length.
    With `tokens` they are brought to the length of x by nearest repetition and added to it before; tokens as long as x, such
    as the known values of a time series and where they are known, meet it step by step.
    A mixer of `StateDiT`; hands nothing on. Taps: `u`, `y` [B, T, d].
    Args: x: [B, T, d].   tokens: [B, S, e], zero where they are padding.   mask: [B, T] bool without tokens, False at
        padding of x, which is read as zero; not needed with them.
    Returns: [B, T, d] and `first`.

    Example:
        >>> v = jax.eval_shape(S4D(1).init, jax.random.key(0), jnp.zeros((1, 4, 8)))
        >>> v["params"]["frequencies"].shape
        (8, 32)

    Reference: Gu et al. 2022, arXiv:2206.11893 (S4D-Lin).
    """

    heads: int  # not used: every channel has a state of its own
    zero: bool = False  # start with a zero output
    dtype: Any = jnp.float32
    states: int = 64  # real ones; half as many complex

    @nn.compact
    def __call__(self, x: Any, first: Any = None, tokens: Any = None, mask: Any = None) -> tuple[jax.Array, Any]:
        """Mix along the tokens of x."""
        d, n = x.shape[-1], self.states // 2
        u = x.astype(self.dtype)
        if mask is not None and tokens is None:
            u = jnp.where(mask[:, :, None], u, jnp.zeros((), u.dtype))
        if tokens is not None:
            given = stretch(tokens.astype(self.dtype), x.shape[1])
            u = u + Dense(d, bias=False, dtype=self.dtype, name="tokens")(given)
        u = Tap(name="u")(u.astype(jnp.float32))
        spread = lambda key, shape: jnp.asarray(np.log(np.geomspace(1e-3, 1e-1, shape[0])), jnp.float32)
        log_step = self.param("log_step", spread, (d,))
        log_decay = self.param("log_decay", nn.initializers.constant(np.log(0.5)), (d, n), jnp.float32)
        lin = lambda key, shape: jnp.broadcast_to(jnp.pi * jnp.arange(n, dtype=jnp.float32), shape)
        frequencies = self.param("frequencies", lin, (d, n))
        c = self.param("c", nn.initializers.normal(0.5**0.5), (2, d, n), jnp.float32)
        skip = self.param("skip", nn.initializers.ones, (d,), jnp.float32)
        p, q = discretised(lax.complex(-jnp.exp(log_decay), frequencies), lax.complex(c[0], c[1]), jnp.exp(log_step))
        y = long_convolution(u, kernel_of(p, q, x.shape[1])) + u * skip[None, None]
        y = nn.gelu(Tap(name="y")(y)).astype(self.dtype)
        gated = Dense(d, dtype=self.dtype, name="gated_a")(y) * nn.sigmoid(
            Dense(d, dtype=self.dtype, name="gated_b")(y)
        )
        return Dense(d, zero=self.zero, dtype=self.dtype, name="out")(gated), first
