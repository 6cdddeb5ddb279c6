"""From a configuration and a data set to processes, networks, denoisers, losses and solvers."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax import adapters as adapters_
from diffjax import data as data_
from diffjax import guidance, losses, networks, numerics, prediction, processes, solvers, times
from diffjax.cli import hinted
from diffjax.cli import model as models
from diffjax.cli.config import Adapter, Objective, Path, Sampler, Train, Training
from diffjax.training import Layout, TrainStep, devices, dynamics, ema, make_train_step, optimizer
from diffjax.types import Denoiser, Process, Solver

TRAINED = "^adapters/"  # of the parameters of a run with an adapter
ADAPTER = "adapter"  # the name of the adapter of a run beside the network
AFFINE = 6  # numbers that describe the affine augmentation: five parameters, and whether there was one


def entry(catalogue: Mapping[str, Any], name: str, kind: str) -> Any:
    """A catalogue entry by name, or a ValueError with close names."""
    if name not in catalogue:
        close = difflib.get_close_matches(name, catalogue, 3, 0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r}.{hint} There are {', '.join(catalogue)}")
    return catalogue[name]


def process(config: Path) -> Process:
    """The process of a run.   Raises: ValueError: unknown name, or an option that the process does not take."""
    make = entry(processes.CATALOGUE, config.name, "process").build
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("name", "shift") and v is not None}
    takes = inspect.signature(make).parameters
    extra = sorted(set(options) - set(takes))
    if extra:
        raise ValueError(f"process {config.name!r} takes no {', '.join(extra)}; it takes {list(takes) or 'nothing'}")
    made = make(**options)
    return made if config.shift is None else processes.shifted(made, config.shift)


def vector_size(training: Training) -> int:
    """Numbers of the condition that tells the network of its augmentation."""
    return AFFINE if training.augment == "affine" else 0


@dataclasses.dataclass(frozen=True)
class LabelsAlone:
    """A network that also takes an augmentation vector, called with labels alone: the vector is zero, "none"."""

    fn: Callable[..., Any]
    vector: int

    def __call__(self, params: Any, x: Any, t: Any, cond: Any, key: Any = None) -> Any:
        """The network's output."""
        if self.vector and not (isinstance(cond, dict) and "vector" in cond):
            given = cond if isinstance(cond, dict) else {} if cond is None else {"label": cond}
            cond = {**given, "vector": jnp.zeros((x.shape[0], self.vector), x.dtype)}
        return self.fn(params, x, t, cond, key)


def layout(config: Training, module: Any, devices: int) -> Layout:
    """How the devices of a run share the state and the batch, by the rules of its network.

    Raises: ValueError: sizes that do not divide the devices.
    """
    sizes = config.layout
    rules = networks.partition_rules(module)
    return Layout(fsdp=sizes.fsdp, model=sizes.model, sequence=sizes.sequence, rules=rules).over(devices)


READERS = {
    "edm": prediction.EdmReader(1.0),  # data are standardised
    "v": prediction.from_v,
    "x0": prediction.from_x0,
    "eps": prediction.from_eps,
    "velocity": prediction.from_velocity,
    "score": prediction.from_score,
}


@dataclasses.dataclass(frozen=True)
class ModelOf:
    """`params -> Denoiser`, equal and hashed by value: what a training step and a loaded run call."""

    module: Any
    path: Path
    prediction: str
    num_classes: int | None
    vector: int  # length of the augmentation vector
    dropout: bool
    fields: bool  # conditions are dicts, as where an adapter or an augmentation vector is told; else labels alone
    adapters: tuple[tuple[str, Any], ...] = ()  # beside the network

    def __call__(self, params: Any) -> Denoiser:
        """The denoiser with these parameters."""
        null = {"label": self.num_classes} if self.fields and self.num_classes else self.num_classes or None
        fn = networks.from_linen(self.module)
        fn = adapters_.adapt(fn, **dict(self.adapters)) if self.adapters else fn
        return prediction.denoiser(
            LabelsAlone(fn, self.vector), process(self.path), READERS[self.prediction],
            params, null=null, time=prediction.time_log_sigma, input_scale=prediction.edm_scale(1.0),
            dropout=self.dropout,
        )  # fmt: skip


def adapters(config: Adapter) -> dict[str, Any]:
    """The adapter of a run by its name beside the network, or none."""
    if config.kind == "none":
        return {}
    given = {
        "lora": lambda: {"rank": config.rank} | ({} if config.targets is None else {"targets": config.targets}),
        "controlnet": lambda: {"widths": config.widths},
        "control_next": lambda: {"widths": config.widths},
        "skip_tuner": lambda: {"rank": config.rank, "conditions": (config.hint,), "widths": config.widths},
    }[config.kind]()
    return {ADAPTER: adapters_.CATALOGUE[config.kind].build(**given)}


def model(
    config: Train,
    shape: tuple[int, ...],
    num_classes: int | None,
    *,
    training: bool,
    others: Mapping[str, Any] | None = None,
) -> Any:
    """How parameters become the denoiser of a run; while training, of `trained` parameters and its batches' conditions.

    others: adapters beside the network in place of the run's own.
    """
    vector = vector_size(config.training)
    module = models.network(config.model, shape, num_classes, vector)
    beside = adapters(config.adapter) if others is None else others
    made = ModelOf(
        module, config.process, config.objective.prediction, num_classes, vector,
        dropout=training and config.model.dropout > 0,
        fields=training and vector > 0 or any(getattr(adapter, "told", True) for adapter in beside.values()),
        adapters=tuple(beside.items()),
    )  # fmt: skip
    return losses.uncertainty().model(made) if training and config.objective.uncertainty else made


def trained(config: Objective, params: Any) -> Any:
    """What is trained: the network's parameters, and beside them those of the learned uncertainty."""
    return losses.uncertainty().init(params) if config.uncertainty else params


def of_network(config: Objective, params: Any) -> Any:
    """The network's parameters among those that are trained."""
    return params["net"] if config.uncertainty else params


def loss(config: Objective, num_classes: int | None) -> Any:
    """The training loss.   Raises: ValueError: unknown law or weighting, or one that takes no such option."""
    law_card = entry(times.LAWS, config.law, "law")
    names = {"law_mean": "mean", "law_std": "std"}
    given = {names[k]: getattr(config, k) for k in names if getattr(config, k) is not None}
    extra = sorted(set(given) - set(inspect.signature(law_card.build).parameters))
    if extra:
        raise ValueError(f"law {config.law!r} takes no {', '.join(extra)}; leave out objective.law_{extra[0]}")
    weight_card = entry(times.WEIGHTS, config.weighting, "weighting")
    weight = weight_card.build(1.0) if config.weighting == "edm" else weight_card.build()
    coupling = {
        "independent": losses.independent, "assignment": losses.minibatch_assignment, "nearest": losses.k_nearest_noise,
    }[config.coupling]  # fmt: skip
    return losses.denoising_loss(
        times=law_card.build(**given),
        space=prediction.to_x0,
        weight=weight,
        label_drop=config.label_drop if num_classes else 0.0,
        coupling=coupling if config.coupling == "independent" else coupling(),
        log_variance=losses.log_variance_of_aux if config.uncertainty else None,
    )


def logged(loss: Any, path: Process, bins: int) -> Any:
    """The loss that also reports its mean at noise levels; itself for no bins."""
    return losses.by_noise_level(loss, losses.level_edges(loss.times, path, bins)) if bins else loss


def optimiser(config: Training) -> tuple[Any, Any]:
    """`(optax transformation, schedule)`."""
    peak, steps, warmup = config.learning_rate, config.steps, min(config.warmup, config.steps // 10)
    schedule = {
        "constant": lambda: optimizer.constant(peak, warmup=warmup),
        "cosine": lambda: optimizer.cosine(peak, steps, warmup=warmup),
        "linear": lambda: optimizer.linear_tail(peak, steps, warmup=warmup, tail=0.5),
        "inverse_sqrt": lambda: optimizer.inverse_sqrt(peak, reference=max(steps // 4, 1), warmup=warmup),
    }[config.decay]()
    made = optimizer.adamw(
        schedule, b2=config.b2, weight_decay=config.weight_decay, clip=config.clip, decay_mask=optimizer.matrices,
        moment_dtype=None if config.moment_dtype == "float32" else config.moment_dtype,
    )  # fmt: skip
    return made, schedule


def train_step(config: Train, shape: tuple[int, ...], num_classes: int | None) -> TrainStep:
    """The training step of a run, for items of a shape."""
    t = config.training
    optimizer, schedule = optimiser(t)
    return make_train_step(
        model(config, shape, num_classes, training=True),
        logged(loss(config.objective, num_classes), process(config.process), t.loss_bins), optimizer,
        emas=averages(t), accumulate=t.accumulate, learning_rate=schedule,
        augment=augmentation(config),
        monitor=dynamics.magnitudes if t.magnitudes else None, noise_scale=t.noise_scale,
        trainable=None if config.adapter.kind == "none" else TRAINED,
    )  # fmt: skip


def parallel(config: Training) -> Any:
    """How a run meets its devices, as `fit` takes it."""
    if not config.offload:
        return config.parallel
    return functools.partial(devices.mesh, offload=("ema", "opt_state"))


def averages(config: Training) -> dict[str, Any]:
    """The averages of parameters by name, the one for sampling first."""
    classic = {f"ema_{beta}": ema.decay(beta, warmup=True) for beta in config.ema}
    return classic | {f"power_{width}": ema.power(width) for width in config.ema_power}


def augmentation(config: Train) -> Augment | None:
    """What is done to the batches of a run, and what its adapter is told of them."""
    kind, hint = config.training.augment, hinted.of(config.adapter)
    if hint is not None:
        return Augment(kind, hint, adapters(config.adapter)[ADAPTER])
    return None if kind == "none" else Augment(kind)


@dataclasses.dataclass(frozen=True)
class Augment:
    """The augmentation of a run as `(key, batch, items) -> batch`, and the hint of what it gives."""

    kind: str
    hint: hinted.Hint | None = None
    adapter: Any = None  # that reads it

    def __call__(self, key: Any, batch: Any, items: Any) -> Any:
        """The batch with `x` changed, `vector` added if the network is told, and the hint if an adapter is."""
        batch = batch if self.kind == "none" else self._moved(key, batch, items)
        return batch if self.hint is None else {**batch, ADAPTER: hinted.told(self.adapter, self.hint(batch["x"]))}

    def _moved(self, key: Any, batch: Any, items: Any) -> Any:
        keys = numerics.item_keys(key, items)
        if self.kind == "flip":
            return {**batch, "x": data_.augment.flip(keys, batch["x"])}
        x, vector = data_.augment.affine(keys, batch["x"])
        # Interpolation blurs even the smallest move: without this flag the network blurs pictures that were not moved.
        moved = jnp.any(vector != 0, axis=1, keepdims=True).astype(vector.dtype)
        vector = jnp.concatenate([vector, moved], axis=1)
        return {**batch, "x": x, "vector": vector}


def solver(config: Sampler, path: Process) -> Solver:
    """The solver of a run on its grid.   Raises: ValueError: unknown names, or a grid that does not fit."""
    make = entry(solvers.CATALOGUE, config.solver, "solver").build
    rule, grid = config.solver == "recommended", grid_name(config)
    if rule and grid == "auto":
        return solvers.recommended(path, config.steps, guidance=config.guidance)
    spaced = entry(times.GRIDS, grid, "grid").build
    options = {"guidance": config.guidance} if rule else {}
    return make(path, spaced(path, config.steps), **options)


def grid_name(config: Sampler) -> str:
    """The grid that "auto" stands for: karras, except for `recommended`, whose rule has its own."""
    return "karras" if config.grid == "auto" and config.solver != "recommended" else config.grid


def guided(denoiser: Denoiser, weight: float, interval: tuple[float, float] | None = None) -> Denoiser:
    """Classifier-free guidance around a denoiser; weight 1 leaves it as it is.

    Args: interval: noise levels sigma / alpha between which it acts.   Raises: ValueError: bounds not in order.
    """
    if weight == 1.0:
        return denoiser
    guide = guidance.cfg(weight)
    if interval is not None:
        guide = guidance.interval(guide, *interval, unit=guidance.in_sigma)
    return guide(denoiser)


def shape_of(dataset: Any) -> tuple[int, ...]:
    """The shape of an item, of one to four axes.   Raises: ValueError: anything else."""
    shape = tuple(dataset.shape)
    if not 1 <= len(shape) <= 4:
        raise ValueError(
            f"items of data set {dataset.name!r} have shape {shape}; vectors [d], sequences [L, C], pictures [H, W, C] "
            "or volumes [D, H, W, C] are needed"
        )
    return shape


def zeros(
    shape: tuple[int, ...], num_classes: int | None, vector: int, own: Mapping[str, Any] | None = None
) -> tuple[Any, Any, Any]:
    """Inputs of one item, to initialise a network with.   own: what adapters are told"""
    cond = {}
    if num_classes:
        cond["label"] = np.zeros(1, np.int32)
    if vector:
        cond["vector"] = np.zeros((1, vector), np.float32)
    cond |= own or {}
    return np.zeros((1, *shape), np.float32), np.zeros(1, np.float32), cond or None
