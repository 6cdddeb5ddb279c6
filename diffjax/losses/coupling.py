"""Couplings of noise and data: `coupling(key, x0, items) -> eps`. They choose or permute the noise, never data or labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.types import Key


def independent(key: Key, x0: PyTree, items: Any) -> PyTree:
    """Noise that knows nothing of the data.   eps_b ~ N(0, I) from fold_in(key, items[b])"""
    return nu.item_normal(nu.item_keys(key, items), 0, x0)


def flat(x: PyTree) -> jax.Array:
    """A state as one float32 matrix [B, D]."""
    return jnp.concatenate([a.reshape(a.shape[0], -1).astype(jnp.float32) for a in jax.tree.leaves(x)], axis=1)


# --------------------------------------------------------------------------------------------------------- assignment


def _host_assignment(gain: Any) -> np.ndarray:
    gain = np.nan_to_num(np.asarray(gain, np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
    return linear_sum_assignment(gain, maximize=True)[1].astype(np.int32)


def exact(gain: jax.Array) -> jax.Array:
    """The permutation p that maximises `sum_b gain[b, p_b]`, by SciPy on the host.   [B, B] -> [B] int32

    A callback: the device waits for the host. Cubic in B; about 0.05 s at B = 1000.
    """
    n = gain.shape[0]
    return jax.pure_callback(_host_assignment, jax.ShapeDtypeStruct((n,), jnp.int32), gain, vmap_method="sequential")


def sinkhorn(gain: jax.Array, sharpness: float = 200.0, iterations: int = 100) -> jax.Array:
    """A permutation close to the best, all on the device: entropic transport, rounded greedily.   [B, B] -> [B]

    Potentials f, g balance the plan exp(gain / e + f + g), e = range(gain) / sharpness; then the largest entry of the plan
    is taken B times, with its row and column. For accelerators, where the callback of `exact` would stall the device.
    Reference: arXiv:1306.0895, Algorithm 1.
    """
    gain = jnp.nan_to_num(gain)
    n = gain.shape[0]
    score = gain * (sharpness / jnp.maximum(gain.max() - gain.min(), 1e-30))
    lse = jax.scipy.special.logsumexp

    def balance(_: Any, g: Any) -> Any:
        f = -lse(score + g[None, :], axis=1)
        return -lse(score + f[:, None], axis=0)

    g = jax.lax.fori_loop(0, iterations, balance, jnp.zeros_like(score[0]))
    plan = score + g[None, :] - lse(score + g[None, :], axis=1)[:, None]

    def take(_: Any, carry: Any) -> Any:
        plan, order = carry
        row, column = jnp.divmod(jnp.argmax(plan), n)
        return plan.at[row].set(-jnp.inf).at[:, column].set(-jnp.inf), order.at[row].set(column.astype(jnp.int32))

    return jax.lax.fori_loop(0, n, take, (plan, jnp.zeros(n, jnp.int32)))[1]


@dataclasses.dataclass(frozen=True)
class MinibatchAssignment:
    """See `minibatch_assignment`."""

    solve: Callable[[jax.Array], jax.Array] = exact
    limit: int = 2048

    def __call__(self, key: Key, x0: PyTree, items: Any) -> PyTree:
        """The noise of every item, a permutation of the independent noise of the batch."""
        n = nu.batch_size(x0)
        if n > self.limit:
            raise ValueError(
                f"minibatch_assignment of {n} items needs time of order B^3 and {n} x {n} numbers; the limit is "
                f"{self.limit}. Use a smaller batch, k_nearest_noise, or minibatch_assignment(limit={n})"
            )
        eps = independent(key, x0, items)
        if n == 1:
            return eps
        # |x0_i - eps_j|^2 differs from -2 x0_i . eps_j by terms that no permutation changes
        gain = jax.lax.stop_gradient(flat(x0)) @ flat(eps).T
        order = self.solve(gain)
        return jax.tree.map(lambda e: e[order], eps)


def minibatch_assignment(solve: Callable[[jax.Array], jax.Array] = exact, limit: int = 2048) -> MinibatchAssignment:
    """Noise permuted within the batch to the least transport cost.   min_p sum_b |x0_b - eps_{p_b}|^2

    Over many batches the noise is exactly standard normal. The pairing depends on the whole batch (not on its order), so
    a batch that is cut into devices by `shard_map` or `pmap` is assigned within each part; with one sharded batch under
    `jit` it is gathered.

    Args: solve: `exact` (SciPy on the host), or `sinkhorn` (on the device, nearly the least cost).   limit: largest
    batch.
    Raises: ValueError: at the call, a larger batch.
    Reference: arXiv:2406.12303, Algorithm 1; arXiv:2302.00482, Section 3.3.

    Example:
        >>> x0 = jnp.array([[9.0], [-9.0]])
        >>> eps = minibatch_assignment()(jax.random.key(0), x0, jnp.arange(2))
        >>> bool(eps[0, 0] > eps[1, 0])
        True
    """
    return MinibatchAssignment(solve, limit)


# ---------------------------------------------------------------------------------------------------------- neighbours


@dataclasses.dataclass(frozen=True)
class NearestNoise:
    """See `k_nearest_noise`."""

    k: int = 4

    def __call__(self, key: Key, x0: PyTree, items: Any) -> PyTree:
        """The nearest of k noises for every item."""
        keys = nu.item_keys(key, items)
        target = jax.lax.stop_gradient(flat(x0))

        def nearer(best: Any, j: Any) -> Any:
            kept, least = best
            eps = nu.item_normal(keys, j, x0)
            distance = jnp.square(flat(eps) - target).sum(1)
            closer = distance < least
            return (nu.tree_where(closer, eps, kept), jnp.where(closer, distance, least)), None

        first = nu.item_normal(keys, 0, x0)
        start = (first, jnp.square(flat(first) - target).sum(1))
        return jax.lax.scan(nearer, start, jnp.arange(1, self.k))[0][0]


def k_nearest_noise(k: int = 4) -> NearestNoise:
    """For every item the nearest of k independent noises.   eps_b = argmin_j |x0_b - eps_bj|,  j = 1 .. k

    Local to the item, so it does not depend on the batch. The chosen noise is only nearly normal: along x0 it moves by the
    expected maximum of k normals (1.03 at k = 4), which is little per entry in many dimensions and much in few; then use
    `minibatch_assignment`.

    Args: k: int >= 1; 1 is `independent`.
    Raises: ValueError: k is not an int >= 1.
    Reference: arXiv:2505.18521 (KNN noise selection).
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k, the number of candidate noises, must be an int >= 1; got {k!r}")
    return NearestNoise(k)
