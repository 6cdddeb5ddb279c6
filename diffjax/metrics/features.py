"""Feature extractors: the space scores measure in. Pixels, a fixed random network, the user's own weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VERSIONS = (1,)  # of the random convolution: a change of the network is a new version, the old ones stay


def check_samples(name: str, x: Any, least: int = 1, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """`x` as a finite floating NumPy array `[N, ...]` with at least `least` items (of `shape`, if given).

    Raises: ValueError: integers, a missing batch axis, an empty or too small set, another item shape, NaN or Inf.

    Example:
        >>> check_samples("samples", np.zeros((4, 2))).shape
        (4, 2)
    """
    x = np.asarray(x)
    if x.dtype == jnp.bfloat16:
        x = x.astype(np.float32)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"{name} must be a floating array in the encoded range of the data (standardised or [-1, 1]); got dtype "
            f"{x.dtype}. Encode it like the reference first"
        )
    if x.ndim < 2 or x[:1].size == 0 and len(x):
        raise ValueError(f"{name} must be a batch of items [N, ...] with N first; got shape {x.shape}")
    if len(x) < max(least, 1):
        raise ValueError(f"{name} has {len(x)} items; this score needs at least {max(least, 1)}. Give more samples")
    if shape is not None and x.shape[1:] != shape:
        raise ValueError(f"{name} has items of shape {x.shape[1:]}; the reference's are {shape}. Give both alike")
    bad = ~np.isfinite(x).reshape(len(x), -1).all(1)
    if bad.any():
        raise ValueError(
            f"{name} holds NaN or Inf in {int(bad.sum())} of {len(x)} items, the first at index {int(bad.argmax())}; "
            "drop these items, or find out why the sampler made them"
        )
    return x


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A named map from a batch to feature vectors.   x [N, ...] -> f(x) [N, d]

    Inputs are floating, channels-last and in the encoded range of the data (standardised or [-1, 1]); fake and real
    must be in the same range: nothing here can tell a shifted range from a bad model. `inception` says that the
    features are those of Inception weights that the user supplied; only then may a Frechet distance be called FID.
    """

    name: str
    apply: Callable[[Any], Any]  # [N, ...] -> [N, d]
    inception: bool = False
    chunk: int | None = 1024  # items per call; None gives the whole set at once

    def __call__(self, x: Any, name: str = "samples") -> np.ndarray:
        """Features of a set, `[N, d]` on the host, whatever the chunks.   Raises: ValueError: as `check_samples`."""
        x = check_samples(name, x)
        size = min(len(x), self.chunk or len(x))
        parts = []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])  # one shape, one compilation
            parts.append(np.asarray(self.apply(padded))[: len(part)])
        out = np.concatenate(parts)
        if out.ndim != 2 or not np.isfinite(out).all():
            raise ValueError(
                f"the extractor '{self.name}' must return finite features [N, d]; got shape {out.shape}"
                + ("" if out.ndim != 2 else " with NaN or Inf")
            )
        return out


def _flat(x: Any) -> Any:
    return x.reshape(len(x), -1)


def pixels() -> FeatureExtractor:
    """The entries of the item itself.   f(x) = vec(x)

    Example:
        >>> pixels()(np.zeros((3, 4, 4, 1))).shape
        (3, 16)
    """
    return FeatureExtractor("pixels", _flat, chunk=None)


def user(f: Any, name: str, *, inception: bool = False, chunk: int | None = 1024) -> FeatureExtractor:
    """Any function `[N, ...] -> [N, d]` as an extractor; the last chunk is padded, so `f` must treat items one by one.

    Args: f: the function.   name: ends the names of its scores.   inception: the features are Inception's.
    Raises: ValueError: `f` is not callable.

    Example:
        >>> user(lambda x: x.mean(axis=(1, 2)), "means")(np.ones((2, 4, 4, 3))).shape
        (2, 3)
    """
    if not callable(f):
        raise ValueError(f"f must be a function [N, ...] -> [N, d]; got {type(f).__name__}")
    return FeatureExtractor(name, f, inception, chunk)


# ------------------------------------------------------------------------------------------------- random convolution


def philox_normal(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals that are the same on every machine: Box-Muller over the raw words of Philox, float64.

    Raw words of a bit generator are fixed for good, which NumPy does not promise of its distributions.

    Example:
        >>> philox_normal(0, 0, (2,)).round(6).tolist()
        [0.116557, -0.683532]
    """
    n = int(np.prod(shape))
    raw = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(2 * n)
    u = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (np.sqrt(-2 * np.log1p(-u[:n])) * np.cos(2 * np.pi * u[n:])).reshape(shape)


def patches(x: jax.Array) -> jax.Array:
    """The 3x3 neighbours of every pixel as channels: slices and a matmul beat XLA's convolution at small sizes."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1)


def halve(x: jax.Array) -> jax.Array:
    """Means over 2x2 cells (an odd last row or column is left out)."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def stages(h: int, w: int) -> int:
    """How often a picture halves before its short side is below four, at least once."""
    return max(1, int(np.log2(min(h, w) / 4)) + 1)


def quadrants(x: jax.Array) -> jax.Array:
    """Means over the four quarters of the picture, `[N, 4 C]`."""
    h, w = x.shape[1] // 2, x.shape[2] // 2
    return jnp.concatenate(
        [x[:, i, j].mean((1, 2)) for i in (slice(h), slice(h, None)) for j in (slice(w), slice(w, None))], -1
    )


def check_pictures(name: str, shape: tuple[int, ...]) -> None:
    """Raises: ValueError: not [N, H, W, C] with H, W >= 4."""
    if len(shape) != 4 or min(shape[1:3]) < 4 or shape[3] < 1:
        raise ValueError(
            f"{name} needs pictures [N, H, W, C] with H, W >= 4; got shape {shape}. Use pixels() for vectors"
        )


@jax.jit
def _random_features(x: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
    out = []
    for i, w in enumerate(weights):
        x = jax.nn.relu(jnp.matmul(patches(x), w, precision=jax.lax.Precision.HIGHEST))
        if i == 0:
            out.append(x.mean((1, 2)))
        x = halve(x)
    return jnp.concatenate([*out, quadrants(x)], -1)


@dataclasses.dataclass(frozen=True)
class _RandomConvolution:
    seed: int
    width: int = 32

    def __call__(self, x: Any) -> Any:
        check_pictures("random_convolution", x.shape)
        fan = [x.shape[3]] + [self.width] * stages(*x.shape[1:3])
        weights = tuple(
            jnp.asarray(philox_normal(self.seed, i, (9 * a, b)) * np.sqrt(2 / (9 * a)), jnp.float32)
            for i, (a, b) in enumerate(zip(fan[:-1], fan[1:], strict=True))
        )
        return _random_features(jnp.asarray(x, jnp.float32), weights)


def random_convolution(seed: int = 0, version: int = 1) -> FeatureExtractor:
    """A fixed random convolutional network.   f = (mean of the first layer, means over quarters of the last)

    Its distances rank corruptions of pictures, the moment-matched Gaussian included, without any training, and the
    weights are the same on every machine for a seed and a version. One 3x3 layer of 32 channels per halving of the
    picture; 160 features for every size.

    Args: seed: of the weights.   version: of the network; only listed versions exist, and they do not change.
    Raises: ValueError: unknown version, negative seed; when called: no pictures [N, H, W, C] with H, W >= 4.
    Reference: random embeddings for such scores, arXiv:2002.09797
    """
    if version not in VERSIONS:
        raise ValueError(f"version of the random convolution must be one of {VERSIONS}; got {version}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0; got {seed}")
    return FeatureExtractor("randconv", _RandomConvolution(seed))


# ------------------------------------------------------------------------------------------------------ weights files


def read_npz(path: Any) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`, never unpickled.   Raises: ValueError: missing, unreadable, or holds Python objects."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"path: no file {path}; give the path of an .npz file of weights") from None
    except Exception as error:
        raise ValueError(
            f"path: {path} is not an .npz of plain arrays ({error}); save it with numpy.savez, without object arrays"
        ) from error
