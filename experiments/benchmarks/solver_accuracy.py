"""`recommended` against the best of the peers, k-diffusion, diffusers and azula, at as many evaluations.

error = ||x - exact|| of every item at sigma = 0.01, in float64; a ratio is the rms (median) over the batch over the
smallest rms (median) of all peers with their grids. Problems: the mixture of `solver_bar_2d.json`, and random mixtures in 2 to
32 dimensions, on which experiments/peers/solver_bars.py measured the same peers with their own code (`solver_bars.json`).

Of many problems there are the middle ratio, the worst, the share of problems whose ratio meets its limit, and the pooled
ratio: the rms over all items of all problems, over that of the one peer whose pooled rms is smallest. An item flips if it
ends in another mode (the most likely component) than its exact trajectory: one that flips is the rms of its problem.
`within without flips` counts the problems in which no item flips at the rule, and those of them that meet the rms limit.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import processes, solvers, testing, times
from diffjax.types import Denoiser, Evaluation, Prediction
from experiments.benchmarks import measure

HERE = pathlib.Path(__file__).parent
BAR, BARS = HERE / "solver_bar_2d.json", HERE / "solver_bars.json"
PICTURE = HERE.parent / "results" / "benchmarks" / "solver_accuracy.png"
LIMITS = {  # evaluations -> ratios of rms and median to be met
    5: (1.0, 1.0),
    8: (1.0, 1.0),
    10: (0.6, 0.85),
    15: (0.6, 0.6),
    20: (0.4, 0.4),
    30: (0.25, 0.25),
    50: (0.1, 0.1),
}
EVALUATIONS = tuple(LIMITS)
PROCESS = processes.ve(0.010000500037502575, 157.40728081040757)
COMPONENTS = 10
DIMENSIONS, COUNT, BATCH, SEED = (2, 4, 8, 16, 32), 24, 1024, 112026
RUN = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))


def random_mixture(rng: np.random.Generator, d: int, kind: str) -> Any:
    """3 to 10 isotropic components; sharp: deviations .15 to .5 and a total deviation of about 1; smooth: .8 to 1."""
    k = int(rng.integers(3, 11))
    weights = np.maximum(rng.dirichlet(np.full(k, 2.0)), 0.02)
    weights /= weights.sum()
    means = rng.standard_normal((k, d))
    if kind == "smooth":
        return testing.mixture(weights, means * rng.uniform(0.3, 0.8), stds=rng.uniform(0.8, 1.0, k))
    stds = rng.uniform(0.15, rng.uniform(0.3, 0.5), k)
    spread = weights @ ((means - weights @ means) ** 2).mean(1)
    wanted = max(rng.uniform(0.85, 1.15) ** 2 - weights @ stds**2, 0.05)
    return testing.mixture(weights, means * np.sqrt(wanted / spread), stds=stds)


def start(rng: np.random.Generator, m: Any, n: int) -> np.ndarray:
    """Exact samples of the marginal at the largest noise of a mixture with isotropic components."""
    k = rng.choice(len(m.means), n, p=np.exp(m.log_weights))
    x0 = m.means[k] + np.sqrt(m.spectra[k]) * rng.standard_normal((n, m.means.shape[1]))
    return x0 + float(PROCESS.sigma(1.0)) * rng.standard_normal(x0.shape)


def tables(n: int) -> dict[str, Any]:
    """`recommended` and some of the catalogue's methods, to plot beside it."""
    card = lambda name, grid: solvers.CATALOGUE[name].build(PROCESS, grid(PROCESS, n))
    return {
        "recommended": solvers.recommended(PROCESS, n),
        "dpmpp_2m karras": card("dpmpp_2m", times.karras),
        **{f"{name} log_snr": card(name, times.log_snr) for name in ("dpmpp_3m", "exp_ab4_x0", "exp_ab4_eps", "ddim")},
    }


def errors(m: Any, x: np.ndarray, counts: tuple[int, ...]) -> dict[int, dict[str, np.ndarray]]:
    """`[evaluations][method] = (rms, median)`; all tables of a problem run in one call."""
    exact = testing.flow(m, PROCESS, x, 1.0, 0.0, tolerance=1e-10)
    made = {(n, name): s for n in counts for name, s in tables(n).items()}
    names = list(made)
    end = RUN(jax.random.key(0), testing.oracle(m, PROCESS), solvers.stack([made[k] for k in names]), jnp.asarray(x))
    out: dict[int, dict[str, np.ndarray]] = {n: {} for n in counts}
    for (n, name), e in zip(names, np.asarray(end), strict=True):
        squared = ((e - exact) ** 2).sum(-1)
        out[n][name] = np.sqrt([squared.mean(), np.median(squared)])
    return out


def bar() -> tuple[Any, np.ndarray, dict[int, np.ndarray]]:
    """The stored mixture, its start, and the best peer's (rms, median) at no more evaluations."""
    data = json.loads(BAR.read_text())
    p = data["problem"]
    weights, means, stds = (np.array(p[k]) for k in ("weights", "means", "std"))
    rng = np.random.RandomState(p["seed_start"])
    k = rng.choice(len(weights), p["batch"], p=weights / weights.sum())
    x = means[k] + stds[k][:, None] * rng.randn(p["batch"], 2)
    best = {}
    for n in EVALUATIONS:
        peers = [e[str(n)] for e in data["peers"].values() if str(n) in e]
        best[n] = np.min([e[1:3] for e in peers if e[0] <= n and np.all(np.isfinite(e[1:3]))], axis=0)
    return testing.mixture(weights, means, stds), x + p["sigma_max"] * rng.randn(*x.shape), best


# ---------------------------------------------------------------------------------------------------- many problems


def leaves(mixtures: list[Any]) -> dict[str, np.ndarray]:
    """Isotropic mixtures side by side, their components filled up with impossible ones."""
    filled = lambda a, value: np.concatenate([a, np.full((COMPONENTS - len(a), *a.shape[1:]), value)])
    return {
        "log_weights": np.stack([filled(m.log_weights, -1e30) for m in mixtures]),
        "means": np.stack([filled(m.means, 0.0) for m in mixtures]),
        "variances": np.stack([filled(m.spectra[:, 0], 1.0) for m in mixtures]),
    }


def problems(
    d: int, count: int = COUNT, batch: int = BATCH, seed: int = SEED
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random mixtures in d dimensions side by side, and their starts [count, batch, d]; one in six is smooth."""
    rng = np.random.default_rng([seed, d])
    mixtures = [random_mixture(rng, d, "smooth" if i % 6 == 5 else "sharp") for i in range(count)]
    return leaves(mixtures), np.stack([start(rng, m, batch) for m in mixtures])


def fine(process: Any = PROCESS) -> Any:
    """A solver whose rms distance to one of twice as many steps is below 3e-8 (2 and 16 dimensions)."""
    return solvers.CATALOGUE["exp_ab4_eps"].build(process, times.log_snr(process, 2000))


def log_joint(m: dict[str, Any], x: Any, sigma: Any) -> tuple[Any, Any]:
    """Log joint density of states and isotropic components but for a constant [B, K], variances of the marginals [1, K]."""
    spread, means = (m["variances"] + sigma**2)[None], m["means"]
    squared = (x**2).sum(-1, keepdims=True) - 2 * x @ means.T + (means**2).sum(-1)[None]
    return m["log_weights"][None] - 0.5 * squared / spread - 0.5 * x.shape[-1] * jnp.log(spread), spread


def _predict(d: Denoiser, state: Any, x: Any, t: Any, cond: Any, key: Any) -> Evaluation:
    """`testing.oracle` for isotropic components, where it takes a tenth of the time."""
    m, sigma = d.leaves, d.process.sigma(t)
    joint, spread = log_joint(m, x, sigma)
    r, gain = jax.nn.softmax(joint, axis=-1), m["variances"][None] / spread
    x0 = (r * gain).sum(-1, keepdims=True) * x + (r * (1 - gain)) @ m["means"]
    return Evaluation(Prediction(x0, (x - x0) / sigma), state)


@jax.jit
def ends(m: dict[str, Any], solver: Any, x: Any, process: Any = PROCESS) -> tuple[Any, Any]:
    """The last states of one table on many problems [P, B, d], and their modes [P, B]; no recompilation for padded tables."""

    def one(m: dict[str, Any], x: Any) -> tuple[Any, Any]:
        end = diffjax.sample(jax.random.key(0), Denoiser(leaves=m, process=process, apply=_predict), solver, x)
        return end, jnp.argmax(log_joint(m, end, process.sigma(0.0))[0], axis=-1)

    return jax.vmap(one)(m, x)


def many(d: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """All figures of the random mixtures in d dimensions, [rms, median] at every number of evaluations; see the module."""
    m, x = problems(d)
    exact, home = ends(m, fine(), x)
    stored, out = json.loads(BARS.read_text())[str(d)], {}
    for n in counts:
        table = solvers.pad(solvers.compact(solvers.recommended(PROCESS, n)), max(EVALUATIONS), 2, 6, 0)
        end, mode = ends(m, table, x)
        squared = np.asarray(((end - exact) ** 2).sum(-1))
        best = np.array([[error for _, error in row[str(n)]] for row in stored["best"]])
        peer, pooled = stored["pooled"][str(n)]
        figures = summary(squared, np.asarray(mode != home), best, pooled, LIMITS[n])
        for key, value in (figures | {"best": peer}).items():
            out.setdefault(key, []).append(value)
    return out


def summary(
    squared: np.ndarray, flips: np.ndarray, best: np.ndarray, pooled: float, limits: tuple[float, float]
) -> dict[str, Any]:
    """The figures at one number of evaluations, from squared errors and flips [P, B] and the peers' errors [P, 2]."""
    ratio = np.sqrt(np.stack([squared.mean(-1), np.median(squared, axis=-1)], axis=-1)) / best
    met, still = ratio <= np.array(limits), ~flips.any(-1)
    digits = lambda v: [float(f"{a:.2g}") for a in np.atleast_1d(v)]
    return {
        "middle": digits(np.median(ratio, axis=0)),
        "worst": digits(ratio.max(axis=0)),
        "within": digits(met.mean(0)),
        "within without flips": [int(met[still, 0].sum()), int(still.sum())],
        "pooled": digits(np.sqrt(squared.mean()) / pooled),
        "flips": digits(flips.mean()),
    }


def plot(found: dict[int, dict[str, np.ndarray]]) -> None:
    """Error over evaluations on the stored mixture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for column, (axis, title) in enumerate(zip(axes, ("rms", "median"), strict=True)):
        for name in found[EVALUATIONS[0]]:
            axis.loglog(list(found), [e[name][column] for e in found.values()], "o-", label=name, ms=3)
        axis.set(xlabel="evaluations", title=f"{title} error")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)


def run() -> dict[str, Any]:
    """All figures, and the plot."""
    counts = EVALUATIONS
    with jax.enable_x64(True):
        m, x, best = bar()
        found = errors(m, x, counts)
        against = [[float(f"{v:.2g}") for v in found[n]["recommended"] / best[n]] for n in counts]
        report: dict[str, Any] = {"evaluations": list(counts), "bar over the best peer": against}
        report |= {"problems": COUNT, "batch": BATCH, "dimensions": {str(d): many(d, counts) for d in DIMENSIONS}}
    plot(found)
    return report


if __name__ == "__main__":
    measure.record("solver_accuracy", run())
