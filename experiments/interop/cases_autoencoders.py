"""AutoencoderKL of diffusers: sizes, attention, with and without the maps at the latent."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from experiments.interop.case import Arrays, Case, first, last, picture


def kl_theirs(model: Any, inputs: Arrays) -> Arrays:
    """Moments of the latent, and the picture of its mean."""
    posterior = model.encode(inputs["x"]).latent_dist
    found = {"mean": posterior.mean, "log_variance": posterior.logvar}
    return found | {"picture": model.decode(posterior.mean).sample}


def kl_ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours."""
    net = model.fn(params)
    posterior = net.encode(last(inputs["x"]))
    found = {"mean": posterior.mean, "log_variance": posterior.log_variance, "picture": net.decode(posterior.mean)}
    return {name: first(jnp.asarray(a)) for name, a in found.items()}


def blocks(*attention: bool) -> dict:
    """Types of the blocks, downwards and upwards."""
    return dict(
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
        up_block_types=["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
    )


def kl(variant: str, shape: tuple[int, ...], golden: bool = False, **config: Any) -> Case:
    """A case of AutoencoderKL."""
    kind = "AutoencoderKL"
    return Case(f"{kind}-{variant}", kind, config, picture(*shape), kl_theirs, kl_ours, golden=golden)


CASES = (kl("tiny", (2, 3, 8, 8), True, block_out_channels=[4, 8], norm_num_groups=2, **blocks(False, False)),)
