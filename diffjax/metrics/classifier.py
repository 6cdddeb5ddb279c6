"""A small picture classifier for scoring: trained in seconds on data that neither the model nor the scores use."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.metrics.classify import check_labels
from diffjax.metrics.features import (
    FeatureExtractor,
    check_pictures,
    check_samples,
    halve,
    patches,
    philox_normal,
    read_npz,
    stages,
)
from diffjax.types import PyTree

FORMAT = 1
CHUNK = 512


def _init(seed: int, shape: tuple[int, ...], classes: int, width: int, features: int) -> PyTree:
    """He-normal weights; channels double per halving, up to eight times the first."""
    h, w, c = shape
    fan = [c]
    for i in range(stages(h, w)):
        fan.append(width * 2 ** min(i, 3))
        h, w = h // 2, w // 2
    sizes = [(9 * a, b) for a, b in zip(fan[:-1], fan[1:], strict=True)] + [
        (h * w * fan[-1], features),
        (features, classes),
    ]
    gain = [2.0] * (len(sizes) - 1) + [0.1]
    return {
        name: value
        for i, ((a, b), g) in enumerate(zip(sizes, gain, strict=True))
        for name, value in (
            (f"w{i}", np.asarray(philox_normal(seed, i, (a, b)) * np.sqrt(g / a), np.float32)),
            (f"b{i}", np.zeros(b, np.float32)),
        )
    }


def _forward(params: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(features [N, d], logits [N, K])."""
    dense = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    layers = len(params) // 2 - 1  # the mean and the std of the inputs are a pair too
    x = (x - params["mean"]) / params["std"]
    for i in range(layers - 2):
        x = halve(jax.nn.silu(dense(patches(x), params[f"w{i}"]) + params[f"b{i}"][None, None, None]))
    i = layers - 2
    x = jax.nn.silu(dense(x.reshape(x.shape[0], -1), params[f"w{i}"]) + params[f"b{i}"][None])
    return x, dense(x, params[f"w{i + 1}"]) + params[f"b{i + 1}"][None]


_apply = jax.jit(_forward)


def _warp(key: jax.Array, x: jax.Array, strength: jax.Array) -> jax.Array:
    """A random affine map of every picture, bilinear, edges repeated: rotation, scale, shear and shift."""
    n, h, w, _ = x.shape
    z = jax.random.normal(key, (n, 6)) * strength * jnp.array([[0.15, 0.1, 0.1, 0.15, 0.05 * h, 0.05 * w]])
    cos, sin = jnp.cos(z[:, 0]), jnp.sin(z[:, 0])
    sy, sx, shear = jnp.exp(z[:, 1]), jnp.exp(z[:, 2]), z[:, 3]
    centred = lambda size: jnp.arange(size, dtype=x.dtype) - (size - 1) / 2
    grid_y, grid_x = jnp.meshgrid(centred(h), centred(w), indexing="ij")
    flat_y, flat_x = grid_y.reshape(1, -1), grid_x.reshape(1, -1)
    row = lambda a: a[:, None]
    y = row(sy * cos) * flat_y + row(sx * (shear * cos - sin)) * flat_x + row(z[:, 4]) + (h - 1) / 2
    x_ = row(sy * sin) * flat_y + row(sx * (shear * sin + cos)) * flat_x + row(z[:, 5]) + (w - 1) / 2
    y, x_ = jnp.clip(y, 0, h - 1), jnp.clip(x_, 0, w - 1)
    y0, x0 = jnp.minimum(jnp.floor(y), h - 2), jnp.minimum(jnp.floor(x_), w - 2)
    fy, fx = (y - y0)[..., None], (x_ - x0)[..., None]
    start = (y0 * w + x0).astype(jnp.int32)
    flat = x.reshape(n, h * w, -1)
    at = lambda offset: jnp.take_along_axis(flat, (start + offset)[..., None], 1)
    out = (1 - fy) * ((1 - fx) * at(0) + fx * at(1)) + fy * ((1 - fx) * at(w) + fx * at(w + 1))
    return out.reshape(x.shape)


@partial(jax.jit, static_argnames=("steps", "batch", "classes"))
def _train(
    key: jax.Array, params: PyTree, x: jax.Array, y: jax.Array, strength: jax.Array, rate: jax.Array, *,
    steps: int, batch: int, classes: int,
) -> tuple[PyTree, jax.Array]:  # fmt: skip
    """AdamW, warm-up, linear decay over `steps` batches drawn with replacement; the weights are averaged at the end."""
    schedule = lambda i: rate * jnp.minimum((i.astype(rate.dtype) + 1) / 20, 1 - i.astype(rate.dtype) / steps)
    optimizer = optax.adamw(schedule, b2=0.99, weight_decay=0.01)
    frozen = {k: params[k] for k in ("mean", "std")}
    free = {k: v for k, v in params.items() if k not in frozen}

    def loss(p: PyTree, bx: jax.Array, by: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(by, classes), 0.05)
        return optax.softmax_cross_entropy(_forward(p | frozen, bx)[1], targets).mean()

    def step(carry: PyTree, i: jax.Array) -> tuple[PyTree, jax.Array]:
        p, mean, opt = carry
        pick, warp = jax.random.split(jax.random.fold_in(key, i))
        index = jax.random.randint(pick, (batch,), 0, x.shape[0])
        value, grads = jax.value_and_grad(loss)(p, _warp(warp, x[index], strength), y[index])
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, opt = optimizer.update(grads, opt, p)
        p = optax.apply_updates(p, updates)
        mean = jax.tree.map(lambda m, q: m + (q - m) * 0.02, mean, p)
        return (p, mean, opt), value

    (_, mean, _), losses = jax.lax.scan(step, (free, free, optimizer.init(free)), jnp.arange(steps))
    return mean | frozen, losses


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier of pictures of one shape; `features` are the smooth outputs of its last hidden layer."""

    params: dict[str, np.ndarray]
    shape: tuple[int, ...]  # [H, W, C]
    classes: int

    def _run(self, x: Any, which: int) -> np.ndarray:
        x = check_samples("samples", x, shape=self.shape)
        size = min(len(x), CHUNK)
        parts = []
        for start in range(0, len(x), size):
            part = np.asarray(x[start : start + size], np.float32)
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
            parts.append(np.asarray(_apply(self.params, jnp.asarray(padded))[which])[: len(part)])
        return np.concatenate(parts)

    def features(self, x: Any) -> np.ndarray:
        """The last hidden layer, `[N, d]`.   Raises: ValueError: pictures of another shape, integers, NaN, empty."""
        return self._run(x, 0)

    def logits(self, x: Any) -> np.ndarray:
        """Unnormalised log-probabilities of the classes, `[N, K]`.   Raises: ValueError: as `features`."""
        return self._run(x, 1)

    def predict(self, x: Any) -> np.ndarray:
        """The most likely label of every picture, `[N]`.   Raises: ValueError: as `features`."""
        return self.logits(x).argmax(1)

    def accuracy(self, x: Any, labels: Any) -> float:
        """The share of labels predicted.   Raises: ValueError: as `features`; labels not [N] integers."""
        found = self.predict(x)
        return float((found == check_labels(labels, len(found))).mean())

    def extractor(self) -> FeatureExtractor:
        """`features` as an extractor called 'classifier'."""
        return FeatureExtractor("classifier", self.features, chunk=None)

    def save(self, path: Any) -> None:
        """Write an `.npz` of plain arrays with a format version."""
        meta = {"format": FORMAT, "shape": np.array(self.shape), "classes": self.classes}
        with open(path, "wb") as file:
            np.savez(file, **meta, **{f"params/{k}": v for k, v in self.params.items()})


def load_classifier(path: Any) -> Classifier:
    """The classifier that `Classifier.save` wrote.   Raises: ValueError: no such file, or of another format."""
    arrays = read_npz(path)
    if not {"format", "shape", "classes"} <= set(arrays):
        raise ValueError(
            f"path: {path} is not a classifier file; it holds {sorted(arrays)[:5]}. Write one with Classifier.save"
        )
    if int(arrays["format"]) != FORMAT:
        raise ValueError(f"path: {path} has format {int(arrays['format'])}; this version reads {FORMAT}. Train again")
    params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
    return Classifier(params, tuple(int(s) for s in arrays["shape"]), int(arrays["classes"]))


def classifier(
    x: Any,
    labels: Any,
    *,
    steps: int = 1500,
    batch: int = 64,
    rate: float = 3e-3,
    width: int = 32,
    features: int = 64,
    augment: float = 0.7,
    seed: int = 0,
) -> Classifier:
    """Train a small convolutional classifier.   min E CE(f(warp(x)), y),  warp a random affine map

    Use data that neither the scored model nor the scores see (a third split): features trained on the reference flatter
    it. Deterministic by seed on one kind of device. Horizontal flips are not among the warps: digits have none.

    Args: x: [N, H, W, C] floating, in the range that will be scored, H, W >= 4.   labels: [N] integers from 0; each
        class is needed at least once.   steps, batch, rate: of AdamW, > 0.   width: channels of the first layer.
        features: size of the last hidden layer.   augment: strength of the warps, 0 for none.   seed: of weights,
        batches and warps.
    Returns: a `Classifier` with `.features(x)`, `.predict(x)`, `.accuracy(x, labels)`, `.extractor()`, `.save(path)`.
    Raises: ValueError: no pictures, labels that do not fit, a missing class, NaN, numbers out of range.
    """
    x = check_samples("x", x)
    check_pictures("classifier", x.shape)
    labels = check_labels(labels, len(x))
    if steps < 1 or batch < 1 or width < 1 or features < 1 or not rate > 0 or augment < 0 or seed < 0:
        raise ValueError(
            "steps, batch, width, features and rate must be positive, augment and seed >= 0; got "
            f"{(steps, batch, width, features, rate, augment, seed)}"
        )
    classes = int(labels.max()) + 1
    missing = np.setdiff1d(np.arange(classes), labels)
    if classes < 2 or missing.size:
        raise ValueError(
            f"labels must hold every class from 0 to the largest, at least two; missing {missing.tolist()} of {classes}"
        )
    params = _init(seed, x.shape[1:], classes, width, features)
    params |= {"mean": np.float32(x.mean(dtype=np.float64)), "std": np.float32(max(x.std(dtype=np.float64), 1e-6))}
    params, _ = _train(
        jax.random.key(seed),
        jax.tree.map(jnp.asarray, params),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.float32(augment),
        jnp.float32(rate),
        steps=steps,
        batch=batch,
        classes=classes,
    )
    return Classifier({k: np.asarray(v) for k, v in params.items()}, x.shape[1:], classes)
