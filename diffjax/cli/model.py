"""The network of a run: a catalogue name or a published preset, with fields changed by options."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import typing
from typing import Any

import jax.numpy as jnp

from diffjax import networks
from diffjax.cli import config
from diffjax.cli.config import Model

FREQUENCIES = (0.5, 32.0)  # radians per unit of log(sigma) / 4, which runs over about [-1.5, 1.5]
ITEMS = {1: "vector", 2: "sequence", 3: "image", 4: "volume"}  # axes of an item -> the flag of networks that take it
SMALL: dict[str, dict[str, Any]] = {  # where no option says otherwise
    "unet": {"width": 32, "multipliers": (1, 2), "blocks": 1, "attention": (1,)},
    "dit": {"width": 32, "depth": 4, "heads": 4, "patch": 2},
    "mlp": {"width": 32, "depth": 4},
}
OPTIONS = ("width", "multipliers", "blocks", "attention", "depth", "heads", "patch")
OWN = ("num_classes", "vector_size", "token_size", "image_channels", "out_channels", "parent", "name", "dtype", "remat")


def named(name: str) -> tuple[Any, dict[str, Any]]:
    """The network class of a catalogue or preset name, and the preset's fields.   Raises: ValueError: unknown name."""
    if name in networks.CATALOGUE:
        return networks.CATALOGUE[name].build, {}
    if name in networks.PRESETS:
        return networks.PRESETS[name]
    known = [*networks.CATALOGUE, *networks.PRESETS]
    close = difflib.get_close_matches(name, known, 3, 0.4)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"unknown network {name!r}.{hint} `diffjax list networks` shows all {len(known)}")


def flags(cls: Any) -> tuple[str, ...]:
    """The flags of the card of a network class: the items that it takes, and what can be cut."""
    return next((card.flags for card in networks.CATALOGUE.values() if card.build is cls), ())


@functools.cache
def kinds(cls: Any) -> dict[str, Any]:
    """The type of every field of a network."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.name not in ("parent", "name")}


def parse(cls: Any, name: str, text: str) -> tuple[str, Any]:
    """`FIELD=VALUE` as a pair.   Raises: ValueError: no such field, one that the run sets itself, or another type."""
    field, equals, value = text.partition("=")
    free = [k for k in kinds(cls) if k not in OWN]
    if not equals or field not in free:
        close = difflib.get_close_matches(field, free, 3, 0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"--model.options takes FIELD=VALUE with a field of {name!r}; got {text!r}.{hint} There are {', '.join(free)}"
        )
    try:
        made = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        made = value
    made = tuple(made) if isinstance(made, list) else made
    if not config.fits(made, kinds(cls)[field]):
        kind = kinds(cls)[field]
        raise ValueError(f"--model.options {field} must be {getattr(kind, '__name__', kind)}; got {value!r}")
    return field, made


def check_given(model: Model, default: Model) -> None:
    """Refuse options that were given and that the network does not read; what a preset or an older run holds is left.

    Args: default: what the options were read over.   Raises: ValueError: naming the options and what the network reads.
    """
    reads = set(SMALL.get(model.network, OPTIONS))  # what other networks do not have, `fields` refuses
    given = [k for k in OPTIONS if getattr(model, k) not in (None, getattr(default, k))]
    if extra := [f"--model.{k}" for k in given if k not in reads]:
        cls, _ = named(model.network)
        others = [k for k in kinds(cls) if k not in (*OWN, *OPTIONS, "widths")]
        raise ValueError(
            f"network {model.network!r} does not read {', '.join(extra)}; it reads "
            f"{', '.join(f'--model.{k}' for k in OPTIONS if k in reads)}, and by --model.options FIELD=VALUE "
            f"{', '.join(others)}. Leave {'it' if len(extra) == 1 else 'them'} out"
        )


def fields(model: Model) -> dict[str, Any]:
    """The fields by which a configured network differs from the defaults of its class.

    Raises: ValueError: unknown network; an option that it does not have.
    """
    cls, given = named(model.network)
    own = {k: getattr(model, k) for k in OPTIONS if getattr(model, k) is not None}
    if model.network in SMALL:  # these take their own among the options, as runs of before keep all of them
        small = SMALL[model.network]
        own = small | {k: v for k, v in own.items() if k in small}
    if cls is networks.UNet and "multipliers" in own:
        width = own.pop("width", SMALL["unet"]["width"])
        own["widths"] = tuple(width * m for m in own.pop("multipliers"))
    if extra := sorted(set(own) - set(kinds(cls))):
        raise ValueError(
            f"network {model.network!r} takes no --model.{extra[0]}; its fields are set by --model.options, for example "
            f"--model.options {_example(cls)}"
        )
    return given | own | dict(parse(cls, model.network, text) for text in model.options)


def network(model: Model, shape: tuple[int, ...], num_classes: int | None, vector: int = 0) -> Any:
    """The network of a run, for items of a shape, labels and an augmentation vector.

    Raises: ValueError: a network that does not take such items, labels or vectors; unknown names and options.
    """
    cls, _ = named(model.network)
    item = ITEMS.get(len(shape))
    if item not in flags(cls):
        fitting = [name for name, card in networks.CATALOGUE.items() if item in card.flags]
        raise ValueError(
            f"network {model.network!r} does not fit items of shape {shape}; "
            f"{'use --network ' + ' or '.join(fitting) if fitting else 'no network does'}"
        )
    made, known = fields(model), kinds(cls)
    for field, size, what in (
        ("num_classes", num_classes or 0, "labels"),
        ("vector_size", vector, "augmentation vectors; use --training.augment none or flip"),
        ("dropout", model.dropout, "--model.dropout"),
    ):
        if field in known:
            made[field] = size
        elif size:
            raise ValueError(f"network {model.network!r} takes no {what}")
    if model.scan_layers:
        if "scan_layers" not in known:
            raise ValueError(f"network {model.network!r} takes no --model.scan-layers")
        made["scan_layers"] = True
    if model.remat != "none" and "remat" not in known:
        raise ValueError(f"network {model.network!r} takes no --model.remat")
    if "remat" in known:
        made["remat"] = model.remat
    if "frequencies" in known:
        made.setdefault("frequencies", FREQUENCIES)
    return cls(**made, dtype=jnp.dtype(model.dtype))


def _example(cls: Any) -> str:
    """One field of a network and its default, as an option."""
    for f in dataclasses.fields(cls):
        if f.name not in OWN and isinstance(f.default, int) and not isinstance(f.default, bool):
            return f"{f.name}={f.default}"
    return "FIELD=VALUE"
