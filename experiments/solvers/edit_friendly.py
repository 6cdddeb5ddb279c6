"""Edit-friendly noise maps: the noise of a stochastic sampler that returns an image, drawn so that it can be edited.

Around an image x0 draw x_t = alpha_t x0 + sigma_t e_t with an independent e_t for every t; then, from noise to data,

    z_t = (x_{t-1} - mu_t(x_t)) / sigma_t,   x_{t-1} <- mu_t(x_t) + sigma_t z_t

Run the sampler again with these z from the same x_{T - skip}: the image. With another condition: the edit. The z of
independent e are larger than standard normal and each is opposed to the next, those of a path drawn by the sampler itself
(`path='markov'`) are white. The model of the pictures is the exact denoiser of a Gaussian mixture around real digits, the
statistics are those of a mixture in the plane, and the shift is seen with a convolution that wraps around.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import data, processes, solvers, testing, times
from experiments.recipe import Recipe, at_least, at_most, between
from experiments.solvers import digits_mixture

RECIPE = Recipe(
    ledger=236,
    paper="arXiv:2304.06140",
    claim="any image returns to 1e-5 in float32; z is large and anticorrelated; edits stay nearer to the source than resampling",
    expect={
        "reconstruction_error": at_most(1e-5),
        "reconstruction_error_of_noise": at_most(1e-5),
        "z_std": at_least(2.0),
        "z_correlation": at_most(-0.3),
        "markov_z_std": between(0.9, 1.1),
        "markov_z_correlation": between(-0.05, 0.05),
        "edit_distance_over_resampling": at_most(0.95),
        "accuracy_less_resampling": at_least(-0.02),
        "shift_error": at_most(1e-4),
    },
    minutes=1,
)
PROCESS = processes.cosine()
PLANE = testing.mixture([1, 1, 1], [[-1.5, 0.0], [1.0, 1.0], [1.0, -1.2]], stds=[0.3, 0.4, 0.5])
ENCODE = jax.jit(solvers.encode, static_argnames="path")
SAMPLE = jax.jit(diffjax.sample)
LABELS = jax.jit(digits_mixture.labels)
KEY = jax.random.key(0)


def decode(denoiser, solver, code):
    return SAMPLE(KEY, denoiser, solvers.replay(solver, code), code.start)


def statistics(n, steps):
    """Standard deviation of z in the middle of the path, and correlation of each z with the next, for both paths."""
    solver, d = solvers.ddpm(PROCESS, times.uniform(steps)), testing.oracle(PLANE, PROCESS)
    x0, out = testing.draw(jax.random.key(1), PLANE, n)[0], {}
    for path, name in (("independent", "z"), ("markov", "markov_z")):
        z = ENCODE(jax.random.key(2), d, solver, x0, path=path).z[steps // 10 : -(steps // 10) - 1]
        out[f"{name}_std"] = jnp.std(z)
        out[f"{name}_correlation"] = jnp.mean(z[1:] * z[:-1]) / jnp.mean(z**2)
    return out


def shift_error(images, steps):
    """Decode a code shifted by one pixel with a model that moves with its input, against the shifted image."""
    kernel = jax.random.normal(jax.random.key(4), (3, 3)) / 3
    turned = lambda x, i, j: jnp.roll(x, (i - 1, j - 1), (1, 2))
    net = lambda x, t: jnp.tanh(sum(kernel[i, j] * turned(x, i, j) for i in range(3) for j in range(3)))
    d, solver = diffjax.denoiser(net, PROCESS, diffjax.from_v), solvers.ddpm(PROCESS, times.uniform(steps))
    code = ENCODE(jax.random.key(5), d, solver, images)
    move = lambda a, axis: jnp.roll(a, 1, axis)
    moved = solvers.NoiseMap(move(code.start, 1), move(code.residual, 2), move(code.z, 2))
    return jnp.abs(decode(d, solver, moved) - move(images, 1)).max()


def run(preset):
    n, components, steps, skip = (120, 200, 100, 36) if preset == "full" else (4, 20, 8, 2)
    digits = data.load("digits")
    m = digits_mixture.mixture(digits, components)
    test = digits.read("test", n)
    images, source = jnp.asarray(test["x"]), np.asarray(test["label"], np.int32)
    x = images.reshape(n, -1)
    target = (source + 1 + np.arange(n, dtype=np.int32) % 9) % 10
    denoiser = testing.oracle(m, PROCESS)
    as_source, as_target = denoiser.bind(source), denoiser.bind(target)

    solver = solvers.ddpm(PROCESS, times.uniform(steps)[skip:])  # T_skip: begin nearer to the image
    code = ENCODE(jax.random.key(6), as_source, solver, x)
    noise = 2 * jax.random.normal(jax.random.key(7), x.shape)  # far from every digit
    far = ENCODE(jax.random.key(8), as_source, solver, noise)
    edit = decode(as_target, solver, code)
    resampled = SAMPLE(jax.random.key(9), as_target, solver, code.start)  # the same start, fresh noise
    distance = lambda y: float(jnp.sqrt(jnp.mean((y - x) ** 2)))
    accuracy = lambda y: float(np.mean(np.asarray(LABELS(m, PROCESS, y)) == target))
    picture = lambda y: np.clip(digits.transform.decode(np.asarray(y)[:20].reshape(-1, 8, 8, 1)), 0, 16)
    return statistics(2000 if preset == "full" else 50, 100 if preset == "full" else 20) | {
        "reconstruction_error": jnp.abs(decode(as_source, solver, code) - x).max(),
        "reconstruction_error_of_noise": jnp.abs(decode(as_source, solver, far) - noise).max(),
        "edit_distance": distance(edit),
        "resampled_distance": distance(resampled),
        "edit_distance_over_resampling": distance(edit) / distance(resampled),
        "edit_accuracy": accuracy(edit),
        "accuracy_less_resampling": accuracy(edit) - accuracy(resampled),
        "shift_error": shift_error(images, steps),
        "source_grid": picture(x),
        "edit_grid": picture(edit),
        "resampled_grid": picture(resampled),
    }
