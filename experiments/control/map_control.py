"""Map-controlled generation: a ControlNet that draws what a map says, as satellite pictures are drawn from maps.

The map says where ink is: a picture of 0 and 1, made of the digits by a threshold. The base is a flow on the digits that
knows labels, and is frozen; the net is a trainable copy of its encoder and middle, whose input is the state and the encoded
map, and whose block outputs enter the frozen decoder through convolutions from zero, h' = h + Z_k(h_k of the copy). It is
trained by the usual loss with half of the labels left out. Then both get maps of held-out digits: the net with the label and
without it, the base with the label alone. Where a sample is brighter than the threshold it is compared with the map.

Digits of 8 x 8 overlap also where nothing controls them, by two thirds for equal labels, so that a base below 0.3, as it is for
maps of cities, cannot be had here; what is bounded is the part of the union that is missed, over that of the base.
`converged` is the part of all steps after which the intersection over union had come within a tenth of its last value: the
sudden convergence that is described for large networks is here a steep first part.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import adapters
from experiments.control import bases, hints, runs
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=228,
    paper="Generate Your Own Scotland: Satellite Image Generation Conditioned on Maps",
    claim="samples keep to the map with an intersection over union >= 0.7 and miss <= 0.25 of what the base misses, which stays "
    "bit-identical",
    expect={
        "start_difference": at_most(1e-6),
        "base_moved": at_most(0.0),
        "iou": at_least(0.7),
        "iou_without_label": at_least(0.7),
        "missed_over_base": at_most(0.25),
        "accuracy_over_base": at_least(0.98),
    },
    minutes=1,
)


def run(preset):
    full = preset == "full"
    steps, marks, n, sampling = (1600, 8, 360, 12) if full else (2, 2, 4, 2)
    base = bases.load("unet", preset)
    seen, held = bases.digits("train"), runs.first(bases.digits("test"), n)
    classify = bases.judge(full)

    seen, held = ({**arrays, "map": hints.mask(arrays["x"])} for arrays in (seen, held))
    fn, fresh = runs.beside(base, seen, map=adapters.controlnet((16,)))
    stages = runs.trainer_of(base, fn, steps, drop=0.5, marks=marks)(fresh, seen)  # leaves [marks, ...]
    params = jax.tree.map(lambda a: a[-1], stages)

    def draw(own, label, weight=1.0):
        denoiser = base.denoiser({**own, "weights": {"map": jnp.float32(weight)}}, fn)
        return runs.draw(denoiser, {"label": label, "map": held["map"]}, held["x"].shape, steps=sampling)

    iou = lambda x: hints.overlap(hints.mask(x), held["map"]).mean()
    nothing = jnp.full_like(held["label"], 10)
    plain, controlled, unlabelled = draw(params, held["label"], 0.0), draw(params, held["label"]), draw(params, nothing)
    course = np.array(
        [float(iou(draw(jax.tree.map(lambda a, i=i: a[i], stages), held["label"]))) for i in range(marks)]
    )
    right = lambda x: classify.accuracy(x, held["label"])
    return {
        "start_difference": runs.start_difference(base, fn, fresh, runs.first(seen, 16)),
        "base_moved": runs.moved(base.params, params["base"]),
        "iou": iou(controlled),
        "iou_without_label": iou(unlabelled),
        "iou_of_base": iou(plain),
        "iou_of_base_without_label": iou(draw(params, nothing, 0.0)),
        "missed_over_base": (1 - iou(controlled)) / (1 - iou(plain)),
        "accuracy": right(controlled),
        "accuracy_over_base": right(controlled) / right(plain),
        "converged": (1 + np.argmax(course >= 0.9 * course[-1])) / marks,
        "iou_at_first_mark": course[0],
        "map_grid": held["map"][:20] * 2 - 1,
        "base_grid": plain[:20],
        "controlled_grid": controlled[:20],
        "unlabelled_grid": unlabelled[:20],
    }
