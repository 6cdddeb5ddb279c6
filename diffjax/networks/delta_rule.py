"""The generalised delta rule: a matrix-valued state that is decayed, corrected along one direction, and written to.

S_t = S_{t-1} (diag(w_t) + z_t^T b_t) + v_t^T k_t,   o_t = r_t S_t^T      (row vectors; S is [D, D], values by keys)

In two equal forms: step by step, and in chunks whose inside is matrix products. Either costs time linear in the number of
steps and keeps a state of constant size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def delta_scan(r: Any, log_w: Any, k: Any, v: Any, z: Any, b: Any, state: Any = None) -> tuple[jax.Array, jax.Array]:
    """The delta rule, one step after another.

    Args: r, log_w, k, v, z, b: [B, T, H, D]; log_w <= 0.   state: [B, H, D, D] before the first step, default zero.
    Returns: o [B, T, H, D] and the state after the last step.

    Example:
        >>> one, zero = jnp.ones((1, 3, 1, 1)), jnp.zeros((1, 3, 1, 1))
        >>> delta_scan(one, zero, one, one, zero, zero)[0].ravel().tolist()
        [1.0, 2.0, 3.0]

    Reference: Peng et al. 2025, arXiv:2503.14456 (RWKV-7).
    """

    def step(s: Any, row: Any) -> tuple[Any, Any]:
        r, log_w, k, v, z, b = row  # [B, H, D]
        u = (s @ z[..., None])[..., 0]
        s = s * jnp.exp(log_w)[..., None, :] + u[..., None] * b[..., None, :] + v[..., None] * k[..., None, :]
        return s, (s @ r[..., None])[..., 0]

    rows = tuple(jnp.moveaxis(a, 1, 0) for a in (r, log_w, k, v, z, b))
    state, out = lax.scan(step, _start(r, state), rows)
    return jnp.moveaxis(out, 0, 1), state


def delta_chunked(
    r: Any, log_w: Any, k: Any, v: Any, z: Any, b: Any, state: Any = None, *, chunk: int = 16
) -> tuple[jax.Array, jax.Array]:
    """The delta rule in chunks of matrix products; equals `delta_scan`.

    With P_t the product of the decays since the start of the chunk, S_t = S~_t diag(P_t) obeys a rule without decay
    for z'_t = P_{t-1} z_t, b'_t = b_t / P_t, k'_t = k_t / P_t, r'_t = P_t r_t. There the corrections u_t = z'_t S~_{t-1}^T
    of a chunk solve one triangular system,

        (1 - strictly_lower(Z' B'^T)) U = Z' S_0^T + strictly_lower(Z' K'^T) V
        O = R' S_0^T + lower(R' B'^T) U + lower(R' K'^T) V
        S = (S_0 + U^T B' + V^T K') diag(P)

    All but the terms with S_0 is computed for all chunks at once.
    Args: as for `delta_scan`.   chunk: steps in a chunk; chunk * max(-log_w) must stay below 80, the range of float32.
    Returns: o [B, T, H, D] and the state after the last step.

    Reference: Yang et al. 2024, arXiv:2406.06484 (the form without decay).
    """
    batch, length, heads, size = r.shape
    pad = -length % chunk

    def cut(a: Any) -> Any:  # [B, T, H, D] -> [N, B, H, chunk, D]; steps of zeros leave the state as it is
        a = jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0)))
        return a.reshape(batch, -1, chunk, heads, size).transpose(1, 0, 3, 2, 4)

    r, log_w, k, v, z, b = map(cut, (r, log_w, k, v, z, b))
    total = jnp.cumsum(log_w, axis=-2)
    grow, shrink = jnp.exp(-total), jnp.exp(total)
    r, z, k, b = r * shrink, z * jnp.exp(total - log_w), k * grow, b * grow
    products = jnp.concatenate([r, z], axis=-2) @ jnp.concatenate([b, k], axis=-2).swapaxes(-1, -2)
    rb, rk = jnp.tril(products[..., :chunk, :chunk]), jnp.tril(products[..., :chunk, chunk:])
    zb, zk = jnp.tril(products[..., chunk:, :chunk], -1), jnp.tril(products[..., chunk:, chunk:], -1)
    zu = unit_inverse(zb) @ jnp.concatenate([z, zk @ v], axis=-1)  # U = z S_0^T + u
    read = rb @ zu
    r, out = r + read[..., :size], read[..., size:] + rk @ v
    last = shrink[..., -1:, :]
    written = zu.swapaxes(-1, -2) @ b
    mix, own = written[..., :size, :], (written[..., size:, :] + v.swapaxes(-1, -2) @ k) * last

    def step(s: Any, row: Any) -> tuple[Any, Any]:  # S = (S_0 + S_0 mix) diag(P) + own
        mix, own, last = row
        return (s + s @ mix) * last + own, s

    state, starts = lax.scan(step, _start(r[0].swapaxes(1, 2), state), (mix, own, last))
    out = out + r @ starts.swapaxes(-1, -2)
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, size)[:, :length], state


def unit_inverse(m: Any) -> jax.Array:
    """The inverse of one minus a strictly lower triangular matrix, by doubling blocks.   (1 - m)^-1   [..., n, n]

    [[A, 0], [-C, B]]^-1 = [[A^-1, 0], [B^-1 C A^-1, B^-1]]. Matrix products alone: for many small systems the CPU's
    linear-algebra library stalls where other programs keep the cores busy.

    Example:
        >>> unit_inverse(jnp.array([[0.0, 0.0], [3.0, 0.0]])).tolist()
        [[1.0, 0.0], [3.0, 1.0]]
    """
    n, size = m.shape[-1], 1
    out = jnp.broadcast_to(jnp.eye(n, dtype=m.dtype), m.shape)
    while size < n:
        block = np.arange(n) // size
        below = (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)
        out = out + out @ jnp.where(below, m, jnp.zeros((), m.dtype)) @ out
        size *= 2
    return out


def _start(r: Any, state: Any) -> Any:
    b, _, h, d = r.shape
    return jnp.zeros((b, h, d, d), r.dtype) if state is None else state
