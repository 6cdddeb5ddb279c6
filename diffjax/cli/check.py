"""Options that make no sense are refused before anything is loaded, written or compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from diffjax import networks
from diffjax.cli import hinted
from diffjax.cli import model as models
from diffjax.cli.config import Adapter, Train
from diffjax.data.hints import HINTS
from diffjax.training import patterns

Rule = tuple[Callable[[Any], bool], str]

COUNT: Rule = (lambda v: v >= 1, "at least 1")
POSITIVE: Rule = (lambda v: v > 0 and math.isfinite(v), "positive and finite")
NOT_NEGATIVE: Rule = (lambda v: v >= 0 and math.isfinite(v), "at least 0 and finite")
FINITE: Rule = (math.isfinite, "finite")
SHARE: Rule = (lambda v: 0 <= v < 1, "in [0, 1)")
SEED: Rule = (lambda v: 0 <= v < 2**32, "in 0..4294967295")

RULES: dict[str, Rule] = {
    "seed": SEED,
    "image_size": COUNT,
    "model.width": COUNT,
    "model.multipliers": (lambda v: len(v) > 0 and min(v) >= 1, "one or more numbers of at least 1"),
    "model.blocks": COUNT,
    "model.depth": COUNT,
    "model.heads": COUNT,
    "model.patch": COUNT,
    "model.dropout": SHARE,
    "process.sigma_min": POSITIVE,
    "process.sigma_max": POSITIVE,
    "process.beta_min": NOT_NEGATIVE,
    "process.beta_max": POSITIVE,
    "process.shift": POSITIVE,
    "objective.law_mean": FINITE,
    "objective.law_std": POSITIVE,
    "objective.label_drop": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "latent_steps": COUNT,
    "adapter.rank": COUNT,
    "adapter.widths": (lambda v: len(v) > 0 and min(v) >= 1, "one or more numbers of at least 1"),
    "training.steps": COUNT,
    "training.batch_size": COUNT,
    "training.learning_rate": POSITIVE,
    "training.warmup": NOT_NEGATIVE,
    "training.b2": SHARE,
    "training.weight_decay": NOT_NEGATIVE,
    "training.clip": POSITIVE,
    "training.ema": (lambda v: all(0 <= b < 1 for b in v) and len(set(v)) == len(v), "different numbers in [0, 1)"),
    "training.ema_power": (
        lambda v: all(0 < s <= 12**-0.5 for s in v) and len(set(v)) == len(v),
        "different numbers in (0, 0.2886]",
    ),
    "training.snapshot_every": COUNT,
    "training.accumulate": COUNT,
    "training.layout.fsdp": COUNT,
    "training.layout.model": COUNT,
    "training.layout.sequence": COUNT,
    "training.per_dispatch": COUNT,
    "training.save_every": COUNT,
    "training.sample_every": COUNT,
    "training.log_every": COUNT,
    "training.max_skipped": COUNT,
    "training.loss_bins": (lambda v: v == 0 or 2 <= v <= 100, "0, or in 2..100"),
    "training.max_rewinds": COUNT,
    "grace": POSITIVE,
    "watchdog": NOT_NEGATIVE,
    "peak_flops": POSITIVE,
    "profile": COUNT,
    "sampler.steps": COUNT,
    "sampler.guidance": FINITE,
    "sampler.seeds": COUNT,
    "hosts.patience": POSITIVE,
    "hosts.heartbeat": COUNT,
}


def option(name: str) -> str:
    """The option of a dotted field: 'training.batch_size' -> '--training.batch-size'."""
    return "--" + name.replace("_", "-")


def number(name: str, value: Any, rule: Rule) -> None:
    """Refuse a value that breaks a rule; None means "not given".   Raises: ValueError: naming the option."""
    good, accepted = rule
    if value is not None and not good(value):
        raise ValueError(f"{option(name)} must be {accepted}; got {value}")


def adapter(settings: Train) -> None:
    """Refuse options that do not go with an adapter, and those of an adapter without one.   Raises: ValueError."""
    if settings.adapter.kind == "none":
        if settings.adapter != Adapter():
            raise ValueError(
                "--adapter-rank, -targets, -hint and -widths are of an adapter; add --adapter lora or another, or leave them out"
            )
        return
    own = settings.adapter
    if own.kind in hinted.KINDS and own.hint is None:
        raise ValueError(f"--adapter {own.kind} is told a hint; add --adapter-hint {' or '.join(HINTS)}")
    takes = {"lora": ("rank", "targets"), "skip_tuner": ("rank", "hint", "widths")}.get(own.kind, ("hint", "widths"))
    extra = [f.name for f in dataclasses.fields(own) if f.name != "kind" and f.name not in takes]
    if extra := [name for name in extra if getattr(own, name) != getattr(Adapter(), name)]:
        raise ValueError(
            f"--adapter {own.kind} takes no --adapter-{extra[0]}; it takes {', '.join(f'--adapter-{name}' for name in takes)}"
        )
    if own.hint is not None and settings.latent is not None:
        raise ValueError("--adapter-hint is made of pictures, and does not go with --latent; leave one of them out")
    patterns.checked("--adapter-targets", settings.adapter.targets or "")
    if settings.init is None:
        raise ValueError(
            f"--adapter {settings.adapter.kind} is trained beside a trained network; add --init RUN or FILE.safetensors"
        )
    for name, given in (
        ("objective.uncertainty", settings.objective.uncertainty),
        ("training.ema_power", settings.training.ema_power),
        ("training.magnitudes", settings.training.magnitudes),
    ):
        if given:
            raise ValueError(
                f"{option(name)} does not go with --adapter {settings.adapter.kind}; leave one of them out"
            )


def numbers(settings: Train, devices: int | None = None) -> None:
    """Refuse numbers out of range, and a batch that the devices (default all here) do not divide.   Raises: ValueError."""
    for name, rule in RULES.items():
        value = settings
        for part in name.split("."):
            value = getattr(value, part)
        number(name, value, rule)
    path, t = settings.process, settings.training
    adapter(settings)
    devices = devices or jax.device_count()
    if t.noise_scale and t.accumulate < 2 and (t.parallel == "mesh" or devices == 1):
        raise ValueError(
            "--training.noise-scale compares gradients of parts of the batch; add --training.accumulate 2, or train by "
            "shard_map or pmap on several devices"
        )
    for low, high in (("sigma_min", "sigma_max"), ("beta_min", "beta_max")):
        a, b = getattr(path, low), getattr(path, high)
        if a is not None and b is not None and a >= b:
            raise ValueError(f"{option('process.' + low)} must be below {option('process.' + high)}; got {a} and {b}")
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"this is one of {jax.process_count()} machines of a pod; start it with --hosts.coordinator auto"
        )
    devices = layout(settings, devices)
    if t.batch_size % devices:
        near = max(1, round(t.batch_size / devices)) * devices
        raise ValueError(
            f"--training.batch-size {t.batch_size} is not divisible by the {devices} devices; use for example {near}"
        )
    if t.batch_size % (devices * t.accumulate):
        raise ValueError(
            f"--training.batch-size {t.batch_size} does not divide into {devices} devices x --training.accumulate "
            f"{t.accumulate}; use a multiple of {devices * t.accumulate}"
        )


def layout(settings: Train, devices: int) -> int:
    """Refuse a layout that the devices or the network do not fit.   Returns: the parts of the batch.   Raises: ValueError."""
    t, net = settings.training, settings.model
    inside = t.layout.model * t.layout.sequence
    product = t.layout.fsdp * inside
    if devices % product:
        raise ValueError(
            f"--training.layout.fsdp {t.layout.fsdp} x model {t.layout.model} x sequence {t.layout.sequence} = {product} "
            f"must divide the {devices} devices"
        )
    if t.offload and t.parallel != "mesh":
        raise ValueError(f"--training.offload is done by --training.parallel mesh; got {t.parallel}")
    if product > 1 and t.parallel == "pmap":
        raise ValueError(
            "--training.parallel pmap keeps the whole state on every device; use mesh or shard_map with a layout"
        )
    made = models.fields(net)
    if t.layout.sequence > 1 and "sequence-parallel" not in models.flags(models.named(net.network)[0]):
        fitting = [name for name, card in networks.CATALOGUE.items() if "sequence-parallel" in card.flags]
        raise ValueError(
            f"--training.layout.sequence {t.layout.sequence} needs --network {' or '.join(fitting)}, whose tokens can be "
            f"cut; got {net.network}"
        )
    if (made.get("heads") or t.layout.model) % t.layout.model:  # None: the network chooses
        raise ValueError(
            f"--training.layout.model {t.layout.model} must divide the {made['heads']} heads of {net.network}, because a "
            "head is not cut"
        )
    return devices // inside


def guidance(name: str, weight: float, num_classes: int | None, label_drop: float) -> None:
    """Refuse guidance of a model that has no labels, or that never saw the null label.   Raises: ValueError."""
    if weight == 1.0:
        return
    if not num_classes:
        raise ValueError(f"{option(name)} {weight:g} needs a model with labels; this data set has none. Leave it at 1")
    if label_drop == 0:
        raise ValueError(
            f"{option(name)} {weight:g} needs a model that was also trained without labels, but its "
            "--objective.label-drop is 0. Train with 0.1, or leave guidance at 1"
        )
