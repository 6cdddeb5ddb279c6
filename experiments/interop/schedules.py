"""Schedulers of diffusers beside what `interop.read_schedule` makes of them: noise levels, timesteps and whole trajectories.

    python -m experiments.interop.schedules      needs PyTorch and diffusers; writes results/parity_schedules.json and
                                                 tests/interop/schedules.json, from which the tests compare without them

The network is exact: the prediction of a mixture of Gaussians at the noise level of the step, the same function for both.
Their noise levels are compared twice: as they are, in float32, and made by the same code of theirs in float64.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import interop
from diffjax import numerics as nu
from experiments.interop.schedule_cases import CASES, Case

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "interop" / "results" / "parity_schedules.json"
GOLDEN = ROOT / "tests" / "interop" / "schedules.json"
BATCH, DIMENSIONS, STD = 4, 3, 0.4
CENTRES = np.random.default_rng(0).normal(size=(5, DIMENSIONS))
PLACES = (0, 1, 7, 100, 500, 998, 999)  # the timesteps whose noise levels the golden has
LENGTHS = (1, 4, 7, 10, 50)
ODD_AT_ONE = ("FlowMatchEulerDiscrete-terminal", "EDMEuler-v")  # theirs are NaN and sigma_min with one evaluation
DIVIDED = ("LMS", "Heun", "Euler", "EDM")  # classes that hold x / alpha


# ------------------------------------------------------------------------------------------------ the exact network


def mixture_x0(xp: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """E[x0 | x] of the mixture of `CENTRES` with deviation `STD`.   [B, d]"""
    v = alpha**2 * STD**2 + sigma**2
    centres = xp.asarray(CENTRES, x.dtype)
    gap = x[:, None] - alpha * centres[None]
    log_w = -0.5 * (gap**2).sum(-1) / v
    w = xp.exp(log_w - log_w.max(-1, keepdims=True))
    w = w / w.sum(-1, keepdims=True)
    posterior = centres[None] + (alpha * STD**2 / v) * gap
    return (w[..., None] * posterior).sum(1)


def target(config: dict[str, Any], x: Any, x0: Any, alpha: Any, sigma: Any) -> Any:
    """What a network of this configuration returns.   x: in coordinates (alpha, sigma)"""
    kind, wanted = config["_class_name"], config.get("prediction_type", "epsilon")
    eps = (x - alpha * x0) / sigma
    if kind.startswith("EDM"):
        d = config.get("sigma_data", 0.5)
        n = (sigma**2 + d**2) ** 0.5
        f = (x0 - d**2 / n**2 * x) / (sigma * d / n)
        return -f if wanted == "v_prediction" else f
    if kind.startswith("FlowMatch") or wanted == "flow_prediction":
        return eps - x0
    v = (alpha * eps - sigma * x0) / (alpha**2 + sigma**2) ** 0.5
    return {"epsilon": eps, "sample": x0, "v_prediction": v}[wanted]


def lengths(case: Case) -> list[int]:
    """The numbers of evaluations whose grids are compared."""
    least = 4 if case.config["_class_name"].startswith("PNDM") else 2 if case.name in ODD_AT_ONE else 1
    return [n for n in LENGTHS if least <= n <= case.config.get("num_train_timesteps", 1000)]


def start() -> np.ndarray:
    """Standard normal numbers that both trajectories begin with.   [B, d]"""
    return np.random.default_rng(1).normal(size=(BATCH, DIMENSIONS))


# ---------------------------------------------------------------------------------------------------------------- ours


def noise(i: int) -> Any:
    """What our solvers draw in step i with `KEY`.   [B, d]"""
    keys = nu.item_keys(jax.random.key(0), nu.item_indices(None, BATCH))
    return nu.item_normal(keys, 2 * i + 1, jnp.zeros((BATCH, DIMENSIONS)))


def ours(case: Case) -> dict[str, Any]:
    """Noise levels of every timestep, timesteps for several lengths, and the end of a trajectory."""
    s = interop.read_schedule(case.config)
    found: dict[str, Any] = {}
    if s.process.family.name == "from_betas":
        k = len(s.process.params["gap"])
        t = np.arange(1, k + 1) / k
        found |= {"alpha": s.process.alpha(t), "sigma": s.process.sigma(t)}
    for n in lengths(case):
        grid = s.grid(n, tokens=case.tokens)
        found[f"timesteps {n}"] = np.asarray(s.timesteps(n, tokens=case.tokens))
        flow = s.process.family.name == "rectified"
        with np.errstate(divide="ignore"):
            found[f"levels {n}"] = s.process.sigma(grid) / (1.0 if flow else s.process.alpha(grid))
    if case.n:
        found["x"] = np.asarray(trajectory(case, s))
    return found


def trajectory(case: Case, s: Any) -> Any:
    """The end of the trajectory from `start`, by the schedule's own solver."""

    def network(params: Any, x: Any, code: Any, cond: Any) -> Any:
        t = time_of(s, code[0])
        alpha, sigma = s.process.alpha(t), s.process.sigma(t)
        x = x if s.pieces.input_scale is None else x / s.pieces.input_scale(s.process, t)
        return target(case.config, x, mixture_x0(jnp, x, alpha, sigma), alpha, sigma)

    d = s.denoiser(network, {})
    grid = s.grid(case.n, tokens=case.tokens)
    x = jnp.asarray(start() * s.process.sigma(grid[0]))
    return jax.jit(diffjax.sample)(jax.random.key(0), d, s.solver(case.n, tokens=case.tokens), x)


def time_of(s: Any, code: Any) -> Any:
    """The time that a code stands for."""
    name = s.process.family.name
    if name == "from_betas":
        return (code + 1) / len(s.process.params["gap"])
    return jnp.exp(4 * code) / s.process.params["sigma_max"] if name == "edm" else code / 1000


# -------------------------------------------------------------------------------------------------------------- theirs


@contextlib.contextmanager
def in_float64(module: Any) -> Iterator[None]:
    """Their module with float64 wherever it says float32."""
    import torch

    wide = types.SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(module, "torch", wide):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def theirs(case: Case) -> dict[str, Any]:
    """The same of diffusers; `alpha 64` and `sigma 64` by its code in float64."""
    import diffusers
    import torch

    kind = getattr(diffusers, case.config["_class_name"])
    make = lambda: kind.from_config(case.config)
    found: dict[str, Any] = {}
    s = make()
    if hasattr(s, "alphas_cumprod") and not case.config.get("use_flow_sigmas"):
        with in_float64(sys.modules[kind.__module__]):
            wide = make().alphas_cumprod.numpy()
        narrow = s.alphas_cumprod.double().numpy()
        found |= {
            "alpha": narrow**0.5,
            "sigma": (1 - narrow) ** 0.5,
            "alpha 64": wide**0.5,
            "sigma 64": (1 - wide) ** 0.5,
        }
    for n in lengths(case):
        s = make()
        set_timesteps(s, case, n)
        found[f"timesteps {n}"] = s.timesteps.double().numpy()
        if hasattr(s, "sigmas"):
            sigma = s.sigmas.double().numpy()
            found[f"levels {n}"] = sigma
    if not case.n:
        return found
    s = make()
    set_timesteps(s, case, case.n)
    levels = [a.item() for a in s.sigmas] if hasattr(s, "sigmas") else None
    ac = lambda t: s.alphas_cumprod[int(t)].item()
    flow = case.config["_class_name"].startswith("FlowMatch") or getattr(s.config, "use_flow_sigmas", False)
    scaled = case.config["_class_name"].startswith(DIVIDED)
    first = levels[0] if levels else None
    x = torch.tensor(start())
    if case.config["_class_name"].startswith("EDM") or case.config.get("timestep_type") == "continuous":
        x = x * first
    elif flow:
        x = x * first
    else:
        a2 = ac(s.timesteps[0]) if levels is None else 1 / (1 + first**2)
        x = x * (1 - a2) ** 0.5 / (a2**0.5 if scaled else 1.0)
    drawn: list[int] = []

    def draw(shape: Any, **_: Any) -> Any:
        drawn.append(len(drawn))
        return torch.tensor(np.asarray(noise(steps[0]), np.float64))[..., None, None]

    steps = [0]
    with mock.patch.object(sys.modules[kind.__module__], "randn_tensor", draw, create=True):
        for i, t in enumerate(s.timesteps):
            steps[0] = i
            if hasattr(s, "scale_model_input"):
                s.scale_model_input(x, t)
            at = getattr(s, "step_index", None)
            if levels is None:
                place = int(t) if float(t) == int(t) else t
                a2 = ac(place)
                alpha, sigma = a2**0.5, (1 - a2) ** 0.5
            elif flow:
                sigma = s.sigmas[i].item()
                alpha = 1 - sigma
            elif scaled:
                sigma, alpha = s.sigmas[i if at is None else at].item(), 1.0
            else:
                r = s.sigmas[i].item()
                alpha = 1 / (1 + r * r) ** 0.5
                sigma = r * alpha
            xs = x.numpy()
            out = target(case.config, xs, mixture_x0(np, xs, alpha, sigma), alpha, sigma)
            x = s.step(torch.tensor(out)[..., None, None], t, x[..., None, None]).prev_sample[..., 0, 0]
    if scaled and not case.config["_class_name"].startswith("EDM") and case.config.get("timestep_type") != "continuous":
        last = s.sigmas[-1].item()
        x = x / (1 + last**2) ** 0.5
    found["x"] = x.double().numpy()
    return found


def set_timesteps(s: Any, case: Case, n: int) -> None:
    """Their grid; the shift of a picture as their pipelines compute it."""
    more = {}
    if getattr(s.config, "use_dynamic_shifting", False):
        c = s.config
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        more["mu"] = c.base_shift + slope * (case.tokens - c.base_image_seq_len)
    s.set_timesteps(n, **more)


# --------------------------------------------------------------------------------------------------------- comparison


def relative(a: Any, b: Any) -> float:
    """The largest relative difference."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-300))) if a.shape == b.shape else float("inf")


def compare(case: Case, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """One row: relative differences of noise levels, largest difference of timesteps, relative one of the end."""
    row: dict[str, Any] = {"case": case.name}
    for name in ("alpha", "sigma"):
        if name in a:
            keep = b[f"{name} 64"] > 0
            row[f"{name}, float64"] = relative(a[name][keep], b[f"{name} 64"][keep])
            row[f"{name}, as is"] = relative(a[name][keep], b[name][keep])
    steps, level = 0.0, 0.0
    for n in lengths(case):
        ts, ls = (b.get(f"{what} {n}") for what in ("timesteps", "levels"))
        mine = a[f"timesteps {n}"]
        if case.config["_class_name"].startswith("Heun"):
            ts = np.concatenate([ts[:1], ts[1::2]])
            ls = np.concatenate([ls[:1], ls[1:-1:2], ls[-1:]])
        if case.config["_class_name"].startswith("PNDM") or case.config["_class_name"].startswith("ScoreSde"):
            continue
        steps = max(steps, float(np.abs(mine - ts[: len(mine)]).max()))
        if ls is not None:
            both = a[f"levels {n}"], ls[: len(a[f"levels {n}"])]
            finite = np.isfinite(both[0]) & np.isfinite(both[1]) & (both[1] > 0)
            level = max(level, relative(both[0][finite], both[1][finite]))
    row["timesteps"], row["levels"] = steps, level
    if case.n:
        row["trajectory"] = float(np.abs(a["x"] - b["x"]).max() / np.abs(b["x"]).max())
    return row


def passes(row: dict[str, Any]) -> bool:
    """Whether a case holds."""
    exact = max(row.get(f"{name}, float64", 0.0) for name in ("alpha", "sigma"))
    return exact <= 1e-6 and row["timesteps"] <= 1 and row["levels"] <= 1e-4 and row.get("trajectory", 0.0) <= 1e-4


def golden(case: Case, b: dict[str, Any]) -> dict[str, Any]:
    """What the tests compare with: some noise levels, some timesteps, the end."""
    kept = {
        name: b[f"{name} 64"][[i for i in PLACES if i < len(b["alpha"])]] for name in ("alpha", "sigma") if name in b
    }
    kept |= {name: a for name, a in b.items() if name in ("timesteps 4", "timesteps 10", "levels 10", "x")}
    return {name: np.asarray(a).round(10).tolist() for name, a in kept.items()}


def main() -> int:
    """Compare all and write both files."""
    rows, kept = [], {}
    for c in CASES:
        b = theirs(c)
        row = compare(c, ours(c), b)
        rows.append(row)
        kept[c.name] = golden(c, b)
        figures = " ".join(f"{k} {v:.1e}" for k, v in row.items() if k != "case")
        print(f"{c.name:36s} {figures} {'ok' if passes(row) else 'FAILED'}", flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items()) + "\n}\n")
    return sum(not passes(row) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
