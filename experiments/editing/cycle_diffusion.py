"""CycleDiffusion: translate between two domains by decoding, with one model, the noise that another model's data have.

DPM-Encoder: draw a path from the data to the noise, x_{t-1} ~ q(x_{t-1} | x_t, x0), and keep what the sampler of model A
would have had to draw to follow it, eps_t = (x_{t-1} - mu_A(x_t, t)) / sigma_t. Decode x_T, eps_T .. eps_1 with model A:
the data. Decode them with model B: the same picture in B's domain. SDEdit starts from the same x_{T_es} of the picture, with
fresh noise. Domain A is the digits, domain B the digits drawn bold (every pixel the largest of itself and its neighbours to
the right and below), both as exact mixtures around pictures of other writers; the true bold picture is known and judges the
structure. Target-domain MMD is that of the pictures to bold test digits. Both methods trade one for the other by how many
steps they skip, so that the structure of SDEdit is read off its curve at the MMD that CycleDiffusion has.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import data, metrics, processes, solvers, testing, times
from experiments.recipe import Recipe, at_least, at_most, between
from experiments.solvers.digits_mixture import STD

RECIPE = Recipe(
    ledger=44,
    paper="arXiv:2210.05559",
    claim="codes return any data to 1e-5 and are white for the right model; it keeps more structure than SDEdit at equal MMD",
    expect={
        "round_trip_error": at_most(1e-5),
        "round_trip_error_of_noise": at_most(1e-5),
        "code_std": between(0.9, 1.15),
        "code_kurtosis": between(2.6, 3.4),
        "smallest_gain_at_equal_mmd": at_least(0.0),
        "mean_gain_at_equal_mmd": at_least(0.01),
    },
    minutes=1,
)
PROCESS = processes.cosine()
ENCODE = jax.jit(solvers.encode, static_argnames="path")


def bold(x):
    """Pictures [N, 8, 8, 1] with every stroke one pixel wider."""
    right, below = (
        np.pad(x, pad, mode="edge") for pad in (((0, 0), (0, 0), (1, 0), (0, 0)), ((0, 0), (1, 0), (0, 0), (0, 0)))
    )
    return np.maximum(x, np.maximum(right[:, :, :-1], below[:, :-1]))


def model(pictures):
    n = len(pictures)
    return testing.oracle(testing.mixture(np.ones(n), pictures.reshape(n, -1), stds=np.full(n, STD)), PROCESS)


def run(preset):
    n, components, steps, skips = (
        (120, 400, 100, (20, 30, 40, 50, 60, 70)) if preset == "full" else (4, 20, 8, (1, 2, 3))
    )
    digits = data.load("digits")
    train, test = (np.asarray(digits.read(split)["x"]) for split in ("train", "test"))
    thin, fat = model(train[:components]), model(bold(train[components : 2 * components]))
    x, truth, other = test[:n].reshape(n, -1), bold(test[:n]).reshape(n, -1), bold(test[-n:]).reshape(n, -1)

    @jax.jit
    def translate(skip_solver, denoiser, x):  # the picture again, in the other domain, and by SDEdit
        code = solvers.encode(jax.random.key(1), denoiser, skip_solver, x, "markov")
        ways = (
            (denoiser, solvers.replay(skip_solver, code)),
            (fat, solvers.replay(skip_solver, code)),
            (fat, skip_solver),
        )
        return [diffjax.sample(jax.random.key(4), d, solver, code.start) for d, solver in ways]

    ends = {k: translate(solvers.ddpm(PROCESS, times.uniform(steps)[k:]), thin, jnp.asarray(x)) for k in skips}
    noise = 2 * jax.random.normal(jax.random.key(2), (n, x.shape[1]))
    far = translate(solvers.ddpm(PROCESS, times.uniform(steps)[skips[1] :]), thin, noise)[0]

    # codes of data that model A drew itself: its own samples
    whole = solvers.ddpm(PROCESS, times.uniform(steps))
    own = testing.draw(jax.random.key(5), thin.leaves, n)[0]
    z = np.asarray(ENCODE(jax.random.key(6), thin, whole, own, path="markov").z)[:-1]

    def structure(y):  # correlation with the true bold picture, mean over pictures
        centred = [np.asarray(a) - np.asarray(a).mean(1, keepdims=True) for a in (y, truth)]
        a, b = (c / np.linalg.norm(c, axis=1, keepdims=True) for c in centred)
        return float((a * b).sum(1).mean())

    mmd = lambda y: float(metrics.score(metrics.mmd(other), np.asarray(y)))
    cycled, sdedit = ([(mmd(e[i]), structure(e[i])) for e in ends.values()] for i in (1, 2))
    curve = np.array(sorted(sdedit)).T
    gains = [s - float(np.interp(m, *curve)) for m, s in cycled if curve[0, 0] <= m <= curve[0, -1] or preset == "tiny"]
    middle = ends[skips[len(skips) // 2]]
    picture = lambda y: np.clip(digits.transform.decode(np.asarray(y)[:20].reshape(-1, 8, 8, 1)), 0, 16)
    return {
        "round_trip_error": max(float(jnp.abs(e[0] - x).max()) for e in ends.values()),
        "round_trip_error_of_noise": jnp.abs(far - noise).max(),
        "code_std": z.std(),
        "code_kurtosis": (z**4).mean() / (z**2).mean() ** 2,
        "smallest_gain_at_equal_mmd": min(gains),
        "mean_gain_at_equal_mmd": np.mean(gains),
        "compared_strengths": len(gains),
        "mmd_of_source": mmd(x),
        "source_grid": picture(x),
        "cycled_grid": picture(middle[1]),
        "sdedit_grid": picture(middle[2]),
    }
