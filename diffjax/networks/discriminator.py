"""A discriminator of patches, and the pair of an autoencoder and its discriminator as a function of their parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diffjax.networks.codec import Autoencoder, AutoencoderOf, autoencoder
from diffjax.networks.convolution import Conv, ConvForm
from diffjax.networks.functional import from_linen
from diffjax.networks.layers import GroupNorm, at_least_float32
from diffjax.networks.partition import Rules
from diffjax.networks.taps import Tap
from diffjax.numerics import PyTree, pytree_dataclass, static


class PatchDiscriminator(nn.Module):
    """Logits of patches: real or not.   [B, H, W, C] -> [B, ceil(H / 2^layers), ceil(W / 2^layers), 1]

    `layers` convolutions of 4 x 4 with stride two and doubling widths, one more and the last with stride one; leaky ReLU of
    slope 0.2. Group normalisation stands where the published network has batch normalisation, with as many parameters: items
    must not depend on each other. Taps: `tap_i`, after each.

    Example:
        >>> net = PatchDiscriminator(width=8, layers=2)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> v["params"]["out"]["kernel"].shape
        (4, 4, 32, 1)

    Reference: Isola et al. 2017, arXiv:1611.07004, section 3.2.2 and its appendix.
    """

    width: int = 64
    layers: int = 3
    most: int = 8  # widths double up to this many times `width`
    conv: ConvForm | None = None
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = ((r"layer_0/(kernel|bias)$", PartitionSpec("model")),)

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """The logits of x."""
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"PatchDiscriminator takes floating pictures [B, H, W, C]; got {x.dtype} {x.shape}")
        own = dict(kernel=4, form=self.conv, dtype=self.dtype)
        act = lambda h: nn.leaky_relu(h, 0.2)
        h = Tap(name="tap_0")(act(Conv(self.width, stride=2, name="layer_0", **own)(x)))
        for i in range(1, self.layers + 1):
            n, stride = self.width * min(2**i, self.most), 2 if i < self.layers else 1
            h = Conv(n, stride=stride, bias=False, name=f"layer_{i}", **own)(h)
            h = Tap(name=f"tap_{i}")(act(GroupNorm(name=f"norm_{i}")(h)))
        y = Conv(1, kernel=(4, 4), form=self.conv, dtype=self.dtype, name="out")(h)
        return y.astype(at_least_float32(x.dtype))


@pytree_dataclass
class Adversary:
    """An autoencoder, its discriminator, and the number of updates that they have had. Made by `adversary`."""

    autoencoder: Autoencoder
    params: PyTree
    age: Any
    module: Any = static()

    def judge(self, x: Any) -> jax.Array:
        """The logits of x, higher for what looks real."""
        return self.module.apply({"params": self.params}, x)


@dataclasses.dataclass(frozen=True)
class AdversaryOf:
    """`params -> Adversary`. Made by `adversary`."""

    autoencoder: AutoencoderOf
    discriminator: Any

    def __call__(self, params: PyTree) -> Adversary:
        """The pair with these parameters."""
        return Adversary(
            self.autoencoder(params["autoencoder"]), params["discriminator"], params["age"], self.discriminator
        )

    def init(self, key: Any, x: Any) -> dict[str, PyTree]:
        """Fresh parameters: `autoencoder`, `discriminator`, and `age`, zero."""
        k_auto, k_disc = jax.random.split(key)
        disc = AutoencoderOf(self.discriminator).init(k_disc, x)
        return {
            "autoencoder": self.autoencoder.init(k_auto, x),
            "discriminator": disc,
            "age": jnp.zeros((), jnp.float32),
        }


def adversary(module: nn.Module, discriminator: nn.Module) -> AdversaryOf:
    """An autoencoder and a discriminator as a function of the parameters of both, for `losses.adversarial_loss`.

    Args: module: as for `autoencoder`.   discriminator: linen, `x [B, ...] -> logits [B, ...]`, such as PatchDiscriminator.

    Example:
        >>> from diffjax.networks import KLAutoencoder
        >>> make = adversary(KLAutoencoder(widths=(8,)), PatchDiscriminator(width=8, layers=1))
        >>> sorted(jax.eval_shape(make.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3))))
        ['age', 'autoencoder', 'discriminator']
    """
    return AdversaryOf(autoencoder(module), from_linen(discriminator).module)
