"""`recommended` against the best peer, and against the best of the catalogue's methods on the usual grids.

error = ||x - exact|| of every item at sigma = 0.01, in float64; a ratio is the rms (median) over the batch over the
smallest rms (median) of all the others at as many evaluations. Problems: the mixture of `solver_bar_2d.json`, where others
are the peers measured there, and new random mixtures in 2 to 32 dimensions, where others are this library's own methods.
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
from experiments.benchmarks import measure

HERE = pathlib.Path(__file__).parent
BAR = HERE / "solver_bar_2d.json"
PICTURE = HERE.parent / "results" / "benchmarks" / "solver_accuracy.png"
EVALUATIONS = (5, 8, 10, 15, 20, 30, 50)
PROCESS = processes.ve(0.010000500037502575, 157.40728081040757)
OTHERS = (
    "ddim", "dpmpp_2m", "dpmpp_3m", "exp_ab2_x0", "exp_ab3_x0", "exp_ab4_x0", "exp_ab2_eps", "exp_ab3_eps", "exp_ab4_eps",
    "exp_ab2_v", "exp_ab3_v", "exp_ab4_v", "unipc2_x0", "unipc3_x0", "unipc3_eps", "deis_t4", "deis_rho4", "dpm_solver_3",
)  # fmt: skip
GRIDS = {"log_snr": times.log_snr, "karras": times.karras}
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
    """`recommended` and all others with at most n evaluations."""
    out = {"recommended": solvers.recommended(PROCESS, n)}
    for grid, make in GRIDS.items():
        steps = {name: n // int(solvers.CATALOGUE[name].evals) for name in OTHERS}
        out |= {
            f"{name} {grid}": solvers.CATALOGUE[name].build(PROCESS, make(PROCESS, k)) for name, k in steps.items() if k
        }
        half = solvers.compact(solvers.heun(PROCESS, make(PROCESS, n // 2)))
        out[f"heun {grid}"] = half
    return out


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


def ratios(found: dict[int, dict[str, np.ndarray]]) -> np.ndarray:
    """[evaluations, 2] of one problem: `recommended` over the best other, rms and median."""
    best = lambda e: np.nanmin([v for k, v in e.items() if k != "recommended"], axis=0)
    return np.array([e["recommended"] / best(e) for e in found.values()])


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


def plot(found: dict[int, dict[str, np.ndarray]]) -> None:
    """Error over evaluations on the stored mixture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    chosen = (
        "recommended",
        "dpmpp_2m karras",
        "dpmpp_3m log_snr",
        "exp_ab4_x0 log_snr",
        "exp_ab4_eps log_snr",
        "ddim log_snr",
    )
    for column, (axis, title) in enumerate(zip(axes, ("rms", "median"), strict=True)):
        for name in chosen:
            axis.loglog(list(found), [e[name][column] for e in found.values()], "o-", label=name, ms=3)
        axis.set(xlabel="evaluations", title=f"{title} error")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)


def run(quick: bool = False, seed: int = 2026) -> dict[str, Any]:
    """All ratios; `quick`: one problem of each kind in two dimensions."""
    counts = EVALUATIONS[:2] if quick else EVALUATIONS
    dims, problems, batch = ((2,), 1, 32) if quick else ((2, 4, 8, 16, 32), 6, 192)
    with jax.enable_x64(True):
        m, x, best = bar()
        found = errors(m, x, counts)
        against = np.array([found[n]["recommended"] / best[n] for n in counts])
        report: dict[str, Any] = {"evaluations": list(counts), "bar over the best peer [rms, median]": _round(against)}
        rng = np.random.default_rng(seed)
        for d in dims:
            kinds = ["sharp"] * (problems - 1) + ["smooth"]
            mixtures = [random_mixture(rng, d, kind) for kind in kinds]
            r = np.array([ratios(errors(m, start(rng, m, batch), counts)) for m in mixtures])
            report[f"{d} dimensions, middle of {problems}"] = _round(np.median(r, axis=0))
            report[f"{d} dimensions, worst of {problems}"] = _round(r.max(axis=0))
    if not quick:
        plot(found)
    return report


def _round(a: np.ndarray) -> list[Any]:
    return [[float(f"{v:.2g}") for v in row] for row in a]


if __name__ == "__main__":
    measure.record("solver_accuracy", run())
