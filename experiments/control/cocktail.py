"""Cocktail: one control network for any subset of pictures, and attention held to regions.

The base is a flow on the digits that knows labels. One net, a copy of its encoder with an encoder for each picture, learns
from edges, blobs (the digit, blurred) and class maps (the ink in the channel of its class), each left out of half of the
items; what is left out is a picture of zeros. It scales and shifts the skips and the bottleneck, y' = y (1 + gamma) + beta.
Held-out digits are asked for by each picture alone, by all, and by all inside a box that is the left half.

Then a flow that knows captions of three tokens is drawn from with the logits of its attention to tokens raised where they
belong, S' = S + w log(1 + (1 - t)^2) std(S) mask: the word of the digit to the left half, the other two to the right. The share
of the attention to that word which comes from the left half is the mean over layers, heads and times.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import adapters
from diffjax.networks.taps import tap_names, tapped
from experiments.control import bases, hints, runs
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=109,
    paper="arXiv:2306.00964",
    claim="one net follows any subset of edges, blobs and class maps; a missing one is exactly a picture of zeros; attention "
    "to a word stays to >= 90% in its region",
    expect={
        "start_difference": at_most(0.0),
        "missing_is_zero_difference": at_most(0.0),
        "edge_error_over_base": at_most(0.5),
        "blob_error_over_base": at_most(0.5),
        "map_error_over_base": at_most(0.7),
        "all_edge_error_over_base": at_most(0.5),
        "all_blob_error_over_base": at_most(0.5),
        "all_map_error_over_base": at_most(0.5),
        "boxed_error_inside_over_outside": at_most(0.7),
        "attention_inside": at_least(0.9),
    },
    minutes=2,
)
NET = adapters.control_norm(("blob", "edge", "map"), (16,))
STRENGTH = 30.0


def pictures(x, label):
    """What the net may be shown."""
    classes = jax.nn.one_hot(label, 10)[:, None, None] * hints.mask(x)
    return {"edge": hints.edges(x), "blob": (hints.blur(x, 1.5) + 1) / 2, "map": classes}


def condition(batch):
    """The label and the pictures under the name of the net."""
    return {"label": batch["label"], "mix": {name: batch[name] for name in NET.pictures}}


def run(preset):
    full = preset == "full"
    steps, n, sampling = (2000, 360, 12) if full else (2, 4, 2)
    base = bases.load("unet", preset)
    seen, held = bases.digits("train"), runs.first(bases.digits("test"), n)
    seen = jax.tree.map(lambda a: jnp.concatenate([a] * 4), seen)  # each digit with four subsets of its pictures
    shown = pictures(seen["x"], seen["label"])
    keep = np.random.default_rng(0).integers(0, 2, (len(shown), len(seen["x"]), 1, 1, 1)).astype(np.float32)
    data = {**seen, **{name: a * k for (name, a), k in zip(shown.items(), keep, strict=True)}}
    fn, fresh = runs.beside(base, data, condition, mix=NET)
    params = runs.trainer_of(base, fn, steps, drop=0.5, condition=condition)(fresh, data)

    asked = pictures(held["x"], held["label"])
    zeros = jax.tree.map(jnp.zeros_like, asked)
    nobody = jnp.full_like(held["label"], 10)

    def draw(own, label):
        return runs.draw(base.denoiser(params, fn), {"label": label, "mix": own}, held["x"].shape, steps=sampling)

    off = {**params, "weights": {"mix": jnp.float32(0)}}
    plain = runs.draw(base.denoiser(off, fn), {"label": held["label"], "mix": zeros}, held["x"].shape, steps=sampling)
    alone = {name: draw(zeros | {name: a}, held["label"]) for name, a in asked.items()}
    together, unlabelled = draw(asked, held["label"]), draw(asked, nobody)

    def error(name, x, where=1.0):  # the class map is compared by the ink
        return hints.far(where * pictures(x, held["label"])[name], where * asked[name]).mean()

    half = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 0.5]), (n, 1, 4))
    left = hints.filled(half[:, 0], 8, 8)
    boxed = draw({**{name: a[:, None] for name, a in asked.items()}, "boxes": half}, held["label"])
    inside, outside = ([error("edge", x, w) for x in (boxed, plain)] for w in (left, 1 - left))

    few = runs.first(data, 16)
    own = {"edge": few["edge"]}
    with_zeros = {"edge": few["edge"], "blob": 0 * few["blob"], "map": 0 * few["map"]}
    call = jax.jit(fn, compiler_options=runs.PLAIN)
    at = lambda own: call(params, few["x"], jnp.full(16, 0.5), {"label": few["label"], "mix": own})
    return {
        "start_difference": runs.start_difference(base, fn, fresh, few, condition),
        "missing_is_zero_difference": jnp.abs(at(own) - at(with_zeros)).max(),
        **{f"{name}_error_over_base": error(name, alone[name]) / error(name, plain) for name in asked},
        **{f"all_{name}_error_over_base": error(name, together) / error(name, plain) for name in asked},
        "all_unlabelled_edge_error_over_base": error("edge", unlabelled) / error("edge", plain),
        "boxed_error_inside_over_outside": (inside[0] / inside[1]) / (outside[0] / outside[1]),
        **attention(preset, held),
        "held_out_grid": held["x"][:20],
        "base_grid": plain[:20],
        **{f"{name}_grid": x[:20] for name, x in alone.items()},
        "all_grid": together[:20],
        "boxed_grid": boxed[:20],
    }


def attention(preset, held, n=64):
    """The share of the attention to the word of the digit that comes from its region, without and with the bias."""
    base = bases.load("text", preset)
    x0, words = held["x"][:n], bases.caption(held["label"][:n])
    left = hints.filled(jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 0.5]), (len(x0), 4)), 8, 8)
    regions = jnp.concatenate([1 - left, 1 - left, left], axis=-1)
    fn = adapters.adapt(base.fn, region=adapters.region_bias())
    cond = {**words, "region": regions}
    names = tap_names(base.fn, base.params, x0, jnp.zeros(1), words)
    taps = [name for name in names if name.endswith("cross/weights")]

    @jax.jit
    def share(strength, t, noise):
        params = {"base": base.params, "adapters": {"region": {"strength": strength}}}
        x = bases.PROCESS.add_noise(x0, noise, t)
        seen = tapped(fn, read=taps)(params, x, jnp.full(len(x), t), cond)[1]
        parts = []
        for weights in seen.values():  # [B, H, T, S]
            of_word = weights[..., 2].mean((0, 1))
            side = round(len(of_word) ** 0.5)
            of_word = of_word.reshape(side, side)
            parts.append(of_word[:, : side // 2].sum() / of_word.sum())
        return jnp.stack(parts).mean()

    noise = jax.random.normal(jax.random.key(0), x0.shape)
    at = lambda strength: np.mean([share(jnp.float32(strength), jnp.float32(t), noise) for t in (0.1, 0.3, 0.5)])
    return {"attention_inside_without": at(0.0), "attention_inside": at(STRENGTH)}
