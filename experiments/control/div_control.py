"""DivControl: one ControlNet for four kinds of pictures, and a fifth kind by its tailors alone.

The base, a transformer, is frozen; a copy of its first three blocks sees the picture (`diffjax.adapters.diversion`). Its matrices
of rank 64 are sums of rank-one parts: 48 learngenes, on for all, and 16 tailors, gated by the embedding of the instruction
that says what the picture shows: edges, the digit blurred, all but a quadrant, low resolution. All parts are trained together
on the four kinds. Then a fifth one, where the digit is bright, is learned from 100 pictures, by tailors and gates alone
(`tailors_*`), and by everything (`full_*`). Without further training it is `zero_shot_*`.

`*_fidelity` is one minus the distance of the silhouette of what is drawn to the one that was given, over the distance for
silhouettes of other digits; `fidelity_ratio` is that of tailors and gates over that of everything, `*_overlap` the overlap of
the silhouettes; `fidelity_*` are those of the four kinds, with their own hints. With 8 tailors and the rate of everything (a
quarter) the ratio was .85.
`start_error` is W(c) - W with all gates on, before training.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import adapters, losses, solvers, times, training
from diffjax.training.partial import named
from experiments.control import bases, hints
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=13,
    paper="DivControl (AAAI 2026)",
    claim="with all gates on the parts are the matrices; after training on four kinds of pictures a fifth one is learned by "
    "tailors and gates, less than a fifth of the numbers, to nine tenths of what training of everything reaches",
    expect={
        "start_error": at_most(1e-5),
        "fidelity_ratio": at_least(0.9),
        "trained_share": at_most(0.2),
        "fidelity_edges": at_least(0.3),
        "fidelity_low": at_least(0.3),
    },
    minutes=3,
)
EMBEDDINGS = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0].astype(np.float32)
KINDS = {
    "edges": hints.edges,
    "blur": lambda x: (hints.blur(x) + 1) / 2,
    "quadrant": lambda x: jnp.where(hints.quadrant(x.shape, np.zeros(len(x), int)) > 0, 0, (x + 1) / 2),
    "low": lambda x: (hints.low_resolution(x, 2) + 1) / 2,
    "silhouette": hints.mask,
}
NEW = "silhouette"


def told(kind, picture):
    """The condition of the adapter."""
    e = EMBEDDINGS[list(KINDS).index(kind)]
    return {"image": picture, "instruction": jnp.broadcast_to(e, (len(picture), len(e)))}


def run(preset):
    full = preset == "full"
    steps, few_steps, few, n = (900, 300, 100, 100) if full else (4, 4, 8, 4)
    base = bases.load("dit", preset)
    kind = adapters.diversion(blocks=3, tailors=16)
    fn = adapters.adapt(base.fn, div=kind)
    seen, held = bases.digits("train"), bases.digits("test")
    condition = lambda batch: {"label": batch["label"], "div": {k: batch[k] for k in ("image", "instruction")}}
    of = lambda kind, digits, at=slice(None): {
        **{k: a[at] for k, a in digits.items()},
        **told(kind, KINDS[kind](digits["x"][at])),
    }
    four = [of(name, seen) for name in KINDS if name != NEW]
    arrays = {k: jnp.concatenate([part[k] for part in four]) for k in four[0]}
    one = jax.tree.map(lambda a: a[:1], arrays)
    fresh = jax.jit(fn.init)(jax.random.key(0), base.params, one["x"], jnp.zeros(1), condition(one))
    model, loss = (lambda p: base.denoiser(p, fn)), losses.flow_matching(label_drop=0.0)
    train = trainer(model, loss, steps, rate=2e-3, condition=condition, trainable="^adapters/")
    params = train(fresh, arrays)

    solver = solvers.heun(bases.PROCESS, times.uniform(10))
    asked = {k: a[:n] for k, a in held.items()}
    noise = bases.PROCESS.prior(jax.random.key(1), (n, 8, 8, 1))
    sample = jax.jit(lambda d: diffjax.sample(jax.random.key(2), d, solver, noise))

    def drawn(params, name):
        cond = {"label": asked["label"], "div": told(name, KINDS[name](asked["x"]))}
        return sample(model(params).bind(cond))

    def fidelity(x, name):
        want = KINDS[name](asked["x"])
        got, other = KINDS[name](x), hints.shuffled(jax.random.key(3), want)
        return 1 - hints.far(got, want).mean() / hints.far(other, want).mean()

    figures = {f"fidelity_{name}": fidelity(drawn(params, name), name) for name in KINDS if name != NEW}
    new = of(NEW, seen, slice(few))
    tuned = {"zero_shot": params}
    for name, part, rate in (("tailors", r"^adapters/div/(tailors|gate)/", 4e-3), ("full", "^adapters/", 1e-3)):
        short = trainer(model, loss, few_steps, rate=rate, condition=condition, trainable=part)
        tuned[name] = short(params, new)
    pictures = {name: drawn(p, NEW) for name, p in tuned.items()}
    figures |= {f"{name}_fidelity": fidelity(x, NEW) for name, x in pictures.items()}
    figures |= {
        f"{name}_overlap": hints.overlap(hints.mask(x), hints.mask(asked["x"])).mean() for name, x in pictures.items()
    }
    own = fresh["adapters"]["div"]
    start = dict(named(base.params))
    count = training.state.count_params
    return {
        **figures,
        "fidelity_ratio": figures["tailors_fidelity"] / figures["full_fidelity"],
        "trained_share": (count(own["tailors"]) + count(own["gate"])) / count(own),
        "start_error": max(
            float(abs(w - start[path]).max()) for path, w in kind.matrices(own, jnp.ones(kind.tailors)).items()
        ),
        "gates": kind.gates(params["adapters"]["div"], EMBEDDINGS[:5]),
        "asked_grid": 2 * KINDS[NEW](asked["x"][:10]) - 1,
        **{f"{name}_grid": x[:10] for name, x in pictures.items()},
    }
