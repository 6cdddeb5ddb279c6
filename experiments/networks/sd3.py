"""SD3: rectified flow with biased times, and a transformer of two streams with one attention.

The path x_t = (1 - t) x0 + t eps is trained on its velocity eps - x0, with t drawn from a law that favours the middle. Times
of three laws are compared with the published distribution functions (Kolmogorov and Smirnov's test); the shift of times for
a larger picture, t' = k t / (1 + (k - 1) t) with k = sqrt(m / n), is the process with its noise times k.

Digits: a logit-normal law against the uniform one, of the same networks, four seeds and steps, by the MMD^2 of pixels for
five steps of Heun's method. The bandwidth is 4 of a typical distance of 11: with the median distance both laws are at
the noise of the score (2e-4) after 200 steps already.

Captions: two pictures of 4 x 4 pixels side by side, each of a shape and a colour, and a caption of six words in any order
of sides ("right blue cross left red bar"). The two streams (MM-DiT) are compared with one stream that reads the words
by cross-attention, of no fewer parameters and the same steps. A picture is judged by the nearest of all clean ones, side by
side, so that an attribute is right or wrong without a trained judge. MM-DiTs of growing width are compared by validation loss
and by accuracy.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from diffjax import data, losses, metrics, networks, processes, solvers, times
from diffjax.times import laws
from experiments.networks.flow import PROCESS, denoiser, sample, train
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=43,
    paper="arXiv:2403.03206",
    claim="drawn times follow the published densities; logit-normal times beat uniform ones at equal steps; joint attention "
    "follows captions better than cross-attention; a lower loss is a better metric across sizes",
    expect={
        "least_ks_p": at_least(0.01),
        "shift_error": at_most(1e-5),
        "uniform_over_logit_normal_mmd": at_least(1.5),
        "joint_accuracy": at_least(0.7),
        "joint_minus_cross_accuracy": at_least(0.1),
        "correlation_of_loss_and_error": at_least(0.8),
    },
    minutes=3,
)
COLOURS = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]], np.float32)
SHAPES = np.array([
    ["####", "#..#", "#..#", "####"],
    [".##.", "####", "####", ".##."],
    ["#..#", ".##.", ".##.", "#..#"],
    ["....", "####", "####", "...."],
])  # fmt: skip
MASKS = np.array([[[c == "#" for c in row] for row in shape] for shape in SHAPES], np.float32)
WORDS, LENGTH = 2 + len(COLOURS) + len(SHAPES), 6


# ---------------------------------------------------------------------------------------------------------- times


def distribution_functions(scale):
    """The distribution functions of the paper: logit-normal (0, 1), mode, CosMap (Eqs. 19 to 21)."""
    u = np.linspace(0, 1, 200001)
    mode = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)  # decreases in u
    return {
        laws.logit_normal(0.0, 1.0): lambda t: stats.norm.cdf(np.log(t / (1 - t))),
        laws.mode(scale): lambda t: 1 - np.interp(t, mode[::-1], u[::-1]),
        laws.cosmap(): lambda t: 2 / np.pi * (np.arctan(2 * t - 1) + np.pi / 4),
    }


def least_p(n):
    """The least p-value over the laws."""
    draw = lambda law, i: np.asarray(law(jax.random.key(i), PROCESS, jnp.arange(n)), np.float64)
    found = distribution_functions(0.8).items()
    return min(stats.kstest(draw(law, i), cdf).pvalue for i, (law, cdf) in enumerate(found))


def shift_error():
    """Of the log-SNR of the shifted process against that at the shifted time."""
    t, worst = np.linspace(0.01, 0.99, 99), 0.0
    for k in (0.5, 2.0, 3.0):
        moved = k * t / (1 + (k - 1) * t)
        worst = max(worst, np.abs(processes.shifted(PROCESS, k).log_snr(t) - PROCESS.log_snr(moved)).max())
    return worst


# ------------------------------------------------------------------------------------------------------- training


def law_scores(full):
    """MMD of digits by networks trained with uniform and with logit-normal times, the mean over seeds."""
    steps, batch, n, seeds = (1000, 64, 1000, 4) if full else (2, 8, 20, 1)
    digits = data.load("digits")
    known = {k: jnp.asarray(v) for k, v in digits.read("train").items() if k in ("x", "label")}

    def draw(key):
        rows = jax.random.randint(key, (batch,), 0, len(known["x"]))
        return {"x": known["x"][rows].reshape(batch, -1), "cond": known["label"][rows].astype(jnp.int32)}

    net = networks.MLP(width=128 if full else 8, depth=3, num_classes=10)
    real = digits.read("test")["x"]
    score = jax.jit(metrics.mmd_to(real.reshape(len(real), -1), bandwidth=4.0))
    label, solver = jnp.arange(n) % 10, solvers.heun(PROCESS, times.uniform(5 if full else 2))
    x = PROCESS.prior(jax.random.key(2), (n, real[0].size))
    out = {}
    for name, law in {"uniform": laws.uniform(), "logit_normal": laws.logit_normal()}.items():
        fit = train(net, law, draw, steps)
        drawn = [sample(denoiser(networks.from_linen(net), fit(seed)), label, x, solver) for seed in range(seeds)]
        out[name] = [float(score(a)) for a in drawn]
    return out


# -------------------------------------------------------------------------------------------------------- captions


def pictures(kinds):
    """Clean pictures [n, 4, 8, 3] of (colour, shape) on the left and on the right, [n, 2, 2]."""
    halves = jnp.asarray(MASKS)[kinds[..., 1]][..., None] * jnp.asarray(COLOURS)[kinds[..., 0]][:, :, None, None]
    return jnp.concatenate([halves[:, 0], halves[:, 1]], axis=2)


def captioned(key, n):
    """Pictures with their captions as tokens [n, 6, WORDS + 6]: which word, and where in the caption."""
    k_kind, k_order, k_noise = jax.random.split(key, 3)
    kinds = jax.random.randint(k_kind, (n, 2, 2), 0, 4)
    sides = jnp.broadcast_to(jnp.arange(2)[None, :, None], (n, 2, 1))
    phrases = jnp.concatenate([sides, 2 + kinds[..., :1], 6 + kinds[..., 1:]], axis=-1)
    swap = jax.random.bernoulli(k_order, 0.5, (n, 1, 1))
    words = jnp.where(swap, phrases[:, ::-1], phrases).reshape(n, LENGTH)
    place = jnp.broadcast_to(jnp.eye(LENGTH)[None], (n, LENGTH, LENGTH))
    tokens = 2.0 * jnp.concatenate([jax.nn.one_hot(words, WORDS), place], axis=-1)
    x = pictures(kinds) + 0.1 * jax.random.normal(k_noise, (n, 4, 8, 3))
    return {"x": x, "cond": {"tokens": tokens}, "kinds": kinds}


def accuracy(x, kinds):
    """How many of the four attributes of a picture are those asked for, by the nearest clean half."""
    every = np.array(list(itertools.product(range(4), range(4))))
    clean = np.asarray(pictures(jnp.stack([every, every], axis=1)))[:, :, :4].reshape(16, -1)
    halves = np.asarray(x).reshape(-1, 4, 2, 4, 3).transpose(0, 2, 1, 3, 4).reshape(len(x), 2, 1, -1)
    nearest = every[np.square(halves - clean).sum(-1).argmin(-1)]
    return np.mean(nearest == np.asarray(kinds))


def caption_scores(net, full, steps, seeds):
    """Accuracy and validation loss per seed, the number of parameters, and some samples of the last."""
    n = 512 if full else 16
    draw = functools.partial(captioned, n=64 if full else 8)
    held = captioned(jax.random.key(7), n)
    fit = train(net, laws.logit_normal(), lambda key: {k: v for k, v in draw(key).items() if k != "kinds"}, steps)
    solver = solvers.heun(PROCESS, times.uniform(10 if full else 2))
    validate = jax.jit(lambda d: losses.flow_matching(label_drop=0.0)(jax.random.key(8), d, held["x"], held["cond"])[0])
    right, loss = [], []
    for seed in range(seeds):
        params = fit(seed)
        model = denoiser(networks.from_linen(net), params)
        x = sample(model, held["cond"], PROCESS.prior(jax.random.key(2), held["x"].shape), solver)
        right.append(accuracy(x, held["kinds"]))
        loss.append(float(validate(model).mean()))
    return np.array(right), np.array(loss), networks.parameter_count(params), x


def run(preset):
    full = preset == "full"
    steps, seeds = (600, 1) if full else (2, 1)
    word = WORDS + LENGTH
    fields = dict(depth=3, heads=4, token_size=word, scan_layers=True)
    cross = networks.DiT(width=64 if full else 8, **fields)
    joint = {w: networks.MMDiT(width=w, sinusoids=64, qk_norm=True, **fields) for w in ((16, 28, 48) if full else (8,))}
    law = law_scores(full)
    found = {w: caption_scores(net, full, steps, seeds) for w, net in joint.items()}
    other = caption_scores(cross, full, steps, seeds)
    best = found[max(found)]
    loss, error = (np.array([v for f in found.values() for v in g(f)]) for g in (lambda f: f[1], lambda f: 1 - f[0]))
    return {
        "least_ks_p": least_p(20000 if full else 500),
        "shift_error": shift_error(),
        **{f"{name}_mmd": np.mean(v) for name, v in law.items()},
        **{f"{name}_mmd_spread": np.std(v) for name, v in law.items()},
        "uniform_over_logit_normal_mmd": np.mean(law["uniform"]) / np.mean(law["logit_normal"]),
        "joint_accuracy": best[0].mean(),
        "cross_accuracy": other[0].mean(),
        "joint_minus_cross_accuracy": best[0].mean() - other[0].mean(),
        "joint_parameters": best[2],
        "cross_parameters": other[2],
        **{f"joint_{w}_accuracy": f[0].mean() for w, f in found.items()},
        **{f"joint_{w}_loss": f[1].mean() for w, f in found.items()},
        "cross_loss": other[1].mean(),
        "correlation_of_loss_and_error": np.corrcoef(loss, error)[0, 1] if len(loss) > 1 else 0.0,
        "joint_grid": np.asarray(best[3][:16]),
        "cross_grid": np.asarray(other[3][:16]),
    }
