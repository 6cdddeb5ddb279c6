"""Networks of EDM from exported tensors, with the names of their own repository, as `networks.UNet`: DDPM++, NCSN++ and ADM.

A folder holds `model.safetensors` with the network's state and a `config.json` with the name and the arguments of its
preconditioning. Their files are pickles, which are never opened here; where one is trusted, and their repository is on
Python's path, PyTorch exports it so:

    net = pickle.load(open("edm-cifar10-32x32-cond-vp.pkl", "rb"))["ema"]
    safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, "folder/model.safetensors")
    json.dump({"_class_name": type(net).__name__, **net.init_kwargs}, open("folder/config.json", "w"))

`load_pretrained("folder")` reads it, and `denoiser()` of the result needs no scheduler. Conditions: a label [B], or None and
`label_dim` for no label; where the network was trained with augmentation labels they are `cond["vector"]`, zero if left out.
One field is ours: `channels_per_head`, 64 there.

Reference: Karras et al. 2022, arXiv:2206.00364, Table 1 (preconditioning) and appendix C.2 (networks).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax import prediction as pr
from diffjax import times
from diffjax.interop import options
from diffjax.interop.edm_rules import filters, rules
from diffjax.interop.peer import Config, Peer
from diffjax.interop.pieces import Pieces, quarter_log_sigma, steps_of
from diffjax.interop.unet_rules import attending, check_same, given
from diffjax.networks import LinearLabel, UNet, falling, from_linen, kept_fourier, part
from diffjax.networks.layers import GroupNorm
from diffjax.networks.resample import double, fir_double, fir_halve, halve
from diffjax.networks.unet_parts import ResBlock, added, attend, film, input_residual, input_skip, within
from diffjax.processes import edm, ve, vp
from diffjax.solvers import heun
from diffjax.types import Process, PyTree

COMMON = dict(
    img_resolution=None, img_channels=None, label_dim=0, use_fp16=False, augment_dim=0, channel_mult_emb=4,
    dropout=0.10, label_dropout=0,
)  # fmt: skip
SONG = COMMON | dict(
    model_channels=128, channel_mult=(1, 2, 2, 2), num_blocks=4, attn_resolutions=(16,), embedding_type="positional",
    channel_mult_noise=1, encoder_type="standard", decoder_type="standard", resample_filter=(1, 1),
)  # fmt: skip
DHARIWAL = COMMON | dict(
    model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8), channels_per_head=64
)
MODELS = {"SongUNet": SONG, "DhariwalUNet": DHARIWAL}
# preconditionings: their own arguments, and the model_type that is meant if there is none
PRECONDITIONS = {
    "EDMPrecond": (dict(sigma_min=0.0, sigma_max=math.inf, sigma_data=0.5), "DhariwalUNet"),
    "VPPrecond": (dict(beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5), "SongUNet"),
    "VEPrecond": (dict(sigma_min=0.02, sigma_max=100.0), "SongUNet"),
}
HALF = math.sqrt(0.5)
FILTERS = {(1, 1): (halve, double), (1, 3, 3, 1): (fir_halve, fir_double)}


def read(kind: str, config: Config) -> Any:
    """The fields of a configuration, with `model_type`."""
    own, usual = PRECONDITIONS[kind]
    model = options.accept(kind, "model_type", config.get("model_type", usual), tuple(MODELS))
    c = options.read(kind, config, {**own, **MODELS[model], "model_type": model})
    for name in ("img_resolution", "img_channels"):
        value = getattr(c, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{kind}: {name} must be an int >= 1, and the configuration must have it; got {value!r}")
    return c


def network(kind: str, config: Config) -> UNet:
    """The module of a configuration."""
    c = read(kind, config)
    widths = tuple(int(c.model_channels * m) for m in c.channel_mult)
    net = UNet(
        widths=widths,
        blocks=c.num_blocks,
        attention=tuple(i for i in range(len(widths)) if c.img_resolution >> i in c.attn_resolutions),
        middle=(True, False),
        code=c.model_channels * c.channel_mult_emb,
        num_classes=c.label_dim,
        vector_size=c.augment_dim,
        out_channels=c.img_channels,
        act=jax.nn.silu,
        dropout=float(c.dropout),
        **(song if c.model_type == "SongUNet" else dhariwal)(kind, c),
    )
    if any(net.widths[i] < net.head_size and net.heads is None for i in attending(net)):
        raise ValueError(f"{kind}: levels of {widths} channels with attention need at least {net.head_size}, one head")
    return net


def song(kind: str, c: Any) -> dict[str, Any]:
    """What DDPM++ and NCSN++ alone are."""
    down, up = options.accept(kind, "resample_filter", c.resample_filter, FILTERS)
    pyramids = {"standard": None, "skip": part(input_skip, resize=down), "residual": input_residual}
    pyramid = options.accept(kind, "encoder_type", c.encoder_type, pyramids)
    if c.encoder_type == "residual" and down is not fir_halve:
        raise ValueError(f"{kind}: encoder_type='residual' needs resample_filter=[1, 3, 3, 1]; got {c.resample_filter}")
    features = {"positional": falling(1, False), "fourier": kept_fourier(16.0)}
    return dict(
        stem=c.model_channels,
        sinusoids=c.model_channels * c.channel_mult_noise,
        heads=1,
        frequencies=options.accept(kind, "embedding_type", c.embedding_type, features),
        label=part(LinearLabel, scale=math.sqrt(c.label_dim)) if c.label_dim else None,
        early=("label", "vector"),
        norm=part(GroupNorm, eps=1e-6),
        block=part(ResBlock, modulation=added, rescale=HALF, project=True),
        mix=part(attend, norm=part(GroupNorm, eps=1e-6), rescale=HALF),
        late=True,
        down=part(within, resize=down),
        up=part(within, resize=up),
        pyramid_in=pyramid,
        pyramid_out=options.accept(kind, "decoder_type", c.decoder_type, {"standard": None, "skip": up}),
    )


def dhariwal(kind: str, c: Any) -> dict[str, Any]:
    """What ADM alone is."""
    norm = part(GroupNorm, eps=1e-5)
    return dict(
        sinusoids=c.model_channels,
        head_size=c.channels_per_head,
        frequencies=falling(),
        label=part(LinearLabel, bias=False) if c.label_dim else None,
        early=("vector",),
        norm=norm,
        block=part(ResBlock, modulation=film),
        mix=part(attend, norm=norm),
        down=part(within, resize=halve),
        up=part(within, resize=double),
    )


def config(kind: str, module: UNet) -> dict[str, Any]:
    """The arguments of a module, with a nominal resolution.   Raises: ValueError: there are none."""
    is_song = given(module.block)[1].get("project", False)
    base = module.stem if is_song else module.sinusoids
    size = 2 ** max(5, len(module.widths) - 1)
    page = dict(
        model_type="SongUNet" if is_song else "DhariwalUNet",
        img_resolution=size,
        img_channels=module.out_channels,
        label_dim=module.num_classes,
        augment_dim=module.vector_size,
        model_channels=base,
        channel_mult=[w // base if w % base == 0 else w / base for w in module.widths],
        channel_mult_emb=module.code // base,
        num_blocks=module.blocks,
        attn_resolutions=[size >> i for i in module.attention],
        dropout=module.dropout,
    )
    if is_song:
        resize = given(module.down)[1]["resize"]
        page |= dict(
            embedding_type="fourier" if isinstance(module.frequencies, kept_fourier) else "positional",
            channel_mult_noise=module.sinusoids // base,
            encoder_type={None: "standard", input_residual: "residual"}.get(module.pyramid_in, "skip"),
            decoder_type="standard" if module.pyramid_out is None else "skip",
            resample_filter=[1, 3, 3, 1] if resize is fir_halve else [1, 1],
        )
    else:
        page["channels_per_head"] = module.head_size
    check_same(kind, network(kind, page), module)
    return page


# ------------------------------------------------------------------------------------------------ how they are called


@dataclasses.dataclass(frozen=True)
class WithoutLabel:
    """A network whose condition may be left out: no label, and a zero vector."""

    net: Any
    num_classes: int
    vector_size: int

    def __call__(self, params: Any, x: Any, t: Any, cond: Any = None, key: Any = None, *, mutable: Any = False) -> Any:
        """The network's output."""
        cond = dict(cond) if isinstance(cond, dict) else {} if cond is None else {"label": cond}
        if self.num_classes:
            cond.setdefault("label", jnp.full(x.shape[:1], self.num_classes, jnp.int32))
        if self.vector_size:
            cond.setdefault("vector", jnp.zeros((x.shape[0], self.vector_size), x.dtype))
        return self.net(params, x, t, cond or None, key, mutable=mutable)


def function(module: Any, config: Config) -> WithoutLabel:
    """The module at their time code, with conditions that may be left out."""
    return WithoutLabel(from_linen(module), module.num_classes, module.vector_size)


def example(module: Any, config: Config) -> tuple:
    """One state of the smallest size, its time and its condition."""
    side = 2 ** (len(module.widths) - 1)
    shape = lambda *n, dtype=np.float32: jax.ShapeDtypeStruct((1, *n), dtype)
    cond = {"label": shape(dtype=np.int32)} if module.num_classes else {}
    cond |= {"vector": shape(module.vector_size)} if module.vector_size else {}
    return shape(side, side, module.out_channels), shape(), cond or None


def from_minus_eps(out: PyTree, x: PyTree, process: Process, t: PyTree) -> pr.Prediction:
    """The network returns the score times sigma.   eps = -F"""
    return pr.from_eps(jax.tree.map(jnp.negative, out), x, process, t)


def log_half_sigma(process: Process, t: PyTree) -> PyTree:
    """The time code log(sigma / 2)."""
    return jax.tree.map(lambda s: nu.namespace(s).log(0.5 * s), process.sigma(t))


def pieces(kind: str, config: Config) -> Pieces:
    """The preconditioning as a process, its reading, and EDM's grid for Heun's method."""
    c = read(kind, config)
    if kind == "EDMPrecond":
        return edm_pieces(float(c.sigma_data), c.sigma_min or 0.002, min(c.sigma_max, 80.0))
    if kind == "VPPrecond":
        process = vp(c.beta_min, c.beta_min + c.beta_d)
        return Pieces(process, pr.from_eps, steps_of(c.M - 1), *_karras(process))
    process = ve(c.sigma_min, c.sigma_max)
    return Pieces(process, from_minus_eps, log_half_sigma, *_karras(process))


def edm_pieces(sigma_data: float, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Pieces:
    """EDM's preconditioning; the solver takes two evaluations a step, but for the last."""
    process = edm(sigma_min, sigma_max)
    scale = pr.edm_scale(sigma_data)
    return Pieces(process, pr.EdmReader(sigma_data), quarter_log_sigma, *_karras(process), input_scale=scale)


def _karras(process: Process) -> tuple[Any, Any]:
    return lambda n, tokens, levels: times.karras(process, n), heun


def peer(kind: str) -> Peer:
    """The class of a preconditioning around one of their networks."""
    bound = lambda f: functools.partial(f, kind)
    return Peer(
        bound(network), bound(config), rules, example, fn=function, buffers=filters, by_config=True,
        pieces=bound(pieces),
    )  # fmt: skip


PEERS = {kind: peer(kind) for kind in PRECONDITIONS}
