"""Layerwise attention pooling: all layers of a frozen encoder as the condition, not its last one alone.

The captions are `bright SEVEN`, `dark SEVEN`: what digit, and whether it is shown in negative. The encoder is a frozen random
transformer of six layers that, as encoders may, forgets: from its fourth layer on nothing in it depends on the digit (each state
is replaced by its mean over the digits of a caption). So the digit can be read from the first layers alone. The states of all
layers, pooled for each token by attention across the layers, are the tokens of a flow; against them stands the same network
with the same pooling of the last layer only. Both poolings are trained with their flow.

`loss_ratio` is that of the losses on held-out pictures, the mean over two seeds, `digit_lap` and `digit_last` the accuracy of a
judge on what is drawn for captions, `dark_lap` and `dark_last` how often the picture is in negative where it is asked for.
`probe_first` and `probe_last` are the accuracy of a linear probe of the digit on the second and on the last layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

import diffjax
from diffjax import losses, networks, solvers, times
from experiments.control import bases
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=213,
    paper="arXiv:2510.12789",
    claim="with an attribute that only early layers of a frozen encoder hold, pooling of all layers gives a lower loss than the "
    "last layer, and pictures that have it",
    expect={
        "loss_ratio": at_most(0.97),
        "digit_lap": at_least(0.7),
        "digit_last": at_most(0.3),
        "dark_lap": at_least(0.9),
        "probe_first": at_least(0.95),
        "probe_last": at_most(0.15),
    },
    minutes=2,
)
LAYERS, WIDTH, KEEPS = 6, 32, 3  # the layers that know the digit: the first three


def encoder(rng):
    """The states of all captions in all layers.   [2, 10, 2 tokens, LAYERS, WIDTH]: dark or not, digit"""
    words = rng.normal(size=(12, WIDTH))
    h = np.stack([np.stack([np.stack([words[10 + dark], words[k]]) for k in range(10)]) for dark in range(2)])
    h = h + 0.5 * rng.normal(size=(2, WIDTH))  # positions
    states = []
    for layer in range(LAYERS):
        q, k, v, w1, w2 = (rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5 for _ in range(5))
        a = np.exp((h @ q) @ (h @ k).swapaxes(-1, -2) / WIDTH)
        h = h + a / a.sum(-1, keepdims=True) @ (h @ v)
        h = h + np.tanh(h @ w1) @ w2
        if layer >= KEEPS:
            h = np.broadcast_to(h.mean(1, keepdims=True), h.shape)
        h = h / np.sqrt(np.square(h).mean(-1, keepdims=True))
        states.append(h)
    return np.stack(states, axis=3).astype(np.float32)


POOL = networks.LayerPooling(heads=4, blocks=2, expand=2)
NET = networks.DiT(width=48, depth=3, heads=4, patch=2, token_size=WIDTH)


def pooled(params, x, t, cond, key=None):
    """The flow with the pooled layers as its tokens."""
    tokens = POOL.apply({"params": params["pool"]}, cond["layers"])
    return networks.from_linen(NET)(params["net"], x, t, {"tokens": tokens}, key)


def run(preset):
    full = preset == "full"
    steps, seeds, n = (1000, 2, 10) if full else (4, 1, 1)
    judge, states = bases.judge(full), encoder(np.random.default_rng(0))
    model = lambda p: diffjax.denoiser(pooled, bases.PROCESS, diffjax.from_velocity, p)
    condition = lambda batch: {"layers": batch["layers"]}
    loss = losses.flow_matching(label_drop=0.0)

    def captioned(split, layers, seed):
        digits = bases.numpy_digits(split)
        dark = np.random.default_rng(seed).integers(0, 2, len(digits["x"]))
        x = np.where(dark[:, None, None, None] == 1, -digits["x"], digits["x"])
        return {"x": x, "layers": states[dark, digits["label"]][:, :, layers]}

    solver = solvers.heun(bases.PROCESS, times.uniform(15))
    dark, label = np.repeat([0, 1], 10 * n), np.tile(np.repeat(np.arange(10), n), 2)
    noise = bases.PROCESS.prior(jax.random.key(4), (len(label), 8, 8, 1))
    draw = jax.jit(lambda d: diffjax.sample(jax.random.key(5), d, solver, noise))
    figures, grids, ends = {}, {}, {}
    for name, layers in (("lap", slice(None)), ("last", slice(-1, None))):
        arrays, held = captioned("train", layers, 0), captioned("test", layers, 1)
        held = {k: jnp.concatenate([jnp.asarray(a)] * 4) for k, a in held.items()}
        error = jax.jit(lambda p, held=held: loss(jax.random.key(9), model(p), held["x"], condition(held))[0].mean())
        train, ends[name] = trainer(model, loss, steps, rate=2e-3, condition=condition), []
        for seed in range(seeds):
            start = {
                "pool": POOL.init(jax.random.key(seed), arrays["layers"][:1])["params"],
                "net": networks.initialise(
                    NET, jax.random.key(10 + seed), arrays["x"][:1], jnp.zeros(1), {"tokens": jnp.zeros((1, 2, WIDTH))}
                ),
            }
            params = train(start, arrays, seed)
            ends[name].append(float(error(params)))
        x = np.asarray(draw(model(params).bind({"layers": states[dark, label][:, :, layers]})))
        upright = np.where(dark[:, None, None, None] == 1, -x, x)
        figures[f"digit_{name}"] = judge.accuracy(upright, label)
        figures[f"dark_{name}"] = np.mean((np.median(x, axis=(1, 2, 3)) > 0) == (dark == 1))
        figures[f"{name}_loss"] = np.mean(ends[name])
        figures[f"{name}_loss_spread"] = np.ptp(ends[name])
        grids[f"{name}_grid"] = x[:: max(n // 2, 1)]

    def probe(layer):
        """Fitted to the states of all captions with a little noise, tried on those without."""
        rng = np.random.default_rng(1)
        x, y = states[..., layer, :].reshape(20, -1), np.tile(np.arange(10), 2)
        noisy = np.concatenate([x + 0.01 * rng.normal(size=x.shape) for _ in range(10)])
        return LogisticRegression(max_iter=300).fit(noisy, np.tile(y, 10)).score(x, y)

    return {
        **figures,
        "loss_ratio": figures["lap_loss"] / figures["last_loss"],
        "probe_first": probe(1),
        "probe_last": probe(LAYERS - 1),
        **grids,
    }
