"""One case for each line of the catalogue of adapters: the contract runs over them."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax import adapters, networks


class Case(NamedTuple):
    adapter: Any
    net: str  # of NETS
    own: Any = None  # what the adapter reads, with batch axis


NETS = {
    "mlp": (networks.MLP(width=8), (3, 2), None),
    "unet": (
        networks.UNet(widths=(8, 12), blocks=1, attention=(1,), head_size=6, num_classes=3),
        (3, 4, 4, 1),
        "label",
    ),
    "dit": (networks.DiT(width=8, depth=2, heads=2, num_classes=3), (3, 4, 4, 1), "label"),
    "scanned": (networks.DiT(width=8, depth=2, heads=2, num_classes=3, scan_layers=True), (3, 4, 4, 1), "label"),
    "joint": (networks.MMDiT(width=8, depth=1, single=1, heads=2, token_size=5, patch=2), (3, 4, 4, 1), "tokens"),
    "text": (
        networks.UNet(widths=(8, 12), blocks=1, attention=(1,), head_size=6, token_size=5),
        (3, 4, 4, 1),
        "tokens",
    ),
}

PICTURE = np.random.default_rng(5).normal(size=(3, 4, 4, 2)).astype(np.float32)
LARGE = np.random.default_rng(6).normal(size=(3, 8, 8, 2)).astype(np.float32)
TOKENS = np.random.default_rng(2).normal(size=(3, 2, 4)).astype(np.float32)  # of adapters that read tokens
MASK = np.array([[True, True], [True, False], [True, True]])
CLEAN = np.random.default_rng(3).normal(size=(3, 4, 4, 1)).astype(np.float32)
BOXES = np.sort(np.random.default_rng(4).uniform(size=(3, 2, 2, 2)), axis=2).reshape(3, 2, 4).astype(np.float32)
OBJECTS = {"tokens": TOKENS, "boxes": BOXES, "mask": MASK}

PART = {"y": np.random.default_rng(2).normal(size=(3, 4, 4, 1)).astype(np.float32), "t": np.float32([0, 0.5, 1])}
CASES = {
    "lora": Case(adapters.lora(2), "unet"),
    "lora, transformer": Case(adapters.lora(2, targets="attention/qkv/kernel$"), "dit"),
    "controlnet": Case(adapters.controlnet((4, 6), scales=(0.5, 1.0, 1.0, 1.0, 2.0)), "unet", LARGE),
    "control_transformer": Case(adapters.control_transformer(1), "scanned", LARGE),
    "lora, scanned": Case(adapters.lora((("attention/", 3), ("", 1)), parts=("q", "v")), "scanned"),
    "control_next": Case(adapters.control_next(widths=(6,)), "unet", LARGE),
    "skip_tuner": Case(
        adapters.skip_tuner(2, conditions=("a", "b"), scales=(1.0, 0.5), widths=(4, 6), stop=True),
        "unet",
        {"a": LARGE, "b": PICTURE},
    ),
    "control_norm": Case(adapters.control_norm(("a", "b"), (4,)), "unet", {"a": PICTURE, "b": PICTURE[..., :1]}),
    "region_bias": Case(
        adapters.region_bias(), "text", np.broadcast_to(np.eye(4, dtype=np.float32), (3, 4, 4, 4)).copy()
    ),
    "difference": Case(adapters.difference("film/"), "dit"),
    "textual inversion": Case(adapters.textual_inversion(2), "text", np.array([[0, -1, 1, -1]] * 3)),
    "label inversion": Case(adapters.label_inversion(2), "scanned", np.array([0, 1, 0])),
    "diversion": Case(adapters.diversion(1, 3), "dit", {"image": PICTURE, "instruction": TOKENS[:, 0]}),
    "diversion, scanned": Case(
        adapters.diversion(2, 3, active=2), "scanned", {"image": LARGE, "instruction": TOKENS[:, 0]}
    ),
    "parallel attention": Case(adapters.parallel_attention(hidden=5), "text", {"tokens": TOKENS, "mask": MASK}),
    "parallel attention, scanned": Case(adapters.parallel_attention(), "scanned", TOKENS),
    "value mixing": Case(adapters.value_mixing(), "text", TOKENS),
    "grounding": Case(adapters.grounding(hidden=5, frequencies=2), "scanned", OBJECTS),
    "grounded control": Case(adapters.grounded_control(hidden=5, frequencies=2), "unet", OBJECTS),
    "easy control": Case(adapters.easy_control(2), "joint", CLEAN),
    "easy control, scanned": Case(adapters.easy_control(2), "scanned", CLEAN[:, :2]),
    "concatenation": Case(adapters.concatenation(), "unet"),  # without a reference; with one see test_concatenation
    "jointnet": Case(adapters.jointnet(), "dit", PART),  # as pairs, and in a U-Net: see test_pair
    "unicon": Case(adapters.unicon(2), "dit", PART),
}


@functools.cache
def network(name):
    """`(fn, base, x, t, cond)` with random parameters."""
    net, shape, kind = NETS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    t = np.linspace(0.2, 0.8, len(x), dtype=np.float32)
    cond = {
        None: None,
        "label": {"label": np.arange(len(x), dtype=np.int32)},
        "tokens": {"tokens": rng.normal(size=(len(x), 4, 5)).astype(np.float32)},
    }[kind]
    return networks.from_linen(net), networks.random_parameters(net, x, t, cond), x, t, cond


@functools.cache
def made(name):
    """`(fn, params, x, t, cond)` of a case with a fresh adapter named `it`."""
    case = CASES[name]
    net, base, x, t, cond = network(case.net)
    fn = adapters.adapt(net, it=case.adapter)
    if case.own is not None:
        cond = {**(cond or {}), "it": case.own}
    params = jax.jit(fn.init)(jax.random.key(0), base, x, t, cond)
    return fn, params, x, t, cond


def moved(params, scale=0.3):
    """The adapter's parameters moved away from their start."""
    leaves, tree = jax.tree.flatten(params["adapters"])
    rng = np.random.default_rng(1)
    leaves = [np.asarray(a) + scale * rng.normal(size=a.shape).astype(a.dtype) for a in leaves]
    return {**params, "adapters": jax.tree.unflatten(tree, leaves)}
