"""DDMI: latent diffusion of functions, by an autoencoder whose decoder is read at coordinates.

D2C-VAE: z = E(x), Xi^1, Xi^2, Xi^3 = D(z) at 2 x 2, 4 x 4 and 8 x 8, p_k(c) = Xi^k read at c, h_1 = MLP(p_1),
h_k = MLP([h_{k-1}, p_k]) -> value(c); then diffusion of z. The data are functions: digits as cosine series of 5 x 5 terms, so that
the truth is known at every resolution. All models are given pictures of 8 x 8.

`grid` is trained at the points of these alone: what is read between them must be better than the truth's nearest point.
`random_places` and `one_scale`, which has the finest field alone, are trained with as many values at random places, which
continuous data have, and must then be as good between the points as at them. The finest field is as fine as the pictures, as in
the paper: a field says the same everywhere beyond its outermost points, and with one of 4 x 4 this alone (32 dB for the truth
itself) makes the quarter next to the border worse, so that 1.4 dB were lost between the points at random places.

That a hierarchy of fields is better than one field was expected and is not so here: for functions of 5 x 5 terms the finest field
alone is .8 dB better (`gain_of_hierarchy`), and with fields of 2 x 2 and 4 x 4 it was .2 dB better at the points and .3 dB
worse between them. What random places gain between the points over the points alone is bound in its place.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import dctn

import diffjax
from diffjax import data, latent, losses, metrics, networks, processes, solvers, times
from diffjax.networks import cell_centres
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most
from experiments.scale.isolation import Net, init

RECIPE = Recipe(
    ledger=250,
    paper="arXiv:2401.12517",
    claim="trained at 8 x 8 it decodes at 16 x 16 and 32 x 32 better than nearest upsampling of the truth, better still if trained "
    "at random places, then as well as at 8 x 8; samples are as good as reconstructions",
    expect={
        "gain_over_nearest_16": at_least(1.0),
        "gain_over_nearest_32": at_least(1.0),
        "gain_of_random_places": at_least(0.5),
        "loss_between_points_at_random_places": at_most(1.0),
        "samples_over_reconstructions_mmd": at_most(2.0),
    },
    minutes=2,
)
TERMS, SIZES, PROCESS = 5, (8, 16, 32), processes.rectified()


def series(x):
    """The first cosine coefficients of pictures [N, 8, 8, 1], which are the function's values at the centres of their pixels."""
    scale = np.where(np.arange(8) > 0, 1.0, 0.5) / 8
    a = dctn(np.asarray(x[..., 0], np.float64), axes=(1, 2)) * scale[None, :, None] * scale[None, None]
    return jnp.asarray(a[:, :TERMS, :TERMS], jnp.float32)


def values(a, coords):
    """The functions of the coefficients a [N, k, k] at coords [M, 2], [N, M, 1]."""
    waves = jnp.cos(jnp.pi / 2 * (coords[..., None] + 1) * jnp.arange(TERMS, dtype=coords.dtype).reshape(1, 1, -1))
    return jnp.einsum("bij,ni,nj->bn", a, waves[:, 0], waves[:, 1])[..., None]


def pictures(a, n):
    return values(a, cell_centres(n, n)).reshape(-1, n, n, 1)


def anywhere(loss):
    """The loss of an autoencoder with the picture compared at 64 random places instead of its own."""

    def compare(key, autoencoder, x, a, items=None):
        k_latent, k_place = jax.random.split(key)
        z, of_latent, aux = loss.latent(k_latent, autoencoder, x, items)
        coords = jax.random.uniform(k_place, (64, 2), minval=-1, maxval=1)
        return losses.squared(values(a["series"], coords), autoencoder.apply("decode", z, coords)) + of_latent, aux

    return compare


def run(preset):
    full = preset == "full"
    steps, updates, n, seeds = (700, 2000, 1000, 1) if full else (2, 2, 20, 1)
    digits = data.load("digits")
    a, held, other = (series(digits.read(split)["x"]) for split in ("train", "test", "classifier"))
    x, truth = pictures(a, 8), {size: pictures(held, size) for size in SIZES}
    peak = float(x.max() - x.min())
    psnr = lambda y, size: -10 * np.log10(float(jnp.mean((y - truth[size]) ** 2)) / peak**2)

    grid = losses.autoencoder_loss(losses.squared, kl=1e-4)
    kinds = {  # which scales, how trained, from how many first weights
        "grid": ((2, 1, 0), grid, 1),
        "random_places": ((2, 1, 0), anywhere(grid), seeds),
        "one_scale": ((0,), anywhere(grid), seeds),
    }
    everywhere = jnp.concatenate([cell_centres(size, size) for size in SIZES])
    ends = np.cumsum([size**2 for size in SIZES])[:-1]

    def read(y):  # what was decoded everywhere, as pictures by their size
        parts = zip(SIZES, jnp.split(y, ends, axis=1), strict=True)
        return {size: part.reshape(-1, size, size, 1) for size, part in parts}

    autos, decoded, quality, out = {}, {}, {}, {}
    for name, (scales, loss, starts) in kinds.items():
        make = networks.autoencoder(
            networks.ImplicitAutoencoder(
                widths=(8, 16, 24),
                latent_channels=8,
                features=16,
                scales=scales,
                width=32,
                point_blocks=3,
                out_channels=1,
            )
        )
        train = trainer(make, loss, steps, rate=3e-3)
        found = [train(make.init(jax.random.key(k), x[:1]), {"x": x, "series": a}, k) for k in range(starts)]
        decode = jax.jit(lambda auto, z: auto.apply("decode", z, everywhere))
        encode = jax.jit(lambda auto, x: auto.encode(x).mean)
        drawn = [read(decode(make(p), encode(make(p), truth[8]))) for p in found]
        autos[name], decoded[name] = make(found[0]), drawn[0]
        quality[name] = np.array([[psnr(y[size], size) for size in SIZES] for y in drawn])
        out |= {f"{name}_psnr_{size}": q for size, q in zip(SIZES, quality[name].mean(0), strict=True)}
    for size in SIZES[1:]:
        up = lambda how, size=size: jax.image.resize(truth[8], (len(held), size, size, 1), how)
        out |= {f"{how}_psnr_{size}": psnr(up(how), size) for how in ("nearest", "bilinear", "bicubic")}

    # diffusion of the latents
    space = latent.latent_space(autos["random_places"], x)
    z = space.encode_all(np.asarray(x))
    f = networks.from_linen(Net(128 if full else 8, 4, 10))
    model = lambda p: diffjax.denoiser(f, PROCESS, diffjax.from_velocity, p, null=10)
    label = digits.read("train")["label"]
    p = trainer(model, losses.flow_matching(label_drop=0.0), updates, batch=128)(
        init(f, 1, z.shape[1:]), {"x": z, "label": label}
    )
    start = PROCESS.prior(jax.random.key(4), (n, *z.shape[1:]))
    codes = jax.jit(diffjax.sample)(
        jax.random.key(3), model(p).bind(jnp.arange(n) % 10), solvers.heun(PROCESS, times.uniform(20)), start
    )
    samples = space.decode_all(codes)
    mmd = metrics.mmd(np.concatenate([truth[8], pictures(other, 8)]))
    score = lambda y: metrics.score(mmd, np.asarray(y))
    floor = abs(score(x))
    ratio = max(score(samples), floor) / max(score(space.decode_all(z)), floor)
    latents = np.resize(np.asarray(codes) * space.scale + space.shift, (len(held), *z.shape[1:]))  # one compiled size
    larger = read(decode(space.autoencoder, jnp.asarray(latents)))[32]
    grey = digits.transform
    picture = lambda y: np.clip(np.asarray(y) * grey.std + grey.mean, 0, 16)  # of any size
    gains = (quality["random_places"] - quality["one_scale"]).mean(1)  # for each seed
    return {
        **out,
        "gain_over_nearest_16": out["grid_psnr_16"] - out["nearest_psnr_16"],
        "gain_over_nearest_32": out["grid_psnr_32"] - out["nearest_psnr_32"],
        "gain_of_hierarchy": gains.mean(),
        "gain_of_hierarchy_worst": gains.min(),
        "gain_of_random_places": (quality["random_places"].mean(0) - quality["grid"].mean(0))[1:].mean(),
        "loss_between_points_at_random_places": out["random_places_psnr_8"] - out["random_places_psnr_32"],
        "mmd_floor": floor,
        "samples_mmd": score(samples),
        "reconstructions_mmd": score(space.decode_all(z)),
        "samples_over_reconstructions_mmd": ratio,
        "truth_grid": picture(truth[32][:6]),
        "random_places_grid": picture(decoded["random_places"][32][:6]),
        "samples_grid": picture(larger[:6]),
    }
