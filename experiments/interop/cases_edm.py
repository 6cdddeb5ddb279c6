"""Networks of EDM and EDM2, against references written from the papers: all options, each preconditioning."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.networks import tapped
from experiments.interop.case import Arrays, Case, first, last


def build(case: Case) -> Any:
    """The reference."""
    from experiments.interop import edm_reference

    return edm_reference.make(case.kind, case.config)


def write(case: Case, model: Any, folder: str) -> None:
    """The reference to disk."""
    from experiments.interop import edm_reference

    edm_reference.write(model, folder)


def reopen(case: Case, folder: str) -> Any:
    """The reference from disk."""
    from experiments.interop import edm_reference

    return edm_reference.read(folder)


def theirs(model: Any, inputs: Arrays) -> Arrays:
    """The denoised picture, what the network returns, and the log of its loss if it tells it."""
    return model(inputs["x"], inputs["sigma"], inputs.get("label"), inputs.get("vector"))


def ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same: their x is x / alpha."""
    s = model.schedule()
    t = s.process.time_of_log_snr(-jnp.log(inputs["sigma"]))
    alpha = s.process.alpha(t).reshape(-1, 1, 1, 1)
    x = alpha * last(inputs["x"])
    cond = {name: inputs[name] for name in ("label", "vector") if name in inputs} or None
    code = s.pieces.time(s.process, t)
    scale = 1.0 if s.pieces.input_scale is None else s.pieces.input_scale(s.process, t).reshape(-1, 1, 1, 1)
    found = {"x0": first(s.denoiser(model.fn, params)(x, t, cond).x0)}
    if not getattr(model.module, "log_variance", 0):
        return found | {"f": first(model.fn(params, scale * x, code, cond))}
    f, taps = tapped(model.fn, read=("log_variance",))(params, scale * x, code, cond)
    return found | {"f": first(f), "log_variance": taps["log_variance"]}


def case(kind: str, variant: str, golden: bool = False, label: Any = None, vector: int = 0, **config: Any) -> Case:
    """A case: two pictures of different noise."""

    def inputs(rng: np.random.Generator) -> Arrays:
        shape = (2, config["img_channels"], config["img_resolution"], config["img_resolution"])
        found = {"x": rng.standard_normal(shape), "sigma": np.array([0.3, 5.0])}
        found |= {"vector": rng.standard_normal((2, vector))} if vector else {}
        found = {name: a.astype(np.float32) for name, a in found.items()}
        return found | ({} if label is None else {"label": np.array(label, np.int32)})

    functions = dict(build=build, write=write, reopen=reopen)
    return Case(f"{kind}-{variant}", kind, config, inputs, theirs, ours, golden=golden, **functions)


PICTURE = dict(img_resolution=8, img_channels=3)
DDPMPP = PICTURE | dict(
    model_type="SongUNet", model_channels=8, channel_mult=[2, 2], num_blocks=1, attn_resolutions=[4]
)
NCSNPP = DDPMPP | dict(
    embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1]
)
ADM = PICTURE | dict(
    model_type="DhariwalUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]
)
EDM2 = PICTURE | dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=8)
CASES = (
    # as edm-cifar10-32x32-cond-vp and -uncond-ve: three equal levels, classes, augmentation labels
    case("EDMPrecond", "ddpmpp", True, [4, 0], 9, label_dim=5, augment_dim=9, **DDPMPP),
    case("EDMPrecond", "ncsnpp", True, augment_dim=9, vector=9, **NCSNPP),
    case("EDMPrecond", "ncsnpp-classes", label=[1, 3], label_dim=3, **NCSNPP | dict(
        img_resolution=16, channel_mult=[1, 2, 2], num_blocks=2, attn_resolutions=[8], model_channels=16,
    )),
    case("EDMPrecond", "no-label", label_dim=3, augment_dim=9, **DDPMPP | dict(attn_resolutions=[], channel_mult=[1, 2])),
    # as the input and output skips of score-based models at 256 x 256
    case("VEPrecond", "skips", True, **DDPMPP | dict(
        encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1], embedding_type="fourier",
        channel_mult_noise=2, channel_mult=[1, 2],
    )),
    case("VPPrecond", "ddpmpp", **DDPMPP | dict(img_resolution=16, num_blocks=2, channel_mult=[1, 2, 2], model_channels=16)),
    # as edm-imagenet-64x64-cond-adm
    case("EDMPrecond", "adm", True, [2, 0], label_dim=4, channels_per_head=8, **ADM),
    case("EDMPrecond", "adm-wide", label=[0, 5], label_dim=5, augment_dim=4, vector=4, **ADM | dict(
        model_channels=64, img_resolution=16, channel_mult=[1, 2, 3], attn_resolutions=[8, 4], num_blocks=2,
        img_channels=1, sigma_data=1.0,
    )),
    case("EDMPrecond", "adm-plain", channels_per_head=16, **ADM | dict(num_blocks=2, model_channels=16, attn_resolutions=[])),
    # as edm2-img512-s and its unconditional guide
    case("Precond", "edm2", True, [3, 5], label_dim=5, logvar_channels=16, **EDM2),
    case("Precond", "edm2-plain", True, label_dim=0, logvar_channels=8, **EDM2 | dict(attn_resolutions=[], clip_act=None)),
    case("Precond", "edm2-wide", label=[1, 0], label_dim=6, **EDM2 | dict(
        img_resolution=16, img_channels=4, model_channels=32, channel_mult=[1, 2, 3], num_blocks=2, attn_resolutions=[8, 4],
        channels_per_head=16, channel_mult_noise=2, channel_mult_emb=4, label_balance=0.4, concat_balance=0.6,
        res_balance=0.2, attn_balance=0.2, sigma_data=1.0, clip_act=3,
    )),
)  # fmt: skip
