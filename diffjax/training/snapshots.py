"""Snapshots of the power-function averages during a run, and averages of any length made from them afterwards."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.numerics import PyTree
from diffjax.training import hosts, posthoc
from diffjax.training.ema import Ema, Power, exp_to_std, std_to_exp
from diffjax.training.loop import Hook
from diffjax.training.manifest import CheckpointError
from diffjax.training.partial import named, nested
from diffjax.training.state import TrainState
from diffjax.training.tensors import SUFFIX
from diffjax.training.weights import WeightsFile, export_safetensors

DTYPES = ("float32", "bfloat16", "float16")


class Snapshot(NamedTuple):
    """One file: the averages of these exponents by name, as of that many updates."""

    step: int
    updates: int
    gammas: dict[str, float]
    file: WeightsFile


class Reconstruction(NamedTuple):
    """An average of relative width `sigma_rel` at `step`, and how well its profile was met."""

    params: PyTree
    sigma_rel: float
    step: int
    updates: int
    snapshots: int  # how many were used
    fit: posthoc.Fit


def hook(
    directory: Any,
    every: int,
    emas: Mapping[str, Ema],
    *,
    dtype: str = "float32",
    say: Callable[[str], None] | None = None,
) -> Hook:
    """A hook for `fit` that keeps the power-function averages every `every` steps, as `directory/STEP.safetensors`.

    A snapshot of a later step than the one that is written belongs to an abandoned course of the run, and is removed. A
    snapshot that cannot be written (a full disk) is reported and leaves the others alone; training goes on.

    Args: emas: those of the training step; the ones made by `ema.power` are kept.   dtype: of the files: 'float32',
        'bfloat16' or 'float16'.   say: where messages go, default stderr.
    Raises: ValueError: no power-function average, or another dtype.
    """
    gammas = {name: e.gamma for name, e in emas.items() if isinstance(e, Power)}
    if not gammas:
        raise ValueError(
            f"snapshots are of power-function averages, and there is none among {sorted(emas) or 'no averages'}; add "
            "emas={'power_0.05': ema.power(0.05), 'power_0.1': ema.power(0.1)}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    folder = pathlib.Path(directory)
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))

    def call(step: int, state: TrainState) -> dict | None:
        updates = int(state.updates)
        if updates == 0:  # nothing has been averaged
            return None
        meta = {"step": step, "updates": updates, "gammas": gammas}
        try:
            hosts.first(lambda: _remove_later(folder, step))
            averages = {name: state.ema[name] for name in gammas}
            export_safetensors(averages, folder / f"{step:08d}{SUFFIX}", meta, dtype=jnp.dtype(dtype))
        except OSError as error:  # on every process, or on none
            if hosts.leader():
                say(
                    f"the snapshot of step {step} could not be written to {folder}: {error}; the earlier ones are intact"
                )
            return {"failed": 1}
        return None

    return Hook(every, call, "snapshots")


def load(directory: Any, *, verify: bool = True, say: Callable[[str], None] | None = None) -> list[Snapshot]:
    """The undamaged snapshots of a folder, oldest first; damaged ones are named through `say` and left out.

    Args: verify: check every file against its SHA-256.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    found = []
    for path in _files(pathlib.Path(directory)):
        try:
            file = WeightsFile(path, verify=verify)
            if not file.ours:
                raise CheckpointError(f"{path} does not say that diffjax wrote it")
            m = file.metadata
            found.append(Snapshot(int(m["step"]), int(m["updates"]), dict(json.loads(m["gammas"])), file))
        except (KeyError, ValueError) as error:
            say(f"left out a damaged snapshot: {error}")
    return found


def reconstruct(
    snapshots: Any, sigma_rel: float, *, step: int | None = None, like: PyTree = None, verify: bool = True
) -> Reconstruction:
    """The power-function average of any length from stored ones.   m = sum_i c_i m_i,  c from `posthoc.coefficients`

    Every leaf is read, weighted and summed alone, and of a sharded leaf only the parts that lie on this process, so that
    memory holds one leaf of one snapshot beside the result.

    Args: snapshots: a folder that `hook` wrote, or what `load` returned.   sigma_rel: in (0, 0.2887].   step: of one of
        the snapshots, the end of the average; default the newest. Later ones are not used.   like: parameters, or
        `abstract(params, shardings)`, whose tree, dtypes and shardings the result gets; default nested dicts of NumPy
        arrays.
    Returns: a `Reconstruction`; its `fit.residual` is the profile's distance from the one asked for.
    Raises: ValueError: no snapshot, none of `step`, other leaves than `like`, or a sigma_rel out of range.

    Reference: Karras et al. 2024, arXiv:2312.02696, Algorithm 3.
    """
    gamma = std_to_exp(sigma_rel)
    items = load(snapshots, verify=verify) if not isinstance(snapshots, (list, tuple)) else list(snapshots)
    if not items:
        raise ValueError(f"there are no undamaged snapshots in {snapshots}; train with a snapshot hook first")
    step = items[-1].step if step is None else step
    used = [s for s in items if s.step <= step]
    if not used or used[-1].step != step:
        steps = [s.step for s in items]
        near = min(steps, key=lambda s: abs(s - step))
        raise ValueError(
            f"step must be that of a snapshot; got {step}, the nearest is {near} ({len(steps)} from {steps[0]} to {steps[-1]})"
        )
    stored = [(s, name) for s in used for name in s.gammas]
    t = used[-1].updates
    fit = posthoc.coefficients([(s.updates, s.gammas[name]) for s, name in stored], (t, gamma))
    first, prefix = stored[0]
    shapes = {n.removeprefix(f"{prefix}/"): v for n, v in first.file.shapes.items() if n.startswith(f"{prefix}/")}

    def leaf(path: str, index: Any, shape: tuple[int, ...]) -> np.ndarray:
        if shapes.get(path) != tuple(shape):
            raise ValueError(f"the snapshots hold {path} with shape {shapes.get(path)}; like has {tuple(shape)}")
        last = stored[-1][0].file.read(f"{stored[-1][1]}/{path}", index)
        if not jnp.issubdtype(last.dtype, jnp.floating):
            return last  # counters are not averaged
        total = np.zeros(last.shape, np.float64)
        for c, (s, name) in zip(fit.weights, stored, strict=True):
            total += c * s.file.read(f"{name}/{path}", index).astype(np.float64)
        return total if last.dtype == np.float64 else total.astype(np.float32)

    def placed(path: str, a: Any) -> Any:
        part = lambda index: leaf(path, index, a.shape).astype(a.dtype)
        sharding = getattr(a, "sharding", None)
        return part(...) if sharding is None else jax.make_array_from_callback(a.shape, sharding, part)

    if like is None:
        params = nested({path: leaf(path, ..., shape) for path, shape in shapes.items()})
    else:
        params = jax.tree.unflatten(jax.tree.structure(like), [placed(path, a) for path, a in named(like)])
    return Reconstruction(params, float(sigma_rel), step, t, len(used), fit)


def widths(snapshots: list[Snapshot]) -> list[float]:
    """The relative widths of the averages that the snapshots hold."""
    return sorted({round(exp_to_std(g), 6) for s in snapshots for g in s.gammas.values()})


def _remove_later(folder: pathlib.Path, step: int) -> None:
    for path in _files(folder):
        if int(path.stem) > step:
            path.unlink()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.glob(f"*{SUFFIX}") if p.stem.isdecimal()) if folder.is_dir() else []
