"""Parts of a U-Net, to be given to its fields: residual blocks, what follows them, and ways between its levels.

A part is a function or a module class; `part(f, field=value)` is one with some of its arguments given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from diffjax.networks.attention import Attention
from diffjax.networks.convolution import Conv, ConvForm
from diffjax.networks.layers import Dense, GroupNorm, modulate, spread
from diffjax.networks.partition import constrain
from diffjax.networks.resample import Factor, double, fir_blur, fir_halve, halve
from diffjax.networks.taps import Tap


@dataclasses.dataclass(frozen=True, init=False)
class part:  # noqa: N801  (reads as a function: norm=part(GroupNorm, eps=1e-5))
    """`make` with some arguments given.   part(f, a=1)(x) = f(x, a=1)

    As `functools.partial`, but equal and hashed by value, so that equal networks share their compiled programs.

    Example:
        >>> part(GroupNorm, eps=1e-5) == part(GroupNorm, eps=1e-5)
        True
    """

    make: Callable[..., Any]
    given: tuple[tuple[str, Any], ...]

    def __init__(self, make: Callable[..., Any], **given: Any) -> None:
        object.__setattr__(self, "make", make)
        object.__setattr__(self, "given", tuple(given.items()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `make`; an argument given here and before has the value given here."""
        return self.make(*args, **{**dict(self.given), **kwargs})


# --------------------------------------------------------------------------------------- inside a residual block


def film(h: Any, c: Any, norm: Any, dtype: Any) -> Any:
    """The normalised state, scaled and shifted by the code.   norm(h) (1 + scale) + shift,  [shift, scale] = W c + b

    Reference: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3 (adaptive group normalisation).
    """
    y = constrain(Dense(2 * h.shape[-1], dtype=dtype, name="film")(c), "batch", ...)
    shift, scale = jnp.split(y, 2, axis=-1)
    return modulate(norm(name="norm_out")(h), spread(shift, h), spread(scale, h))


def added(h: Any, c: Any, norm: Any, dtype: Any) -> Any:
    """The state, shifted by the code, then normalised.   norm(h + W c + b)

    Reference: Ho et al. 2020, arXiv:2006.11239, appendix B.
    """
    y = constrain(Dense(h.shape[-1], dtype=dtype, name="film")(c), "batch", ...)
    return norm(name="norm_out")(h + spread(y, h))


def attend(
    x: Any, tokens: Any, mask: Any, *, heads: int, dtype: Any, norm: Any = GroupNorm, rescale: float = 1.0
) -> Any:
    """Attention of all places to each other, then to the tokens if there are any.   x' = rescale (x + attention(norm(x)))

    Args: x: [B, *n, c].   tokens, mask: see `attention`.   heads: of both.
    """
    n = x.shape[-1]
    flat = lambda a: a.reshape(a.shape[0], -1, n)
    h = flat(norm(name="norm_attention")(x))
    x = scaled(x + Attention(heads, zero=True, dtype=dtype, name="attention")(h).reshape(x.shape), rescale)
    if tokens is not None:
        h = flat(norm(name="norm_cross")(x))
        cross = Attention(heads, zero=True, dtype=dtype, name="cross")
        x = scaled(x + cross(h, tokens, mask).reshape(x.shape), rescale)
    return x


def unnormalised(name: str) -> Any:
    """No norm, in the place of one: the identity."""
    return lambda x: x


def scaled(x: Any, by: float) -> Any:
    """`by * x`, without a multiplication by one."""
    return x if by == 1.0 else x * by


class ResBlock(nn.Module):
    """Two convolutions with the code between them, then `mix`.   x' = rescale (skip(x) + Conv(act(FiLM(Conv(act(norm(x)))))))

    Where it changes the size, `resize` is applied to x and before the first convolution. Taps: `residual`, `block`.
    Reference: Ho et al. 2020, arXiv:2006.11239, appendix B; resize: Song et al. 2021, arXiv:2011.13456, appendix H.
    """

    features: int
    heads: int  # of `mix`; 0: none
    act: Callable[[Any], Any]
    form: ConvForm | None
    dropout: float
    train: bool
    dtype: Any
    kernel: int | tuple[int, ...] = 3
    norm: Any = GroupNorm
    mix: Any = attend  # (x, tokens, mask, heads=, dtype=) -> x
    modulation: Any = film  # (h, c, norm, dtype) -> h, normalised
    rescale: float = 1.0
    project: bool = False  # a linear skip wherever the size changes, not only where the channels do
    resize: Any = None  # x -> x of another size

    @nn.compact
    def __call__(self, x: Any, c: Any, tokens: Any, mask: Any) -> Any:
        """One block at code c, with the tokens and mask of the condition."""
        n = self.features
        conv = part(Conv, kernel=self.kernel, form=self.form, dtype=self.dtype)
        h = self.act(self.norm(name="norm_in")(x))
        if self.resize is not None:
            x, h = self.resize(x), self.resize(h)
        h = constrain(conv(n, name="conv_in")(h), "batch", ..., "wide")
        h = self.act(self.modulation(h, c, self.norm, self.dtype))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        h = conv(n, zero=True, name="conv_out")(h)
        if x.shape[-1] != n or (self.project and self.resize is not None):
            x = Dense(n, dtype=self.dtype, name="skip")(x)
        x = scaled(constrain(x + Tap(name="residual")(h), "batch", ...), self.rescale)
        if self.heads:
            x = self.mix(x, tokens, mask, heads=self.heads, dtype=self.dtype)
        return Tap(name="block")(x)


# ----------------------------------------------------------------------------------------------- between levels


class Site(NamedTuple):
    """Where a U-Net changes its resolution: what a part needs to do it there."""

    name: str  # for the modules of the part
    factor: Factor
    conv: Any  # (features, name=, ...) -> a convolution of the network's kernel, form and dtype
    block: Any  # (h, name, resize) -> h, a residual block of the network


def pooled(h: Any, site: Site) -> Any:
    """Down by means, see `resample.halve`."""
    return halve(h, site.factor)


def repeated(h: Any, site: Site) -> Any:
    """Up by repeats, see `resample.double`."""
    return double(h, site.factor)


def strided(h: Any, site: Site, before: int | None = None) -> Any:
    """Down by a convolution with stride.   `before=0` puts zeros after each axis alone, as DDPM does."""
    return site.conv(h.shape[-1], stride=site.factor, before=before, name=site.name)(h)


def enlarged(h: Any, site: Site) -> Any:
    """Up by repeats and a convolution."""
    return site.conv(h.shape[-1], name=site.name)(double(h, site.factor))


def within(h: Any, site: Site, resize: Any) -> Any:
    """Down or up inside a residual block: `resize` is one of `halve`, `double`, `fir_halve`, `fir_double`.

    Reference: Brock et al. 2019, arXiv:1809.11096, appendix B.
    """
    return site.block(h, site.name, part(resize, factor=site.factor))


# What a pyramid does beside the levels: (h, pyramid, site) -> (h, pyramid), where the pyramid starts as the input.


def input_skip(h: Any, pyramid: Any, site: Site, resize: Any = fir_halve) -> tuple[Any, Any]:
    """The input at this size enters by a linear map.   p' = resize(p),  h' = h + W p' + b

    Reference: Song et al. 2021, arXiv:2011.13456, appendix H (progressive growing, input skip).
    """
    pyramid = resize(pyramid, site.factor)
    return h + site.conv(h.shape[-1], kernel=1, name=f"{site.name}_pyramid")(pyramid), pyramid


def input_residual(h: Any, pyramid: Any, site: Site) -> tuple[Any, Any]:
    """The input runs along and is halved by filtered, strided convolutions.   p' = h' = (h + Conv(blur(p))) / sqrt(2)

    Reference: Song et al. 2021, arXiv:2011.13456, appendix H (progressive growing, residual).
    """
    wide = fir_blur(pyramid, site.factor)
    y = site.conv(h.shape[-1], stride=site.factor, before=0, name=f"{site.name}_pyramid")(wide)
    y = y[(slice(None), *(slice(n) for n in h.shape[1:-1]))]  # the last window hangs over the end
    h = (h + y) * math.sqrt(0.5)
    return h, h
