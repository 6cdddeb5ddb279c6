"""Losses of autoencoders: reconstruction, a perceptual distance, the latent's own term, and a discriminator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffjax import numerics as nu
from diffjax.losses.denoising import as_tree
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.types import Aux, Cond, Key, PerExample

ADAPTIVE_LIMIT, ADAPTIVE_FLOOR = 1e4, 1e-4  # of the ratio of gradients, as in the released code of VQGAN


def item_mean(a: Any) -> jax.Array:
    """The mean over all axes but the first, in at least float32.   [B, ...] -> [B]"""
    wide = a.dtype if jnp.finfo(a.dtype).bits >= 32 else jnp.float32
    return a.astype(wide).reshape(a.shape[0], -1).mean(1)


def absolute(x: Any, y: Any) -> jax.Array:
    """mean |x - y|, [B]"""
    return item_mean(jnp.abs(x - y))


def squared(x: Any, y: Any) -> jax.Array:
    """mean |x - y|^2, [B]"""
    return item_mean(jnp.square(x - y))


# ------------------------------------------------------------------------------------------------ perceptual distance


@pytree_dataclass
class Perceptual:
    """See `perceptual`; the features' own arrays and the weights are leaves."""

    features: Any
    weights: Any = None

    def __call__(self, x: Any, y: Any) -> jax.Array:
        """The distances [B] of pictures x and y."""
        a, b = jax.tree.leaves(self.features(x)), jax.tree.leaves(self.features(y))
        weights = [None] * len(a) if self.weights is None else self.weights
        if len(weights) != len(a):
            raise ValueError(f"perceptual needs weights for each of the {len(a)} layers; got {len(weights)}")
        return sum(_layer(u, v, w) for u, v, w in zip(a, b, weights, strict=True))


def _layer(a: Any, b: Any, w: Any) -> jax.Array:
    unit = lambda f: f * lax.rsqrt(jnp.square(f).sum(-1, keepdims=True) + 1e-10)
    gap = jnp.square(unit(a) - unit(b))
    if w is not None:
        gap = gap * jnp.asarray(w, gap.dtype).reshape((1,) * (gap.ndim - 1) + (-1,))
    return item_mean(gap) * gap.shape[-1]


def perceptual(features: Callable[[Any], Any], weights: Any = None) -> Perceptual:
    """The distance of two pictures in the layers of a network.   sum_l mean_place sum_c w_lc (f_lc(x) - f_lc(y))^2,  |f_l| = 1

    The features of each place are divided by their length over the channels.
    Args: features: `x [B, H, W, C] -> arrays [B, h, w, c]`, one for each layer, such as taps of a network; a function, or a
    pytree that can be called. It is not trained.   weights: None for ones, or non-negative arrays [c], one for each layer.
    Returns: `(x, y) -> [B]`.
    Raises: ValueError: weights for another number of layers (when called).

    Example:
        >>> d = perceptual(lambda x: (x, x[:, ::2]))
        >>> d(jnp.ones((1, 2, 2, 1)), -jnp.ones((1, 2, 2, 1))).tolist()
        [8.0]

    Reference: Zhang et al. 2018, arXiv:1801.03924, Eq. 1; the weights multiply squares, as in the released networks.
    """
    return Perceptual(as_tree(features), weights)


# --------------------------------------------------------------------------------------------------- the autoencoder


@pytree_dataclass
class AutoencoderLoss:
    """See `autoencoder_loss`; weights are leaves."""

    kl: Any
    commitment: Any
    decay: Any
    perceptual: Any = None
    perceptual_weight: Any = 1.0
    reconstruction: Callable[[Any, Any], Any] = static(default=absolute)

    def __call__(
        self, key: Key, autoencoder: Any, x0: Any, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux` of [B] arrays.   autoencoder: bound, as `networks.autoencoder(module)(params)`"""
        z, latent, aux = self.latent(key, autoencoder, x0, items)
        loss, seen = self.compare(x0, autoencoder.decode(z))
        return loss + latent, aux | seen

    def latent(self, key: Key, autoencoder: Any, x0: Any, items: Any) -> tuple[Any, Any, Aux]:
        """A latent to decode, the loss [B] of the latent itself, and aux."""
        items = nu.item_indices(items, nu.batch_size(x0))
        posterior = autoencoder.encode(x0)
        z = posterior.draw(nu.item_keys(key, items))
        if posterior.log_variance is not None:
            nats = posterior.kl()
            return z, self.kl * nats / (x0.size // x0.shape[0]), {"kl": nats}
        if not hasattr(autoencoder.module, "quantise"):
            return z, jnp.zeros(x0.shape[0], z.dtype), {}
        q = autoencoder.quantise(z)
        gap = squared(z, lax.stop_gradient(q.codes))
        loss = self.commitment * gap
        if autoencoder.module.average:
            loss = loss + autoencoder.apply("follow", z, q.tokens, self.decay)
        else:
            loss = loss + squared(lax.stop_gradient(z), q.codes)
        return z, loss, {"commitment": gap}

    def compare(self, x: Any, y: Any) -> tuple[Any, Aux]:
        """The loss [B] of the picture y of x, and aux."""
        loss = self.reconstruction(x, y)
        aux = {"mse": squared(x, y)}
        if self.perceptual is not None:
            aux["perceptual"] = self.perceptual(x, y)
            loss = loss + self.perceptual_weight * aux["perceptual"]
        return loss, aux


def autoencoder_loss(
    reconstruction: Callable[[Any, Any], Any] = absolute,
    *,
    kl: Any = 1e-6,
    commitment: Any = 0.25,
    decay: Any = 0.99,
    perceptual: Any = None,
    perceptual_weight: Any = 1.0,
) -> AutoencoderLoss:
    """Reconstruction plus what keeps the latent in place.   r(x, D(z)) + w p(x, D(z)) + latent

    For a Gaussian posterior z is drawn from it, and latent = kl KL(q || N(0, I)) / D for D numbers in x: sums of both over a
    picture have the ratio `kl`. For a codebook latent = commitment |z - sg(e)|^2 + |sg(z) - e|^2 (means), where the second is
    replaced by the moving average of rate `1 - decay` if the codes are averages.

    Args: reconstruction: `(x, y) -> [B]`, `absolute` or `squared`.   kl, commitment, perceptual_weight: >= 0.   decay: in
    [0, 1).   perceptual: `(x, y) -> [B]`, such as `perceptual(features)`.
    Returns: `loss(key, autoencoder, x, cond=None, items=None) -> ([B], aux)` for `make_train_step` with the model
    `networks.autoencoder(module)`; aux `mse`, and `kl` in nats, or `commitment`, and `perceptual`.

    Example:
        >>> from diffjax.networks import KLAutoencoder, autoencoder
        >>> make, x = autoencoder(KLAutoencoder(widths=(8, 8), blocks=1)), jnp.ones((2, 4, 4, 3))
        >>> loss, aux = autoencoder_loss()(jax.random.key(1), make(make.init(jax.random.key(0), x)), x)
        >>> loss.shape, sorted(aux)
        ((2,), ['kl', 'mse'])

    Reference: Rombach et al. 2022, arXiv:2112.10752, appendix G; van den Oord et al. 2017, arXiv:1711.00937, Eq. 3.
    """
    distance = None if perceptual is None else as_tree(perceptual)
    return AutoencoderLoss(kl, commitment, decay, distance, perceptual_weight, reconstruction)


# ----------------------------------------------------------------------------------------------------- discriminator


def hinge(real: Any, fake: Any) -> jax.Array:
    """Loss [B] of a discriminator by its logits [B, ...].   (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2"""
    return 0.5 * (item_mean(jax.nn.relu(1 - real)) + item_mean(jax.nn.relu(1 + fake)))


def vanilla(real: Any, fake: Any) -> jax.Array:
    """Loss [B] of a discriminator by its logits [B, ...]: cross-entropy.   (mean log(1 + e^-real) + mean log(1 + e^fake)) / 2"""
    return 0.5 * (item_mean(jax.nn.softplus(-real)) + item_mean(jax.nn.softplus(fake)))


@pytree_dataclass
class AdversarialLoss:
    """See `adversarial_loss`."""

    base: AutoencoderLoss
    weight: Any
    start: Any
    kind: Callable[[Any, Any], Any] = static(default=hinge)
    last: tuple[str, ...] = static(default=())

    def __call__(
        self, key: Key, adversary: Any, x0: Any, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux`.   adversary: as `networks.adversary(module, discriminator)(params)`"""
        z, latent, aux = self.base.latent(key, adversary.autoencoder, x0, items)
        y = adversary.autoencoder.decode(z)
        loss, seen = self.base.compare(x0, y)
        frozen = dataclasses.replace(adversary, params=lax.stop_gradient(adversary.params))
        fooled = lambda y: -item_mean(frozen.judge(y))
        on = (adversary.age >= self.start).astype(loss.dtype)
        factor = on * self.weight * self.adaptive(adversary.autoencoder, x0, z, fooled).astype(loss.dtype)
        judged = self.kind(adversary.judge(x0), adversary.judge(lax.stop_gradient(y)))
        loss = loss + latent + factor * fooled(y) + on * judged + _count(adversary.age).astype(loss.dtype)
        return loss, aux | seen | {"discriminator": judged, "adversarial_weight": factor}

    def adaptive(self, autoencoder: Any, x0: Any, z: Any, fooled: Callable[[Any], Any]) -> jax.Array:
        """|grad of the reconstruction| / |grad of the discriminator| at the weights of the decoder's last layer."""
        x0, z, params = lax.stop_gradient((x0, z, autoencoder.params))

        def picture(weights: Any) -> jax.Array:
            return dataclasses.replace(autoencoder, params=_put(params, self.last, weights)).decode(z)

        y, back = jax.vjp(picture, _get(params, self.last))
        norm = lambda f: jnp.sqrt(jnp.square(back(jax.grad(lambda y: f(y).mean())(y))[0]).sum())
        ratio = norm(lambda y: self.base.compare(x0, y)[0]) / (norm(fooled) + ADAPTIVE_FLOOR)
        return jnp.clip(ratio, 0.0, ADAPTIVE_LIMIT)


def adversarial_loss(
    base: AutoencoderLoss,
    *,
    weight: Any = 0.5,
    start: Any = 0,
    kind: Callable[[Any, Any], Any] = hinge,
    last: tuple[str, ...] = ("decoder", "out", "kernel"),
) -> AdversarialLoss:
    """An autoencoder against a discriminator of patches, both in one step.   base - w a mean D(y) + kind(D(x), D(sg y))

    a = |grad r| / (|grad mean D(y)| + 1e-4), clipped to [0, 1e4], of the mean over the batch of a device (or part), at the
    last layer of the decoder; the discriminator of the first of the two terms is constant, and so is the picture of the
    second: each moves its own parameters alone. Both begin after `start` updates, which `age`, a parameter whose gradient is
    -1, counts: give it `optax.sgd(1.0)`, and the two networks an optimiser each (`training.optimizer.by_path`).

    Args: base: from `autoencoder_loss`.   weight: w >= 0.   start: updates before the discriminator begins.   kind: `hinge`
    or `vanilla`.   last: path of the decoder's last weights in its parameters.
    Returns: `loss(key, adversary, x, cond=None, items=None) -> ([B], aux)` for `make_train_step` with the model
    `networks.adversary(module, discriminator)`.

    Reference: Esser et al. 2021, arXiv:2012.09841, Eq. 7 (weight); Isola et al. 2017, arXiv:1611.07004 (patches).
    """
    return AdversarialLoss(base, weight, start, kind, tuple(last))


def _count(age: Any) -> jax.Array:
    """Zero, with the gradient -1: a step of rate one adds one to `age`."""
    return lax.stop_gradient(age) - age


def _get(tree: PyTree, path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            raise ValueError(
                f"last={'/'.join(path)} is no path of the autoencoder's parameters; at {name!r} there are "
                f"{sorted(tree) if isinstance(tree, dict) else 'no further names'}"
            )
        tree = tree[name]
    return tree


def _put(tree: PyTree, path: tuple[str, ...], value: Any) -> PyTree:
    """The tree with another value at the path."""
    return value if not path else {**tree, path[0]: _put(tree[path[0]], path[1:], value)}
