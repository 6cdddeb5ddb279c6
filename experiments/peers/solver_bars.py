"""Measure peers' samplers on the benchmark's own mixtures, for experiments/benchmarks/solver_accuracy.py.

Needs the environment of experiments/peers/solvers.py, and diffjax. `python -m experiments.peers.solver_bars` writes
experiments/benchmarks/solver_bars.json: for every problem and number of evaluations the smallest rms error and the
smallest median error of all peers, with their names, and the peer whose rms error over all problems is smallest.
`python -m experiments.peers.solver_bars stored` measures the mixture of solver_bar_2d.json instead and prints the largest
relative difference from what is stored there, for every peer.

Samplers and grids are those of solver_bar_2d.json that come within a factor of 1.8 of its best peer at any number of
evaluations, by either error, and their kin. All in float64; k-diffusion and azula end at the smallest sigma, diffusers
at zero, as there.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from typing import Any

import jax
import numpy as np

from diffjax import processes
from experiments.benchmarks import solver_accuracy
from experiments.peers.solvers import peer_of_k_diffusion

OUT = solver_accuracy.HERE / "solver_bars.json"
LOW, HIGH = (float(solver_accuracy.PROCESS.sigma(t)) for t in (0.0, 1.0))


class Model:
    """The exact denoiser of isotropic components, in torch, and how often it was called."""

    def __init__(self, weights: np.ndarray, means: np.ndarray, variances: np.ndarray):
        self.log_weights, self.means, self.variances = (
            torch.from_numpy(np.asarray(a, np.float64)) for a in (np.log(weights), means, variances)
        )
        self.calls = 0

    def x0(self, z: Any, sigma: Any) -> Any:
        """E[x0 | z], z = x0 + sigma eps."""
        self.calls += 1
        spread = self.variances + float(np.asarray(sigma).reshape(-1)[0]) ** 2
        squared = (z**2).sum(-1, keepdim=True) - 2 * z @ self.means.T + (self.means**2).sum(-1)
        r = torch.softmax(self.log_weights - 0.5 * squared / spread - 0.5 * z.shape[-1] * torch.log(spread), -1)
        gain = self.variances / spread
        return (r * gain).sum(-1, keepdim=True) * z + (r * (1 - gain)) @ self.means


def log_snr(n: int) -> np.ndarray:
    """Equal steps in log sigma."""
    return np.geomspace(HIGH, LOW, n + 1)


def karras(n: int) -> np.ndarray:
    """Equal steps in sigma^(1/7)."""
    return np.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), n + 1) ** 7


def uniform_t(n: int) -> np.ndarray:
    """Equal steps in the time of 1000 linear betas, log sigma between its times linear."""
    bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    return np.exp(np.interp(np.linspace(999, 0, n + 1), np.arange(1000), 0.5 * np.log((1 - bar) / bar)))


SIGMAS = {
    "exponential": "use_exponential_sigmas",
    "karras": "use_karras_sigmas",
    "lu": "use_lu_lambdas",
}  # of diffusers
GRIDS = (log_snr, karras, uniform_t)


def k_diffusion() -> dict[str, Any]:
    """`f(model, z, n)` of k-diffusion's samplers on all grids."""
    k, out = peer_of_k_diffusion(), {}
    chosen = {
        "heun": {}, "dpm_2": {}, "lms": {}, "dpmpp_2m": {}, "dpmpp_2s_ancestral": {"eta": 0.0},
        "dpmpp_2m_sde": {"eta": 0.0, "solver_type": "midpoint"}, "dpmpp_3m_sde": {"eta": 0.0},
    }  # fmt: skip
    for grid in GRIDS:
        for name, options in chosen.items():
            options = options | ({"noise_sampler": lambda *_: 0.0} if options else {})

            def f(model: Model, z: Any, n: int, grid=grid, name=name, options=options) -> Any:
                sigmas = torch.from_numpy(grid(n))
                denoise = lambda x, s, **_: model.x0(x, s)
                return getattr(k, f"sample_{name}")(denoise, z, sigmas, disable=True, **options)

            out[f"kdiff.{name}@{grid.__name__}"] = f
    return out


def azula() -> dict[str, Any]:
    """The same of azula's."""
    from azula import sample
    from azula.denoise import Denoiser

    class Exact(Denoiser):
        """The model over a grid, in azula's interface."""

        def __init__(self, model: Model, sigmas: np.ndarray):
            super().__init__()
            self.model, self.sigmas = model, torch.from_numpy(sigmas)
            self.schedule = self.at

        def at(self, t: Any) -> tuple[Any, Any]:
            """alpha and sigma; t falls from one by equal steps."""
            i = torch.round((1 - t) * (len(self.sigmas) - 1)).long()
            return torch.ones_like(t), self.sigmas[i]

        def forward(self, x: Any, t: Any, **_: Any) -> Any:
            """The posterior mean."""
            return types.SimpleNamespace(mean=self.model.x0(x, self.at(t)[1]))

    out = {}
    for grid in GRIDS:
        for kind in ("zAB", "vAB", "zEAB", "xEAB"):
            for order in (2, 3, 4):

                def f(model: Model, z: Any, n: int, grid=grid, kind=kind, order=order) -> Any:
                    make = getattr(sample, f"{kind}Sampler")
                    return make(Exact(model, grid(n)), order=order, steps=n, silent=True, dtype=torch.float64)(z)

                out[f"azula.{kind.lower()}{order}@{grid.__name__}"] = f
    return out


def diffusers() -> dict[str, Any]:
    """The same of diffusers' schedulers, in their own coordinates and over their own sigmas, which end at zero."""
    import diffusers as peer

    kinds = {
        "dpmpp2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        "dpmpp3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        "unipc2": ("UniPCMultistepScheduler", {"solver_order": 2}),
        "unipc3": ("UniPCMultistepScheduler", {"solver_order": 3}),
        "deis2": ("DEISMultistepScheduler", {"solver_order": 2}),
        "deis3": ("DEISMultistepScheduler", {"solver_order": 3}),
        "dpmsingle2": ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
        "dpmsingle3": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        "sasolver": ("SASolverScheduler", {"tau_func": lambda t: 0.0}),
    }
    out = {}
    for name, (kind, options) in kinds.items():
        for grid in ("exponential", "karras", *(["lu"] if name.startswith("dpmpp") else [])):

            def f(model: Model, z: Any, n: int, kind=kind, options=options, grid=grid) -> Any:
                scheduler = getattr(peer, kind)(beta_schedule="linear", **{SIGMAS[grid]: True}, **options)
                scheduler.set_timesteps(n)
                s = scheduler.sigmas = scheduler.sigmas.double()
                x = z / (1 + s[0] ** 2) ** 0.5
                for i, t in enumerate(scheduler.timesteps):
                    y = x * (1 + s[i] ** 2) ** 0.5
                    x = scheduler.step((y - model.x0(y, s[i])) / s[i], t, x).prev_sample
                return x

            out[f"diffusers.{name}_{grid}"] = f
    return out


def measured(model: Model, z: np.ndarray, ends: tuple[np.ndarray, np.ndarray], peers: dict[str, Any]) -> dict[str, Any]:
    """`[peer][evaluations] = (rms, median)` with as many steps as the evaluations allow; `ends` at sigma = low and zero."""
    out: dict[str, Any] = {}
    for name, f in peers.items():
        exact = ends[name.startswith("diffusers")]
        for n in solver_accuracy.EVALUATIONS:
            for steps in (n, n // 2):
                model.calls = 0
                end = f(model, torch.from_numpy(z), steps)
                if model.calls <= n:
                    break
            assert model.calls <= n, (name, n, model.calls)
            squared = ((end.numpy() - exact) ** 2).sum(-1)
            out.setdefault(name, {})[n] = np.sqrt([squared.mean(), np.median(squared)])
    return out


def peers() -> dict[str, Any]:
    """All of them."""
    return k_diffusion() | azula() | diffusers()


def stored() -> None:
    """Compare with solver_bar_2d.json."""
    data = json.loads(solver_accuracy.BAR.read_text())
    p, found = data["problem"], data["peers"]
    mixture, z, _ = solver_accuracy.bar()
    model = Model(np.array(p["weights"]), np.array(p["means"]), np.array(p["std"]) ** 2)
    ends = exact_ends(solver_accuracy.leaves([mixture]), z[None])
    for name, result in measured(model, z, (ends[0][0], ends[1][0]), peers()).items():
        key = name.replace("log_snr", "logsnr").replace("@karras", "@karras7").replace("exponential", "exp")
        key = key.replace("lms@", "lms4@").replace("sde@", "sde_eta0@").replace("ancestral@", "ancestral_eta0@")
        gap = [
            np.abs(np.array(found[key][str(n)][1:3]) / v - 1).max() for n, v in result.items() if str(n) in found[key]
        ]
        print(f"{name:40s} {max(gap):.1e}  {' '.join(f'{g:.0e}' for g in gap)}")


def exact_ends(m: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact states at the smallest sigma, and as good as at zero, of problems side by side."""
    at = lambda process: np.asarray(solver_accuracy.ends(m, solver_accuracy.fine(process), x, process)[0])
    return at(solver_accuracy.PROCESS), at(processes.ve(1e-5, HIGH))


def dumped(report: dict[str, Any]) -> str:
    """JSON with a line for each problem."""
    best = lambda d: ",\n".join(f"  {json.dumps(row)}" for row in report[d]["best"])
    parts = [f'"{d}": {{"pooled": {json.dumps(report[d]["pooled"])},\n "best": [\n{best(d)}]}}' for d in report]
    return "{" + ",\n".join(parts) + "}\n"


def main() -> None:
    """Measure all problems."""
    chosen, report = peers(), {}
    for d in solver_accuracy.DIMENSIONS:
        m, x = solver_accuracy.problems(d)
        ends = exact_ends(m, x)
        best, squared = [], {}
        for i in range(len(x)):
            model = Model(np.exp(m["log_weights"][i]), m["means"][i], m["variances"][i])
            found = measured(model, x[i], (ends[0][i], ends[1][i]), chosen)
            row = {}
            for n in solver_accuracy.EVALUATIONS:
                names = [min(found, key=lambda k, j=j, n=n: np.nan_to_num(found[k][n][j], nan=np.inf)) for j in (0, 1)]
                row[str(n)] = [[name, float(f"{found[name][n][j]:.4g}")] for j, name in enumerate(names)]
                for name in found:
                    squared.setdefault(n, {}).setdefault(name, []).append(found[name][n][0] ** 2)
            best.append(row)
            print(d, i, row, flush=True)
        pooled = {n: {k: float(np.sqrt(np.mean(v))) for k, v in by.items()} for n, by in squared.items()}
        top = {str(n): min(by.items(), key=lambda kv: np.nan_to_num(kv[1], nan=np.inf)) for n, by in pooled.items()}
        report[str(d)] = {"best": best, "pooled": {n: [k, float(f"{v:.4g}")] for n, (k, v) in top.items()}}
    OUT.write_text(dumped(report))


if __name__ == "__main__":
    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    importlib.import_module("diffusers")
    with jax.enable_x64(True):
        stored() if sys.argv[1:] == ["stored"] else main()
