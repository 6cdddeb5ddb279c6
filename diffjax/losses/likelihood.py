"""The variational bound of a Gaussian process in bits per dimension: prior + diffusion + reconstruction, one per item.

-log p(x0) <= KL(q(x_noise | x0) | N(0, sigma^2)) + diffusion(noise -> data) + E[-log p(x0 | x_data)]
The bound depends on the process only through log-SNR at the two ends, so times are drawn uniformly in log-SNR.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from diffjax import numerics as nu
from diffjax.losses.checks import drop_labels
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.types import Aux, Cond, Denoiser, Key, PerExample, Process

Decoder = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x0, mean, std) -> log p(x0), elementwise


# ----------------------------------------------------------------------------------------------------------- decoders


@dataclasses.dataclass(frozen=True)
class GaussianDecoder:
    """The density of continuous data.   log N(x0; mean, std^2)"""

    def __call__(self, x0: Any, mean: Any, std: Any) -> Any:
        """Elementwise log-density."""
        return -0.5 * jnp.square((x0 - mean) / std) - jnp.log(std) - 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class LevelDecoder:
    """The probability of data with equally spaced levels: a Gaussian integrated over the bin around the level.

    log P(v_j) = log(Phi((v_j + h - mean) / std) - Phi((v_j - h - mean) / std)), the outer bins reaching to infinity.
    Args: levels: number of levels, >= 2.   low, high: the first and the last level (numbers, or tuples over channels).
    Reference: arXiv:2006.11239, Eq. 13.

    Example:
        >>> d = LevelDecoder(3)
        >>> p = jnp.exp(d(jnp.array([-1.0, 0.0, 1.0]), jnp.full(3, 0.2), jnp.full(3, 0.7)))
        >>> round(float(p.sum()), 5)
        1.0
    """

    levels: Any = 256
    low: float | tuple[float, ...] = -1.0
    high: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise ValueError(f"levels must be an int >= 2, for example 256; got {self.levels!r}")
        if not np.all(np.asarray(self.low) < np.asarray(self.high)):
            raise ValueError(f"the first level must be below the last; got low={self.low}, high={self.high}")

    def __call__(self, x0: Any, mean: Any, std: Any) -> Any:
        """Elementwise log-probability."""
        channels = lambda a: jnp.broadcast_to(jnp.asarray(a, x0.dtype), x0.shape)
        low, high = channels(self.low), channels(self.high)
        half = 0.5 * (high - low) / (self.levels - 1)
        above = jnp.where(x0 > high - half, jnp.inf, (x0 + half - mean) / std)
        below = jnp.where(x0 < low + half, -jnp.inf, (x0 - half - mean) / std)
        # In the upper tail both probabilities round to one: use the mirrored bin there.
        mirror = above + below > 0
        a, b = jnp.where(mirror, -below, above), jnp.where(mirror, -above, below)
        log_a, log_b = log_ndtr(a), log_ndtr(jnp.where(b == -jnp.inf, -1e4, b))
        return log_a + jnp.log1p(-jnp.exp(jnp.minimum(log_b - log_a, -1e-7)))


# -------------------------------------------------------------------------------------------------------------- bound


@pytree_dataclass
class VariationalBound:
    """See `variational_bound`; the two ends are leaves."""

    data: Any = None
    noise: Any = None
    steps: int | None = static(default=None)
    decoder: Decoder = static(default=LevelDecoder())
    samples: int = static(default=1)
    label_drop: float = static(default=0.0)

    def __call__(
        self, key: Key, denoiser: Denoiser, x0: PyTree, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Bits per dimension [B], and the three parts in the same unit.   Arguments as of `DenoisingLoss`."""
        items, process = nu.item_indices(items, nu.batch_size(x0)), denoiser.process
        k_time, k_noise, k_read, k_drop, k_net = jax.random.split(key, 5)
        cond = drop_labels(k_drop, denoiser, cond, items, self.label_drop)
        ends = process.ends()
        data, noise = (
            jnp.asarray(e if own is None else own) for e, own in zip(ends, (self.data, self.noise), strict=True)
        )
        keys = nu.item_keys(k_noise, items)
        u = jax.vmap(lambda k: jax.random.uniform(k, ()))(nu.item_keys(k_time, items))

        def term(total: Any, k: Any) -> Any:
            place = (k.astype(u.dtype) + u) / self.samples  # one draw per stratum
            eps = nu.item_normal(keys, k, x0)
            dropout = nu.item_keys(jax.random.fold_in(k_net, k), items)
            return total + self._diffusion(process, denoiser, data, noise, x0, cond, place, eps, dropout), None

        dims = sum(math.prod(a.shape[1:]) for a in jax.tree.leaves(x0))
        diffusion = jax.lax.scan(term, jnp.zeros_like(u), jnp.arange(self.samples))[0] / self.samples
        prior = _prior(process, noise, x0)
        z = process.add_noise(x0, nu.item_normal(nu.item_keys(k_read, items), 0, x0), data)
        dropout = nu.item_keys(jax.random.fold_in(k_net, self.samples), items)
        mean = denoiser.evaluate(z, data, cond, key=dropout).prediction.x0
        std = process.sigma(data) / process.alpha(data)
        reconstruction = -_total(jax.tree.map(lambda a, m: self.decoder(a, m, std.astype(a.dtype)), x0, mean))
        parts = {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction}
        parts = {name: value / (dims * math.log(2)) for name, value in parts.items()}
        return sum(parts.values()), parts

    def _diffusion(
        self, process: Any, denoiser: Any, data: Any, noise: Any, x0: Any, cond: Any, u: Any, eps: Any, key: Any
    ) -> Any:
        """One estimate of the sum of KL divergences, in nats, [B]."""
        lam_data, lam_noise = process.log_snr(data), process.log_snr(noise)
        if self.steps is None:
            lam = lam_data + u * (lam_noise - lam_data)
            t = process.time_of_log_snr(lam)
            prediction = denoiser.evaluate(process.add_noise(x0, eps, t), t, cond, key=key).prediction
            # -(1/2) d snr/dt |x0 error|^2 dt = |eps error|^2 d lambda
            return (lam_data - lam_noise) * _total(_squares(prediction.eps, eps))
        # floor(u T) picks a step, and every step once for samples = T
        i = jnp.clip(jnp.floor(u * self.steps), 0, self.steps - 1)
        at = lambda j: data + (j / self.steps) * (noise - data)
        s, t = at(i), at(i + 1)
        prediction = denoiser.evaluate(process.add_noise(x0, eps, t), t, cond, key=key).prediction
        # (T / 2) (snr(s) - snr(t)) |x0 error|^2, finite where snr(t) = 0
        gain = -jnp.expm1(2 * (process.log_snr(t) - process.log_snr(s)))
        scaled = nu.scale(jnp.exp(process.log_snr(s)), nu.sub(x0, prediction.x0))
        return 0.5 * self.steps * gain * _total(jax.tree.map(jnp.square, scaled))


def variational_bound(
    steps: Any = None,
    *,
    levels: Any = 256,
    decoder: Decoder | None = None,
    samples: Any = 1,
    data: Any = None,
    noise: Any = None,
    label_drop: float = 0.0,
) -> VariationalBound:
    """The bound on -log p(x0) in bits per dimension.   prior KL + diffusion + reconstruction

    Continuous: (lam_data - lam_noise) E |eps - eps_hat|^2, lambda uniform;  T steps, uniform in t:
    (T / 2) E_i (snr(t_i) - snr(t_{i+1})) |x0 - x0_hat|^2.  Reconstruction: decoder of mean x0_hat, std sigma / alpha at t_data.

    Args: steps: T >= 1, or None for continuous time.   levels: of quantised data in [-1, 1]; None for continuous data,
    whose bits are those of a density and may be negative.   decoder: in place of `levels`, `LevelDecoder(levels, low,
    high)` for other ranges.   samples: stratified draws of time and noise per item; `samples = steps` visits every step.
    data, noise: the times of the two ends, default `process.ends()`; alpha and sigma must be positive at `data`.
    label_drop: as `denoising_loss`.
    Returns: a loss `(key, denoiser, x0, cond, items=None) -> ([B], aux)`; aux holds the parts `prior`, `diffusion`,
    `reconstruction`.
    Raises: ValueError: counts that are not ints >= 1, levels and decoder both given, ends not in order.
    Reference: arXiv:2107.00630, Eq. 11 (bound), 13-14 (T steps), 15-17 (continuous).

    Example:
        >>> variational_bound(levels=None).decoder
        GaussianDecoder()
    """
    for name, count in (("steps", steps), ("samples", samples)):
        if not (name == "steps" and count is None):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an int >= 1; got {count!r}")
    if decoder is not None and levels not in (None, 256):
        raise ValueError(f"give levels or a decoder, not both; got levels={levels} and {decoder}")
    if not 0 <= label_drop <= 1:
        raise ValueError(f"label_drop is a probability in [0, 1]; got {label_drop!r}")
    if isinstance(data, (int, float)) and isinstance(noise, (int, float)) and not 0 < data < noise <= 1:
        raise ValueError(f"the ends of the bound need 0 < data < noise <= 1; got data={data}, noise={noise}")
    if decoder is None:
        decoder = GaussianDecoder() if levels is None else LevelDecoder(levels)
    return VariationalBound(data, noise, steps, decoder, samples, float(label_drop))


def discrete_bound(steps: int = 1000, **options: Any) -> VariationalBound:
    """The bound of a chain of T steps; `variational_bound(steps)`.

    Reference: arXiv:2107.00630, Eq. 13.
    """
    return variational_bound(steps, **options)


def _prior(process: Process, noise: Any, x0: PyTree) -> jax.Array:
    """`KL(q(x_noise | x0) | N(0, sigma^2)) = (1/2) snr |x0|^2`, nats [B]."""
    return 0.5 * jnp.exp(2 * process.log_snr(noise)) * _total(jax.tree.map(jnp.square, x0))


def _squares(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda p, q: jnp.square(p - q), a, b)


def _total(x: PyTree) -> jax.Array:
    """The sum over all axes but the first, over all leaves."""
    return sum(a.reshape(a.shape[0], -1).sum(1) for a in jax.tree.leaves(x))
