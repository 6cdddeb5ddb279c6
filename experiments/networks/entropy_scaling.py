"""Attention-entropy scaling: pictures of other sizes than those of training, without training.

The entropy of attention grows with the number of tokens N as log N minus what the logits take away, so that each token looks at
relatively more of a larger picture than it was trained to. Logits times sqrt(log N / log T), with T tokens in training, keep
its share of log N. Here a transformer with rotary positions learns grey crops of 16 x 16 pixels of photographs as 8 x 8
tokens, and draws pictures of 4 x 4 and of 16 x 16 tokens, as they are and scaled, through the taps of its logits.

`share_error_*` is |entropy / log N - that at T|, the mean over sizes, layers, heads and noise levels, on noised crops
of each size. `spectrum_error_*` is the mean distance of the logarithms of the radial power spectra of pictures drawn and
of crops of the same size, over frequencies and seeds (and sizes).

What holds: the entropy, whose share is six times nearer to the trained one at both sizes, and the identity. What does not:
samples nearer to the data. At 4 x 4 tokens the spectra are nearer (0.87 scaled, 1.12 plain), at 16 x 16 they are further away
(1.52, 1.24), and on average they are equal within what two seeds can tell (1.19, 1.18); the loss on the data moves by less
than half a percent (up at 4 x 4, down at 16 x 16). At the size of training the error is 0.98 already: after a minute the
network is far from its data, and what is left may have little to do with entropy. Untested: whether rotary positions are to
blame at 16 x 16, where tokens lie further apart than in training; the networks of the paper have none in their attention.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import data, losses, networks, solvers, times
from diffjax.times import laws
from experiments.networks.flow import PROCESS, denoiser, sample, train
from experiments.recipe import Recipe, at_most

RECIPE = Recipe(
    ledger=108,
    paper="arXiv:2306.08645",
    claim="at other sizes than that of training, scaled logits keep the entropy of attention nearer to its trained share and "
    "pictures nearer to the data; at the size of training nothing changes",
    expect={
        "share_error_scaled_over_plain": at_most(0.7),
        "spectrum_error_scaled_over_plain": at_most(1.0),
        "changed_at_trained_size": at_most(0.0),
    },
    minutes=2,
)
SIDE, TAP = 16, "blocks/attention/weights"
SIZES = {  # training steps, batch, width, pictures, seeds, sampling steps, sides of the pictures
    "full": (400, 32, 48, 128, 2, 8, (8, 32)),
    "tiny": (2, 4, 16, 8, 1, 2, (8,)),
}


def crops(pictures, side):
    """The upper left corners of the pictures, [n, side, side, 1]."""
    return pictures[:, :side, :side]


def spectrum(x):
    """Logarithm of the mean power in rings of frequency, one ring for each cycle per picture."""
    n = x.shape[1]
    window = np.hanning(n + 2)[1:-1]
    power = np.square(np.abs(np.fft.fft2(np.asarray(x)[..., 0] * np.outer(window, window)))).mean(0)
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(n, 1 / n), np.fft.fftfreq(n, 1 / n)))
    return np.log([power[(radius > k - 0.5) & (radius <= k + 0.5)].mean() for k in range(1, n // 2)])


def shares(f, params, pictures, sides, write):
    """Entropy of attention as a share of log N at each size, the mean over layers, heads and noise levels."""
    out = {}
    for side in sides:
        x0 = crops(pictures, side)
        noise = jax.random.normal(jax.random.key(5), x0.shape)

        @jax.jit
        def share(t, x0=x0, noise=noise):
            _, taps = networks.tapped(f, read=TAP, write=write)(params, PROCESS.add_noise(x0, noise, t), t, None)
            return networks.attention_entropy(taps[TAP]) / jnp.log(taps[TAP].shape[-1])

        out[side] = np.mean([float(share(t)) for t in (0.2, 0.5, 0.8)])
    return out


@jax.jit
def loss(model, x0):
    """The flow's loss on crops of any size, with the same times and noise for every model."""
    return losses.flow_matching(label_drop=0.0)(jax.random.key(8), model, x0, None)[0].mean()


def run(preset):
    steps, batch, width, n, seeds, evaluations, sides = SIZES[preset]
    photos = data.load("photos")
    train_x, test_x = (jnp.asarray(photos.read(s)["x"].mean(-1, keepdims=True)) for s in ("train", "test"))

    def draw(key):
        k_row, k_place = jax.random.split(key)
        rows = jax.random.randint(k_row, (batch,), 0, len(train_x))
        place = jax.random.randint(k_place, (batch, 2), 0, 32 - SIDE + 1)
        cut = lambda a, p: jax.lax.dynamic_slice(a, (p[0], p[1], 0), (SIDE, SIDE, 1))
        return {"x": jax.vmap(cut)(train_x[rows], place)}

    net = networks.DiT(width=width, depth=3, heads=4, positions=None, rope=networks.Rope(), scan_layers=True)
    f = networks.from_linen(net)
    fit, solver = train(net, laws.logit_normal(), draw, steps), solvers.heun(PROCESS, times.uniform(evaluations))
    noise = lambda side: PROCESS.prior(jax.random.key(2), (n, side, side, 1))
    errors, spectra, losses_of = ({"plain": [], "scaled": []} for _ in range(3))
    grids, changed = {}, 0.0
    for seed in range(seeds):
        params = fit(seed)
        writers = {"plain": {}, "scaled": networks.entropy_scaling(f, params, crops(test_x[:1], SIDE), 0.5, None)}
        trained = shares(f, params, test_x[:64], (SIDE,), {})[SIDE]
        for name, write in writers.items():
            found = shares(f, params, test_x[:64], sides, write)
            errors[name] += [abs(v - trained) for v in found.values()]
            model = denoiser(networks.tapped(f, write=write), params)
            for side in sides:
                losses_of[name].append(float(loss(model, crops(test_x[:256], side))))
                x = sample(model, None, noise(side), solver)
                spectra[name].append(np.abs(spectrum(x) - spectrum(crops(test_x, side))).mean())
                grids[f"{name}_{side}_grid"] = np.clip(np.asarray(x[:8]), -1, 1)
        own = [
            sample(denoiser(networks.tapped(f, write=w), params), None, noise(SIDE), solver) for w in writers.values()
        ]
        changed = max(changed, float(jnp.abs(own[0] - own[1]).max()))
        reference = np.abs(spectrum(own[0]) - spectrum(crops(test_x, SIDE))).mean()
    mean = lambda values: {k: np.mean(v) for k, v in values.items()}
    share, seen = mean(errors), mean(spectra)
    by_side = lambda values: {k: np.reshape(v, (seeds, -1)).mean(0) for k, v in values.items()}
    sized, lost = by_side(spectra), by_side(losses_of)
    return {
        **{f"share_error_{k}": v for k, v in share.items()},
        **{f"spectrum_error_{k}": v for k, v in seen.items()},
        **{f"spectrum_error_{k}_{side}": v for k, a in sized.items() for side, v in zip(sides, a, strict=True)},
        **{f"loss_scaled_over_plain_{s}": a for s, a in zip(sides, lost["scaled"] / lost["plain"], strict=True)},
        "trained_share": trained,
        "spectrum_error_at_trained_size": reference,
        "share_error_scaled_over_plain": share["scaled"] / share["plain"],
        "spectrum_error_scaled_over_plain": seen["scaled"] / seen["plain"],
        "changed_at_trained_size": changed,
        **{k: v for k, v in grids.items() if "_8_" not in k},
    }
