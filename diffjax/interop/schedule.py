"""Schedulers of other libraries: the process, the reading of the network, its time code, its grid and its solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax import prediction as pr
from diffjax.guidance import chain
from diffjax.interop import continuous, discrete, options
from diffjax.interop.pieces import Kind, Pieces, times_unit
from diffjax.processes.betas import DISCRETE
from diffjax.processes.gaussian import EDM, RECTIFIED
from diffjax.types import Cond, Denoiser, Process, PyTree, Solver

KINDS: dict[str, Kind] = discrete.KINDS | continuous.KINDS
ANYWHERE = {name for kind in KINDS.values() for name in kind.defaults}
# fields of early versions, with the values that mean what is done anyway
EARLY = {"timestep_values": (None,), "tensor_format": ("pt", "np", None), "clip_predict_epsilon": (None,)}
PREDICTIONS = {pr.from_eps: "epsilon", pr.from_x0: "sample", pr.from_v: "v_prediction"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A scheduler of another library, as read by `read_schedule`.

    `kind` is the name of its class, `config` its configuration as found, `unused` the fields that its class does not read
    (they are there for other classes), `pieces` what it means here.
    """

    kind: str
    config: Mapping[str, Any]
    pieces: Pieces
    unused: tuple[str, ...] = ()

    @property
    def process(self) -> Process:
        """The process; time t of step k of K is (k + 1) / K where the schedule is discrete."""
        return self.pieces.process

    def grid(self, n: int, *, tokens: int | None = None, levels: Any = None) -> np.ndarray:
        """The times at which the scheduler evaluates the network, and the last one.   [n + 1]

        Args: n: evaluations, as `num_inference_steps`.   tokens: of the picture, where the shift depends on them
        (`use_dynamic_shifting`).   levels: [n] noise levels of a flow before its shift, instead of those of the class; some
        pipelines give `times.uniform(n)[:-1]`.
        Returns: decreasing, from noise; a last step of no length is left out.
        Raises: ValueError: n out of range, tokens missing, levels where there is no shift.
        """
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
            raise ValueError(f"n, the number of evaluations, must be an int >= 1; got {n!r}")
        return self.pieces.grid(int(n), tokens, levels)

    def timesteps(self, n: int, **options: Any) -> np.ndarray:
        """What the network is given as time at each evaluation; options as in `grid`.   [n]"""
        return np.asarray(self.pieces.time(self.process, self.grid(n, **options)[:-1]))

    def solver(self, n: int, **options: Any) -> Solver:
        """The method of the class as a table on its own grid; options as in `grid`.

        Exactly that of the class for DDPM, DDIM, Euler, ancestral Euler, Heun, LMS, PNDM with Runge-Kutta steps, UniPC, and
        for DPM-Solver++ that ends at sigma = 0. The others are the same method with our start and end.
        """
        return self.pieces.method(self.process, self.grid(n, **options))

    def denoiser(
        self, fn: Any, params: PyTree = None, *, null: Cond = None, guide: Any = None, unit: float = 1.0
    ) -> Denoiser:
        """The denoiser of a network that was trained with this schedule, with its limits on x0.

        Args: fn: `fn(params, x, t, cond)` with their time.   null: the condition that means "no condition".   guide: a
        transform such as `guidance.cfg(5.0)`; the limits are around it.   unit: factor of the time code. Where fn returns
        twice the channels of x, the second half is the learned variance, an auxiliary output.
        """
        p = self.pieces
        time = p.time if unit == 1.0 else times_unit(p.time, unit)
        d = pr.denoiser(
            WithVariance(fn), p.process, p.read, params, null=null, input_scale=p.input_scale, time=time, aux=True
        )
        return chain(*([] if guide is None else [guide]), *p.limits)(d)

    def __repr__(self) -> str:
        return f"Schedule({self.kind}, {self.process.family.name}, {getattr(self.pieces.read, '__name__', self.pieces.read)})"


@dataclasses.dataclass(frozen=True)
class WithVariance:
    """A network whose output may have twice the channels of x: prediction, and fraction of the log variance in [-1, 1]."""

    fn: Any

    def __call__(self, params: PyTree, x: Any, t: Any, cond: Cond = None) -> tuple[Any, dict[str, Any]]:
        """The prediction, and `{"fraction": [0, 1]}` if there is one."""
        out = self.fn(params, x, t, cond)
        if out.shape[-1] == x.shape[-1]:
            return out, {}
        if out.shape[-1] != 2 * x.shape[-1]:
            raise ValueError(
                f"the network returns {out.shape[-1]} channels for a state of {x.shape[-1]}; a denoiser needs as many, or "
                "twice as many with a learned variance"
            )
        out, v = jnp.split(out, 2, axis=-1)
        return out, {"fraction": 0.5 * (v + 1)}


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """What the configuration of a scheduler means here.

    Args: config: the content of `scheduler_config.json`.
    Raises: ValueError: an unknown class or field, a value that has no counterpart, options that exclude each other.

    Example:
        >>> s = read_schedule({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
        >>> s.timesteps(4).round(6).tolist(), s.solver(4).evaluations
        ([750.0, 500.0, 250.0, 0.0], 4)
    """
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"the scheduler {kind!r} has no counterpart here; there are {', '.join(KINDS)}")
    own, unused = own_fields(kind, config)
    fields = options.read(kind, own, KINDS[kind].defaults)
    return Schedule(kind, dict(config), KINDS[kind].build(kind, fields), unused)


def own_fields(kind: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields that the class reads, and those that it does not read since they are another's.

    Raises: ValueError: a field of an early version with a value that has no counterpart.
    """
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    if "predict_epsilon" in given:
        old = "epsilon" if given.pop("predict_epsilon") else "sample"
        if given.setdefault("prediction_type", old) != old:
            raise ValueError(
                f"{kind}: predict_epsilon={old == 'epsilon'} and prediction_type={given['prediction_type']!r} "
                "exclude each other; leave predict_epsilon out"
            )
    for name in EARLY.keys() & given.keys():
        options.accept(kind, name, given.pop(name), EARLY[name])
    unused = sorted(name for name in given if name in ANYWHERE and name not in KINDS[kind].defaults)
    return {name: value for name, value in given.items() if name not in unused}, tuple(unused)


def schedule_config(process: Process, read: Any = pr.from_eps, **fields: Any) -> dict[str, Any]:
    """The configuration of a scheduler of diffusers for networks that were trained here.

    Args: process: `from_betas`, `rectified` or `edm`.   read: `from_eps`, `from_x0`, `from_v`; for `rectified`
    `from_velocity`, for `edm` `EdmReader` or `from_edm`. Time codes must be theirs: `step_of_time`, 1000 t, log(sigma) / 4.
    fields: others of the class.
    Returns: what `read_schedule` reads as the same process.
    Raises: ValueError: a process or a reading that they cannot express.

    Example:
        >>> from diffjax import processes
        >>> schedule_config(processes.edm(), pr.from_edm)["sigma_max"]
        80.0
    """
    family, p = process.family, process.params
    edm = read if isinstance(read, pr.EdmReader) else pr.EdmReader() if read is pr.from_edm else None
    if family == DISCRETE and read in PREDICTIONS:
        alpha = np.asarray(process.alpha(np.arange(len(p["gap"]) + 1) / len(p["gap"])), np.float64)
        known = dict(
            _class_name="DDIMScheduler", num_train_timesteps=len(p["gap"]), prediction_type=PREDICTIONS[read],
            trained_betas=(1 - (alpha[1:] / alpha[:-1]) ** 2).tolist(), clip_sample=False, timestep_spacing="trailing",
        )  # fmt: skip
    elif family == RECTIFIED and read is pr.from_velocity:
        known = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=1.0)
    elif family == EDM and edm is not None:
        known = dict(_class_name="EDMEulerScheduler", sigma_data=edm.sigma_data)
        known |= {name: float(p[name]) for name in ("sigma_min", "sigma_max")}
    else:
        raise ValueError(
            f"no scheduler expresses the process {family.name!r} read by {getattr(read, '__name__', read)}; there are "
            "from_betas (from_eps, from_x0, from_v), rectified (from_velocity) and edm (from_edm)"
        )
    config = {**known, **fields}
    read_schedule(config)
    return config
