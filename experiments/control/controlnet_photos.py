"""ControlNet on photographs: one frozen flow, four nets for edges, blur, low resolution and a masked quadrant.

The base draws 16 x 16 crops of photographs without a condition. Four nets of the same form are trained on pictures made of
the crops: lengths of gradients; a Gaussian blur; means over 4 x 4 squares; the crop without one of its quadrants, and where that
is. Each then gets pictures of held-out crops. The control error is the root mean square difference between the picture made of a
sample and the one that was given, over that of samples of the base; for the masked crops it is taken where the crop was
shown. Quality is the sliced Wasserstein distance of samples to other held-out crops, as a ratio to that of the base.

Blur, low resolution and masks are linear in the crop and learned in 500 batches of 32; edges, which hide the sign of what they
outline, take 3000 (2500: 0.350). After 500 they are at 0.52, little better than pictures without any edge (0.58; the edges of
other crops are at 0.85, the held-out crops themselves with noise of 0.05 at 0.06). Edges are given enlarged, as their root mean
square is 0.07.
"""

import functools

import jax
import jax.numpy as jnp

from diffjax import adapters, metrics
from experiments.control import bases, hints, runs
from experiments.recipe import Recipe, at_most

KINDS = ("edge", "blur", "low", "masked")
LOUD = 13.0  # edges of the crops have a root mean square of 0.07, the other pictures of about one
RECIPE = Recipe(
    ledger=170,
    paper="arXiv:2302.05543",
    claim="on crops of photographs edges, blur, low resolution and masks are followed with a third of the base's error or "
    "less, and samples are no worse",
    expect={
        "start_difference": at_most(0.0),
        "base_moved": at_most(0.0),
        **{f"{kind}_error_over_base": at_most(0.35) for kind in KINDS},
        "worst_distance_over_base": at_most(1.0),
    },
    minutes=4,
)


def made(kind, x, where):
    """The picture of a kind, filled with zeros to four channels."""
    if kind == "masked":
        return hints.erased(x, where)
    makers = {
        "edge": lambda x: LOUD * hints.edges(x),
        "blur": lambda x: hints.blur(x, 1.5),
        "low": hints.low_resolution,
    }
    picture = makers[kind](x)
    return jnp.pad(picture, ((0, 0),) * 3 + ((0, 4 - picture.shape[-1]),))


def run(preset):
    full = preset == "full"
    n, sampling = (192, 8) if full else (4, 2)
    base = bases.load("photo", preset)
    seen, rest = bases.photos("train"), bases.photos("test")
    held, others = runs.first(rest, n), rest["x"][n : 3 * n]  # no hint is made of the others
    where = [
        hints.quadrant(a["x"].shape, jax.random.randint(jax.random.key(0), (len(a["x"]),), 0, 4)) for a in (seen, held)
    ]

    data = {kind: {**seen, "hint": made(kind, seen["x"], where[0])} for kind in KINDS}
    fn, fresh = runs.beside(base, data["edge"], hint=adapters.controlnet((16,)))
    steps = lambda kind: (3000 if kind == "edge" else 500) if full else 2
    train = functools.cache(lambda steps: runs.trainer_of(base, fn, steps, null=None, batch=32))

    def draw(params, kind, weight=1.0):
        params = {**params, "weights": {"hint": jnp.float32(weight)}}
        cond = {"hint": made(kind, held["x"], where[1])}
        return runs.draw(base.denoiser(params, fn), cond, held["x"].shape, steps=sampling)

    plain = draw(fresh, "edge", 0.0)
    distance = metrics.sliced_wasserstein(others.reshape(len(others), -1))
    far = lambda x: float(metrics.score(distance, x.reshape(n, -1)))
    figures, grids, distances, moved = {}, {}, {}, []
    for kind in KINDS:
        params = train(steps(kind))(fresh, data[kind])
        moved.append(runs.moved(base.params, params["base"]))
        x = grids[f"{kind}_grid"] = draw(params, kind)
        shown = made(kind, held["x"], where[1])
        error = lambda x, kind=kind, shown=shown: hints.far(made(kind, x, where[1]), shown).mean()
        figures[f"{kind}_error_over_base"] = error(x) / error(plain)
        distances[kind] = far(x)
    return {
        "start_difference": runs.start_difference(base, fn, fresh, runs.first(data["edge"], 16)),
        "base_moved": max(moved),
        **figures,
        "base_distance": far(plain),
        "held_out_distance": far(held["x"]),
        **{f"{kind}_distance": d for kind, d in distances.items()},
        "worst_distance_over_base": max(distances.values()) / far(plain),
        "held_out_grid": held["x"][:16],
        "base_grid": plain[:16],
        **{name: x[:16] for name, x in grids.items()},
    }
