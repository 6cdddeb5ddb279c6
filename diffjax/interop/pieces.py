"""What a scheduler's class means here, and the parts that several classes share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import prediction as pr
from diffjax.guidance import clip_x0, dynamic_threshold
from diffjax.interop import options
from diffjax.types import Prediction, Process, PyTree, Read, Solver

READS = {"epsilon": pr.from_eps, "sample": pr.from_x0, "v_prediction": pr.from_v, "flow_prediction": pr.from_velocity}


class Pieces(NamedTuple):
    """A scheduler as a process and what belongs to it.   grid(n, tokens, levels) -> times,   method(process, times) -> table"""

    process: Process
    read: Read
    time: Callable[..., Any]  # (process, t) -> what their network is given
    grid: Callable[[int, Any, Any], np.ndarray]
    method: Callable[[Process, Any], Solver]
    input_scale: Callable[..., Any] | None = None
    limits: tuple[Any, ...] = ()  # transforms of the denoiser


class Kind(NamedTuple):
    """A class: its fields with their defaults, and `build(kind, fields) -> Pieces`."""

    defaults: dict[str, Any]
    build: Callable[[str, Any], Pieces]


def read_of(kind: str, c: Any, accepted: tuple[str, ...] = ("epsilon", "sample", "v_prediction")) -> Read:
    """How the network is read."""
    return READS[options.accept(kind, "prediction_type", c.prediction_type, accepted)]


def limits_of(kind: str, c: Any, *, keep_eps: bool = False) -> tuple[Any, ...]:
    """The transforms of `thresholding`, else of `clip_sample`.

    Args: keep_eps: they change x0 alone, as DDIM does by default.
    """
    if getattr(c, "thresholding", False):
        ratio, most = float(c.dynamic_thresholding_ratio), float(c.sample_max_value)
        if not (0 < ratio <= 1 and most >= 1):
            raise ValueError(
                f"{kind}: dynamic_thresholding_ratio must be in (0, 1] and sample_max_value at least 1; got {ratio}, {most}"
            )
        return (dynamic_threshold(ratio, ceiling=most, keep_eps=keep_eps),)
    if getattr(c, "clip_sample", False):
        return (clip_x0(float(c.clip_sample_range), keep_eps=keep_eps),)
    return ()


@dataclasses.dataclass(frozen=True)
class steps_of:  # noqa: N801  (reads as a function: time=steps_of(1000))
    """The time code `steps * t`."""

    steps: int

    def __call__(self, process: Process, t: PyTree) -> PyTree:
        """The code at time t."""
        return jax.tree.map(lambda ti: self.steps * ti, t)


@dataclasses.dataclass(frozen=True)
class times_unit:  # noqa: N801  (reads as a function: time=times_unit(time, 1e-3))
    """A time code times a factor."""

    time: Callable[..., Any]
    unit: float

    def __call__(self, process: Process, t: PyTree) -> PyTree:
        """The code at time t."""
        return jax.tree.map(lambda c: self.unit * c, self.time(process, t))


def sigma_itself(process: Process, t: PyTree) -> PyTree:
    """The time code sigma(t)."""
    return process.sigma(t)


def quarter_log_sigma(process: Process, t: PyTree) -> PyTree:
    """The time code log(sigma / alpha) / 4, for grids and for networks."""
    host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(t))
    return -0.25 * process.log_snr(t) if host else pr.time_log_sigma(process, t)


@dataclasses.dataclass(frozen=True)
class EdmV:
    """The network returns v in coordinates of unit variance, which is minus what EDM's returns.   F = -v"""

    sigma_data: float

    def __call__(self, out: PyTree, x: PyTree, process: Process, t: PyTree) -> Prediction:
        """The pair."""
        return pr.EdmReader(self.sigma_data)(jax.tree.map(jnp.negative, out), x, process, t)


def no_levels(kind: str, levels: Any) -> None:
    """Refuse levels where the class has no shift."""
    if levels is not None:
        raise ValueError(f"{kind} has no shift, so that it takes no levels; give n alone")


def expect(kind: str, c: Any, **wanted: Any) -> None:
    """Refuse fields with other values than these, by name."""
    for name, value in wanted.items():
        found = getattr(c, name)
        if found != value:
            raise ValueError(f"{kind}: {name}={found!r} has no counterpart here; accepted is {value!r}")
