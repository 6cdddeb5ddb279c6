"""Published U-Nets as parts of one: DDPM, DDPM++ and NCSN++, ADM, latent and Stable Diffusion.

They take the classes, vectors, tokens, image channels and outputs of their fields. Time codes are as everywhere, of range
one. Weights trained on t = 0 ... 999 need that as time code, and as `frequencies` `falling(1, False)` for DDPM, `falling()`
for ADM, latent and Stable Diffusion; `diffjax.interop` reads and writes them.
"""

from __future__ import annotations

import math

from diffjax.networks.embeddings import fourier
from diffjax.networks.layers import GroupNorm
from diffjax.networks.resample import double, fir_double, fir_halve, halve
from diffjax.networks.transformer import transformer
from diffjax.networks.unet import UNet
from diffjax.networks.unet_parts import (
    ResBlock,
    added,
    attend,
    enlarged,
    input_residual,
    input_skip,
    part,
    strided,
    within,
)


def multiples(base: int, *by: float | int) -> dict:
    """Widths of the levels, and a code of four times the base."""
    return dict(widths=tuple(int(base * m) for m in by), code=4 * base, sinusoids=base)


GROUPS = part(GroupNorm, groups=32)
LOOSE = part(GroupNorm, groups=32, eps=1e-5)

# arXiv:2006.11239, appendix B: 32 x 32 (CIFAR-10) and 256 x 256 (LSUN, CelebA-HQ); 64 x 64 (CelebA): arXiv:2010.02502
DDPM = dict(
    blocks=2, heads=1, norm=GROUPS, block=part(ResBlock, modulation=added), down=part(strided, before=0), up=enlarged
)
# arXiv:2011.13456, appendix H, and the settings of its weights for CIFAR-10 and CelebA-HQ 256
HALF = math.sqrt(0.5)
SCORE = dict(
    blocks=4,
    attention=(1,),
    heads=1,
    block=part(ResBlock, modulation=added, rescale=HALF, project=True),
    mix=part(attend, rescale=HALF),
    late=True,
)
MEANS = dict(down=part(within, resize=halve), up=part(within, resize=double))
FILTERS = dict(
    down=part(within, resize=fir_halve), up=part(within, resize=fir_double), frequencies=fourier(16.0), sinusoids=256
)
# arXiv:2102.09672: 64 x 64 by channels, and the options of its weights for CIFAR-10
IMPROVED = dict(blocks=3, heads=4, norm=LOOSE, mix=part(attend, norm=LOOSE), down=strided, up=enlarged)
# arXiv:2105.05233, Tables 11 and 13, and the options of the released weights
ADM = dict(blocks=2, head_size=64, norm=LOOSE, mix=part(attend, norm=LOOSE), **MEANS)
# arXiv:2112.10752, appendix E, and the options of the released weights
LATENT = dict(blocks=2, norm=LOOSE, block=part(ResBlock, modulation=added), down=strided, up=enlarged)
STABLE = multiples(320, 1, 2, 4, 4) | LATENT | dict(attention=(0, 1, 2), mix=transformer)

PRESETS = {
    name: (UNet, fields)
    for name, fields in {
        "ddpm-32": multiples(128, 1, 2, 2, 2) | DDPM | dict(attention=(1,), dropout=0.1),
        "ddpm-64": multiples(128, 1, 2, 2, 2, 4) | DDPM | dict(attention=(2,), dropout=0.1),
        "ddpm-256": multiples(128, 1, 1, 2, 2, 4, 4) | DDPM | dict(attention=(4,)),
        "ddpm++": multiples(128, 1, 2, 2, 2) | SCORE | MEANS | dict(dropout=0.1),
        # as arXiv:2206.00364 trains them: three levels of 256 after a stem of 128
        "ddpm++-edm": multiples(128, 2, 2, 2) | SCORE | MEANS | dict(stem=128, dropout=0.13),
        "ncsn++-edm": multiples(128, 2, 2, 2)
        | SCORE
        | FILTERS
        | dict(stem=128, dropout=0.13, pyramid_in=input_residual),
        "ncsn++": multiples(128, 1, 2, 2, 2) | SCORE | FILTERS | dict(dropout=0.1, pyramid_in=input_residual),
        "ncsn++-256": multiples(128, 1, 1, 2, 2, 2, 2, 2)
        | SCORE
        | FILTERS
        | dict(blocks=2, attention=(4,), pyramid_in=input_skip, pyramid_out=fir_double),
        "iddpm-32": multiples(128, 1, 2, 2, 2) | IMPROVED | dict(attention=(1, 2), dropout=0.3),
        **{f"iddpm-64-{n}": multiples(n, 1, 2, 3, 4) | IMPROVED | dict(attention=(2, 3)) for n in (64, 96, 128, 192)},
        "adm-64": multiples(192, 1, 2, 3, 4) | ADM | dict(blocks=3, attention=(1, 2, 3), dropout=0.1),
        "adm-128": multiples(256, 1, 1, 2, 3, 4) | ADM | dict(attention=(2, 3, 4), heads=4),
        "adm-256": multiples(256, 1, 1, 2, 2, 4, 4) | ADM | dict(attention=(3, 4, 5)),
        "adm-512": multiples(256, 0.5, 1, 1, 2, 2, 4, 4) | ADM | dict(attention=(4, 5, 6)),
        "adm-64-256": multiples(192, 1, 1, 2, 2, 4, 4) | ADM | dict(attention=(3, 4, 5), heads=4, image_channels=3),
        "adm-128-512": multiples(192, 1, 1, 2, 2, 4, 4) | ADM | dict(attention=(4, 5), image_channels=3),
        "ldm-4": multiples(192, 1, 2, 3, 5)
        | LATENT
        | dict(attention=(1, 2, 3), heads=1, mix=transformer, token_size=512),
        "ldm-8": multiples(256, 1, 2, 4)
        | LATENT
        | dict(attention=(0, 1, 2), head_size=32, mix=transformer, token_size=512),
        "ldm-4-ffhq": multiples(224, 1, 2, 3, 4)
        | LATENT
        | dict(attention=(1, 2, 3), head_size=32, mix=part(attend, norm=LOOSE)),
        "sd-1": STABLE | dict(heads=8, token_size=768),
        "sd-2": STABLE | dict(head_size=64, token_size=1024),
        # arXiv:2307.01952, Table 1; the vector is the pooled text and six sizes
        "sdxl": STABLE
        | dict(widths=(320, 640, 1280), attention=(1, 2), head_size=64, token_size=2048, vector_size=2816)
        | dict(mix=(part(transformer, depth=2), part(transformer, depth=10)), deep_vector=True),
    }.items()
}
