"""Hints of adapters: made of the data while training, of held-out items or read from files afterwards."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from diffjax.adapters import SkipTuner
from diffjax.cli.config import Adapter
from diffjax.data.hints import HINTS

KINDS = ("controlnet", "control_next", "skip_tuner")  # adapters that read a hint
MOST = 2000  # held-out items that hints are made of


@dataclasses.dataclass(frozen=True)
class Hint:
    """What an adapter of a run is told, made of pictures.   x [B, H, W, C] -> [B, H, W, c]; equal by value"""

    name: str

    def __call__(self, x: Any) -> Any:
        """The hint of pictures in model coordinates."""
        return HINTS[self.name](x)

    @property
    def signed(self) -> bool:
        """Whether it is in the range of the data, and not in [0, 1]."""
        return self.name in ("blur", "low_resolution")

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the hint of one item.   Raises: ValueError: items that are no pictures, or do not fit."""
        if len(shape) != 3:
            raise ValueError(f"--adapter-hint {self.name} is made of pictures [H, W, C]; the items have shape {shape}")
        try:
            return jax.eval_shape(self, jax.ShapeDtypeStruct((1, *shape), np.float32)).shape[1:]
        except ValueError as error:
            raise ValueError(f"--adapter-hint {self.name}: {error}") from None


def of(config: Adapter) -> Hint | None:
    """The hint of a run's adapter, or None."""
    return None if config.hint is None else Hint(config.hint)


def told(adapter: Any, hint: Any) -> Any:
    """A hint as an adapter reads it: itself, or a dict where several could be given."""
    return {adapter.conditions[0]: hint} if isinstance(adapter, SkipTuner) else hint


def condition(labels: Any, own: Mapping[str, Any]) -> Any:
    """The condition of samples: the labels alone, or a dict with what adapters are told by their names."""
    if not own:
        return labels
    return dict(own) if labels is None else {"label": labels, **own}


def held_out(hint: Hint, dataset: Any, n: int, labels: Any) -> np.ndarray:
    """Hints of n items of the test split, which training never sees, in turn; with labels [n] those of items of each.

    Raises: ValueError: a label that no such item has.
    """
    items = dataset.read("test", min(MOST, len(dataset.split("test"))))
    rows = np.arange(n) % len(items["x"])
    if labels is not None:
        for label in np.unique(labels):
            fitting, wanted = np.flatnonzero(items["label"] == label), np.flatnonzero(labels == label)
            if not fitting.size:
                raise ValueError(f"no held-out item of {dataset.name} has the label {label}, whose hint could be taken")
            rows[wanted] = np.resize(fitting, wanted.size)
    return np.asarray(hint(items["x"][rows]))


def errors(found: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """How far the hints of samples are from what was asked for, and from what was asked of the next sample: root mean squares.

    Example:
        >>> errors(np.float32([[[[1.0]]], [[[0.0]]]]), np.float32([[[[1.0]]], [[[0.0]]]]))
        {'hint_error': 0.0, 'hint_error_of_others': 1.0}
    """
    far = lambda a, b: float(np.sqrt(np.square(a - b).reshape(len(a), -1).mean(1)).mean())
    return {"hint_error": far(found, asked), "hint_error_of_others": far(found, np.roll(asked, 1, axis=0))}


def read(path: pathlib.Path, n: int, shape: tuple[int, ...] | None, transform: Any, signed: bool) -> np.ndarray:
    """Hints of a file for n samples, in turn.

    Args: path: .npy with one [h, w, c] or several [k, h, w, c], as the adapter reads them; or a picture of one.   shape:
        that they must have, None where it is not known.   transform: of the data.   signed: whether a picture is in the
        range of the data, as one that is blurred, and not in [0, 1].
    Raises: ValueError: no such file, not readable, another shape, numbers that are not finite.
    """
    if not path.is_file():
        raise ValueError(f"--hint {path}: there is no file {path}")
    try:
        found = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _picture(path, shape, transform, signed)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--hint {path}: it is no .npy of numbers, and no picture: {error}") from None
    found = found[None] if found.ndim == 3 else found
    if found.ndim != 4 or not len(found) or (shape is not None and found.shape[1:] != shape):
        wanted = "[h, w, c]" if shape is None else list(shape)
        raise ValueError(f"--hint {path} must be {wanted}, or several of these; got {list(found.shape)}")
    if found.dtype.kind not in "fiub" or not np.isfinite(found).all():
        raise ValueError(f"--hint {path} must hold finite numbers; got {found.dtype}")
    return np.asarray(found, np.float32)[np.arange(n) % len(found)]


def _picture(path: pathlib.Path, shape: tuple[int, ...] | None, transform: Any, signed: bool) -> np.ndarray:
    """A picture of a hint, in [0, 1] or in model coordinates."""
    if shape is None or shape[-1] not in (1, 3):
        raise ValueError("of this adapter no number of channels is known that pictures have; give a .npy")
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L" if shape[-1] == 1 else "RGB"), np.float32) / 255
    found = grey.reshape(*grey.shape[:2], shape[-1])
    if not signed:
        return found
    low, high = (0.0 if transform.low is None else transform.low), (1.0 if transform.high is None else transform.high)
    return (low + (high - low) * found - np.asarray(transform.mean)) / np.asarray(transform.std)
