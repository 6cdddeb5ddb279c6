"""LoRA files of other libraries as `adapters.lora`, and back, without loss.

Their q, k and v have factors of their own, and keep them (the parts of `adapters.LoRA`). Layouts that are read: PEFT and
diffusers (`X.lora_A.weight`, `X.lora.down.weight`, `X.processor.to_q_lora.down.weight`), and that of kohya for networks whose
layers have the names of diffusers (`lora_unet_X_with_underscores.lora_down.weight`), with `.alpha` or metadata.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.adapters.lora import KINDS, PROJECTION, LoRA, lora
from diffjax.interop.lora_kinds import Factors, read_factors, write_factors
from diffjax.interop.pretrained import Pretrained, peer_of
from diffjax.interop.rules import Rule, shown
from diffjax.interop.tensors import SUFFIX, open_tensors, write
from diffjax.numerics import PyTree
from diffjax.training import CheckpointError, partial
from diffjax.training.patterns import pattern as compiled

METADATA = "lora_adapter_metadata"  # of PEFT's configuration, as diffusers writes it
FILE = "pytorch_lora_weights" + SUFFIX  # the name that diffusers gives to it
WRAPPERS = r"^(base_model\.model\.|model\.)?"
ENDINGS = {  # pattern at the end of a name, with the name of an adapter -> what stands there
    r"\.lora_A(\.\w+)?\.weight$": "down", r"\.lora_B(\.\w+)?\.weight$": "up",
    r"[._]lora\.down()\.weight$": "down", r"[._]lora\.up()\.weight$": "up",
    r"\.lora_down()\.weight$": "down", r"\.lora_up()\.weight$": "up",
    r"()\.alpha$": "alpha",
}  # fmt: skip
LAYOUTS = ("peft", "kohya")
WAY_OUT = (
    "Give patterns of what shall be left out, such as ignored=(r'^text_encoder', r'^lora_te'), or the network that the file "
    "is for"
)


class Found(NamedTuple):
    """Where the factors of one of their layers are in a file."""

    down: str
    up: str
    alpha: str | None = None


def load_lora(path: Any, model: Pretrained, *, ignored: Sequence[str] = ()) -> tuple[LoRA, dict[str, Any]]:
    """A LoRA file of another library as an adapter of a network and its parameters.   W' = W + alpha / r B A

    `fn = adapt(model.fn, style=adapter)`, then `fn({"base": model.params, "adapters": {"style": params}}, x, t, cond)`.
    Where alpha is the same in all layers it stays the adapter's; where it differs it goes into the factors.

    Args:
        path: a safetensors file, or a folder with one.
        model: the network that it is for.
        ignored: patterns of names that may be in the file and are not for this network, such as those of text encoders.

    Raises:
        CheckpointError: no such file, a pickle, damaged; layers that the network does not have, other kinds of adapters, half
            a pair, shapes that do not fit: by name.
    """
    tensors = open_tensors(path)
    places = places_of(model)
    found = sort(tensors, places, prefix_of(model), ignored)
    scales = scale_reader(tensors.metadata, prefix_of(model))
    leaves = {name: a.shape for name, a in partial.named(model.params)}
    factors: dict[str, Factors] = {}
    alphas: dict[str, float] = {}
    for name, place in found.items():
        rule, i = places[name]
        down, up = (np.asarray(tensors[stored], np.float32) for stored in (place.down, place.up))
        if down.shape[0] != up.shape[1]:
            raise CheckpointError(f"{tensors.source}: {name} has factors {list(down.shape)} and {list(up.shape)}")
        alpha = None if place.alpha is None else float(np.asarray(tensors[place.alpha], np.float32).reshape(()))
        try:
            made = read_factors(rule, i, down, up, leaves)
        except (ValueError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"{tensors.source}: {name} has factors {list(down.shape)} and {list(up.shape)}, which do not fit "
                f"{', '.join(f'{path} {list(leaves[path])}' for path in rule.paths)}: {error}"
            ) from None
        factors |= made
        alphas |= dict.fromkeys(made, scales(name, down.shape[0]) if alpha is None else alpha)
    return adapter_of(factors, alphas)


def save_lora(
    path: Any, adapter: LoRA, params: PyTree, model: Pretrained, *, layout: str = "peft", prefix: str | None = None
) -> pathlib.Path:
    """Write a LoRA adapter as other libraries read it.

    Args:
        path: the file; of a folder, its `pytorch_lora_weights.safetensors`.
        adapter, params: of `adapters.lora`, params those of the adapter alone.
        model: the network that it was trained beside; one of ours by `as_pretrained`.
        layout: "peft", the names of PEFT and diffusers, where the scale alpha / r is in the second factor; or "kohya".
        prefix: before the names; default "unet" or "transformer", as in pipelines; "" for none. Not for kohya.

    Returns: the file.
    Raises: ValueError: an unknown layout; an adapter that is no LoRA, or has factors that the other library lacks.   OSError:
    it could not be written; then there is none.
    """
    if layout not in LAYOUTS or not isinstance(adapter, LoRA):
        raise ValueError(
            f"save_lora writes the layouts {', '.join(LAYOUTS)} of adapters.lora; got {layout!r}, {adapter!r}"
        )
    place = pathlib.Path(path)
    place = place / FILE if place.is_dir() else place
    prefix = prefix_of(model) if prefix is None else prefix
    arrays: dict[str, np.ndarray] = {}
    for name, (down, up, scale) in their_factors(adapter, params, model).items():
        if layout == "peft":
            stem = f"{prefix}.{name}" if prefix else name
            arrays |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": np.float32(scale) * up}
        else:
            stem = f"lora_unet_{name.replace('.', '_')}"
            alpha = np.asarray(scale * down.shape[0], np.float32)
            arrays |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}
    write(place, arrays, {"format": "pt"})
    return place


# ------------------------------------------------------------------------------------------------------------- names


def places_of(model: Pretrained) -> dict[str, tuple[Rule, int]]:
    """Their layers with a weight -> the rule that moves it, and its place in the rule."""
    rules = peer_of(model.kind).table(model.module, model.config)
    return {
        name.removesuffix(".weight"): (rule, i)
        for rule in rules
        for i, name in enumerate(rule.theirs)
        if name.endswith(".weight") and not all(path.endswith(("/scale", "/table")) for path in rule.paths)
    }


def prefix_of(model: Pretrained) -> str:
    """What their pipelines call the network."""
    return "unet" if model.kind.startswith("UNet") else "transformer"


def sort(tensors: Any, places: Mapping[str, Any], prefix: str, ignored: Sequence[str] = ()) -> dict[str, Found]:
    """Their layers -> where the factors are.

    Raises: CheckpointError: what has no place here, a factor without the other, layers with factors of several adapters: by
    name.
    """
    flat = {name.replace(".", "_"): name for name in places}
    pairs: dict[str, dict[str, dict[str, str]]] = {}  # layer -> name of an adapter -> role -> tensor
    alphas: dict[str, str] = {}
    odd, twice = [], []
    for stored in tensors:
        if any(compiled(text, "ignored").search(stored) for text in ignored):
            continue
        ends = ((re.search(ending, stored), role) for ending, role in ENDINGS.items())
        end, role = next(((end, role) for end, role in ends if end), (None, None))
        name = None if end is None else layer_of(stored[: end.start()], places, flat, prefix)
        if name is None:
            odd.append(stored)
            continue
        held = alphas if role == "alpha" else pairs.setdefault(name, {}).setdefault((end[1] or "").lstrip("."), {})
        key = name if role == "alpha" else role
        if key in held:
            twice.append(f"{held[key]} and {stored}")
        held[key] = stored
    if odd or not pairs:
        raise CheckpointError(
            f"{tensors.source} has {len(odd)} tensors that are no LoRA factors of layers of this network: {shown(odd)}. "
            f"Its layers are such as {', '.join(list(places)[:3])}. {WAY_OUT}"
            if odd
            else f"{tensors.source} has no LoRA factors. {WAY_OUT}"
        )
    if twice:
        raise CheckpointError(f"{tensors.source} has the same factor under two names: {shown(twice)}. Leave one out")
    one = [(name, roles) for name, by_adapter in pairs.items() for roles in by_adapter.values()]
    half = [f"{name} ({stored})" for name, roles in one if len(roles) < 2 for stored in roles.values()]
    half += [f"{name} ({stored})" for name, stored in alphas.items() if name not in pairs]
    if half:
        raise CheckpointError(
            f"{tensors.source} has one of two factors alone, of {shown(sorted(half))}: the file is incomplete. A layer needs "
            "both, lora_A and lora_B or lora_down and lora_up, of one adapter; save it again, or leave these out by "
            "ignored=(...)"
        )
    if several := {name: sorted(by_adapter) for name, by_adapter in pairs.items() if len(by_adapter) > 1}:
        name, names = next(iter(several.items()))
        raise CheckpointError(
            f"{tensors.source} has {len(several)} layers with factors of several adapters, such as {name} of "
            f"{', '.join(repr(n) for n in names)}. Leave all but one out by ignored=(...), and load them one after the other"
        )
    return {name: Found(**next(iter(by.values())), alpha=alphas.get(name)) for name, by in pairs.items()}


def layer_of(stem: str, places: Mapping[str, Any], flat: Mapping[str, str], prefix: str) -> str | None:
    """The layer that a name without its ending means, or None."""
    kohya = re.sub(r"^lora_(unet|transformer)_", "", stem)
    if kohya in flat:
        return flat[kohya]
    name = re.sub(WRAPPERS, "", stem).removeprefix(f"{prefix}.").replace(".processor.", ".")
    return next((n for n in (name, f"{name}.0") if n in places), None)  # to_out_lora means to_out.0


# ------------------------------------------------------------------------------------------------------------- scales


def scale_reader(metadata: Mapping[str, str], prefix: str) -> Any:
    """`f(layer, rank) -> alpha` by the configuration of PEFT in the metadata; the rank where there is none.

    Raises: CheckpointError: a configuration of something else than plain LoRA.
    """
    if METADATA not in metadata:
        return lambda name, rank: float(rank)
    try:
        page = json.loads(metadata[METADATA])
        own = {key.removeprefix(f"{prefix}."): a for key, a in page.items()}
        alpha, patterns = own.get("lora_alpha"), dict(own.get("alpha_pattern") or {})
        ends = {compiled(rf"(.*\.)?({key})$", "alpha_pattern"): value for key, value in patterns.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the metadata {METADATA} are no configuration of PEFT: {error}") from None
    plain = {
        "use_dora": (False, None),
        "fan_in_fan_out": (False, None),
        "init_lora_weights": (True, False, "gaussian", None),
    }
    for field, accepted in plain.items():
        if own.get(field) not in accepted:
            raise CheckpointError(
                f"the file says {field}={own[field]!r}, which is more than W + B A; accepted is {accepted[0]!r}"
            )

    def read(name: str, rank: int) -> float:
        match = (a for end, a in ends.items() if end.match(name))
        found = float(next(match, rank if alpha is None else alpha))
        return found * math.sqrt(rank) if own.get("use_rslora") else found  # it divides by sqrt(r), we by r

    return read


def adapter_of(factors: Mapping[str, Factors], alphas: Mapping[str, float]) -> tuple[LoRA, dict[str, Any]]:
    """The adapter with these factors, by path, and its parameters.   alphas: by path too"""
    ranks = {path: f.down.shape[1] for path, f in factors.items()}
    one = len(set(alphas.values())) == 1
    params: dict[str, Any] = {}
    kernels: dict[str, int] = {}
    for path, f in sorted(factors.items()):
        up = f.up if one else np.float32(alphas[path] / ranks[path]) * f.up
        params |= {f"{path}/down": jnp.asarray(f.down), f"{path}/up": jnp.asarray(up)}
        kernel = path if path.endswith("kernel") else path.rpartition("/")[0]
        kernels[kernel] = max(ranks[path], kernels.get(kernel, 0))
    several = len(set(ranks.values())) > 1
    rank = tuple((f"^{k}$", r) for k, r in kernels.items()) if several else next(iter(ranks.values()))
    alpha = next(iter(alphas.values())) if one else None
    parts = tuple(a for a in "qkv" if any(path.endswith(f"/kernel/{a}") for path in factors))
    made = lora(rank, alpha=alpha, targets=f"^({'|'.join(kernels)})$", parts=parts)
    return made, partial.nested(params)


def their_factors(adapter: LoRA, params: PyTree, model: Pretrained) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Their layers -> both factors in their layout, and the scale.   Raises: ValueError: see `save_lora`."""
    held: dict[str, dict[str, Any]] = {}
    for name, a in partial.named(params):
        path, _, which = name.rpartition("/")
        held.setdefault(path, {})[which] = np.asarray(a, np.float32)
    own = {path: Factors(f["down"], f["up"]) for path, f in held.items()}
    scale = {path: 1.0 if adapter.alpha is None else adapter.alpha / f.down.shape[-1] for path, f in own.items()}
    leaves = {name: a.shape for name, a in partial.named(model.params)}
    found: dict[str, tuple] = {}
    used: set[str] = set()
    for rule in dict.fromkeys(rule for rule, _ in places_of(model).values()):
        for path in rule.paths:
            mine = [path, *(f"{path}/{part}" for part in parts_of(path))]
            used |= {p for p in mine if p in own}
        for i, pair in write_factors(rule, own, scale, leaves).items():
            found[rule.theirs[i].removesuffix(".weight")] = pair
    left = sorted(set(own) - used)
    if left or not found:
        raise ValueError(
            f"the factors at {shown(left) or 'no path'} have no place in {model.kind}; layers of scanned networks must be "
            "unstacked first"
        )
    return found


def parts_of(path: str) -> Iterable[str]:
    """The parts that a projection of attention may have."""
    match = PROJECTION.match(path)
    return KINDS[match[2]] if match else ()
