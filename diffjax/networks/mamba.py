"""Selective state spaces (Mamba): a diagonal recurrence whose step, input and output depend on the token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffjax.networks.layers import Dense, fan_in_uniform
from diffjax.networks.partition import COLUMN, ROW, Rules, constrain
from diffjax.networks.rwkv import stretch
from diffjax.networks.taps import Tap

MAMBA: Rules = (
    (r"mix\w*/(state_in|gate_in|step_up)/(kernel|bias)$", COLUMN),
    (r"mix\w*/conv_kernel$", COLUMN),
    (r"mix\w*/inner/kernel$", ROW),
    (r"mix\w*/out/kernel$", ROW),
)


def selective_scan(x: Any, step: Any, a: Any, b: Any, c: Any, state: Any = None) -> tuple[jax.Array, jax.Array]:
    """The selective recurrence, one token after another.   h_t = exp(s_t a) h_{t-1} + s_t x_t b_t,  y_t = h_t c_t

    Args: x, step: [B, T, D], step > 0.   a: [D, N] < 0.   b, c: [B, T, N].   state: [B, D, N] before the first token,
        default zero.
    Returns: y [B, T, D] and the state after the last token.

    Example:
        >>> one = jnp.ones((1, 3, 1))
        >>> selective_scan(one, one, jnp.zeros((1, 1)), one, one)[0].ravel().tolist()
        [1.0, 2.0, 3.0]

    Reference: Gu & Dao 2023, arXiv:2312.00752, section 3.2.
    """

    def token(h: Any, row: Any) -> tuple[Any, Any]:
        x, step, b, c = row
        h = jnp.exp(step[..., None] * a[None]) * h + (step * x)[..., None] * b[:, None, :]
        return h, jnp.einsum("bdn,bn->bd", h, c)

    rows = tuple(jnp.moveaxis(v, 1, 0) for v in (x, step, b, c))
    start = jnp.zeros((*x[:, 0].shape, a.shape[1]), x.dtype) if state is None else state
    state, y = lax.scan(token, start, rows)
    return jnp.moveaxis(y, 0, 1), state


def selective_chunked(
    x: Any, step: Any, a: Any, b: Any, c: Any, state: Any = None, *, chunk: int = 16
) -> tuple[jax.Array, jax.Array]:
    """The same recurrence by parallel scans inside chunks; equals `selective_scan`.

    Inside a chunk the maps h -> p h + q compose associatively, so that log2(chunk) steps of whole arrays do; only the
    states between chunks are kept for the gradient.
    Args: as for `selective_scan`.   chunk: tokens in a chunk.
    Returns: y [B, T, D] and the state after the last token.

    Reference: Blelloch 1990, Prefix sums and their applications, section 1.4.
    """
    batch, length, d = x.shape
    pad = -length % chunk

    def cut(v: Any) -> Any:  # [B, T, k] -> [N, B, chunk, k]; tokens of step zero leave the state as it is
        return jnp.pad(v, ((0, 0), (0, pad), (0, 0))).reshape(batch, -1, chunk, v.shape[-1]).swapaxes(0, 1)

    def compose(first: Any, second: Any) -> tuple[Any, Any]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    @jax.checkpoint
    def part(h: Any, row: Any) -> tuple[Any, Any]:
        x, step, b, c = row
        p = jnp.exp(step[..., None] * a[None, None])  # [B, chunk, D, N]
        q = (step * x)[..., None] * b[:, :, None, :]
        p, q = lax.associative_scan(compose, (p, q), axis=1)
        states = p * h[:, None] + q
        return states[:, -1], jnp.einsum("btdn,btn->btd", states, c)

    start = jnp.zeros((batch, d, a.shape[1]), x.dtype) if state is None else state
    state, y = lax.scan(part, start, tuple(map(cut, (x, step, b, c))))
    return y.swapaxes(0, 1).reshape(batch, -1, d)[:, :length], state


def causal_convolution(x: Any, kernel: Any, bias: Any) -> jax.Array:
    """A convolution of each channel with the tokens before it.   y_t = sum_j kernel_j x_{t - K + 1 + j} + bias

    Args: x: [B, T, D].   kernel: [K, D].   bias: [D].
    Returns: [B, T, D].
    """
    size, length = kernel.shape[0], x.shape[1]
    x = jnp.pad(x, ((0, 0), (size - 1, 0), (0, 0)))
    return sum(x[:, j : j + length] * kernel[j][None, None] for j in range(size)) + bias[None, None]


def steps(low: float = 1e-3, high: float = 1e-1) -> Callable[..., Any]:
    """The start of the steps' bias: softplus of it runs over [low, high], evenly in the logarithm."""

    def init(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        s = np.geomspace(low, high, shape[0])
        return jnp.asarray(s + np.log(-np.expm1(-s)), dtype)

    return init


class Mamba(nn.Module):
    """A selective state space between two projections: linear time, constant state.   out(scan(silu(conv(x W))) silu(x V))

    With u = silu(conv(x W)) the step is softplus(u S), and input b and output c are linear in u; the state of each of
    the `expand` d channels has `states` numbers, and u times a learned constant is added to the output of the scan.
    With `tokens` (CrossMamba) they take the place of u in step and b, brought to the length of x by `align`: the
    condition decides what of x is written to the state, and x what is read from it. (Which
    of step, b and c the published network takes from the condition could not be confirmed.)

    A mixer of `StateDiT`; hands nothing on. Taps: `u`, `step` [B, T, D], `b`, `c` [B, T, N], float32.
    Args: x: [B, T, d].   tokens: [B, S, e], zero where they are padding.   mask: [B, T] bool without tokens, False at
        padding of x, which leaves the state as it is; not needed with them.
    Returns: [B, T, d] and `first`.

    Example:
        >>> v = jax.eval_shape(Mamba(1).init, jax.random.key(0), jnp.zeros((1, 4, 8)))
        >>> v["params"]["log_rates"].shape
        (16, 16)

    Reference: Gu & Dao 2023, arXiv:2312.00752, section 3.4; the cross form: Dat et al. 2024, arXiv:2407.10998.
    """

    heads: int  # not used: every channel has a state of its own
    zero: bool = False  # start with a zero output
    dtype: Any = jnp.float32
    expand: int = 2
    states: int = 16
    window: int = 4  # of the convolution
    align: Callable[[Any, int], Any] = stretch
    form: Callable[..., tuple[Any, Any]] = selective_chunked  # or selective_scan

    @nn.compact
    def __call__(self, x: Any, first: Any = None, tokens: Any = None, mask: Any = None) -> tuple[jax.Array, Any]:
        """Mix along the tokens of x."""
        d, n = x.shape[-1], self.states
        inner, rank = self.expand * d, math.ceil(d / 16)
        x = x.astype(self.dtype)
        keep = mask if tokens is None else None
        if keep is not None:
            x = jnp.where(keep[:, :, None], x, jnp.zeros((), x.dtype))
        dense = lambda features, name, bias=False: Dense(features, bias=bias, dtype=self.dtype, name=name)
        u = constrain(dense(inner, "state_in")(x), "batch", None, "wide")
        gate = constrain(dense(inner, "gate_in")(x), "batch", None, "wide")
        kernel = self.param("conv_kernel", fan_in_uniform(self.window), (self.window, inner), jnp.float32)
        bias = self.param("conv_bias", nn.initializers.zeros, (inner,), jnp.float32)
        u = nn.silu(causal_convolution(u, kernel.astype(self.dtype), bias.astype(self.dtype)))
        if tokens is None:
            low, b, c = jnp.split(dense(rank + 2 * n, "inner")(u), [rank, rank + n], axis=-1)
        else:
            given = self.align(tokens.astype(self.dtype), x.shape[1])
            low, b = jnp.split(dense(rank + n, "inner_tokens")(given), [rank], axis=-1)
            c = dense(n, "inner")(u)
        step = Dense(inner, bias=False, dtype=self.dtype, name="step_up")(low).astype(jnp.float32)
        step = step + self.param("step_bias", steps(), (inner,), jnp.float32)[None, None]
        rates = lambda key, shape: jnp.log(jnp.broadcast_to(jnp.arange(1, n + 1, dtype=jnp.float32), shape))
        a = -jnp.exp(self.param("log_rates", rates, (inner, n)))
        skip = self.param("skip", nn.initializers.ones, (inner,), jnp.float32)
        step = nn.softplus(step)
        if keep is not None:  # a step of zero leaves the state as it is
            step = jnp.where(keep[:, :, None], step, 0.0)
        sites = {"u": u, "step": step, "b": b, "c": c}
        u, step, b, c = (Tap(name=name)(v.astype(jnp.float32)) for name, v in sites.items())
        y, _ = self.form(u, step, a, b, c)
        y = (y + u * skip[None, None]).astype(self.dtype) * nn.silu(gate)
        y = constrain(y, "batch", None, "wide")
        return Dense(d, zero=self.zero, bias=False, dtype=self.dtype, name="out")(y), first
