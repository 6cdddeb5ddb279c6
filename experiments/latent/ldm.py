"""Latent diffusion: class-conditional crops of photographs, in the latents of an autoencoder and in pixels.

    z = (E(x) - shift) / scale,   v-prediction on z with the class by cross-attention,   x = D(scale z + shift)

The autoencoder keeps a quarter of the numbers (see `latent/kl_autoencoder`), the second stage is a U-Net at 8 x 8. The pixel model
is a U-Net of the same kind at 32 x 32, trained for as many seconds, without compilation, as autoencoder and latent model
together: a first chunk of its steps is timed, which gives their number. So the number varies with the machine.

Scores are Frechet distances in a fixed random convolutional network. The references are crops of the training part, because so
does a short run learn: held-out crops are of other places of the two photographs, and the training crops themselves are as far
from them as samples are (`floor_held_out`). `floor` is the distance of other training crops. A judge trained on other crops reads
the class of the samples.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import latent, losses, metrics, networks, processes, solvers
from experiments.latent.stages import crops, first_stage, psnr, train
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=16,
    paper="arXiv:2112.10752",
    claim="at equal training time, first stage included, latent samples score better than those of a pixel model, and are "
    "drawn in less than half the time; the class given by cross-attention is read off more than 90 % of them",
    expect={
        "frechet_over_pixel_model": at_most(1.0),
        "seconds_over_pixel_model": at_most(1.05),
        "sampling_speedup": at_least(2.0),
        "class_agreement": at_least(0.9),
    },
    minutes=4,
)
PROCESS = processes.cosine()
NETS = {
    "latent": networks.UNet(widths=(48,), blocks=1, attention=(0,), head_size=16, token_size=2),
    "pixel": networks.UNet(widths=(16, 32, 64), blocks=1, attention=(2,), head_size=16, token_size=2),
}


def tokens(label):
    """The class as the one token that the network attends to."""
    return {"tokens": jax.nn.one_hot(jnp.asarray(label), 2)[:, None, :]}


def parts(net):
    """`(network, model, loss)` of a diffusion model."""
    fn = networks.from_linen(net)
    model = lambda params: diffjax.denoiser(fn, PROCESS, diffjax.from_v, params)
    return fn, model, losses.v_prediction(label_drop=0.0)


def condition(batch):
    """The class of a batch as tokens, if it has one."""
    return tokens(batch["label"]) if "label" in batch else None


@jax.jit
def draw(key, denoiser, solver, x):
    return diffjax.sample(key, denoiser, solver, x)


def seconds(f, repeats):
    """The least of some timings of a call that is compiled."""
    f()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(f())
        found.append(time.perf_counter() - begin)
    return min(found)


def run(preset):
    full = preset == "full"
    stage, steps, batch, n, sampling = (50, 1200, 32, 400, 20) if full else (2, 2, 4, 4, 2)
    small = {} if full else {"widths": (8,)}
    photos = crops(full)
    rows, test, third = (photos.read(split) for split in ("train", "test", "classifier"))
    n = min(n, len(test["x"]))
    order = np.random.default_rng(0).permutation(len(rows["x"]))
    real, others = rows["x"][order[:n]], rows["x"][order[n : 2 * n]]
    label, figures = np.asarray(rows["label"][order[:n]]), {}

    _, auto, spent = first_stage(photos, stage, **small)
    figures["first_stage_seconds"] = spent
    space = latent.latent_space(auto, rows["x"])
    data, samples, clocks = {"latent": space.encode_all(rows["x"]), "pixel": rows["x"]}, {}, {}
    for name, x in data.items():
        net = NETS[name] if full else NETS[name].clone(widths=(8,) * len(NETS[name].widths), head_size=8)
        fn, model, loss = parts(net)
        start = fn.init(jax.random.key(1), x[:1], jnp.zeros(1), tokens([0]))
        fitted = functools.partial(
            train,
            model,
            loss,
            start,
            {"x": x, "label": rows["label"]},
            batch=batch,
            rate=2e-3,
            seed=2,
            condition=condition,
        )
        if name == "latent":
            count, chunk = steps, 50
        else:
            chunk = 10 if full else 2
            pace = min(fitted(chunk, chunk=chunk).seconds for _ in range(2)) / chunk
            count = chunk * max(round(spent / pace / chunk), 1)
        found = fitted(count, chunk=chunk)
        if name == "latent":
            spent += found.seconds
        figures |= {f"{name}_seconds": found.seconds, f"{name}_steps": count}
        solver, denoiser = solvers.recommended(PROCESS, sampling), model(found.params)
        noise = PROCESS.prior(jax.random.key(3), (n, *x.shape[1:]))
        finish = jax.jit(space.decode) if name == "latent" else lambda y: y
        sample = lambda label, noise, d=denoiser, s=solver, f=finish: f(
            draw(jax.random.key(4), d.bind(tokens(label)), s, noise)
        )
        samples[name] = np.asarray(sample(label, noise))
        clocks[name] = seconds(lambda f=sample, noise=noise: f(label[:32], noise[:32]), 2)

    frechet = metrics.frechet(real, metrics.random_convolution())
    held_out = metrics.frechet(test["x"][:n], metrics.random_convolution())
    judge = metrics.classifier(third["x"], third["label"], steps=300 if full else 3, width=16)
    scores = {name: metrics.score(frechet, x) for name, x in samples.items()}
    decoded = space.decode_all(space.encode_all(real))
    pixels = lambda x: np.asarray(photos.transform.decode(x[:24]))
    return {
        **figures,
        "seconds_over_pixel_model": spent / figures["pixel_seconds"],
        **{f"{name}_frechet": score for name, score in scores.items()},
        **{f"{name}_frechet_to_held_out": metrics.score(held_out, x) for name, x in samples.items()},
        "frechet_over_pixel_model": scores["latent"] / scores["pixel"],
        "floor": metrics.score(frechet, others),
        "floor_held_out": metrics.score(held_out, real),
        "decoded_frechet": metrics.score(frechet, decoded),
        "decoded_psnr_db": psnr(photos, real, decoded),
        "sampling_speedup": clocks["pixel"] / clocks["latent"],
        "class_agreement": judge.accuracy(samples["latent"], label),
        "pixel_class_agreement": judge.accuracy(samples["pixel"], label),
        "judge_accuracy_on_real": judge.accuracy(real, label),
        "real_grid": pixels(real),
        "latent_grid": pixels(samples["latent"]),
        "pixel_grid": pixels(samples["pixel"]),
    }
