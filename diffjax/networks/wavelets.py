"""Haar wavelets, and resampling of a U-Net that weighs their bands by what the picture and the time ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.layers import Dense, at_least_float32, spread
from diffjax.networks.taps import Tap
from diffjax.networks.unet_parts import Site

Bands = tuple[Any, Any, Any, Any]  # LL, LH, HL, HH


def haar(x: Any) -> Bands:
    """The four bands of the orthonormal Haar transform.   [B, H, W, c] -> 4 x [B, H/2, W/2, c]

    (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2 of each square [[a, b], [c, d]]:
    LL, LH (changes along the width), HL (along the height), HH.
    Raises: ValueError: H or W odd.

    Example:
        >>> [float(band[0, 0, 0, 0]) for band in haar(jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1))]
        [5.0, -1.0, -2.0, 0.0]

    Reference: Mallat 2009, A Wavelet Tour of Signal Processing, section 7.7.
    """
    if x.ndim != 4 or x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f"haar needs [B, H, W, c] with H and W even; got shape {x.shape}. Pad it")
    a, b, c, d = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    return _mix(a, b, c, d)


def inverse_haar(bands: Bands) -> jax.Array:
    """The picture of these bands; `haar` is its own transpose and inverse.   4 x [B, H, W, c] -> [B, 2H, 2W, c]

    Example:
        >>> x = jnp.arange(8.0).reshape(1, 2, 4, 1)
        >>> bool((inverse_haar(haar(x)) == x).all())
        True
    """
    a, b, c, d = _mix(*bands)
    n, h, w, k = a.shape
    rows = [jnp.stack(pair, axis=3).reshape(n, h, 2 * w, k) for pair in ((a, b), (c, d))]
    return jnp.stack(rows, axis=2).reshape(n, 2 * h, 2 * w, k)


def _mix(a: Any, b: Any, c: Any, d: Any) -> Bands:
    return (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2


class Gates(nn.Module):
    """The weight of each band for each item, 1/2 at the start.   sigmoid(W act(W mean(x)))

    The time is in it as far as it is in x. Tap: `gates`.
    Args: x: [B, H, W, c].   Returns: [B, 4] in (0, 1), for LL, LH, HL, HH.
    """

    hidden: int = 16
    act: Callable[[Any], Any] = nn.silu

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """The gates of x."""
        h = x.astype(at_least_float32(x.dtype)).mean((1, 2)).astype(x.dtype)
        h = self.act(Dense(self.hidden, dtype=x.dtype, name="hidden")(h))
        return Tap(name="gates")(nn.sigmoid(Dense(4, zero=True, dtype=x.dtype, name="out")(h)))


def gated(gates: Any, bands: Bands) -> Bands:
    """Each band times its gate.   g_i X_i"""
    ll, lh, hl, hh = (spread(gates[:, i : i + 1], band) * band for i, band in enumerate(bands))
    return ll, lh, hl, hh


class WaveletDown(nn.Module):
    """Halves height and width: the gated bands, summed.   sum_i g_i X_i,  X = haar(x), g = gates(x)

    Equal gates of 1/2 keep every second pixel of every second row; the gate of LL alone is twice the mean of each square.
    Args: x: [B, H, W, c].   Returns: [B, H/2, W/2, c].

    Example:
        >>> v = jax.eval_shape(WaveletDown().init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
        >>> v["params"]["gate"]["out"]["kernel"].shape
        (16, 4)

    Reference: Yang et al. 2023, arXiv:2211.17106 (WG-Down).
    """

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Halve x."""
        return sum(gated(Gates(name="gate")(x), haar(x)))


class WaveletUp(nn.Module):
    """Doubles height and width: quarters of the channels are taken for bands, gated and joined.   haar^-1(g_i X_i)

    What a level takes for each pixel is spread over four of them: a quarter of the channels, with no convolution.
    Args: x: [B, H, W, c].   Returns: [B, 2H, 2W, c/4].
    Raises: ValueError: c not divisible by 4.

    Example:
        >>> v = WaveletUp().init(jax.random.key(0), jnp.ones((1, 2, 2, 8)))
        >>> WaveletUp().apply(v, jnp.ones((1, 2, 2, 8))).shape
        (1, 4, 4, 2)

    Reference: Yang et al. 2023, arXiv:2211.17106 (WG-Up).
    """

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Double x."""
        if x.shape[-1] % 4:
            raise ValueError(f"WaveletUp needs channels divisible by 4, for four bands; got {x.shape[-1]}")
        ll, lh, hl, hh = jnp.split(x, 4, axis=-1)
        return inverse_haar(gated(Gates(name="gate")(x), (ll, lh, hl, hh)))


# ------------------------------------------------------------------------- what a U-Net takes as `down` and `up`


def wavelet_down(h: Any, site: Site) -> Any:
    """Down by gated bands, see `WaveletDown`; of pictures, by a factor of two.   Raises: ValueError: another factor."""
    _check_factor(site)
    return WaveletDown(name=site.name)(h)


def wavelet_up(h: Any, site: Site) -> Any:
    """Up by gated bands and to a quarter of the channels, see `WaveletUp`; of pictures, by two.   Raises: as `wavelet_down`"""
    _check_factor(site)
    return WaveletUp(name=site.name)(h)


def _check_factor(site: Site) -> None:
    if site.factor not in (2, (2, 2)):
        raise ValueError(f"wavelets halve and double both axes of a picture; got factor={site.factor}. Take factor=2")
