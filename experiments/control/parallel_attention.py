"""PVA: parallel visual attention, by which a frozen inpainter fills a hole with the identity that references show.

The base is a flow on the digits that knows a caption, a mask and the picture without what the mask hides. Beside every
attention to the caption, another one attends to an encoding e of each reference; keys, values and encoder alone are trained:

    O = softmax(Q K^T / sqrt(d)) V + s softmax(Q K'^T / sqrt(d)) V',   K' = e W'_k,  V' = e W'_v,  W'_v from zero

Identity is the digit's class: the references are one to four other pictures of it, as a set. In training the holes are
rectangles and the caption says nothing. Then the lower six of eight rows of held-out pictures are hidden, the references are
other held-out pictures, and a classifier that saw other data reads the filled pictures. A caption of the class, which only
the base was trained with, shows what could be reached.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import adapters, losses, solvers, times
from experiments.control import bases, hints
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=134,
    paper="arXiv:2312.03556",
    claim="with another picture of the class as reference the class of the filled region is right >= 20 points more often; "
    "fresh, or with s = 0, the base is reproduced exactly",
    expect={
        "start_difference": at_most(0.0),
        "weight_zero_difference": at_most(0.0),
        "base_moved": at_most(0.0),
        "accuracy_gain_of_one": at_least(0.2),
        "accuracy_gain_of_four": at_least(0.2),
    },
    minutes=2,
)
MOST = 4  # references
HIDDEN = jnp.asarray([0.25, 0.0, 1.0, 1.0])  # of held-out pictures: all but the first two rows


def references(rng, label):
    """Indices [N, MOST] of other pictures of the same class."""
    chosen = np.empty((len(label), MOST), int)
    for i, k in enumerate(np.asarray(label)):
        others = np.flatnonzero((label == k) & (np.arange(len(label)) != i))
        chosen[i] = rng.choice(others, MOST)
    return chosen


def prepared(data, copies, rng, hole):
    """`copies` of each picture, with references, how many of them are shown, and a hole."""
    data = {name: np.asarray(a) for name, a in data.items()}
    chosen = np.concatenate([references(rng, data["label"]) for _ in range(copies)])
    shown = np.arange(MOST)[None] < rng.integers(1, MOST + 1, len(chosen))[:, None]
    flat = data["x"].reshape(len(data["x"]), -1)
    x = jnp.tile(data["x"], (copies, 1, 1, 1))
    silent = bases.caption(jnp.full(len(x), 10))["tokens"]
    return {"x": x, "tokens": silent, "image": hints.erased(x, hole(len(x))), "faces": flat[chosen], "shown": shown}


def condition(batch):
    """The base's condition, and that of the adapter."""
    own = {"tokens": jnp.asarray(batch["faces"]), "mask": jnp.asarray(batch["shown"])}
    return {"tokens": batch["tokens"], "image": batch["image"], "faces": own}


def run(preset):
    full = preset == "full"
    steps, n, copies, hidden = (2000, 360, 16, 64) if full else (2, 24, 1, 8)
    base, rng = bases.load("inpaint", preset), np.random.default_rng(0)
    seen = prepared(bases.digits("train"), copies, rng, lambda n: bases.holes(jax.random.key(1), n))
    test = jax.tree.map(lambda a: a[:n], bases.digits("test"))
    held = prepared(test, 1, rng, lambda n: hints.filled(jnp.tile(HIDDEN, (n, 1)), 8, 8))

    fn, few = (
        adapters.adapt(base.fn, faces=adapters.parallel_attention(hidden=hidden)),
        {k: a[:16] for k, a in held.items()},
    )
    fresh = jax.jit(fn.init)(jax.random.key(0), base.params, few["x"], jnp.zeros(16), condition(few))
    model = lambda p: base.denoiser(p, fn)
    loss = losses.flow_matching(label_drop=0.0)
    params = trainer(model, loss, steps, condition=condition, trainable="^adapters/")(fresh, seen)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), base.params, params["base"])

    # in programs without fusion, because those of another program round in another way
    compiled = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
    plainly = lambda f, p, cond: compiled(f)(p, few["x"], jnp.full(16, 0.5), cond)
    alone = {k: few[k] for k in ("tokens", "image")}
    difference = lambda p: jnp.abs(plainly(fn, p, condition(few)) - plainly(base.fn, base.params, alone)).max()

    def filled(denoiser, cond):
        """Samples in the hole, the picture elsewhere."""
        drawn = draw(denoiser.bind(cond), bases.PROCESS.prior(jax.random.key(1), held["x"].shape))
        return jnp.where(held["image"][..., 1:] > 0, drawn, held["x"])

    shown = lambda k: condition(held | {"shown": np.tile(np.arange(MOST) < k, (n, 1))})
    told = {**bases.caption(test["label"]), "image": held["image"]}
    samples = {
        "base": filled(base.denoiser(), {k: held[k] for k in ("tokens", "image")}),
        "caption": filled(base.denoiser(), told),
        "one": filled(model(params), shown(1)),
        "four": filled(model(params), shown(MOST)),
    }
    classify = bases.judge(full)
    accuracy = {name: float(classify.accuracy(x, test["label"])) for name, x in samples.items()}
    return {
        "start_difference": difference(fresh),
        "weight_zero_difference": difference({**params, "weights": {"faces": jnp.float32(0)}}),
        "base_moved": max(map(float, jax.tree.leaves(moved))),
        **{f"accuracy_{name}": value for name, value in accuracy.items()},
        "accuracy_gain_of_one": accuracy["one"] - accuracy["base"],
        "accuracy_gain_of_four": accuracy["four"] - accuracy["base"],
        "held_out_grid": held["x"][:20],
        "hidden_grid": held["image"][:20, ..., :1],
        "reference_grid": held["faces"][:20, 0].reshape(-1, 8, 8, 1),
        **{f"{name}_grid": x[:20] for name, x in samples.items()},
    }


@jax.jit
def draw(denoiser, x):
    """Samples from a noise, the same for every denoiser."""
    return diffjax.sample(jax.random.key(0), denoiser, solvers.heun(bases.PROCESS, times.uniform(12)), x)
