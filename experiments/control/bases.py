"""Frozen networks that the recipes of this family adapt, each trained once: `python -m experiments.control.bases [NAME...]`.

They are flows on the 8 x 8 digits, or on 16 x 16 crops of photographs, and lie beside this file (`weights/NAME.safetensors`), so
that a recipe trains what it is about, and nothing else. The conditions: `unet`, `dit` a label (10: none); `text` a caption
of three tokens, see `caption`; `lights` a caption, of digits half of which are dark, see there; `photo` none; `inpaint` a
caption, and a picture with a hole (`hints.erased`); `scenes` none, see there.
"""

import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import data, losses, metrics, networks, processes, training
from experiments.control import hints
from experiments.loop import trainer

PROCESS = processes.rectified()
FOLDER = pathlib.Path(__file__).parent / "weights"
WORDS = ("nothing", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "a", "digit", "of")
TOKENS = 16  # size of a token
BLACK = -0.8122831  # of the digits, the lowest of their numbers
TEXT = networks.UNet(widths=(16, 32), blocks=1, attention=(0, 1), token_size=TOKENS)
NETS = {  # network, steps, learning rate
    "unet": (networks.UNet(widths=(16, 32), blocks=1, attention=(1,), num_classes=10), 5000, 2e-3),
    "dit": (networks.DiT(width=64, depth=4, heads=4, patch=2, num_classes=10), 5000, 1e-3),
    "text": (TEXT, 5000, 2e-3),
    "lights": (TEXT, 5000, 2e-3),
    "photo": (networks.UNet(widths=(16, 32), blocks=1, attention=(1,)), 2000, 2e-3),
    "inpaint": (
        networks.UNet(widths=(16, 32), blocks=1, attention=(1,), token_size=TOKENS, image_channels=2),
        5000,
        2e-3,
    ),
    "scenes": (networks.UNet(widths=(16, 32), blocks=1, attention=(0, 1)), 2500, 2e-3),
}


class Base(NamedTuple):
    """A frozen network."""

    fn: Any  # (params, x, t, cond, key)
    params: Any

    def denoiser(self, params: Any = None, fn: Any = None, null: Any = None) -> diffjax.Denoiser:
        """Of the base, or of what `adapt(base.fn, ...)` made of it with its parameters."""
        params = self.params if params is None else params
        return diffjax.denoiser(fn or self.fn, PROCESS, diffjax.from_velocity, params, null=null)


def word(name):
    """The token of a word: fixed, random, of norm one a number."""
    table = np.random.default_rng(0).normal(size=(len(WORDS), TOKENS)).astype(np.float32)
    return table[WORDS.index(name)]


def caption(label):
    """`a digit SEVEN` as tokens.   [B] in 0..10 -> {"tokens": [B, 3, 16]}; 10 is no digit: three tokens `nothing`"""
    digits = np.stack([word(WORDS[1 + i]) for i in range(10)] + [word("nothing")])
    label = jnp.asarray(label)
    fixed = jnp.where((label < 10)[:, None, None], np.stack([word("a"), word("digit")])[None], word("nothing"))
    return {"tokens": jnp.concatenate([fixed, jnp.asarray(digits)[label][:, None]], axis=1)}


def digits(split):
    """`{"x": [N, 8, 8, 1] standardised, in [-0.82, 1.85], "label": [N]}` of a split: train, test, classifier."""
    return {k: jnp.asarray(v) for k, v in data.load("digits").read(split).items() if k != "index"}


def numpy_digits(split):
    """`digits` as NumPy arrays, to choose from by masks."""
    return {k: np.asarray(a) for k, a in digits(split).items()}


def lit(x, by):
    """The digits with the light that falls on them changed.   [B, 8, 8, 1], [B] -> [B, 8, 8, 1]; 1: as they are"""
    return BLACK + (x - BLACK) * jnp.asarray(by)[:, None, None, None]


def lights(split):
    """The digits of a split dark, at half their light, then once more as they are.   {"x", "label", "bright": [2 N] bool}"""
    once = digits(split)
    n = len(once["x"])
    twice = {name: jnp.concatenate([a, a]) for name, a in once.items()}
    bright = jnp.arange(2 * n) >= n
    return {**twice, "x": lit(twice["x"], jnp.where(bright, 1.0, 0.5)), "bright": bright}


def holes(key, n):
    """One in rectangles of sides 4 to 8 in the 8 x 8 digits.   [n, 8, 8, 1]"""
    size, place = jax.random.split(key)
    sides = jax.random.randint(size, (n, 2), 4, 9)
    first = jax.random.randint(place, (n, 2), 0, 9 - sides)
    return hints.filled(jnp.concatenate([first, first + sides], axis=1) / 8, 8, 8)


def photos(split, size=6000):
    """`{"x": [N, 16, 16, 3] in [-1, 1]}` of a split."""
    return {"x": jnp.asarray(data.load("photos", image_size=16, size=size).read(split)["x"])}


def scenes(key, n, most=3):
    """Rectangles, at most one of each colour, which add.   {"x": [n, 8, 8, 3], "boxes": [n, 3, 4], "there": [n, 3] bool}

    Sides of 2 to 5 pixels anywhere in the picture, each there with probability 0.7; -0.8 is nothing, 0.8 colour.
    """
    size, place, some = jax.random.split(key, 3)
    sides = jax.random.randint(size, (n, most, 2), 2, 6)
    first = jax.random.randint(place, (n, most, 2), 0, 9 - sides)
    boxes = jnp.concatenate([first, first + sides], axis=-1) / 8
    there = jax.random.bernoulli(some, 0.7, (n, most))
    drawn = hints.filled(boxes.reshape(-1, 4), 8, 8).reshape(n, most, 8, 8).transpose(0, 2, 3, 1)
    return {"x": 0.8 * (2 * drawn * there[:, None, None] - 1), "boxes": boxes, "there": there}


def load(name, preset="full"):
    """The base of a name: trained, or with random parameters for the preset `tiny`."""
    net = NETS[name][0]
    x = jnp.zeros({"photo": (1, 16, 16, 3), "scenes": (1, 8, 8, 3)}.get(name, (1, 8, 8, 1)))
    label = jnp.zeros(1, jnp.int32)
    cond = {
        "photo": None,
        "scenes": None,
        "text": caption(label),
        "lights": caption(label),
        "inpaint": {**caption(label), "image": jnp.zeros((1, 8, 8, 2))},
    }.get(name, {"label": label})
    if preset == "tiny":
        return Base(networks.from_linen(net), networks.random_parameters(net, x, jnp.zeros(1), cond))
    shapes = jax.eval_shape(networks.from_linen(net).init, jax.random.key(0), x, jnp.zeros(1), cond)
    found = training.load_safetensors(FOLDER / f"{name}.safetensors", shapes)
    return Base(networks.from_linen(net), jax.tree.map(jnp.asarray, found.params))


def judge(full=True):
    """A classifier of digits, trained on a split that no recipe trains on."""
    seen = data.load("digits").read("classifier")
    return metrics.classifier(seen["x"], seen["label"], steps=800 if full else 3, width=16 if full else 4)


def train(name):
    """Train the base of a name and write it."""
    net, steps, rate = NETS[name]
    if name == "scenes":
        arrays = {"x": scenes(jax.random.key(1), 20000)["x"]}
    elif name == "lights":
        arrays = {k: a for k, a in lights("train").items() if k != "bright"}
    else:
        arrays = photos("train") if name == "photo" else digits("train")
    loss = losses.flow_matching(label_drop={"photo": 0.0, "scenes": 0.0, "inpaint": 0.5}.get(name, 0.1))
    silent = jax.tree.map(lambda a: a[0], caption(jnp.array([10])))
    null = {"photo": None, "scenes": None, "text": silent, "lights": silent, "inpaint": silent}.get(
        name, {"label": np.int32(10)}
    )
    if name == "inpaint":
        arrays = jax.tree.map(lambda a: jnp.tile(a, (16,) + (1,) * (a.ndim - 1)), arrays)
        arrays |= {"image": hints.erased(arrays["x"], holes(jax.random.key(1), len(arrays["x"])))}
    if name in ("text", "lights", "inpaint"):
        arrays = {**{k: a for k, a in arrays.items() if k != "label"}, **caption(arrays["label"])}
    condition = lambda batch: {k: v for k, v in batch.items() if k != "x"} or None
    fn = networks.from_linen(net)
    model = lambda params: diffjax.denoiser(fn, PROCESS, diffjax.from_velocity, params, null=null)
    one = {k: v[:1] for k, v in arrays.items()}
    start = fn.init(jax.random.key(0), one["x"], jnp.zeros(1), condition(one))
    run = trainer(model, loss, steps, batch=64, rate=rate, decay=0.999, condition=condition)
    begin = time.perf_counter()
    params = jax.block_until_ready(run(start, arrays))
    print(name, training.state.count_params(params), "parameters", round(time.perf_counter() - begin), "s")
    training.export_safetensors(params, FOLDER / f"{name}.safetensors", {"steps": str(steps)})


if __name__ == "__main__":
    for chosen in sys.argv[1:] or NETS:
        train(chosen)
