"""KL autoencoder: the first stage of latent diffusion, on crops of photographs.

    z ~ q(z | x) = N(mean(x), var(x)),   minimise |x - D(z)|^2 + 1e-6 KL(q || N(0, I)) / D

A crop of 32 x 32 x 3 becomes 8 x 8 x 12 numbers, a quarter of them. The networks stand beside a linear path that starts at the
principal components of 4 x 4 pixels, the best linear map there is, so `gain_over_linear_db` is what the networks learned; held-out
crops come from other parts of the photographs. The scaled latent has mean zero and deviation one per channel by streamed
moments, checked on draws; held-out crops have another contrast, and so another deviation. The autoencoder with a codebook, `vq4`,
is trained in the same way with moving averages and restarts of dead codes: 9 bits for 16 pixels; a perplexity near 512 would be
an evenly used book.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import latent, losses, metrics, networks
from experiments.latent.stages import crops, first_stage, psnr, train
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=16,
    paper="arXiv:2112.10752",
    claim="4x fewer numbers than pixels: held-out crops are reconstructed at 28 dB; the scaled latent has unit deviation",
    expect={
        "compression": at_least(4.0),
        "psnr_db": at_least(28.0),
        "gain_over_linear_db": at_least(0.0),
        "latent_deviation_error": at_most(0.01),
        "codes_used": at_least(0.5),
    },
    minutes=3,
)


def run(preset):
    full = preset == "full"
    photos = crops(full)
    x, test = (photos.read(split)["x"] for split in ("train", "test"))
    start, trained, _ = first_stage(photos, 250 if full else 2, **({} if full else {"widths": (8,)}))
    space = latent.latent_space(trained, x)
    z = space.encode_all(test)
    y = space.decode_all(z)
    same = space.encode_all(x, jax.random.key(2))
    drawn = space.decode_all(space.encode_all(test, jax.random.key(1)))
    first = latent.latent_space(start, x)
    linear = psnr(photos, test, first.decode_all(first.encode_all(test)))
    rms = lambda a: float(np.sqrt(np.mean(np.square(a))))

    tokens, picture, book = codes(photos, full)
    usage = metrics.score(metrics.code_usage(book), tokens)
    pixels = lambda a: np.asarray(photos.transform.decode(a[:32]))
    return {
        "compression": test[0].size / z[0].size,
        "psnr_db": psnr(photos, test, y),
        "psnr_of_draws_db": psnr(photos, test, drawn),
        "linear_psnr_db": linear,
        "gain_over_linear_db": psnr(photos, test, y) - linear,
        "round_trip_error": rms(y - test) / rms(test),
        "latent_mean_error": float(np.abs(same.mean((0, 1, 2))).max()),
        "latent_deviation_error": float(np.abs(same.std((0, 1, 2)) - 1).max()),
        "held_out_deviation": float(z.std()),
        "vq_psnr_db": psnr(photos, test, picture),
        "vq_bits_per_pixel": float(np.log2(book) * tokens[0].size / (test.shape[1] * test.shape[2])),
        **usage,
        "real_grid": pixels(test),
        "kl_grid": pixels(y),
        "vq_grid": pixels(picture),
    }


def codes(photos, full):
    """Tokens and reconstructions of the held-out crops by the autoencoder with a codebook, and the size of the book."""
    module = networks.preset("vq4", **({} if full else {"widths": (8,), "codes": 16}))
    make, x, test = networks.autoencoder(module), photos.read("train")["x"], photos.read("test")["x"]
    params = networks.start_linear(module, make.init(jax.random.key(0), x[:1]), x[:1000])
    loss = losses.autoencoder_loss(losses.squared, decay=0.9)
    encode = jax.jit(lambda params, x: make(params).encode(x).mean)
    least = np.inf
    for part in range(3 if full else 1):  # restarts: all codes at first, then those that died
        key = jax.random.key(part)
        params = {
            **params,
            "codebook": networks.restart_codes(key, params["codebook"], encode(params, x[:256]), least=least),
        }
        params = train(make, loss, params, {"x": x}, 50 if full else 2, batch=32, rate=1e-3, seed=part).params
        least = 0.05
    a = make(params)
    tokens = jax.jit(lambda a, x: a.encode_tokens(x))(a, jnp.asarray(test))
    return np.asarray(tokens), np.asarray(jax.jit(lambda a, t: a.decode_tokens(t))(a, tokens)), module.codes
