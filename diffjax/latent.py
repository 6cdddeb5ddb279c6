"""Latent spaces: an autoencoder with its normalisation, data sets encoded once, samples decoded, one file that keeps it.

Diffusion in latents is: train an autoencoder, `latent_space`, `encoded`, train any denoiser on that data set, sample, `decode`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import networks
from diffjax import numerics as nu
from diffjax.data import DataError, Dataset, DataTransform
from diffjax.networks import FeatureAutoencoder, Posterior
from diffjax.numerics import pytree_dataclass
from diffjax.training import CheckpointError, export_safetensors, load_safetensors
from diffjax.training.weights import WeightsFile

FORMAT = 1
CHUNK = 256  # items that are encoded or decoded at a time


@pytree_dataclass
class LatentSpace:
    """An autoencoder whose latents have mean zero and deviation one.   z = (E(x) - shift) / scale,   x = D(scale z + shift)

    `shift` and `scale` are [c], one for each channel (the last axis) of the latent. All of it are leaves.
    """

    autoencoder: Any
    shift: Any
    scale: Any

    def encode(self, x: Any, keys: Any = None) -> jax.Array:
        """The latents of x [B, ...]: the means of the posteriors, or with item keys [B] a draw of each."""
        posterior = self.autoencoder.encode(x)
        z = posterior.mean if keys is None else posterior.draw(keys)
        return (z - _last(self.shift, z)) / _last(self.scale, z)

    def decode(self, z: Any) -> jax.Array:
        """What latents z [B, ...] stand for, in model coordinates."""
        return self.autoencoder.decode(z * _last(self.scale, z) + _last(self.shift, z))

    def encode_all(self, x: Any, key: Any = None, *, chunk: int = CHUNK) -> np.ndarray:
        """`encode` of any number of items on the host, in chunks of one compiled size.   key: draws by place in x"""
        return _chunked(lambda a, i: _encode(self, a, None if key is None else nu.item_keys(key, i)), x, chunk)

    def decode_all(self, z: Any, *, chunk: int = CHUNK) -> np.ndarray:
        """`decode` of any number of latents on the host, in chunks of one compiled size."""
        return _chunked(lambda a, i: _decode(self, a), z, chunk)


_encode = jax.jit(LatentSpace.encode)
_decode = jax.jit(LatentSpace.decode)


def _last(a: Any, like: Any) -> Any:
    return jnp.asarray(a, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def _chunked(f: Callable[[Any, Any], Any], x: Any, chunk: int) -> np.ndarray:
    """`f(part, indices)` over parts of equal size, the last one filled up and cut again."""
    if chunk < 1 or len(x) < 1:
        raise ValueError(f"chunk must be positive and there must be items; got chunk={chunk} and {len(x)} items")
    n, chunk = len(x), min(chunk, len(x))
    parts = []
    for begin in range(0, n, chunk):
        i = np.arange(begin, begin + chunk) % n
        parts.append(np.asarray(f(jnp.asarray(np.asarray(x)[i]), jnp.asarray(i)))[: n - begin])
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------- normalisation


def moments(autoencoder: Any, x: Any, *, chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the latent of data x, per channel, streamed.   Var z = Var E[z | x] + E Var[z | x]

    Args: x: [N, ...] in model coordinates; sums are kept in float64.
    Returns: `(mean [c], deviation [c])` of draws from the posteriors, without drawing.
    """
    count, total, squares = 0, 0.0, 0.0
    for begin in range(0, len(x), chunk):
        p = _posterior(autoencoder, jnp.asarray(x[begin : begin + chunk]))
        mean = np.asarray(p.mean, np.float64).reshape(-1, p.mean.shape[-1])
        square = np.square(mean)
        if p.log_variance is not None:
            square = square + np.exp(np.asarray(p.log_variance, np.float64)).reshape(mean.shape)
        count, total, squares = count + len(mean), total + mean.sum(0), squares + square.sum(0)
    if count == 0:
        raise ValueError("the moments of a latent need data; got no items")
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0))


@jax.jit
def _posterior(autoencoder: Any, x: Any) -> Posterior:
    return autoencoder.encode(x)


def latent_space(
    autoencoder: Any, x: Any, *, per_channel: bool = True, shift: bool = True, chunk: int = CHUNK
) -> LatentSpace:
    """The latent space in which data x have mean zero and deviation one.

    Args: autoencoder: trained, as `networks.autoencoder(module)(params)`.   x: [N, ...], data in model coordinates.
    per_channel: one scale for each channel; else one for all, as in the paper.   shift: also move the mean to zero; the paper
    does not.   chunk: items that are encoded at a time.
    Raises: ValueError: no data, or a channel that does not vary; frozen features whose residual has no fixed scale yet.

    Example:
        >>> make = networks.autoencoder(networks.KLAutoencoder(widths=(8, 8), blocks=1))
        >>> x = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype("float32")
        >>> space = latent_space(make(make.init(jax.random.key(0), x)), x)
        >>> space.scale.shape, space.decode(space.encode(jnp.ones((2, 4, 4, 3)))).shape
        ((4,), (2, 4, 4, 3))

    Reference: Rombach et al. 2022, arXiv:2112.10752, appendix G: rescaling by the component-wise deviation.
    """
    if isinstance(autoencoder, FeatureAutoencoder) and not autoencoder.fixed:
        raise ValueError(
            "the residual of this autoencoder is scaled by the batch that it is in, so that latents would depend on the chunk; "
            "give autoencoder.measured(data)"
        )
    mean, std = moments(autoencoder, x, chunk=chunk)
    if not per_channel:
        middle = mean.mean()
        std = np.full_like(std, np.sqrt(np.mean(std**2 + (mean - middle) ** 2)))  # of all numbers about their one mean
        mean = np.full_like(mean, middle)
    still = np.flatnonzero(~(std > 1e-6 * std.max()))
    if still.size:
        raise ValueError(
            f"channels {still.tolist()} of the latent do not vary over the data, or not finitely; train the autoencoder longer, "
            "or with fewer latent_channels"
        )
    mean = mean if shift else np.zeros_like(mean)
    return LatentSpace(autoencoder, mean.astype(np.float32), std.astype(np.float32))


# ---------------------------------------------------------------------------------------------------------- data set


def encoded(space: LatentSpace, dataset: Dataset, key: Any = None, *, chunk: int = CHUNK) -> Dataset:
    """A data set whose items are the latents of another's: encoded once, with the same splits, labels and fields.

    Args: key: draws each latent from its posterior; default the mean.
    Returns: `x` float32, normalised, with a transform that leaves it as it is; `space.decode` and the transform of the given
    data set lead back to pixels.
    Raises: DataError: a data set that is read lazily.

    Example:
        >>> from diffjax import data
        >>> digits = data.load("digits")
        >>> make = networks.autoencoder(networks.KLAutoencoder(widths=(8, 8), blocks=1, out_channels=1))
        >>> x = digits.read("train", 64)["x"]
        >>> space = latent_space(make(make.init(jax.random.key(0), x)), x)
        >>> encoded(space, digits).shape
        (4, 4, 4)
    """
    if dataset.source is not None:
        raise DataError(f"data set {dataset.name!r} is read lazily; load it into memory to encode it once")
    z = space.encode_all(dataset.transform.encode(dataset.arrays["x"]), key, chunk=chunk)
    transform = DataTransform(shape=z.shape[1:])
    return dataclasses.replace(
        dataset, name=f"{dataset.name} latents", arrays={**dataset.arrays, "x": z}, transform=transform, log_density=None,
        score=None, sample=None,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- file


def save(path: Any, space: LatentSpace, name: str, shape: tuple[int, ...], **fields: Any) -> pathlib.Path:
    """Write a latent space whose autoencoder is a preset as one safetensors file.

    Args: name, fields: as given to `networks.preset`.   shape: of an item of the data, [H, W, C].
    Raises: ValueError: parameters that are not those of that preset.
    """
    given = networks.autoencoder(networks.preset(name, **fields))
    if given(space.autoencoder.params).module != space.autoencoder.module:
        raise ValueError(f"the autoencoder is not the preset {name!r} with {fields}; got {space.autoencoder.module}")
    about = {"format": FORMAT, "preset": name, "fields": fields, "shape": list(shape)}
    arrays = {"params": space.autoencoder.params, "shift": space.shift, "scale": space.scale}
    return export_safetensors(arrays, path, {"autoencoder": about})


def load(path: Any) -> LatentSpace:
    """What `save` wrote.

    Raises: CheckpointError: no such file, damaged, another kind of file, of a newer version.

    Example:
        >>> import tempfile
        >>> make, x = networks.autoencoder(networks.preset("kl4", widths=(8,), patch=1)), np.ones((2, 4, 4, 3), np.float32)
        >>> space = LatentSpace(make(make.init(jax.random.key(0), x)), np.zeros(12, np.float32), np.ones(12, np.float32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(folder + "/a.safetensors", space, "kl4", (4, 4, 3), widths=(8,), patch=1)
        ...     bool((load(file).encode(x) == space.encode(x)).all())
        True
    """
    about = json.loads(WeightsFile(path, verify=False).metadata.get("autoencoder", "{}"))
    if about.get("format", FORMAT + 1) > FORMAT or about["preset"] not in networks.AUTOENCODER_PRESETS:
        raise CheckpointError(
            f"{path} holds no latent space that this version knows; `latent.save` writes them. It says {about or 'nothing'}"
        )
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in about["fields"].items()}
    make = networks.autoencoder(networks.preset(about["preset"], **fields))
    params = jax.eval_shape(make.init, jax.random.key(0), np.zeros((1, *about["shape"]), np.float32))
    channels = jax.ShapeDtypeStruct((make.module.latent_channels,), np.float32)
    found = load_safetensors(path, {"params": params, "shift": channels, "scale": channels}).params
    return LatentSpace(make(found["params"]), found["shift"], found["scale"])
