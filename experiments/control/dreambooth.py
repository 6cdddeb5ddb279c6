"""DreamBooth: a new subject from twelve pictures, by training of the whole network, with its class kept.

The subject are sevens in negative, with the caption `of digit SEVEN`: a word that no caption has, in the place of `a`. The whole
network is trained on twelve of them; beside their loss stands w times that on 200 sevens that the network drew itself, with
the caption of the class, `a digit SEVEN`, before it was trained,

    L = |v - v_theta(x, V)|^2 + w |v - v_theta(x_pr, c_pr)|^2,

with w = 1 (`kept`) and w = 0 (`lost`). `subject_*` is the accuracy of a judge on pictures of the subject, taken in negative
again; `class_*` that on pictures of the class, which shall be sevens as before, `others_*` that on all other digits, of which
no picture was shown. `base_class` and `base_others` are those of the base.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import losses, solvers, times
from experiments.control import bases
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=None,
    paper="arXiv:2208.12242",
    claim="twelve pictures make a new subject of a class; the class itself is lost without the loss on the network's own "
    "samples, and kept with it",
    expect={
        "subject_kept": at_least(0.8),
        "class_kept": at_least(0.8),
        "class_lost": at_most(0.5),
        "subject_lost": at_least(0.8),
    },
    minutes=2,
)
SEVEN, PICTURES = 7, 12


def captions(label, subject=False):
    """`a digit X`, or `of digit X` for the subject."""
    tokens = bases.caption(label)["tokens"]
    return {"tokens": tokens.at[:, 0].set(bases.word("of")) if subject else tokens}


def run(preset):
    full = preset == "full"
    steps, n, own = (300, 100, 200) if full else (4, 9, 8)
    base, judge = bases.load("text", preset), bases.judge(full)
    digits = bases.digits("train")
    pictures = -digits["x"][digits["label"] == SEVEN][:PICTURES]
    solver = solvers.heun(bases.PROCESS, times.uniform(15))
    sample = jax.jit(lambda d, x: diffjax.sample(jax.random.key(2), d, solver, x))

    def drawn(params, label, **caption):
        noise = bases.PROCESS.prior(jax.random.key(3), (len(label), 8, 8, 1))
        return sample(base.denoiser(params).bind(captions(label, **caption)), noise)

    sevens = np.full(own, SEVEN)
    prior = drawn(base.params, sevens), captions(sevens)
    loss = losses.flow_matching(label_drop=0.0)
    arrays = {"x": pictures, **captions(np.full(len(pictures), SEVEN), subject=True)}
    cond = lambda batch: {"tokens": batch["tokens"]}

    label = np.repeat([k for k in range(10) if k != SEVEN], n // 9)
    figures, grids = {}, {}

    def judged(name, params):
        class_ = drawn(params, sevens)
        figures[f"class_{name}"] = judge.accuracy(np.asarray(class_), sevens)
        figures[f"others_{name}"] = judge.accuracy(np.asarray(drawn(params, label)), label)
        grids[f"{name}_class_grid"] = class_[:PICTURES]

    judged("base", base.params)
    for name, weight in (("lost", 0.0), ("kept", 1.0)):
        both = losses.prior_preservation(loss, *prior, weight=jnp.float32(weight))
        train = trainer(base.denoiser, both, steps, batch=12, rate=1e-3, decay=0.98, condition=cond)
        params = train(base.params, arrays)
        judged(name, params)
        subject = drawn(params, sevens, subject=True)
        figures[f"subject_{name}"] = judge.accuracy(-np.asarray(subject), sevens)
        grids[f"{name}_subject_grid"] = subject[:PICTURES]
    return {**figures, "pictures_grid": pictures, **grids}
