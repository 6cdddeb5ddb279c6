"""Distillation that compares a student with its teacher frequency by frequency, weak frequencies of the data most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.losses.denoising import DenoisingLoss, mean_square
from diffjax.losses.distillation import beside_teacher, difference
from diffjax.numerics import pytree_dataclass, static
from diffjax.types import Aux, Cond, Denoiser, Key, PerExample


def spectral_distance(a: Any, b: Any, x0: Any, alpha: Any = -1.0, floor: Any = 1e-2) -> jax.Array:
    """Mean squared difference of two pictures by frequency.   mean w |F(a - b)|^2,  w = max(|F(x0)|, floor)^alpha

    F is the orthonormal transform over height and width, so that alpha = 0 is the plain mean square. x0 is resized to the
    size of a and b; |F(x0)| is the mean over its channels.
    Args: a, b: [B, H, W, c].   x0: [B, H', W', c'].   alpha: < 0 weighs frequencies up that are weak in x0.   floor: > 0, as
        1 / |F(x0)| has no bound.
    Returns: [B], at least float32.

    Example:
        >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> spectral_distance(x, 0 * x, x, alpha=0.0).tolist()
        [3.5]
    """
    f = lambda y: jnp.abs(jnp.fft.fft2(y, axes=(1, 2), norm="ortho"))
    error = difference(a, b)
    x0 = jax.image.resize(jnp.asarray(x0, error.dtype), (*a.shape[:3], x0.shape[-1]), "linear")
    return (jnp.maximum(f(x0).mean(-1, keepdims=True), floor) ** alpha * jnp.square(f(error))).mean((1, 2, 3))


@pytree_dataclass
class SpectralDistillation:
    """See `spectral_distillation`. Teacher and numbers are leaves."""

    loss: DenoisingLoss
    teacher: Denoiser
    spatial: Any
    frequency: Any
    alpha: Any
    floor: Any
    features: Callable[[Any], tuple[Any, ...]] | None = static(default=None)

    def __call__(
        self, key: Key, denoiser: Denoiser, x0: Any, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux`, a dict of [B] arrays."""
        loss, aux, outputs, both = beside_teacher(self.loss, self.teacher, key, denoiser, x0, cond, items)
        pairs = [outputs]
        if self.features is not None:
            pairs += list(zip(*(self.features(e.aux) for e in both), strict=True))
        for s, t in pairs:
            if jnp.shape(s) != jnp.shape(t) or jnp.ndim(s) != 4:
                raise ValueError(
                    f"student and teacher must be compared at equal shapes [B, H, W, c]; got {jnp.shape(s)} and "
                    f"{jnp.shape(t)}. Let the student map its features by a 1 x 1 convolution of its own"
                )
        spatial = sum(mean_square(difference(s, t)) for s, t in pairs)
        frequency = sum(spectral_distance(s, t, x0, self.alpha, self.floor) for s, t in pairs)
        total = loss + self.spatial * spatial + self.frequency * frequency
        return total, {**aux, "denoising": loss, "spatial": spatial, "frequency": frequency}


def spectral_distillation(
    loss: DenoisingLoss,
    teacher: Denoiser,
    *,
    spatial: Any = 0.1,
    frequency: Any = 0.1,
    alpha: Any = -1.0,
    floor: Any = 1e-2,
    features: Callable[[Any], tuple[Any, ...]] | None = None,
) -> SpectralDistillation:
    """Spectrum-aware distillation.   loss + l_s sum_i mean |S_i - T_i|^2 + l_f sum_i mean w |F(S_i - T_i)|^2

    S_0 and T_0 are what student and teacher predict of the same noised batch, in the space of the loss; further pairs are
    features. w = |F(x0)|^alpha, see `spectral_distance`: a small student spends its error where the data have most power,
    and loses fine detail; these weights ask for it back. The paper sums where this takes means, and has no floor.

    Args: loss: from `denoising_loss`, also says at which times and how noised.   teacher: on the same process and data.
        spatial, frequency: l_s, l_f >= 0.   alpha: exponent of the weights; 0 makes the last term plain distillation.
        floor: see `spectral_distance`.   features: reads a tuple of [B, H, W, c] from what a network returns beside its
        output, the same for both.
    Returns: `loss(key, denoiser, x0, cond, items=None) -> ([B], aux)` with aux `denoising`, `spatial`, `frequency` and those
        of `loss`.
    Raises: ValueError: at the call, shapes that differ.

    Example:
        >>> import diffjax
        >>> from diffjax.losses import noise_prediction
        >>> d = diffjax.denoiser(lambda x, t: x, diffjax.processes.rectified(), diffjax.from_eps)
        >>> value, aux = spectral_distillation(noise_prediction(), d)(jax.random.key(0), d, jnp.ones((3, 2, 2, 1)))
        >>> value.shape, aux["frequency"].tolist()
        ((3,), [0.0, 0.0, 0.0])

    Reference: Yang et al. 2023, arXiv:2211.17106 (spectrum-aware distillation, weights 0.1, 0.1 and alpha = -1).
    """
    return SpectralDistillation(loss, teacher, spatial, frequency, alpha, floor, features)
