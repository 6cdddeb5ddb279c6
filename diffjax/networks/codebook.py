"""Vector quantisation: the nearest of K codes, learned by gradients or as a moving average of what they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from diffjax.networks.layers import at_least_float32
from diffjax.numerics import PyTree

SMOOTHING = 1e-5  # of the counts, so that a code that is never used stays finite


class Quantised(NamedTuple):
    """A latent and its nearest codes.

    `z` [B, ..., d] has the values of the codes and passes gradients on to what was quantised (straight through);
    `tokens` [B, ...] int32 are the numbers of the codes; `codes` [B, ..., d] pass gradients to the codebook.
    """

    z: Any
    tokens: Any
    codes: Any


def nearest(z: Any, codes: Any) -> jax.Array:
    """The nearest code of each vector, the first one of equals.   argmin_k |z - e_k|^2,  [..., d], [K, d] -> [...] int32

    Example:
        >>> nearest(jnp.array([[0.9], [-3.0]]), jnp.array([[-1.0], [1.0]])).tolist()
        [1, 0]
    """
    codes = codes.astype(z.dtype)
    inner = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
    half = 0.5 * jnp.square(codes).sum(1)
    return jnp.argmin(half.reshape((1,) * (z.ndim - 1) + (-1,)) - inner, axis=-1).astype(jnp.int32)


def codes_of(params: PyTree) -> Any:
    """The codes [K, d] in the parameters of a `Codebook`.   e_k = embedding_k, or sums_k / smoothed counts_k

    Reference: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1, with Laplace smoothing of the counts.
    """
    if "embedding" in params:
        return params["embedding"]
    n, total = params["counts"], params["counts"].sum()
    smooth = (n + SMOOTHING) / (total + n.shape[0] * SMOOTHING) * total
    return params["sums"] / smooth[:, None]


class Codebook(nn.Module):
    """K codes of d numbers, and the nearest one of each vector.   [B, ..., d] -> Quantised

    With `average` the codes are moving averages of the vectors that they stand for: the parameters are `counts` [K], how
    often a code is used per item, and `sums` [K, d] of those vectors, both per item. They stay parameters, and their update is
    a gradient step of rate one on `follow`, so they live in the training state, are cut, saved and averaged over devices and
    parts of a batch as all parameters are: give them `optax.sgd(1.0)` (`training.optimizer.by_path`).

    Example:
        >>> v = jax.eval_shape(Codebook(16, 3).init, jax.random.key(0), jnp.zeros((1, 4, 3)))
        >>> v["params"]["embedding"].shape
        (16, 3)

    Reference: van den Oord et al. 2017, arXiv:1711.00937, Eq. 1-3.
    """

    size: int
    features: int
    average: bool = False

    def setup(self) -> None:
        """The parameters."""
        k, d = self.size, self.features
        uniform = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) / k
        if self.average:
            self.counts = self.param("counts", nn.initializers.ones, (k,), jnp.float32)
            self.sums = self.param("sums", uniform, (k, d))
        else:
            self.embedding = self.param("embedding", uniform, (k, d))

    def codes(self) -> jax.Array:
        """The codes [K, d]; without gradient where they are averages."""
        if not self.average:
            return self.embedding
        return lax.stop_gradient(codes_of({"counts": self.counts, "sums": self.sums}))

    def __call__(self, z: Any) -> Quantised:
        """The nearest codes of z."""
        codes = self.codes().astype(z.dtype)
        tokens = nearest(lax.stop_gradient(z), lax.stop_gradient(codes))
        found = codes[tokens]
        return Quantised(z + lax.stop_gradient(found - z), tokens, found)

    def lookup(self, tokens: Any) -> jax.Array:
        """The codes with these numbers.   [B, ...] int -> [B, ..., d]"""
        return self.codes()[tokens]

    def follow(self, z: Any, tokens: Any, decay: Any) -> jax.Array:
        """A loss [B] of value zero whose gradient moves the averages.   N <- decay N + (1 - decay) n,  S likewise

        n_k and s_k are the number and the sum of the vectors of an item with token k, so that a gradient step of rate one on
        the mean over any batch is the moving average over it:  (1 - decay) (|N|^2 / 2 + |S|^2 / 2 - n N - s S).
        """
        axes = tuple(range(1, tokens.ndim))
        used = self.counts[tokens].sum(axes)
        along = (self.sums[tokens] * lax.stop_gradient(z).astype(jnp.float32)).sum((*axes, tokens.ndim))
        size = 0.5 * (jnp.square(self.counts).sum() + jnp.square(self.sums).sum())
        value = ((1 - decay) * (size - used - along)).astype(at_least_float32(z.dtype))
        return value - lax.stop_gradient(value)


def restart_codes(key: Any, params: PyTree, z: Any, *, least: Any = 0.1) -> PyTree:
    """The parameters of a codebook whose dead codes have become vectors of the data: a pure function between steps.

    A code is dead if fewer than `least` times the even share of `z` fall on it. With all codes anew (`least=inf`) it is the
    start from data.
    Args: key: of the choice.   params: of a `Codebook`.   z: [..., d], at least K vectors that an encoder made.
    Returns: new parameters; those of the other codes stay.
    Raises: ValueError: fewer vectors than codes.

    Example:
        >>> p = {"embedding": jnp.array([[0.0], [99.0]])}
        >>> restart_codes(jax.random.key(0), p, jnp.array([[0.25], [0.25], [0.25], [0.25]]))["embedding"].ravel().tolist()
        [0.0, 0.25]

    Reference: random restarts: Dhariwal et al. 2020, arXiv:2005.00341.
    """
    codes = codes_of(params)
    z = jnp.asarray(z).reshape(-1, codes.shape[1]).astype(codes.dtype)
    if len(z) < len(codes):
        raise ValueError(f"restart_codes chooses {len(codes)} of the vectors z; got only {len(z)}. Encode more data")
    share = jnp.zeros(len(codes), codes.dtype).at[nearest(z, codes)].add(1) / len(z)
    dead = share < least / len(codes)
    chosen = z[jax.random.permutation(key, len(z))[: len(codes)]]
    if "embedding" in params:
        return {"embedding": jnp.where(dead[:, None], chosen, codes)}
    # a dead code begins with the weight of an average one: its next vectors move it as they move the others
    even = jnp.maximum(params["counts"].mean(), SMOOTHING)
    counts = jnp.where(dead, even, params["counts"])
    total = counts.sum()
    smooth = (counts + SMOOTHING) / (total + len(codes) * SMOOTHING) * total
    return {"counts": counts, "sums": jnp.where(dead, 1.0, 0.0)[:, None] * chosen * smooth[:, None]
            + jnp.where(dead[:, None], 0.0, params["sums"])}  # fmt: skip
