"""An adapter as one small file that says what it is and which network it fits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from diffjax.adapters.core import Site, added
from diffjax.numerics import PyTree
from diffjax.training import CheckpointError, export_safetensors, load_safetensors
from diffjax.training.partial import named, nested


def fingerprint(base: PyTree) -> str:
    """The SHA-256 of the names and shapes of a network's parameters: what an adapter must fit. Values and dtypes do not matter.

    Example:
        >>> import numpy as np
        >>> fingerprint({"w": np.ones(2)}) == fingerprint({"w": np.zeros(2, np.float32)})
        True
    """
    lines = sorted(f"{name} {list(a.shape)}" for name, a in named(base))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def save_adapter(
    path: Any, adapter: Any, params: PyTree, base: PyTree, about: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Write an adapter with its parameters to a safetensors file; the file gets its name only when it is complete.

    Args: path: the file.   adapter: of the catalogue, such as `lora(rank=4)`.   params: those of the adapter alone.   base:
        parameters of the network it was trained beside.   about: more to remember, strings or JSON-able values.
    Raises: ValueError: an adapter that no catalogue line builds again; about has names that the file needs; OSError: it
        could not be written.
    """
    own = {"kind": "adapter", "adapter": describe(adapter), "base": fingerprint(base)}
    if taken := sorted(set(own) & set(about or {})):
        raise ValueError(f"about cannot have {taken}: the file says these of the adapter itself; choose other names")
    text = {**own, **(about or {})}
    return export_safetensors(params, path, text)


def load_adapter(path: Any, base: PyTree | None = None) -> tuple[Any, PyTree, dict[str, str]]:
    """The adapter of a file, its parameters, and what else the file says.

    Args: path: from `save_adapter`.   base: parameters of the network that it shall work beside; None does not compare.
    Raises: CheckpointError: no such file, damaged, not an adapter, of an unknown kind, incomplete, or made for another
    network.
    """
    found = load_safetensors(path)
    text = dict(found.metadata)
    if text.get("kind") != "adapter":
        raise CheckpointError(
            f"{path} holds {len(found.params)} arrays but no adapter of diffjax; weights of networks are read by load_safetensors, "
            "and LoRA files of other libraries by diffjax.interop"
        )
    try:
        adapter, fits = build(json.loads(text.pop("adapter"))), text.pop("base")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} holds an adapter that this diffjax cannot build: {error}") from error
    if base is not None and fits != fingerprint(base):
        raise CheckpointError(
            f"{path} holds an adapter for another network: its base has the fingerprint {fits[:12]}, this one has "
            f"{fingerprint(base)[:12]} ({len(jax.tree.leaves(base))} arrays). Names and shapes of all parameters must agree"
        )
    own = nested(found.params)
    if base is not None and hasattr(adapter, "delta"):
        whole = lambda base, own: added(base, adapter.delta(own, Site(None, base, None, None, None, None), None))
        try:
            jax.eval_shape(whole, base, own)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} holds an adapter that does not fit its own description: {error}") from None
    return adapter, own, {key: value for key, value in text.items() if key != "kind"}


def describe(adapter: Any) -> dict[str, Any]:
    """`{"name", "fields"}` from which `build` makes an equal adapter.   Raises: ValueError: it would not be equal.

    Example:
        >>> from diffjax.adapters import lora
        >>> describe(lora(2))["name"]
        'lora'
    """
    from diffjax.adapters import CATALOGUE

    fields = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
    for name, card in CATALOGUE.items():
        try:
            if card.build(**fields) == adapter:
                described = {"name": name, "fields": json.loads(json.dumps(fields))}
                if build(described) == adapter:
                    return described
        except (TypeError, ValueError):
            continue
    raise ValueError(
        f"no line of diffjax.adapters.CATALOGUE builds {adapter!r} from its fields, so a file could not hold it"
    )


def build(described: Mapping[str, Any]) -> Any:
    """The adapter that `describe` described.   Raises: ValueError: unknown name."""
    from diffjax.adapters import CATALOGUE

    name = described["name"]
    if name not in CATALOGUE:
        raise ValueError(f"there is no adapter {name!r}; known are {', '.join(CATALOGUE)}")
    tuples = lambda v: tuple(map(tuples, v)) if isinstance(v, list) else v
    return CATALOGUE[name].build(**{field: tuples(value) for field, value in described["fields"].items()})
