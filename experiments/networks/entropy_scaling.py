"""Attention-entropy scaling: pictures of other sizes than those of training, without training.

The entropy of attention grows with the number of tokens N as log N minus what the logits take away, so that each token looks at
relatively more of a larger picture than it was trained to. Logits times sqrt(log N / log T), with T tokens in training, keep
its share of log N. Whether a picture suffers depends on what attention must decide: here, that there is one object. A scene is
dark but for one lit cell, wherever it is and however large the scene. A transformer without positions learns scenes of 8 x 8
cells, a token each, where tokens can know of an object elsewhere through attention alone. It draws scenes of 4 x 4 and of
16 x 16 cells, as it is and scaled, through the taps of its logits. What goes wrong without is what the paper saw in pictures:
objects are missing in small scenes, and repeated in large ones.

`share_error_*` is |entropy / log N - that at T|, the mean over sizes, layers, heads and noise levels, on noised scenes of
each size. `count_*` is the mean number of objects drawn (1 in the data) and `count_error_*` the mean of |objects - 1|, over
pictures, seeds (and sizes). `worst_*` is the largest ratio over seeds and sizes. As a control `inverted` divides the logits by
the factor: changing them the other way must draw worse than not changing them.

Spectra of photographs, drawn by a network with rotary positions after as short a training, could not tell scaled from plain
(1.01 of its error): there the size of training itself is far from the data, and little hangs on the entropy.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import losses, networks, solvers, times
from diffjax.times import laws
from experiments.networks.flow import PROCESS, denoiser, sample, train
from experiments.recipe import Recipe, at_least, at_most, between

RECIPE = Recipe(
    ledger=108,
    paper="arXiv:2306.08645",
    claim="at other sizes than that of training, scaled logits keep the entropy of attention nearer to its trained share and the "
    "number of objects nearer to the data, at every size and seed; at the size of training nothing changes",
    expect={
        "share_error_scaled_over_plain": at_most(0.7),
        "count_error_scaled_over_plain": at_most(0.75),
        "worst_count_error_scaled_over_plain": at_most(1.0),
        "count_error_inverted_over_plain": at_least(1.0),
        "count_at_trained_size": between(0.95, 1.05),
        "changed_at_trained_size": at_most(0.0),
    },
    minutes=3,
)
SIDE, CELL, TAP = 16, 2, "blocks/attention/weights"  # pixels of a scene and of a cell, which is a patch
SIZES = {  # training steps, batch, width, depth, scenes, seeds, sampling steps, sides of the scenes
    "full": (800, 32, 32, 3, 64, 3, 16, (8, 32)),
    "tiny": (2, 4, 16, 1, 8, 1, 2, (8,)),
}


def scenes(key, count, side):
    """Dark scenes with one lit cell, [count, side, side, 1]."""
    cells = side // CELL
    lit = jax.nn.one_hot(jax.random.randint(key, (count,), 0, cells**2), cells**2).reshape(count, cells, cells, 1)
    return 2 * jnp.repeat(jnp.repeat(lit, CELL, 1), CELL, 2) - 1


def objects(x):
    """How many cells of each scene are lit, [n]."""
    n, side = x.shape[:2]
    cells = np.asarray(x).reshape(n, side // CELL, CELL, side // CELL, CELL).mean((2, 4))
    return (cells > 0).sum((1, 2))


def shares(f, params, sides, write):
    """Entropy of attention as a share of log N at each size, the mean over layers, heads and noise levels."""
    out = {}
    for side in sides:
        x0 = scenes(jax.random.key(4), 32, side)
        noise = jax.random.normal(jax.random.key(5), x0.shape)

        @jax.jit
        def share(t, x0=x0, noise=noise):
            _, taps = networks.tapped(f, read=TAP, write=write)(params, PROCESS.add_noise(x0, noise, t), t, None)
            return networks.attention_entropy(taps[TAP]) / jnp.log(taps[TAP].shape[-1])

        out[side] = np.mean([float(share(t)) for t in (0.2, 0.5, 0.8)])
    return out


@jax.jit
def loss(model, x0):
    """The flow's loss on scenes of any size, with the same times and noise for every model."""
    return losses.flow_matching(label_drop=0.0)(jax.random.key(8), model, x0, None)[0].mean()


def inverse(write):
    """The writer that divides where `write` multiplies."""
    return lambda logits: jnp.square(logits) / jnp.where(logits == 0, 1, write(logits))


def run(preset):
    steps, batch, width, depth, n, seeds, evaluations, sides = SIZES[preset]
    net = networks.DiT(width=width, depth=depth, heads=4, patch=CELL, positions=None, scan_layers=True)
    f = networks.from_linen(net)
    fit = train(net, laws.logit_normal(), lambda key: {"x": scenes(key, batch, SIDE)}, steps)
    solver = solvers.heun(PROCESS, times.uniform(evaluations))
    noise = lambda side: PROCESS.prior(jax.random.key(2), (n, side, side, 1))
    names = ("plain", "scaled", "inverted")
    share, count, error, lost = ({name: [] for name in names} for _ in range(4))
    grids, own, changed = {}, [], 0.0
    for seed in range(seeds):
        params = fit(seed)
        scaled = networks.entropy_scaling(f, params, jnp.zeros((1, SIDE, SIDE, 1)), 0.5, None)
        writers = {"plain": {}, "scaled": scaled, "inverted": {tap: inverse(w) for tap, w in scaled.items()}}
        trained = shares(f, params, (SIDE,), {})[SIDE]
        for name, write in writers.items():
            share[name].append([abs(v - trained) for v in shares(f, params, sides, write).values()])
            model = denoiser(networks.tapped(f, write=write), params)
            drawn = [sample(model, None, noise(side), solver) for side in sides]
            count[name].append([objects(x).mean() for x in drawn])
            error[name].append([np.abs(objects(x) - 1).mean() for x in drawn])
            lost[name].append([float(loss(model, scenes(jax.random.key(9), 2 * n, side))) for side in sides])
            grids |= {
                f"{name}_{side}_grid": np.clip(np.asarray(x[:8]), -1, 1) for side, x in zip(sides, drawn, strict=True)
            }
        plain, same = (
            sample(denoiser(networks.tapped(f, write=w), params), None, noise(SIDE), solver) for w in ({}, scaled)
        )
        own.append(objects(plain).mean())
        changed = max(changed, float(jnp.abs(plain - same).max()))
    share, count, error, lost = ({k: np.array(v) for k, v in d.items()} for d in (share, count, error, lost))
    by_side = lambda d, what: {
        f"{what}_{k}_{s}": a for k, v in d.items() for s, a in zip(sides, v.mean(0), strict=True)
    }
    return {
        **{f"share_error_{k}": v.mean() for k, v in share.items()},
        **by_side(count, "count"),
        **by_side(error, "count_error"),
        **by_side(lost, "loss"),
        "trained_share": trained,
        "share_error_scaled_over_plain": share["scaled"].mean() / share["plain"].mean(),
        "count_error_scaled_over_plain": error["scaled"].mean() / error["plain"].mean(),
        "worst_count_error_scaled_over_plain": (error["scaled"] / np.maximum(error["plain"], 1e-9)).max(),
        "count_error_inverted_over_plain": error["inverted"].mean() / error["plain"].mean(),
        "count_at_trained_size": np.mean(own),
        "changed_at_trained_size": changed,
        **{k: v for k, v in grids.items() if "_8_" not in k},
    }
