"""A latent of frozen features and a small residual branch: what a network knows of a picture, and what it left out.

z = [F(x), R(x)]: F is given and never trained, R is an encoder of few channels, brought to the scale of F, and one decoder
reads both. `feature_autoencoder` makes of it what `autoencoder` makes of other modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from diffjax.networks.autoencoders import check_picture
from diffjax.networks.codec import Posterior
from diffjax.networks.coders import Decoder, Encoder
from diffjax.networks.convolution import ConvForm
from diffjax.networks.functional import zeros
from diffjax.networks.layers import at_least_float32
from diffjax.networks.partition import RESIDUAL, Rules
from diffjax.numerics import PyTree, pytree_dataclass, static


class Scale(NamedTuple):
    """Where the numbers of some channels lie, all together: scalars."""

    mean: Any
    std: Any


def scale_of(a: Any) -> Scale:
    """The mean and the standard deviation of a channel, averaged over channels.   a: [B, ..., c]

    Constant for gradients.

    Example:
        >>> scale = scale_of(jnp.array([[0.0, 1.0], [2.0, 5.0]]))
        >>> float(scale.mean), float(scale.std)
        (2.0, 1.5)
    """
    a = lax.stop_gradient(jnp.asarray(a))
    axes = tuple(range(a.ndim - 1))
    return Scale(a.mean(axes).mean(), a.std(axes).mean())


def match_scale(a: Any, own: Scale, target: Scale) -> jax.Array:
    """The numbers `a` of one scale brought to another.   (a - m) / (s + 1e-6) s' + m'

    Args: a: [B, ..., c].   own: `scale_of(a)`, or that of more data.   target: where they are to lie.

    Reference: Shi et al. 2025, arXiv:2510.15301: the residual is given the mean and deviation of the frozen features, so that
    neither half of the latent is lost beside the other.
    """
    ratio = target.std / (own.std + 1e-6)
    return (a - own.mean) * ratio.astype(a.dtype) + target.mean.astype(a.dtype)


class ResidualAutoencoder(nn.Module):
    """The trained half: the encoder of the residual, and the decoder of features and residual.

    Both are those of `KLAutoencoder`, and reach patch 2^(levels - 1) times coarser grids, as the features must be. Taps:
    `encoder/...`, `decoder/...`.
    Methods: `residual(x)`: [B, h, w, residual_channels]; `decode(z)`: pictures of z [B, h, w, features + residual]; the call
    is `decode([features, residual(x)])`.
    Raises: ValueError: at a call, pictures that do not fit.

    Example:
        >>> net = ResidualAutoencoder(widths=(8, 8), residual_channels=2, out_channels=1)
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros((1, 2, 2, 5)))
        >>> v["params"]["decoder"]["in"]["kernel"].shape
        (3, 3, 7, 8)

    Reference: Shi et al. 2025, arXiv:2510.15301.
    """

    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    residual_channels: int = 8  # zero: the features alone
    attention: tuple[int, ...] = ()  # levels with attention after each block
    middle_attention: bool = True
    out_channels: int = 3
    patch: int = 1  # pixels are folded into channels by squares of this side, which makes the first level cheaper
    groups: int | None = None  # of the norms; default: of four channels or more, at most 32
    act: Callable[[Any], Any] = nn.silu
    conv: ConvForm | None = None
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = RESIDUAL  # along the mesh axis `model`

    def setup(self) -> None:
        """The two parts."""
        rest = dict(
            widths=self.widths, blocks=self.blocks, attention=self.attention, middle_attention=self.middle_attention,
            groups=self.groups, act=self.act, patch=self.patch, form=self.conv, remat=self.remat, dtype=self.dtype,
        )  # fmt: skip
        if self.residual_channels:
            self.encoder = Encoder(out=self.residual_channels, **rest)
        self.decoder = Decoder(out=self.out_channels, **rest)

    def residual(self, x: Any) -> jax.Array:
        """What the residual branch says of x, in its own scale."""
        return self.encoder(check_picture(self, x)).astype(at_least_float32(jnp.asarray(x).dtype))

    def decode(self, z: Any) -> jax.Array:
        """The picture of the latent z."""
        return self.decoder(z).astype(at_least_float32(jnp.asarray(z).dtype))

    def __call__(self, x: Any, features: Any) -> jax.Array:
        """Decode features and residual."""
        parts = [features, self.residual(x)] if self.residual_channels else [features]
        return self.decode(jnp.concatenate(parts, -1))


@pytree_dataclass
class FeatureAutoencoder:
    """Frozen features with a residual branch and a decoder, bound to parameters. Made by `feature_autoencoder`.

    `params` are trained, `frozen` are those of the features; `scales` is None, or the pair (of the residual, of the features)
    that `measured` found.
    """

    params: PyTree
    frozen: PyTree
    scales: Any = None
    module: Any = static(default=None)
    features: Callable[..., Any] = static(default=None)

    @property
    def fixed(self) -> bool:
        """Whether the latent of an item does not depend on the batch that it is in; see `measured`."""
        return self.scales is not None or not self.module.residual_channels

    def encode(self, x: Any) -> Posterior:
        """The latent [F(x), R(x)], a point.   R is brought to the scale of F: that of this batch, or the one measured."""
        features = lax.stop_gradient(self.features(self.frozen, x))
        if not self.module.residual_channels:
            return Posterior(features)
        residual = self._apply("residual", x)
        own, target = self.scales or (scale_of(residual), scale_of(features))
        return Posterior(jnp.concatenate([features, match_scale(residual, own, target)], -1))

    def decode(self, z: Any) -> jax.Array:
        """The picture of the latent z [B, h, w, c]."""
        return self._apply("decode", z)

    def measured(self, x: Any) -> FeatureAutoencoder:
        """With the scales of the data x [B, ...] instead of those of each batch: then items no longer see each other."""
        if not self.module.residual_channels:
            return self
        scales = scale_of(self._apply("residual", x)), scale_of(self.features(self.frozen, x))
        return dataclasses.replace(self, scales=scales)

    def _apply(self, method: str, *args: Any) -> Any:
        return self.module.apply({"params": self.params}, *args, method=method)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, for it holds arrays
class FeatureAutoencoderOf:
    """`params -> FeatureAutoencoder`. Made by `feature_autoencoder`."""

    module: Any
    features: Callable[..., Any]
    frozen: PyTree

    def __call__(self, params: PyTree) -> FeatureAutoencoder:
        """The autoencoder with these parameters of the residual branch and the decoder."""
        return FeatureAutoencoder(params, self.frozen, None, self.module, self.features)

    def init(self, key: Any, x: Any) -> PyTree:
        """Fresh parameters of both, a nested dict of float32 arrays.   x: data of one item or more; only its shape matters"""
        x = zeros(x)
        features = jax.eval_shape(self.features, self.frozen, x)
        init = _init_module if isinstance(key, jax.core.Tracer) else _init
        return init(self.module, key, x, zeros(features))["params"]


def _init_module(module: Any, key: Any, x: Any, features: Any) -> Any:
    return module.init(key, x, features)


# runs once, so it is compiled without optimisation
_init = jax.jit(_init_module, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def feature_autoencoder(module: nn.Module, features: Callable[..., Any], frozen: PyTree) -> FeatureAutoencoderOf:
    """An autoencoder whose latent is frozen features beside a residual.   params -> FeatureAutoencoder

    It is the `model` of `make_train_step` for `losses.autoencoder_loss`, and `feature_autoencoder(...)(params).measured(data)`
    is what encodes the data of a latent model.
    Args: module: the residual branch and the decoder.   features: `(frozen, x [B, H, W, C]) -> [B, h, w, c]`, a module-level
    function or a value; no gradient passes.   frozen: its parameters.
    Raises: ValueError: a module without the methods `residual` and `decode`.

    Example:
        >>> def blur(frozen, x):
        ...     return frozen * x[:, ::2, ::2]
        >>> net = ResidualAutoencoder(widths=(8, 8), residual_channels=2, middle_attention=False, out_channels=1)
        >>> make, x = feature_autoencoder(net, blur, jnp.float32(3.0)), jnp.ones((2, 4, 4, 1))
        >>> z = make(make.init(jax.random.key(0), x)).encode(x).mean
        >>> z.shape, z[..., 0].tolist()[0]
        ((2, 2, 2, 3), [[3.0, 3.0], [3.0, 3.0]])

    Reference: Shi et al. 2025, arXiv:2510.15301.
    """
    missing = [name for name in ("residual", "decode") if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"feature_autoencoder needs a module with the methods residual and decode, such as ResidualAutoencoder; "
            f"{type(module).__name__} lacks {' and '.join(missing)}"
        )
    return FeatureAutoencoderOf(module, features, frozen)
