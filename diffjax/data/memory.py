"""A memory of snippets beside a network: normalised features of pictures, kept as a product of two small matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import pytree_dataclass


@pytree_dataclass
class Memory:
    """See `memory`."""

    coefficients: Any  # [N, k]
    basis: Any  # [k, d], orthonormal rows

    @property
    def size(self) -> int:
        """The number of snippets."""
        return self.coefficients.shape[0]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return self.coefficients.size + self.basis.size

    def read(self, index: Any) -> jax.Array:
        """The snippets at integers [B], of norm one.   [B, d]"""
        return normalised(jnp.asarray(self.coefficients)[index] @ self.basis)

    def draw(self, key: Any, items: Any) -> jax.Array:
        """A random snippet for each item: it depends on its place [B] in `items` alone.   [B, d]"""
        one = lambda k: jax.random.randint(k, (), 0, self.size)
        return self.read(jax.vmap(one)(nu.item_keys(key, items)))

    def mixed(self, first: Any, second: Any, weight: Any) -> jax.Array:
        """Between two snippets.   normalised((1 - w) s_i + w s_j),  w in [0, 1], [] or [B]"""
        w = jnp.broadcast_to(jnp.asarray(weight, self.basis.dtype), jnp.shape(first))[:, None]
        return normalised((1 - w) * self.read(first) + w * self.read(second))

    def with_more(self, features: Any, grow: int = 0) -> Memory:
        """The memory with snippets of other pictures put to its end, without training.

        Args: features: [M, d].   grow: directions that the basis gets, the largest of what it misses of them; 0 to d - k.
        Raises: ValueError: features of another size; grow out of range.
        """
        s, basis = _checked(features), np.asarray(self.basis)
        k, d = basis.shape
        if s.shape[1] != d or not 0 <= grow <= min(len(s), d - k):
            raise ValueError(
                f"features must be [M, {d}] and grow in 0..{min(len(s), d - k)}; got {s.shape} and grow={grow}"
            )
        missed = s - s @ basis.T @ basis
        more = np.linalg.svd(missed, full_matrices=False)[2][:grow]
        # once more orthogonal to the old rows: what they miss may be little but rounding
        more = np.linalg.qr((more - more @ basis.T @ basis).T)[0].T if grow else more
        basis = np.concatenate([basis, more.astype(basis.dtype)])
        old = np.pad(np.asarray(self.coefficients), ((0, 0), (0, grow)))
        return Memory(np.concatenate([old, (s @ basis.T).astype(old.dtype)]), basis)


def memory(features: Any, rank: int | None = None) -> Memory:
    """A bank of snippets for a network whose condition is what its own picture looks like.   S ~ C B,  C [N, k], B [k, d]

    The rows of S are the features, normalised; C B is their best approximation of rank k (truncated SVD).
    Args: features: [N, d] of a frozen encoder.   rank: k in 1..min(N, d), default that: exact.
    Raises: ValueError: not a finite matrix with rows that are not zero; rank out of range.

    Example:
        >>> m = memory(np.eye(3, dtype=np.float32), rank=2)
        >>> m.size, m.numbers, m.read(np.array([0, 1])).shape
        (3, 12, (2, 3))

    Reference: Tang et al. 2024, arXiv:2412.08781.
    """
    s = _checked(features)
    rank = min(s.shape) if rank is None else rank
    if not 1 <= rank <= min(s.shape):
        raise ValueError(f"rank must be in 1..{min(s.shape)} for features {s.shape}; got {rank}")
    u, sigma, v = np.linalg.svd(s, full_matrices=False)
    return Memory((u[:, :rank] * sigma[:rank]).astype(np.float32), v[:rank].astype(np.float32))


def normalised(s: Any) -> jax.Array:
    """`s` with rows of norm one.   [..., d]"""
    return s / jnp.linalg.norm(s, axis=-1, keepdims=True)


def _checked(features: Any) -> np.ndarray:
    s = np.asarray(features, np.float64)
    if s.ndim != 2 or not np.isfinite(s).all() or not np.linalg.norm(s, axis=1).all():
        raise ValueError(f"features must be a finite matrix [N, d] without rows of zeros; got shape {s.shape}")
    return s / np.linalg.norm(s, axis=1, keepdims=True)
