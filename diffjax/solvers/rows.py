"""The rows of a linear solver, and the one step that applies a row.

row i:  y  = p_x . X + p_d . D + p_c . C + p_z z        where the network is evaluated, at t_i
        d  = u_x0 x0 + u_eps eps                         the value of this row
        x+ = q_x . X + q_d . D + q_c . C + q_z z + q_n d + noise z'
X: past states, D: past values (newest first), C: constants, z: one normal that y and x+ share, z': a second one.
x+ is pushed on X; d is pushed on D where `keep` says so. Coefficients are float64 NumPy when process and grid are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax import numerics as nu
from diffjax.numerics import PyTree


class Rows(NamedTuple):
    """The coefficients of a linear solver; the leading axis of every leaf is the row, a second axis the register.

    Further axes broadcast from the left against the state: `[n, p, 1, d]` is one coefficient per dimension of a `[B, d]`.
    """

    t: Any  # [n, ...] time of evaluation
    px: Any  # [n, p, ...]
    pd: Any  # [n, q, ...]
    pc: Any  # [n, c, ...]
    u: Any  # [n, 2, ...]
    qx: Any
    qd: Any
    qc: Any
    qn: Any  # [n, ...]
    keep: Any  # [n] bool
    accept: Any  # [n] bool
    noise: Any = None  # [n, ...], or None in a table that draws no z'
    pz: Any = None  # [n, ...], or None in a table that draws no z
    qz: Any = None


class Registers(NamedTuple):
    """The state of a linear solver: past states, past values, constants; newest first."""

    x: tuple
    d: tuple
    c: tuple


@dataclasses.dataclass(frozen=True)
class Start:
    """Fill `p` state registers with the start and `q` value registers with zeros."""

    p: int
    q: int

    def __call__(self, x: PyTree, constants: tuple = ()) -> Registers:
        """The registers before the first row; a constant is a prefix of the state and takes its dtype."""
        like = lambda c, xi: jax.tree.map(lambda leaf: jnp.asarray(c, leaf.dtype), xi)
        fixed = tuple(jax.tree.map(like, constant, x) for constant in constants)
        return Registers((x,) * self.p, (jax.tree.map(jnp.zeros_like, x),) * self.q, fixed)


def newest(state: Registers) -> PyTree:
    """The newest state."""
    return state.x[0]


def step(noise: Any, denoiser: Any, carry: Any, row: Rows) -> Any:
    """Apply one row; see the module docstring. `noise` is a `Noise`, or whatever has its `draw`."""
    z, d, model_state = value(noise, denoiser, carry, row)
    return push(noise, carry[0], row, z, d), model_state


def value(noise: Any, denoiser: Any, carry: Any, row: Rows) -> tuple[Any, PyTree, PyTree]:
    """The first two lines of a row: z, the value d, and the denoiser's next state."""
    (xs, ds, cs), model_state = carry
    like = xs[0]
    if row.pz is None:
        z = None
    else:
        shared = jnp.any(row.pz != 0) | jnp.any(row.qz != 0)
        z = jax.lax.cond(shared, lambda: noise.draw(like, 0), lambda: jax.tree.map(jnp.zeros_like, like))
    y = _combine((row.px, xs), (row.pd, ds), (row.pc, cs), z=(row.pz, z))
    prediction, model_state, _ = denoiser.evaluate(y, row.t, state=model_state)
    return z, nu.add(nu.scale(row.u[0], prediction.x0), nu.scale(row.u[1], prediction.eps)), model_state


def push(noise: Any, state: Registers, row: Rows, z: Any, d: PyTree) -> Registers:
    """The last line of a row: the new state and the value, pushed on their registers."""
    xs, ds, cs = state
    new = nu.add(_combine((row.qx, xs), (row.qd, ds), (row.qc, cs), z=(row.qz, z)), nu.scale(row.qn, d))
    if row.noise is not None:  # else not even the program that draws is compiled
        new = jax.lax.cond(
            jnp.any(row.noise != 0),  # a deterministic row draws nothing
            lambda x: nu.add(x, nu.scale(row.noise, noise.draw(x, 1))),
            lambda x: x,
            new,
        )
    pushed = tuple(nu.tree_where(row.keep, a, b) for a, b in zip((d, *ds[:-1]), ds, strict=True)) if ds else ()
    return Registers((new, *xs[:-1]), pushed, cs)


def _combine(*parts: tuple[Any, tuple], z: tuple[Any, Any]) -> PyTree:
    terms = [nu.scale(c[j], register) for c, registers in parts for j, register in enumerate(registers)]
    return nu.add(*terms, *([nu.scale(*z)] if z[1] is not None else []))
