"""ControlNet: a trainable copy of the encoder of a frozen network reads a picture and adds to its skips.

The base is a flow on the digits that knows labels. One net is trained to read the edges of a picture, one its means over
4 x 4 squares, the base frozen, half of the labels left out:

    y' = y + Z_2(F(x + Z_1(c); copy)),   Z from zero,   for every skip and the bottleneck y

Then the base is given labels and hints of held-out pictures. The control error is the root mean square difference of the
hint made of a sample from the hint that was given, over the same for the base, which sees the label alone. Two nets are
asked at once for edges and means of one picture, by the sum of what they add; neither has seen the other. A classifier
that saw other data says whether the samples still show their labels.
"""

import jax.numpy as jnp
import optax

from diffjax import adapters, training
from diffjax.training import flops
from experiments.control import bases, hints, runs
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=170,
    paper="arXiv:2302.05543",
    claim="a fresh net changes nothing and has a gradient; trained, the edges are followed with <= 0.3 of the base's error, "
    "the base bit-identical; two nets add",
    expect={
        "start_difference": at_most(0.0),
        "gradient_of_zero_convolutions": at_least(1e-4),
        "base_moved": at_most(0.0),
        "edge_error_over_base": at_most(0.3),
        "accuracy_over_base": at_least(0.98),
        "means_error_over_base": at_most(0.4),
        "both_edge_error_over_base": at_most(0.4),
        "both_means_error_over_base": at_most(0.4),
        "cost_over_encoder": at_most(1.3),
    },
    minutes=2,
)


def run(preset):
    full = preset == "full"
    steps, n, sampling = (1800, 360, 12) if full else (2, 4, 2)
    base = bases.load("unet", preset)
    seen, held = bases.digits("train"), runs.first(bases.digits("test"), n)
    classify = bases.judge(full)
    net = adapters.controlnet((16,))
    maker = {"edge": hints.edges, "means": hints.low_resolution}

    few = runs.first(seen, 16)
    few = {**few, "hint": hints.edges(few["x"])}
    fn, fresh = runs.beside(base, few, hint=net)
    zeros = runs.start_gradients(base, fn, fresh, few)["hint"]["zero"]
    train = runs.trainer_of(base, fn, steps, drop=0.5)
    trained = {name: train(fresh, {**seen, "hint": make(seen["x"])}) for name, make in maker.items()}

    together = adapters.adapt(base.fn, edge=net, means=net)
    own = {"base": base.params, "adapters": {name: params["adapters"]["hint"] for name, params in trained.items()}}
    given = {name: make(held["x"]) for name, make in maker.items()}
    cond = {"label": held["label"], **given}

    def draw(**weights):
        weights = {name: jnp.float32(weights.get(name, 0)) for name in maker}
        denoiser = base.denoiser({**own, "weights": weights}, together)
        return runs.draw(denoiser, cond, held["x"].shape, steps=sampling)

    plain, edge, means, both = draw(), draw(edge=1), draw(means=1), draw(edge=1, means=1)
    error = lambda name, x: hints.far(maker[name](x), given[name]).mean()
    right = lambda x: classify.accuracy(x, held["label"])
    return {
        "start_difference": runs.start_difference(base, fn, fresh, few),
        "gradient_of_zero_convolutions": optax.tree.norm(zeros),
        "base_moved": max(runs.moved(base.params, params["base"]) for params in trained.values()),
        "cost_over_encoder": cost(base, fn, fresh, few),
        "edge_error": error("edge", edge),
        "edge_error_over_base": error("edge", edge) / error("edge", plain),
        "means_error_over_base": error("means", means) / error("means", plain),
        "both_edge_error_over_base": error("edge", both) / error("edge", plain),
        "both_means_error_over_base": error("means", both) / error("means", plain),
        "accuracy": right(edge),
        "accuracy_over_base": right(edge) / right(plain),
        "parameters_over_base": training.state.count_params(fresh["adapters"])
        / training.state.count_params(base.params),
        "held_out_grid": held["x"][:20],
        "base_grid": plain[:20],
        "edge_grid": edge[:20],
        "means_grid": means[:20],
        "both_grid": both[:20],
    }


def cost(base, fn, params, batch):
    """Operations that the net adds, over those of the base up to its middle."""
    t, cond = jnp.full(len(batch["x"]), 0.5), training.condition(batch)
    own = {"label": cond["label"]}
    count = lambda f, *args: flops.count(f, *args).total
    whole = count(base.fn, base.params, batch["x"], t, own)
    copy = adapters.copies.encoder(base.params)
    half = lambda p, x, t, c: adapters.copies.features(adapters.Site(base.fn, p, x, t, c, None), copy, {})
    return (count(fn, params, batch["x"], t, cond) - whole) / count(half, base.params, batch["x"], t, own)
