"""The loss by noise level: which part of the noise is learned well, from the batches of training themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.types import Aux, Cond, Denoiser, Key, PerExample

LOSS, SHARE = "bin_loss/", "bin_share/"  # aux names; their ratio of means is the mean loss of a bin


@dataclasses.dataclass(frozen=True)
class ByNoiseLevel:
    """See `by_noise_level`."""

    loss: Callable[..., tuple[Any, dict]]
    edges: tuple[float, ...]

    def __call__(
        self, key: Key, denoiser: Denoiser, x0: Any, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """The loss, and its share in every bin as further aux."""
        per_example, aux = self.loss(key, denoiser, x0, cond, items=items)
        value = jax.lax.stop_gradient(aux.get("weighted", per_example))
        lam = aux["log_snr"]
        ends = (-np.inf, *self.edges, np.inf)
        bins = {}
        for low, high in zip(ends[:-1], ends[1:], strict=True):
            inside = (lam >= low) & (lam < high) & jnp.isfinite(value)
            name = f"{low:.3g}..{high:.3g}"
            bins[LOSS + name] = jnp.where(inside, value, 0)
            bins[SHARE + name] = inside.astype(value.dtype)
        return per_example, aux | bins


def by_noise_level(loss: Callable[..., tuple[Any, dict]], edges: Any) -> ByNoiseLevel:
    """A loss that also reports its mean in bins of log-SNR, `len(edges) + 1` of them.

    `aux` gains two arrays [B] per bin, the loss inside it and the indicator of being inside; their means over any number
    of items, parts, devices and steps stay sums that can be divided at the end, as the log of a run does. With learned
    uncertainty it is the loss before that division.

    Args: loss: whose aux has `log_snr`, as `denoising_loss`.   edges: increasing values of `log(alpha / sigma)`, see
        `level_edges`.
    Raises: ValueError: no edges, or edges that do not increase.

    Example:
        >>> from diffjax import losses, processes, testing
        >>> d = testing.oracle(testing.gaussian([0.0], 1.0), processes.rectified())
        >>> _, aux = by_noise_level(losses.denoising_loss(), (0.0,))(jax.random.key(0), d, jnp.zeros((4, 1)))
        >>> sorted(aux)[:4]
        ['bin_loss/-inf..0', 'bin_loss/0..inf', 'bin_share/-inf..0', 'bin_share/0..inf']
    """
    edges = tuple(float(e) for e in edges)
    if not edges or not all(a < b for a, b in zip(edges[:-1], edges[1:], strict=True)):
        raise ValueError(f"edges must be one or more increasing values of log-SNR; got {edges}")
    return ByNoiseLevel(loss, edges)


def level_edges(times: Any, process: Any, bins: int, *, draws: int = 4096) -> tuple[float, ...]:
    """Edges that cut the training law into bins that are drawn equally often: the quantiles of log-SNR.

    Args: times: a law `(key, process, items) -> t`.   bins: at least 2.   draws: times drawn to measure the law.
    Returns: `bins - 1` edges, increasing, rounded to three digits.
    Raises: ValueError: fewer than 2 bins, or more than the law has levels.

    Example:
        >>> from diffjax import processes
        >>> from diffjax.times import laws
        >>> [round(e) for e in level_edges(laws.lognormal(0.0, 1.0), processes.edm(), 2)]
        [0]
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2; got {bins}")
    lam = np.asarray(process.log_snr(times(jax.random.key(0), process, jnp.arange(draws))), np.float64)
    found = [float(f"{q:.3g}") for q in np.quantile(lam, np.arange(1, bins) / bins)]
    if len(set(found)) < len(found):
        raise ValueError(f"the law has fewer than {bins} distinct noise levels; use fewer bins")
    return tuple(found)
