"""Networks: Flax linen modules `net(x, t, cond, train=False)` that know nothing of processes, taps to reach inside
them, and functions that make linen and nnx modules pure functions.

`x` is batch-first and channels-last, `t` is the float time code that the denoiser passes, `cond` follows the convention
of `diffjax.networks.conditions`. Parameters are plain nested dicts of float32 arrays, outputs are float32.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from diffjax.networks.attention import Attention
from diffjax.networks.autoencoders import KLAutoencoder, VQAutoencoder
from diffjax.networks.classifier import Classifier
from diffjax.networks.codebook import Codebook, Quantised, nearest, restart_codes
from diffjax.networks.codec import Autoencoder, AutoencoderOf, Posterior, autoencoder
from diffjax.networks.components import start_linear
from diffjax.networks.conditions import Condition, null_condition, read_condition
from diffjax.networks.continuous import Adaptive, ContinuousUNet, Steps
from diffjax.networks.convolution import Conv, canonical, native, slices
from diffjax.networks.delta_rule import delta_chunked, delta_scan
from diffjax.networks.dimr import Branch, DiMR, TimeNorm
from diffjax.networks.discriminator import Adversary, PatchDiscriminator, adversary
from diffjax.networks.dit import DiT
from diffjax.networks.edm2 import EDM2MLP, EDM2UNet
from diffjax.networks.embeddings import (
    LabelEmbedding,
    LinearLabel,
    TimeCode,
    falling,
    fourier,
    grid_positions,
    kept_fourier,
    sinusoids,
)
from diffjax.networks.entropy import attention_entropy, entropy_scaling
from diffjax.networks.feed_forward import SparseMLP, capacity, dense, ragged, sparse
from diffjax.networks.freeu import freeu
from diffjax.networks.frozen import FeatureAutoencoder, ResidualAutoencoder, feature_autoencoder, match_scale, scale_of
from diffjax.networks.functional import FromLinen, FromNNX, from_linen, from_nnx, zeros
from diffjax.networks.hdit import CentredRope, HDiT, Level, Mapping
from diffjax.networks.implicit import Implicit, ImplicitAutoencoder, cell_centres, interpolate, interpolate_planes
from diffjax.networks.layer_pooling import LayerPooling
from diffjax.networks.layers import stack_blocks, unstack_blocks
from diffjax.networks.local import Circle
from diffjax.networks.magnitude import (
    CosineAttention,
    MPConv,
    MPDense,
    MPEmbedding,
    mp_cat,
    mp_fourier,
    mp_silu,
    mp_sum,
    pixel_norm,
)
from diffjax.networks.mamba import Mamba, selective_chunked, selective_scan
from diffjax.networks.masked_dit import MaskedDiT
from diffjax.networks.mlp import MLP
from diffjax.networks.mmdit import MMDiT
from diffjax.networks.neighborhood import Neighborhood
from diffjax.networks.offset import offset_by_image
from diffjax.networks.partition import constrain
from diffjax.networks.positions import Learned, Rope, Sincos, rotate
from diffjax.networks.presets import AUTOENCODER_PRESETS, PRESETS, preset
from diffjax.networks.resample import double, fir_double, fir_halve, halve
from diffjax.networks.rwkv import RWKV7, pad_left, stretch
from diffjax.networks.s4 import S4D
from diffjax.networks.state_dit import Softmax, StateDiT
from diffjax.networks.taps import Tap, magnitudes, per_layer, tap_names, tapped
from diffjax.networks.task_routing import Switch, switch, task_routed
from diffjax.networks.tokens import InducedAttention, TokenDiT
from diffjax.networks.transformer import transformer
from diffjax.networks.unet import UNet
from diffjax.networks.unet_parts import ResBlock, part
from diffjax.networks.uvit import UViT
from diffjax.networks.vecset import InducedSet, SetAttention, SetPooling, VecSet, farthest_points
from diffjax.networks.wavelets import WaveletDown, WaveletUp, haar, inverse_haar, wavelet_down, wavelet_up
from diffjax.types import Card

__all__ = [
    "Neighborhood",
    "Mapping",
    "Level",
    "HDiT",
    "CentredRope",
    "AUTOENCODERS",
    "AUTOENCODER_PRESETS",
    "Adaptive",
    "Adversary",
    "Attention",
    "Autoencoder",
    "AutoencoderOf",
    "Branch",
    "CATALOGUE",
    "Circle",
    "Classifier",
    "Codebook",
    "Condition",
    "ContinuousUNet",
    "Conv",
    "CosineAttention",
    "DiMR",
    "DiT",
    "EDM2MLP",
    "EDM2UNet",
    "FeatureAutoencoder",
    "FromLinen",
    "FromNNX",
    "Implicit",
    "ImplicitAutoencoder",
    "InducedAttention",
    "InducedSet",
    "KLAutoencoder",
    "LabelEmbedding",
    "LayerPooling",
    "LinearLabel",
    "Learned",
    "MLP",
    "MMDiT",
    "MPConv",
    "MPDense",
    "MPEmbedding",
    "Mamba",
    "MaskedDiT",
    "PRESETS",
    "PatchDiscriminator",
    "Posterior",
    "Quantised",
    "RWKV7",
    "ResBlock",
    "ResidualAutoencoder",
    "Rope",
    "S4D",
    "SetAttention",
    "SetPooling",
    "Sincos",
    "Softmax",
    "SparseMLP",
    "StateDiT",
    "Steps",
    "Switch",
    "Tap",
    "TimeCode",
    "TimeNorm",
    "TokenDiT",
    "UNet",
    "UViT",
    "VQAutoencoder",
    "VecSet",
    "WaveletDown",
    "WaveletUp",
    "adversary",
    "attention_entropy",
    "autoencoder",
    "canonical",
    "capacity",
    "cell_centres",
    "constrain",
    "delta_chunked",
    "delta_scan",
    "dense",
    "double",
    "entropy_scaling",
    "falling",
    "farthest_points",
    "feature_autoencoder",
    "fir_double",
    "fir_halve",
    "fourier",
    "freeu",
    "from_linen",
    "from_nnx",
    "grid_positions",
    "haar",
    "halve",
    "initialise",
    "interpolate",
    "interpolate_planes",
    "inverse_haar",
    "kept_fourier",
    "magnitudes",
    "match_scale",
    "mp_cat",
    "mp_fourier",
    "mp_silu",
    "mp_sum",
    "native",
    "nearest",
    "null_condition",
    "offset_by_image",
    "pad_left",
    "parameter_count",
    "part",
    "partition_rules",
    "per_layer",
    "pixel_norm",
    "preset",
    "ragged",
    "random_parameters",
    "read_condition",
    "restart_codes",
    "rotate",
    "scale_of",
    "selective_chunked",
    "selective_scan",
    "sinusoids",
    "slices",
    "sparse",
    "stack_blocks",
    "start_linear",
    "stretch",
    "switch",
    "tap_names",
    "tapped",
    "task_routed",
    "transformer",
    "unstack_blocks",
    "wavelet_down",
    "wavelet_up",
]

CATALOGUE: dict[str, Card] = {
    "mlp": Card(MLP, summary="residual MLP for vectors, adaptive normalisation", flags=("vector", "sequence")),
    "unet": Card(UNet, paper="arXiv:2006.11239#appB", summary="U-Net with FiLM and attention", flags=("image",)),
    "dit": Card(
        DiT, paper="arXiv:2212.09748#3.2", summary="transformer with adaLN-zero", flags=("image", "sequence-parallel")
    ),
    "edm2": Card(EDM2UNet, paper="arXiv:2312.02696#fig21", summary="magnitude-preserving U-Net", flags=("image",)),
    "edm2_mlp": Card(EDM2MLP, paper="arXiv:2312.02696", summary="magnitude-preserving MLP", flags=("vector",)),
    "uvit": Card(UViT, paper="arXiv:2209.12152#3", summary="all inputs as tokens, long skips", flags=("image",)),
    "hdit": Card(
        HDiT, paper="arXiv:2401.11605#4", summary="hourglass of transformers with neighbourhoods", flags=("image",)
    ),
    "mmdit": Card(MMDiT, paper="arXiv:2403.03206#4", summary="two streams, one joint attention", flags=("image",)),
    "dimr": Card(
        DiMR, paper="arXiv:2406.09416", summary="branches of rising resolution, time in norms", flags=("image",)
    ),
    "masked_dit": Card(
        MaskedDiT, paper="arXiv:2402.01516", summary="DiT of two views, masked in training", flags=("image",)
    ),
    "token_dit": Card(
        TokenDiT, paper="arXiv:1810.00825", summary="transformer for sequences, sets and points", flags=("sequence",)
    ),
    "state_dit": Card(
        StateDiT,
        paper="arXiv:2504.14260",
        summary="RWKV-7, Mamba or S4 in place of attention",
        flags=("sequence", "image"),
    ),
    "continuous": Card(ContinuousUNet, paper="arXiv:2310.20092", summary="U-Net of neural ODEs", flags=("image",)),
}


# with methods `encode` and `decode` instead of a call at a time, see `codec`
AUTOENCODERS: dict[str, Card] = {
    "kl": Card(
        KLAutoencoder, paper="arXiv:2112.10752#3.1", summary="latent of independent Gaussians", flags=("image",)
    ),
    "vq": Card(VQAutoencoder, paper="arXiv:2012.09841#3.1", summary="latent of codes, or tokens", flags=("image",)),
    "implicit": Card(
        ImplicitAutoencoder, paper="arXiv:2401.12517", summary="latent of a function of coordinates", flags=("image",)
    ),
}


def parameter_count(params: Any) -> int:
    """How many numbers a pytree of arrays (or shapes) holds.

    Example:
        >>> parameter_count({"w": np.zeros((3, 4)), "b": np.zeros(4)})
        16
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def partition_rules(module: Any) -> tuple:
    """How the parameters of a network are cut along the mesh axis `model`: pairs `(pattern of the path, spec)`.

    For `training.layouts.Layout(rules=...)`, where the first pattern found decides: `(*own, *partition_rules(net))`
    puts rules of one's own first. The specs are those of the last axes, so that they hold for looped and scanned stacks.
    Args: module: any; rules are the class attribute `RULES`. A network without them can be cut along `fsdp` alone.

    Example:
        >>> partition_rules(DiT())[0]
        ('(attention|cross)/(qkv|q_in|kv)/(kernel|bias)$', P('model',))

    Reference: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """
    return getattr(type(module), "RULES", ())


def initialise(module: nn.Module, key: jax.Array, x: Any, t: Any, cond: Any = None) -> Any:
    """Fresh parameters from one jitted init.

    Args: x, t, cond: arrays or `ShapeDtypeStruct`s; only shapes matter, and a batch of one is enough.
    Returns: a nested dict of float32 arrays.
    Raises: ValueError: the module has variables that are not parameters.

    Example:
        >>> from diffjax.networks.layers import Dense
        >>> class Net(nn.Module):
        ...     __call__ = nn.compact(lambda self, x, t, cond: Dense(3, name="out")(x))
        >>> initialise(Net(), jax.random.key(0), np.zeros((1, 2), "float32"), 0.5)["out"]["kernel"].shape
        (2, 3)
    """
    return from_linen(module).init(key, x, t, cond)


def random_parameters(module: nn.Module, x: Any, t: Any, cond: Any = None, *, seed: int = 0, gain: float = 1.0) -> Any:
    """Random parameters without compiling anything; outputs that `initialise` starts at zero are random as well.

    For tests and benchmarks. Kernels are N(0, gain^2 / fan_in), every other array is N(0, 0.1^2), around one if its
    name is `scale`, so that no layer hides behind a zero.
    Args: as for `initialise`.
    Returns: a nested dict of float32 NumPy arrays.

    Example:
        >>> random_parameters(MLP(width=8), np.zeros((1, 2), "float32"), 0.5)["in"]["kernel"].shape
        (2, 8)
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *zeros((x, t, cond)))["params"]

    def leaf(path: Any, a: Any) -> np.ndarray:
        z = rng.standard_normal(a.shape)
        name = path[-1].key
        if name == "kernel":
            stacked = any(getattr(p, "key", None) == "blocks" for p in path)  # a leading axis of layers
            return (gain * z / math.sqrt(math.prod(a.shape[int(stacked) : -1]))).astype(a.dtype)
        return np.asarray(float(name == "scale") + 0.1 * z, a.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
