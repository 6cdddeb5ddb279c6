"""UNet2DModel and UNet2DConditionModel of diffusers: sizes, heads, classes, texts, images beside the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax.interop.text_unets import text_time
from experiments.interop.case import Arrays, Case, first, last


def inputs(shape: tuple[int, ...], times: tuple[float, ...], **more: Any) -> Callable[[np.random.Generator], Arrays]:
    """A state, times, and more arrays by name: shapes of normal arrays, or lists of integers."""

    def draw(rng: np.random.Generator) -> Arrays:
        found = {"x": rng.standard_normal(shape).astype(np.float32), "t": np.asarray(times, np.float32)}
        for name, value in more.items():
            integers = isinstance(value, list)
            found[name] = np.asarray(value, np.int32) if integers else rng.standard_normal(value).astype(np.float32)
        return found

    return draw


def plain_theirs(model: Any, inputs: Arrays) -> Arrays:
    """The output of theirs."""
    label = {"class_labels": inputs["label"].long()} if "label" in inputs else {}
    return {"y": model(inputs["x"], inputs["t"], **label).sample}


def plain_ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours; channels of the state that are an image come from the condition."""
    x, n = last(inputs["x"]), model.module.image_channels
    cond = {"label": inputs["label"]} if "label" in inputs else {}
    cond |= {"image": x[..., -n:]} if n else {}
    return {"y": first(model.fn(params, x[..., : x.shape[-1] - n], inputs["t"], cond or None))}


def blocks(*names: str) -> dict:
    """Types of the blocks, downwards and upwards, by what stands before `DownBlock2D`."""
    down = [f"{name}DownBlock2D" if name != "Resnet" else "ResnetDownsampleBlock2D" for name in names]
    return dict(down_block_types=down, up_block_types=[name.replace("Down", "Up") for name in reversed(down)]) | dict(
        up_block_types=[name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(down)]
    )


def plain(variant: str, shape: tuple[int, ...], golden: bool = False, more: Any = (), **config: Any) -> Case:
    """A case of UNet2DModel."""
    kind = "UNet2DModel"
    times = (3.0, 871.0) if config.get("time_embedding_type") != "fourier" else (0.3, 7.0)
    return Case(
        f"{kind}-{variant}", kind, config, inputs(shape, times, **dict(more)), plain_theirs, plain_ours, golden=golden
    )


PLAIN = (
    # as google/ddpm-*: one head, sines first, frequencies to 1e-4, zeros after
    plain(
        "ddpm", (2, 3, 8, 8), True, block_out_channels=[8, 8, 16], norm_num_groups=4, norm_eps=1e-6, layers_per_block=1,
        attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, **blocks("", "Attn", ""),
    ),
    # as CompVis/ldm-*: heads, an image beside the state
    plain(
        "latent", (2, 5, 8, 12), block_out_channels=[16, 24], norm_num_groups=8, attention_head_dim=4, in_channels=5,
        out_channels=3, layers_per_block=2, **blocks("Attn", "Attn"),
    ),
    # as openai/diffusers-cd_*: classes, scale and shift, residual blocks between levels
    plain(
        "classes", (2, 3, 16, 16), True, (("label", [0, 6]),), block_out_channels=[8, 16], norm_num_groups=4,
        attention_head_dim=8, num_class_embeds=7, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=2,
        downsample_type="resnet", upsample_type="resnet", layers_per_block=1, **blocks("Resnet", "Attn"),
    ),
    plain(
        "shift-bare", (2, 1, 8, 8), block_out_channels=[16, 32], norm_num_groups=8, attention_head_dim=8, in_channels=1,
        out_channels=2, resnet_time_scale_shift="scale_shift", layers_per_block=2, time_embedding_dim=24,
        **blocks("", "Attn"),
    ),
    plain(
        "no-attention", (2, 3, 8, 8), block_out_channels=[16, 24, 24], norm_num_groups=8, add_attention=False,
        layers_per_block=1, **blocks("", "", ""),
    ),
    plain(
        "no-middle", (2, 3, 8, 8), block_out_channels=[16, 24], norm_num_groups=8, mid_block_type=None,
        layers_per_block=1, attention_head_dim=8, **blocks("", "Attn"),
    ),
    # as google/ncsnpp-*
    plain(
        "ncsnpp", (2, 3, 8, 8), block_out_channels=[64, 64, 64], norm_num_groups=None, norm_eps=1e-6,
        attention_head_dim=None, time_embedding_type="fourier", mid_block_scale_factor=2**0.5, layers_per_block=1,
        **blocks("Skip", "AttnSkip", "Skip"),
    ),
    plain(
        "ncsnpp-plain", (2, 3, 8, 8), True, block_out_channels=[8, 16], norm_num_groups=None, norm_eps=1e-6,
        attention_head_dim=8, time_embedding_type="fourier", mid_block_scale_factor=2**0.5, layers_per_block=1,
        **blocks("Skip", "Skip"),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------- with text


def text_theirs(model: Any, inputs: Arrays) -> Arrays:
    """The output of theirs."""
    labels = {"class_labels": inputs["label"].long()} if "label" in inputs else {}
    name = "timestep_cond" if model.config.time_cond_proj_dim else "class_labels"
    labels |= {name: inputs["vector"]} if "vector" in inputs else {}
    if "pooled" in inputs:
        labels["added_cond_kwargs"] = {"text_embeds": inputs["pooled"], "time_ids": inputs["numbers"]}
    return {"y": model(inputs["x"], inputs["t"], inputs["tokens"], **labels).sample}


def text_ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours."""
    x, n = last(inputs["x"]), model.module.image_channels
    cond = {name: inputs[name] for name in ("tokens", "label", "vector") if name in inputs}
    if "pooled" in inputs:
        cond["vector"] = text_time(inputs["pooled"], inputs["numbers"], model.config["addition_time_embed_dim"])
    cond |= {"image": x[..., x.shape[-1] - n :]} if n else {}
    return {"y": first(model.fn(params, x[..., : x.shape[-1] - n], inputs["t"], cond))}


def text(variant: str, shape: tuple[int, ...], golden: bool = False, more: Any = (), **config: Any) -> Case:
    """A case of UNet2DConditionModel."""
    kind = "UNet2DConditionModel"
    tokens = (shape[0], 5, config.get("cross_attention_dim", 1280))
    arrays = inputs(shape, (0.0, 999.0), tokens=tokens, **dict(more))
    return Case(f"{kind}-{variant}", kind, config, arrays, text_theirs, text_ours, golden=golden)


def crossed(*attends: bool, middle: str | None = "UNetMidBlock2DCrossAttn") -> dict:
    """Types of the blocks."""
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    return dict(
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        mid_block_type=middle,
    )


TEXT = (
    # as Stable Diffusion 1: a number of heads, maps as convolutions
    text(
        "sd1", (2, 4, 8, 8), True, block_out_channels=[8, 16], norm_num_groups=4, cross_attention_dim=6,
        attention_head_dim=4, layers_per_block=1, **crossed(True, False),
    ),
    # as Stable Diffusion 2: heads by level, linear maps
    text(
        "sd2", (2, 4, 16, 8), block_out_channels=[32, 64, 64], norm_num_groups=32, cross_attention_dim=24,
        attention_head_dim=[2, 4, 4], use_linear_projection=True, layers_per_block=2, upcast_attention=True,
        **crossed(True, True, False),
    ),
    # as Stable Diffusion XL: depths by level, a pooled text and numbers
    text(
        "sdxl", (2, 4, 8, 8), True, (("pooled", (2, 5)), ("numbers", (2, 6))), block_out_channels=[8, 8],
        norm_num_groups=4, cross_attention_dim=6, attention_head_dim=[1, 2], transformer_layers_per_block=[1, 2],
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=29, layers_per_block=1, **crossed(False, True),
    ),
    text(
        "sdxl-wide", (2, 4, 8, 8), False, (("pooled", (2, 20)), ("numbers", (2, 6))), block_out_channels=[32, 64, 64],
        cross_attention_dim=24, attention_head_dim=[2, 4, 8], transformer_layers_per_block=[1, 2, 3], layers_per_block=2,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=68, **crossed(False, True, True),
    ),
    # as stable-diffusion-inpainting: mask and masked picture beside the state
    text(
        "inpainting", (2, 9, 8, 8), in_channels=9, block_out_channels=[16, 24], norm_num_groups=8,
        cross_attention_dim=12, attention_head_dim=2, layers_per_block=1, **crossed(True, True),
    ),
    # as stable-diffusion-x4-upscaler: a noise level as label, levels with attention to the text alone
    text(
        "upscaler", (2, 7, 8, 8), False, (("label", [0, 19]),), in_channels=7, block_out_channels=[16, 32, 32],
        norm_num_groups=8, cross_attention_dim=12, attention_head_dim=4, num_class_embeds=20, layers_per_block=1,
        use_linear_projection=True, only_cross_attention=[True, True, False], **crossed(False, True, True),
    ),
    # as stable-diffusion-2-1-unclip: a picture's embedding as vector
    text(
        "unclip", (2, 4, 8, 8), True, (("vector", (2, 10)),), block_out_channels=[8, 8], norm_num_groups=4,
        cross_attention_dim=6, attention_head_dim=2, class_embed_type="projection", layers_per_block=1,
        projection_class_embeddings_input_dim=10, freq_shift=1, flip_sin_to_cos=False, **crossed(True, False),
    ),
    # as LCM_Dreamshaper_v7: the strength of guidance beside the time
    text(
        "guided", (2, 4, 8, 8), False, (("vector", (2, 10)),), block_out_channels=[8, 8], norm_num_groups=4,
        cross_attention_dim=6, attention_head_dim=2, time_cond_proj_dim=10, layers_per_block=1, **crossed(True, False),
    ),
    # as bk-sdm-small: without the bottom; and a bottom of one block
    text(
        "no-middle", (2, 4, 8, 8), block_out_channels=[16, 24], norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=4, layers_per_block=[1, 1], act_fn="gelu", time_embedding_dim=20, downsample_padding=0,
        **crossed(True, False, middle=None),
    ),
    text(
        "one-block", (2, 4, 8, 8), block_out_channels=[16, 32], norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=4, layers_per_block=2, resnet_time_scale_shift="scale_shift", out_channels=8,
        **crossed(True, False, middle="UNetMidBlock2D"),
    ),
)  # fmt: skip

CASES = PLAIN + TEXT
