"""Latent diffusion: class-conditional crops of photographs, in the latents of an autoencoder and in pixels.

    z = (E(x) - shift) / scale,   v-prediction on z with the class by cross-attention,   x = D(scale z + shift)

The autoencoder keeps a quarter of the numbers (see `latent/kl_autoencoder`), the second stage is a U-Net at 8 x 8. The pixel model
is a U-Net of the same kind at 32 x 32 with as many training operations as autoencoder and latent model have together, counted in
their traced programs; seconds of training are reported beside them. Scores are Frechet distances in a fixed random convolutional
network against held-out crops; `floor_frechet` is that of as many training crops, `decoded_frechet` that of held-out crops that
went through the autoencoder. A judge trained on other crops reads the class of the samples.

The first claim fails in the committed run, which was cut to 300 steps of the latent model: 13.0 against 10.2 of the pixel model,
where training crops themselves have 9.0 against the held-out ones, so the score says little about the last steps towards the data.
The pixel model does not follow its class (52 %), the latent model does (93 %).
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import latent, losses, metrics, networks, processes, solvers, training
from diffjax.training import flops
from experiments.latent.stages import KL, crops, first_stage, psnr, train
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=16,
    paper="arXiv:2112.10752",
    claim="at equal training operations, first stage included, latent samples score better than those of a pixel model, and are "
    "drawn in less than half the time; the class given by cross-attention is read off more than 90 % of them",
    expect={
        "frechet_over_pixel_model": at_most(1.0),
        "operations_over_pixel_model": at_most(1.0),
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


def operations(model, loss, params, x, batch, steps):
    """Counted operations of that many training steps."""
    shape = {"x": jax.ShapeDtypeStruct((batch, *x.shape[1:]), np.float32)}
    shape |= {} if model_of_pictures(model) else {"label": jax.ShapeDtypeStruct((batch,), np.int32)}
    step = training.make_train_step(model, loss, training.adamw(1e-3), condition=condition)
    return steps * flops.model_flops(step, params, shape).total


def model_of_pictures(model):
    """Whether it is an autoencoder, which takes no class."""
    return isinstance(model, networks.AutoencoderOf)


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
    stage, steps, batch, n, sampling = (50, 300, 32, 400, 10) if full else (2, 2, 4, 4, 2)
    small = {} if full else {"widths": (8,)}
    photos = crops(full)
    rows, test, third = (photos.read(split) for split in ("train", "test", "classifier"))
    n = min(n, len(test["x"]))
    real, label = test["x"][:n], np.asarray(test["label"][:n])
    figures = {}

    begin = time.perf_counter()
    _, auto = first_stage(photos, stage, **small)
    space = latent.latent_space(auto, rows["x"])
    z = space.encode_all(rows["x"])
    figures["first_stage_seconds"] = time.perf_counter() - begin
    make = networks.autoencoder(auto.module)
    spent = operations(make, losses.autoencoder_loss(losses.squared, kl=KL), auto.params, rows["x"], 32, stage)

    data, samples, clocks = {"latent": z, "pixel": rows["x"]}, {}, {}
    for name, x in data.items():
        net = NETS[name] if full else NETS[name].clone(widths=(8,) * len(NETS[name].widths), head_size=8)
        fn, model, loss = parts(net)
        start = fn.init(jax.random.key(1), x[:1], jnp.zeros(1), tokens([0]))
        cost = operations(model, loss, start, x, batch, 1)
        if name == "latent":
            spent += cost * steps
            count = steps
        else:
            count = -(-spent // cost) if full else 2  # rounded up, in favour of the pixel model
            figures["operations_over_pixel_model"] = spent / (cost * count) if full else 1.0
        begin = time.perf_counter()
        chunk = max(count // 10, 1)
        params = train(model, loss, start, {"x": x, "label": rows["label"]}, chunk * -(-count // chunk), batch=batch, rate=2e-3,
                       seed=2, chunk=chunk, condition=condition)  # fmt: skip
        figures[f"{name}_seconds"] = time.perf_counter() - begin
        figures[f"{name}_steps"] = count
        solver, denoiser = solvers.recommended(PROCESS, sampling), model(params)
        noise = PROCESS.prior(jax.random.key(3), (n, *x.shape[1:]))
        finish = jax.jit(space.decode) if name == "latent" else lambda y: y
        sample = lambda label, noise, d=denoiser, s=solver, f=finish: f(
            draw(jax.random.key(4), d.bind(tokens(label)), s, noise)
        )
        samples[name] = np.asarray(sample(label, noise))
        clocks[name] = seconds(lambda f=sample, noise=noise: f(label[:32], noise[:32]), 2)

    frechet = metrics.frechet(real, metrics.random_convolution())
    judge = metrics.classifier(third["x"], third["label"], steps=300 if full else 3, width=16)
    scores = {name: metrics.score(frechet, x) for name, x in samples.items()}
    decoded = space.decode_all(space.encode_all(real))
    pixels = lambda x: np.asarray(photos.transform.decode(x[:32]))
    return {
        **figures,
        **{f"{name}_frechet": score for name, score in scores.items()},
        "frechet_over_pixel_model": scores["latent"] / scores["pixel"],
        "floor_frechet": metrics.score(frechet, rows["x"][:n]),
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
