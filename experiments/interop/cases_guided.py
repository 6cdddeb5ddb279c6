"""ADM checkpoints of guided diffusion, against a reference written from the paper: both orders of attention, all options."""

from __future__ import annotations

from typing import Any

from experiments.interop.case import Arrays, Case
from experiments.interop.cases_unets import inputs, plain_ours


def build(case: Case) -> Any:
    """The reference."""
    from experiments.interop.guided_reference import GuidedDiffusion

    return GuidedDiffusion(**case.config).eval()


def write(case: Case, model: Any, folder: str) -> None:
    """The reference to disk."""
    from experiments.interop import guided_reference

    guided_reference.write(model, folder)


def reopen(case: Case, folder: str) -> Any:
    """The reference from disk."""
    from experiments.interop import guided_reference

    return guided_reference.read(folder)


def theirs(model: Any, inputs: Arrays) -> Arrays:
    """The output of the reference."""
    return {"y": model(inputs["x"], inputs["t"], inputs["label"].long() if "label" in inputs else None)}


def guided(variant: str, shape: tuple[int, ...], golden: bool = False, more: Any = (), **config: Any) -> Case:
    """A case of ADM."""
    kind = "GuidedDiffusion"
    arrays = inputs(shape, (0.0, 640.0), **dict(more))
    functions = dict(build=build, write=write, reopen=reopen)
    return Case(f"{kind}-{variant}", kind, config, arrays, theirs, plain_ours, golden=golden, **functions)


CASES = (
    # as 64x64_diffusion.pt: classes, learned variance, new order, residual blocks between levels
    guided(
        "classes", (2, 3, 8, 8), True, (("label", [4, 0]),), image_size=8, num_channels=8, num_res_blocks=1,
        num_head_channels=4, attention_resolutions="4", channel_mult="1,1", class_cond=True, num_classes=5,
        resblock_updown=True, use_new_attention_order=True, learn_sigma=True, norm_groups=4,
    ),
    # as 256x256_diffusion_uncond.pt: old order, no classes
    guided(
        "legacy", (2, 3, 16, 16), image_size=16, num_channels=32, num_res_blocks=2, num_heads=4,
        attention_resolutions="8,4", channel_mult="1,1,2", resblock_updown=True, learn_sigma=True,
    ),
    # as the weights of improved diffusion: convolutions between levels
    guided(
        "convolutions", (2, 3, 8, 8), True, image_size=8, num_channels=8, num_res_blocks=1, num_heads=2,
        attention_resolutions="8,4", channel_mult="1,2", norm_groups=4,
    ),
    guided(
        "added", (2, 3, 8, 8), image_size=8, num_channels=32, num_res_blocks=2, num_heads=1, attention_resolutions="",
        channel_mult="0.5,1", use_scale_shift_norm=False, norm_groups=16,
    ),
    # as 64_256_upsampler.pt: a small picture beside the state
    guided(
        "upsampler", (2, 6, 8, 8), large_size=8, small_size=2, num_channels=32, num_res_blocks=1, num_heads=4,
        attention_resolutions="4", channel_mult="1,2", class_cond=True, more=(("label", [999, 3]),),
        resblock_updown=True, learn_sigma=True,
    ),
)  # fmt: skip
