"""VMix: values of attributes under the attention map that the caption has.

The base is a flow on digits half of which are dark, their light halved; it knows a caption of three tokens, and nobody can ask
it for a light. Embeddings e of two labels, thick or thin and bright or dark, are lifted to as many tokens as the caption has; in
every attention to the caption they give second values, which the attention map A of the caption mixes too. Lift, Z and the
projections of values are trained, the base is frozen:

    f = norm(L e) Z,  Z from zero,   A = softmax(Q K^T / sqrt(d)),   x^ = A V + A f W'

A digit is thick if it has more ink than the median of its class. All four pairs of labels are asked for under the captions of
held-out digits, with the same noise and with guidance, whose other side has neither caption nor labels; the base is
guided alike. `right_thick` says how often the sample that should be thick has more ink than the one that should be thin,
`right_bright` how often a sample is bright or dark as asked for, each a half by chance; `accuracy` how often a classifier that
saw other data reads the digit of the caption, with the light restored (`accuracy_data`: of the held-out digits). The rival adds f
to the tokens of the caption, so that it changes the attention map; it is trained alike. All are means of two trainings.

The rival was expected to lose more of the accuracy. Beside a base that had seen full light alone it did, 37 points to 12, but
such a base cannot draw dark digits: of what was asked for bright as many were read as before (.96), of what was asked for dark .72.
The adapter chooses among what the frozen network can draw. Beside this base both keep the accuracy, and what the rival lacks is
control of the light, with guidance or without (.83 right with value mixing, .57 with the rival).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import adapters, guidance, losses, solvers, times
from diffjax.networks.layers import fan_in_uniform, plain_norm
from diffjax.networks.taps import tapped
from experiments.control import bases, runs
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=132,
    paper="arXiv:2412.20800",
    claim="thick or thin and bright or dark are controlled, the first attention map bit-equal to the base's; fresh it is the "
    "base; the digit is read as often to 2 points. With f added to the caption the map moves and the light is not controlled",
    expect={
        "start_difference": at_most(0.0),
        "attention_map_difference": at_most(0.0),
        "base_moved": at_most(0.0),
        "right_thick": at_least(0.85),
        "right_bright": at_least(0.95),
        "accuracy_drop": at_most(0.02),
        "attention_map_difference_added": at_least(0.1),
        "right_bright_added": at_most(0.85),
    },
    minutes=3,
)
WHITE = 1.8478819  # the largest of the digits' numbers
WEIGHT = 3.0  # of guidance


def light(x):
    """The picture's brightest value, 0 at black and 1 at the brightest of all.   [B, 8, 8, 1] -> [B]"""
    return ((x - bases.BLACK) / (WHITE - bases.BLACK)).max((1, 2, 3))


def relit(x):
    """The picture in full light.   [B, 8, 8, 1] -> [B, 8, 8, 1]"""
    return bases.lit(x, 1 / jnp.maximum(light(x), 0.1))


def ink(x):
    """How much of a picture is bright, its brightest value taken as one.   [B, 8, 8, 1] -> [B]"""
    relative = (relit(x) - bases.BLACK) / (WHITE - bases.BLACK)
    return jnp.clip(2 * relative - 0.5, 0.0, 1.0).mean((1, 2, 3))


def labels(thick, bright):
    """Embeddings of two labels.   [B], [B] -> [B, 2, 16]"""
    table = np.random.default_rng(1).normal(size=(2, 2, bases.TOKENS)).astype(np.float32)
    return jnp.stack([table[0][thick.astype(int)], table[1][bright.astype(int)]], axis=1)


@dataclasses.dataclass(frozen=True)
class Added:
    """The rival: f is added to the tokens of the caption."""

    def init(self, key, site):
        """The lift and Z."""
        (_, n, size), length = site.own.shape, site.cond["tokens"].shape[1]
        return {"lift": fan_in_uniform(n)(key, (n, length)), "zero": jnp.zeros((size, bases.TOKENS))}

    def change(self, params, site, weight):
        """Other tokens."""
        f = plain_norm(jnp.einsum("bne,ns->bse", site.own, params["lift"])) @ params["zero"]
        more = adapters.strength(f, weight)
        return adapters.Change(inputs=lambda x, t, cond: (x, t, {**cond, "tokens": cond["tokens"] + more}))


def run(preset):
    full = preset == "full"
    steps, seeds, n = (2000, 2, 360) if full else (2, 1, 20)
    base = bases.load("lights", preset)
    seen, held = bases.lights("train"), runs.first(bases.digits("test"), n)
    much = ink(seen["x"])
    middle = jnp.stack([jnp.median(much[seen["label"] == k]) for k in range(10)])
    arrays = {
        "x": seen["x"],
        **bases.caption(seen["label"]),
        "mood": labels(much > middle[seen["label"]], seen["bright"]),
    }

    asked = np.stack(np.meshgrid([0, 1], [0, 1]), -1).reshape(4, 1, 2).repeat(n, 1).reshape(-1, 2)  # thick, bright
    label = jnp.tile(held["label"], 4)
    cond = {**bases.caption(label), "mood": labels(*asked.T)}
    few = {name: a[:16] for name, a in cond.items()}
    nothing = {"tokens": bases.caption(jnp.array([10]))["tokens"][0], "mood": jnp.zeros((2, bases.TOKENS))}  # f is zero
    noises = [jnp.tile(bases.PROCESS.prior(jax.random.key(1 + s), held["x"].shape), (4, 1, 1, 1)) for s in range(seeds)]
    others = [bases.PROCESS.prior(jax.random.key(10 + s), (4 * n, 8, 8, 1)) for s in range(seeds)]
    # in programs without fusion, because those of another program round in another way
    compiled = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
    at = lambda f, p, cond: compiled(f)(p, noises[0][:16], jnp.full(16, 0.5), cond)
    plain = {"tokens": few["tokens"]}
    first = "down_0_0/cross/weights"  # later attentions see other states
    read = lambda f, p, cond: at(tapped(f, read=first), p, cond)[1][first]

    guided = lambda d, cond: guidance.cfg(WEIGHT, {name: nothing[name] for name in cond})(d).bind(cond)
    figures, samples = {}, {"base": [draw(guided(base.denoiser(), {"tokens": cond["tokens"]}), x) for x in others]}
    for name, adapter in {"vmix": adapters.value_mixing(), "added": Added()}.items():
        fn = adapters.adapt(base.fn, mood=adapter)
        fresh = jax.jit(fn.init)(jax.random.key(0), base.params, noises[0][:16], jnp.zeros(16), few)
        model = lambda p, fn=fn: base.denoiser(p, fn)
        train = trainer(model, losses.flow_matching(label_drop=0.0), steps, batch=32, rate=5e-3, trainable="^adapters/")
        found = [train(fresh, arrays, seed) for seed in range(seeds)]
        samples[name] = [draw(guided(model(params), cond), x) for params, x in zip(found, noises, strict=True)]
        map_moved = jnp.abs(read(fn, found[0], few) - read(base.fn, base.params, plain)).max()
        if name == "vmix":
            figures["base_moved"] = runs.moved(base.params, found[0]["base"])
            figures["start_difference"] = jnp.abs(at(fn, fresh, few) - at(base.fn, base.params, plain)).max()
        figures["attention_map_difference" + ("" if name == "vmix" else "_added")] = map_moved

    classify = bases.judge(full)
    right = {name: np.array([classify.accuracy(relit(x), label) for x in parts]) for name, parts in samples.items()}
    for name in ("vmix", "added"):
        x, end = jnp.stack(samples[name]), "" if name == "vmix" else "_added"
        much = jax.vmap(ink)(x).reshape(seeds, 2, 2, n)  # by bright, thick
        figures["right_thick" + end] = (much[:, :, 1] > much[:, :, 0]).mean()
        figures["right_bright" + end] = ((jax.vmap(light)(x) > 0.75) == (asked[:, 1] == 1)).mean()
        figures["accuracy_drop" + end] = right["base"].mean() - right[name].mean()
    shown = [slice(k * n, k * n + 5) for k in range(4)]
    picked = {name: jnp.concatenate([parts[0][s] for s in shown]) for name, parts in samples.items()}
    return {
        **figures,
        "accuracy_drop_most": right["base"].mean() - right["vmix"].min(),
        "accuracy_base": right["base"].mean(),
        "accuracy_data": classify.accuracy(held["x"], held["label"]),
        **{f"{name}_grid": x for name, x in picked.items()},
    }


@jax.jit
def draw(denoiser, x):
    """Samples from a noise, the same for every denoiser."""
    return diffjax.sample(jax.random.key(0), denoiser, solvers.heun(bases.PROCESS, times.uniform(12)), x)
