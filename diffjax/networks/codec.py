"""Autoencoders as functions: what an encoder says of the latent, and a module bound to its parameters.

An autoencoder is any linen module with `module(x)`, `encode(x) -> Posterior` and `decode(z) -> x`; `autoencoder(module)`
makes it a function of its parameters, which losses, latents and training take.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax import numerics as nu
from diffjax.networks.codebook import Quantised
from diffjax.networks.functional import from_linen, zeros
from diffjax.numerics import PyTree, pytree_dataclass, static


class Posterior(NamedTuple):
    """What an encoder says of the latent: a Gaussian with independent numbers, or one point.   q(z | x) = N(mean, e^log_variance)

    `mean` and `log_variance` are [B, ...]; a `log_variance` of None is a point, such as the vector before a codebook.
    """

    mean: Any
    log_variance: Any = None

    def draw(self, keys: Any) -> jax.Array:
        """One latent per item.   z = mean + e^(log_variance / 2) noise     keys: [B] item keys"""
        if self.log_variance is None:
            return self.mean
        return self.mean + jnp.exp(self.log_variance / 2) * nu.item_normal(keys, 0, self.mean)

    def kl(self) -> jax.Array:
        """Nats from the standard normal, [B], summed over the latent; zero for a point.   KL(q || N(0, I))

        Example:
            >>> Posterior(jnp.ones((1, 2)), jnp.zeros((1, 2))).kl().tolist()
            [1.0]
        """
        m, v = self.mean, self.log_variance
        if v is None:
            return jnp.zeros(m.shape[0], m.dtype)
        return 0.5 * (jnp.square(m) + jnp.exp(v) - 1 - v).reshape(m.shape[0], -1).sum(1)


# ---------------------------------------------------------------------------------------------------- as a function


@pytree_dataclass
class Autoencoder:
    """A module with its parameters: the parameters are leaves, the module is structure. Made by `autoencoder(module)`."""

    params: PyTree
    module: Any = static()

    def encode(self, x: Any) -> Posterior:
        """The posterior of the latent of x [B, ...]."""
        return self.apply("encode", x)

    def decode(self, z: Any) -> jax.Array:
        """What the latent z [B, ...] stands for."""
        return self.apply("decode", z)

    def quantise(self, z: Any) -> Quantised:
        """The codes nearest to z; see `Codebook`.   Raises: ValueError: a module without a codebook."""
        return self.apply("quantise", z)

    def encode_tokens(self, x: Any) -> jax.Array:
        """The numbers of the codes of x, int32, one for each place of the latent: data for discrete diffusion."""
        return self.apply("quantise", self.encode(x).mean).tokens

    def decode_tokens(self, tokens: Any) -> jax.Array:
        """What the codes with these numbers stand for."""
        return self.apply("decode_tokens", tokens)

    def apply(self, method: str, *args: Any) -> Any:
        """Any method of the module.   Raises: ValueError: it has none of this name."""
        if not hasattr(self.module, method):
            raise ValueError(
                f"{type(self.module).__name__} has no {method}; codes and tokens need a module with a codebook, such as "
                "VQAutoencoder"
            )
        return self.module.apply({"params": self.params}, *args, method=method)


@dataclasses.dataclass(frozen=True)
class AutoencoderOf:
    """`params -> Autoencoder`; equal to another one of an equal module. Made by `autoencoder`."""

    module: Any

    def __call__(self, params: PyTree) -> Autoencoder:
        """The autoencoder with these parameters."""
        return Autoencoder(params, self.module)

    def init(self, key: Any, x: Any) -> Any:
        """Fresh parameters, a nested dict of float32 arrays.   x: data of one item or more; only its shape matters"""
        init = _init_module if isinstance(key, jax.core.Tracer) else _init
        return init(self.module, key, zeros(x))["params"]


def autoencoder(module: nn.Module) -> AutoencoderOf:
    """A linen module with methods `encode` and `decode` as a function of its parameters.   params -> Autoencoder

    It is the `model` of `make_train_step` for `losses.autoencoder_loss`.
    Raises: ValueError: a module without these methods.

    Example:
        >>> from diffjax.networks import KLAutoencoder
        >>> make = autoencoder(KLAutoencoder(widths=(8, 8), blocks=1, latent_channels=2))
        >>> params = make.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
        >>> z = make(params).encode(jnp.zeros((5, 4, 4, 3))).mean
        >>> z.shape, make(params).decode(z).shape
        ((5, 2, 2, 2), (5, 4, 4, 3))
    """
    missing = [name for name in ("encode", "decode") if not hasattr(module, name)]
    if missing or not isinstance(module, nn.Module):
        raise ValueError(
            f"autoencoder needs a flax.linen module with the methods encode and decode; {type(module).__name__} lacks "
            f"{' and '.join(missing) or 'being one'}"
        )
    return AutoencoderOf(from_linen(module).module)


def _init_module(module: Any, key: Any, x: Any) -> Any:
    return module.init(key, x)


_init = jax.jit(_init_module, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
