"""A tiny pipeline of diffusers with its samples, for the tests: `python -m experiments.interop.pipelines` writes it.

A random U-Net with a DDPM scheduler, and what diffusers' DDIM and Euler make of given noise with it, by the configuration of
that scheduler. Needs PyTorch and diffusers.
"""

from __future__ import annotations

import pathlib
import shutil
import sys

import numpy as np

from diffjax import interop
from experiments.interop.case import randomise
from experiments.interop.goldens import FOLDER, VALUES

PIPELINE = FOLDER.parent / "pipelines" / "ddpm-tiny"
STEPS = 10
# by the name of the class, fields that differ from the pipeline's: where a field has the default of its class, diffusers gives
# it that of the new class
SAMPLERS = {"DDIMScheduler": {}, "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"}}
UNET = dict(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8, freq_shift=1, flip_sin_to_cos=False, downsample_padding=0,
)  # fmt: skip


def main() -> int:
    """Write the pipeline, the noise and the samples."""
    import diffusers
    import torch

    unet = diffusers.UNet2DModel(**UNET).eval()
    randomise(unet, 0)
    scheduler = diffusers.DDPMScheduler(clip_sample=True)
    shutil.rmtree(PIPELINE, ignore_errors=True)
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(PIPELINE)
    (PIPELINE / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# A tiny pipeline with random weights\n")
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    values = {"noise": x}
    for name in SAMPLERS:
        s = getattr(diffusers, name).from_config(scheduler.config)
        s.set_timesteps(STEPS)
        y = torch.tensor(x)
        with torch.no_grad():
            for t in s.timesteps:
                y = s.step(unet(y, t).sample, t, y).prev_sample
        values[name] = y.numpy()
    interop.write(PIPELINE / VALUES, values)
    print(sum(path.stat().st_size for path in pathlib.Path(PIPELINE).rglob("*") if path.is_file()), "bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
