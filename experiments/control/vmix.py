"""VMix: values of attributes under the attention map that the caption has.

The base is a flow on the digits that knows a caption of three tokens. Embeddings e of two labels, thick or thin and bright or
dark, are lifted to as many tokens as the caption has; in every attention to the caption they give second values, which the
attention map A of the caption mixes too. Lift, Z and the projections of values are trained, the base is frozen:

    f = norm(L e) Z,  Z from zero,   A = softmax(Q K^T / sqrt(d)),   x^ = A V + A f W'

A digit is thick if it has more ink than the median of its class, dark if its light is halved. Then all four pairs of labels
are asked for under the captions of held-out digits, with the same noise. `right_thick` says how often the sample that should
be thick has more ink than the one that should be thin, `right_bright` how often a sample is bright or dark as asked for, each
a half by chance; `accuracy` how often a classifier that saw other data reads the digit of the caption, with the light
restored. The rival adds f to the tokens of the caption, so that it changes the attention map; it is trained alike.
The accuracy falls by 12 points, by 37 with the rival; it is not kept to 2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import adapters, losses, solvers, times
from diffjax.networks.layers import fan_in_uniform, plain_norm
from diffjax.networks.taps import tapped
from experiments.control import bases
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=132,
    paper="arXiv:2412.20800",
    claim="thick or thin and bright or dark are controlled, the first attention map bit-equal to the base's; fresh it is the "
    "base; the digit is read as often to 2 points, and no less often than when f is added to the caption",
    expect={
        "start_difference": at_most(0.0),
        "attention_map_difference": at_most(0.0),
        "base_moved": at_most(0.0),
        "right_thick": at_least(0.85),
        "right_bright": at_least(0.95),
        "accuracy_drop": at_most(0.02),
    },
    minutes=2,
)
DARK, BRIGHT = -0.8122831, 1.8478819  # the range of the digits


def light(x):
    """The picture's brightest value, 0 at black and 1 at the brightest of all.   [B, 8, 8, 1] -> [B]"""
    return ((x - DARK) / (BRIGHT - DARK)).max((1, 2, 3))


def ink(x):
    """How much of a picture is bright, its brightest value taken as one.   [B, 8, 8, 1] -> [B]"""
    relative = (lit(x, 1 / jnp.maximum(light(x), 0.1)) - DARK) / (BRIGHT - DARK)
    return jnp.clip(2 * relative - 0.5, 0.0, 1.0).mean((1, 2, 3))


def lit(x, by):
    """The picture with its light changed.   [B, 8, 8, 1], [B] -> [B, 8, 8, 1]"""
    return DARK + (x - DARK) * by[:, None, None, None]


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
    steps, n = (4000, 360) if full else (2, 20)
    base = bases.load("text", preset)
    seen, held = bases.digits("train"), jax.tree.map(lambda a: a[:n], bases.digits("test"))
    middle = jnp.stack([jnp.median(ink(seen["x"][seen["label"] == k])) for k in range(10)])
    thick = ink(seen["x"]) > middle[seen["label"]]
    arrays = {"x": [], "tokens": [], "mood": []}
    for bright in (False, True):
        every = jnp.full(len(thick), bright)
        arrays["x"].append(lit(seen["x"], jnp.where(every, 1.0, 0.5)))
        arrays["tokens"].append(bases.caption(seen["label"])["tokens"])
        arrays["mood"].append(labels(thick, every))
    arrays = {name: jnp.concatenate(parts) for name, parts in arrays.items()}

    asked = np.stack(np.meshgrid([0, 1], [0, 1]), -1).reshape(4, 1, 2).repeat(n, 1).reshape(-1, 2)  # thick, bright
    label = jnp.tile(held["label"], 4)
    cond = {**bases.caption(label), "mood": labels(*asked.T)}
    few = {name: a[:16] for name, a in cond.items()}
    noise = jnp.tile(bases.PROCESS.prior(jax.random.key(1), held["x"].shape), (4, 1, 1, 1))
    # in programs without fusion, because those of another program round in another way
    compiled = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
    at = lambda f, p, cond: compiled(f)(p, noise[:16], jnp.full(16, 0.5), cond)
    plain = {"tokens": few["tokens"]}
    first = "down_0_0/cross/weights"  # later attentions see other states
    read = lambda f, p, cond: at(tapped(f, read=first), p, cond)[1][first]

    figures, samples = {}, {"base": draw(base.denoiser().bind({"tokens": cond["tokens"]}), noise)}
    for name, adapter in {"vmix": adapters.value_mixing(), "added": Added()}.items():
        fn = adapters.adapt(base.fn, mood=adapter)
        fresh = jax.jit(fn.init)(jax.random.key(0), base.params, noise[:16], jnp.zeros(16), few)
        model = lambda p, fn=fn: base.denoiser(p, fn)
        loss = losses.flow_matching(label_drop=0.0)
        params = trainer(model, loss, steps, batch=32, rate=2e-3, trainable="^adapters/")(fresh, arrays)
        samples[name] = draw(model(params).bind(cond), noise)
        map_moved = jnp.abs(read(fn, params, few) - read(base.fn, base.params, plain)).max()
        if name == "vmix":
            moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), base.params, params["base"])
            figures["base_moved"] = max(map(float, jax.tree.leaves(moved)))
            figures["start_difference"] = jnp.abs(at(fn, fresh, few) - at(base.fn, base.params, plain)).max()
        figures["attention_map_difference" + ("" if name == "vmix" else "_added")] = map_moved

    classify = bases.judge(full)
    read_right = {
        name: float(classify.accuracy(lit(x, 1 / jnp.maximum(light(x), 0.1)), label)) for name, x in samples.items()
    }
    for name in ("vmix", "added"):
        x, end = samples[name], "" if name == "vmix" else "_added"
        much = ink(x).reshape(2, 2, n)  # by bright, thick
        figures["right_thick" + end] = (much[:, 1] > much[:, 0]).mean()
        figures["right_bright" + end] = ((light(x) > 0.75) == (asked[:, 1] == 1)).mean()
        figures["accuracy_drop" + end] = read_right["base"] - read_right[name]
    shown = [slice(k * n, k * n + 5) for k in range(4)]
    return {
        **figures,
        "accuracy_base": read_right["base"],
        "accuracy": read_right["vmix"],
        "base_grid": samples["base"][:20],
        "vmix_grid": jnp.concatenate([samples["vmix"][s] for s in shown]),
        "added_grid": jnp.concatenate([samples["added"][s] for s in shown]),
    }


@jax.jit
def draw(denoiser, x):
    """Samples from a noise, the same for every denoiser."""
    return diffjax.sample(jax.random.key(0), denoiser, solvers.heun(bases.PROCESS, times.uniform(12)), x)
