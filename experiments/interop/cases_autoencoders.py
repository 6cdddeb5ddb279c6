"""AutoencoderKL and VQModel of diffusers: sizes, attention, activations, maps at the latent, codebooks, norms by a side."""

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


def vq_theirs(model: Any, inputs: Arrays) -> Arrays:
    """The point before the codebook, its picture, that of its codes, and that of tokens."""
    z = model.encode(inputs["x"]).latents
    found = {"latent": z, "picture": model.decode(z).sample}
    if not model.config.lookup_from_codebook:
        return found | {"unquantised": model.decode(z, force_not_quantize=True).sample}
    shape = (*inputs["tokens"].shape, z.shape[1])
    tokens = inputs["tokens"].reshape(-1)
    return found | {"of_tokens": model.decode(tokens, force_not_quantize=True, shape=shape).sample}


def vq_ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours."""
    net = model.fn(params)
    z = net.encode(last(inputs["x"])).mean
    found = {"latent": z, "picture": net.decode(z)}
    if model.config["lookup_from_codebook"]:
        found |= {"of_tokens": net.decode_tokens(inputs["tokens"])}
    else:
        found |= {"unquantised": net.apply("picture", z)}
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


def vq(variant: str, shape: tuple[int, ...], golden: bool = False, **config: Any) -> Case:
    """A case of VQModel; of its random codes, every one may be the nearest."""
    kind = "VQModel"
    n = 2 ** (len(config["block_out_channels"]) - 1)
    grid = (shape[0], shape[2] // n, shape[3] // n)

    def inputs(rng: Any) -> Arrays:
        tokens = rng.integers(0, config["num_vq_embeddings"], grid)
        own = {"tokens": tokens.astype("int32")} if config.get("lookup_from_codebook") else {}
        return picture(*shape)(rng) | own

    return Case(f"{kind}-{variant}", kind, config, inputs, vq_theirs, vq_ours, golden=golden)


CASES = (
    kl("tiny", (2, 3, 8, 8), True, block_out_channels=[4, 8], norm_num_groups=2, **blocks(False, False)),
    kl("attention", (2, 1, 8, 8), True, in_channels=1, out_channels=1, block_out_channels=[8, 4], norm_num_groups=4,
       latent_channels=2, layers_per_block=2, shift_factor=0.1, scaling_factor=0.5, **blocks(False, True)),
    kl("bare", (1, 3, 8, 8), True, block_out_channels=[4, 4], norm_num_groups=1, act_fn="gelu", use_quant_conv=False,
       use_post_quant_conv=False, mid_block_add_attention=False, latent_channels=16, **blocks(False, False)),
    kl("one-map", (1, 3, 8, 12), block_out_channels=[32], norm_num_groups=8, act_fn="relu", use_quant_conv=False,
       **blocks(True)),
    kl("four-levels", (1, 3, 64, 32), block_out_channels=[32, 64, 64, 96], layers_per_block=2, norm_num_groups=32,
       **blocks(False, False, True, False)),
    kl("wide", (1, 4, 32, 32), in_channels=4, block_out_channels=[64, 128, 128], layers_per_block=3,
       **blocks(False, False, False)),
    vq("tiny", (2, 3, 8, 8), True, block_out_channels=[4, 8], norm_num_groups=2, num_vq_embeddings=24, vq_embed_dim=2,
       **blocks(False, True)),
    vq("tokens", (2, 1, 8, 8), True, block_out_channels=[8, 8], norm_num_groups=4, num_vq_embeddings=16, in_channels=1,
       out_channels=1, lookup_from_codebook=True, mid_block_add_attention=False, **blocks(False, False)),
    vq("spatial", (1, 3, 32, 16), block_out_channels=[32, 64, 64], num_vq_embeddings=64, latent_channels=4,
       norm_type="spatial", **blocks(False, False, True)),
    vq("three-levels", (1, 3, 16, 16), block_out_channels=[32, 64, 64], layers_per_block=2, num_vq_embeddings=512,
       vq_embed_dim=8, act_fn="mish", **blocks(False, True, True)),
)  # fmt: skip
