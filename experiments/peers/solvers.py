"""Record the trajectories of peers' samplers on one exact model, for tests/solvers/test_peers.py.

Needs an environment of its own: torch, diffusers 0.42, azula 0.11, torchsde, torchdiffeq and k-diffusion 0.1 (without
its training dependencies). `python -m experiments.peers.solvers` writes tests/solvers/peers.npz.

Every case is recorded by its calls of the model: the point y_i and its noise level sigma_i / alpha_i at every
evaluation, the normals in the order in which they were drawn, and the end point. All in float64; where a peer casts its
grid to float32, the float64 grid is put back. A case runs in the peer's own coordinates, `ve` (z = x / alpha), `vp` or `rectified`.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
import types

import numpy as np

HERE = pathlib.Path(__file__).parent
OUT = HERE.parent.parent / "tests" / "solvers" / "peers.npz"
SIGMAS = np.concatenate([np.geomspace(14.0, 2.0, 5)[:-1], np.geomspace(2.0, 0.4, 6), [0.2, 0.08]])  # uneven on purpose
WEIGHTS, STD = np.array([0.3, 0.45, 0.25]), 0.6
MEANS = np.array([[-1.0, 0.4], [0.9, 0.8], [0.2, -1.1]])
START = np.random.RandomState(3).randn(4, 2)


def denoise(z: np.ndarray, sigma: float) -> np.ndarray:
    """`E[x0 | z]` for z = x0 + sigma eps and an isotropic mixture of three Gaussians."""
    spread = STD**2 + sigma**2
    gap = z[:, None] - MEANS[None]
    logit = np.log(WEIGHTS) - 0.5 * (gap**2).sum(-1) / spread
    r = np.exp(logit - logit.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return (r[..., None] * (MEANS[None] + STD**2 / spread * gap)).sum(1)


class Recorder:
    """The model, as torch functions, and everything that it was asked."""

    def __init__(self):
        self.y, self.sigma, self.noise = [], [], []
        self.random = np.random.RandomState(11)

    def x0(self, z, sigma):
        """The data prediction at `z = x / alpha`."""
        sigma = float(np.asarray(sigma).reshape(-1)[0])
        self.y.append(np.asarray(z, np.float64))
        self.sigma.append(sigma)
        return torch.from_numpy(denoise(self.y[-1], sigma))

    def eps(self, z, sigma):
        """The noise prediction at `z`."""
        return (z - self.x0(z, sigma)) / float(sigma)

    def normal(self, *shape_like, **_):
        """One normal of the shape of the state, recorded."""
        self.noise.append(self.random.randn(*START.shape))
        return torch.from_numpy(self.noise[-1])

    def case(self, end, frame, grid):
        """What is stored; states of a `vp` case are recorded in its own coordinates."""
        y, sigma = np.stack(self.y), np.array(self.sigma)
        scale = {"ve": np.ones_like, "vp": lambda r: 1 / np.sqrt(1 + r**2), "rectified": lambda r: 1 / (1 + r)}[frame]
        y = y * scale(sigma)[:, None, None]
        noise = np.stack(self.noise) if self.noise else np.zeros((0, *START.shape))
        return {
            "y": y,
            "sigma": sigma,
            "noise": noise,
            "end": np.asarray(end, np.float64),
            "grid": np.asarray(grid, np.float64),
            "frame": np.array(frame),
        }


def peer_of_k_diffusion() -> types.ModuleType:
    """The samplers of k-diffusion, without what it needs for training."""
    package = types.ModuleType("k_diffusion")
    spec = importlib.util.find_spec("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    package.utils = utils
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


def k_diffusion() -> dict:
    """Samplers on a VE state, over the sigmas; none of them ends at zero here."""
    k = peer_of_k_diffusion()
    sigmas, cases = torch.from_numpy(SIGMAS), {}

    def add(name, f, grid=SIGMAS, stochastic=False, **options):
        r = Recorder()
        if stochastic:
            options["noise_sampler"] = r.normal
        cases[f"k.{name}"] = r.case(f(r, options), "ve", grid)

    run = lambda name: (
        lambda r, o: getattr(k, f"sample_{name}")(
            lambda x, s, **_: r.x0(x, s), torch.from_numpy(START * SIGMAS[0]), sigmas, disable=True, **o
        )
    )
    for name in ("euler", "heun", "dpm_2", "lms", "dpmpp_2m"):
        add(name, run(name))
    for order in (1, 2, 3):
        add(f"lms_{order}", run("lms"), order=order)
    for name in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"):
        add(name, run(name), stochastic=True)
    add("dpmpp_2s", run("dpmpp_2s_ancestral"), stochastic=True, eta=0.0)
    for eta in (0.0, 0.7, 1.0):
        for kind in ("midpoint", "heun"):
            add(f"dpmpp_2m_sde_{kind}@{eta}", run("dpmpp_2m_sde"), stochastic=True, eta=eta, solver_type=kind)
        add(f"dpmpp_3m_sde@{eta}", run("dpmpp_3m_sde"), stochastic=True, eta=eta)
    ends = dict(sigma_min=SIGMAS[-1], sigma_max=SIGMAS[0])
    for n in (7, 8, 9):
        fast = lambda r, o, n=n: k.sample_dpm_fast(
            lambda x, s, **_: r.x0(x, s), torch.from_numpy(START * SIGMAS[0]), n=n, disable=True, **ends
        )
        add(f"dpm_fast_{n}", fast, grid=[SIGMAS[0], SIGMAS[-1]])
    r = Recorder()
    r_randn, torch.randn_like = torch.randn_like, r.normal
    end = k.sample_heun(
        lambda x, s, **_: r.x0(x, s), torch.from_numpy(START * SIGMAS[0]), sigmas, disable=True,
        s_churn=4.0, s_tmin=0.1, s_tmax=9.0, s_noise=1.01,
    )  # fmt: skip
    torch.randn_like = r_randn
    r.noise = [z for z, s in zip(r.noise, SIGMAS, strict=False) if 0.1 <= s <= 9.0]  # it draws in the other steps too
    cases["k.heun_churn"] = r.case(end, "ve", SIGMAS)
    return cases


def azula() -> dict:
    """Exponential Adams-Bashforth on a grid of equal steps in log sigma."""
    from azula.denoise import Denoiser
    from azula.noise import VESchedule
    from azula.sample import vABSampler, xEABSampler, zEABSampler

    schedule, cases = VESchedule(sigma_min=float(SIGMAS[-1]), sigma_max=float(SIGMAS[0])), {}

    class Exact(Denoiser):
        """The exact denoiser, in azula's interface."""

        def __init__(self, recorder):
            super().__init__()
            self.recorder, self.schedule = recorder, schedule

        def forward(self, x, t, **_):
            return types.SimpleNamespace(mean=self.recorder.x0(x, float(schedule.sigma(t))))

    for name, sampler in (("zeab", zEABSampler), ("xeab", xEABSampler), ("vab", vABSampler)):
        for order in (2, 3, 4):
            r = Recorder()
            s = sampler(Exact(r), order=order, start=1.0, stop=0.0, steps=10, silent=True, dtype=torch.float64)
            end = s(torch.from_numpy(START * SIGMAS[0]))
            cases[f"azula.{name}{order}"] = r.case(end, "ve", np.geomspace(SIGMAS[0], SIGMAS[-1], 11))
    return cases


def diffusers() -> dict:
    """Schedulers; those that keep a list of sigmas get ours in float64, the others run over their own discrete times."""
    import diffusers as peer

    cases = {}

    def by_sigma(name, kind, frame="vp", grid=SIGMAS, noisy=False, **options):
        scheduler = getattr(peer, kind)(**options)
        n = len(grid) - 1
        scheduler.set_timesteps(n)
        sigmas = torch.from_numpy(np.asarray(grid))
        doubled = len(scheduler.timesteps) > n
        r = Recorder()
        scale = (lambda s: (1 + s**2) ** 0.5) if frame == "vp" else (lambda s: 1.0)
        x = torch.from_numpy(START * grid[0]) / scale(grid[0])
        if doubled:  # two calls of step for each step of the grid
            level = peer_levels(scheduler, kind, np.asarray(grid))
        else:
            scheduler.sigmas, level = sigmas, np.asarray(grid)[:-1]
        scheduler.set_begin_index(0)
        for i, t in enumerate(scheduler.timesteps):
            s = level[i]
            eps = r.eps(x * scale(s), s)
            options = {"variance_noise": r.normal()} if noisy == "given" else {}
            x = scheduler.step(eps, t, x, **options).prev_sample
        cases[f"d.{name}"] = r.case(x, frame, grid)

    def peer_levels(scheduler, kind, grid):
        if kind == "HeunDiscreteScheduler":
            scheduler.sigmas = torch.from_numpy(np.concatenate([grid[:1], np.repeat(grid[1:-1], 2), grid[-1:]]))
            # its last step is first order: it makes 2 n - 1 calls
            return np.concatenate([grid[:1], np.repeat(grid[1:-1], 2)])
        raise ValueError(kind)

    common = dict(final_sigmas_type="sigma_min", lower_order_final=False)
    for order in (1, 2, 3):
        for algorithm in ("dpmsolver++", "dpmsolver"):
            by_sigma(
                f"{algorithm}_{order}m", "DPMSolverMultistepScheduler",
                algorithm_type=algorithm, solver_order=order, **({"lower_order_final": False} | {"final_sigmas_type": "sigma_min"}),
            )  # fmt: skip
    by_sigma("dpmsolver++_2m_heun", "DPMSolverMultistepScheduler", solver_type="heun", **common)
    for order in (2, 3):
        by_sigma(f"dpmsolver++_{order}s", "DPMSolverSinglestepScheduler", solver_order=order, final_sigmas_type="sigma_min",
                 lower_order_final=False, grid=singlestep_grid(order))  # fmt: skip
    for order in (1, 2, 3):
        for kind in ("bh1", "bh2"):
            for data in (True, False):
                name = f"unipc_{order}_{kind}_{'x0' if data else 'eps'}"
                by_sigma(
                    name, "UniPCMultistepScheduler", solver_order=order, solver_type=kind, predict_x0=data, **common
                )
        by_sigma(f"deis_{order}", "DEISMultistepScheduler", solver_order=order, lower_order_final=False)
    by_sigma("euler", "EulerDiscreteScheduler", frame="ve", final_sigmas_type="sigma_min")
    by_sigma("heun", "HeunDiscreteScheduler", frame="ve")
    for kind in (dict(predictor_order=2, corrector_order=2), dict(predictor_order=3, corrector_order=3)):
        for tau in (0.0, 1.0):
            options = dict(lower_order_final=False, tau_func=constant(tau), **kind)
            original = patch_noise(peer.schedulers.scheduling_sasolver)
            by_sigma(f"sa_p{kind['predictor_order']}c{kind['corrector_order']}@{tau}", "SASolverScheduler", **options)
            recorded = original()
            cases[f"d.sa_p{kind['predictor_order']}c{kind['corrector_order']}@{tau}"]["noise"] = recorded
    return cases | discrete(peer) | flow_matching(peer) | ipndm(peer)


def flow_matching(peer) -> dict:
    """Schedulers of rectified flow, from sigma = 1 - t0 to 0: x = (1 - s) x0 + s eps, the model gives eps - x0."""
    cases = {}
    for name, kind in (
        ("flow_euler", "FlowMatchEulerDiscreteScheduler"),
        ("flow_heun", "FlowMatchHeunDiscreteScheduler"),
    ):
        grid = np.append(SIGMAS, 0.0) if name == "flow_euler" else SIGMAS
        s_grid = grid / (1 + grid)
        scheduler = getattr(peer, kind)()
        scheduler.set_timesteps(len(grid) - 1)
        sigmas = (
            s_grid if name == "flow_euler" else np.concatenate([s_grid[:1], np.repeat(s_grid[1:-1], 2), s_grid[-1:]])
        )
        scheduler.sigmas = torch.from_numpy(sigmas)
        scheduler.set_begin_index(0)
        r, x = Recorder(), torch.from_numpy(START * SIGMAS[0]) * (1 - s_grid[0])
        for i, t in enumerate(scheduler.timesteps):
            s = sigmas[i]
            x0 = r.x0(x / (1 - s), s / (1 - s))
            x = scheduler.step((x - x0) / s, t, x).prev_sample
        cases[f"d.{name}"] = r.case(x, "rectified", grid)
    return cases


def ipndm(peer) -> dict:
    """The fourth-order PNDM without Runge-Kutta start; the model gives v, the grid is ours."""
    sigma, alpha = SIGMAS / np.sqrt(1 + SIGMAS**2), 1 / np.sqrt(1 + SIGMAS**2)
    scheduler = peer.IPNDMScheduler()
    scheduler.set_timesteps(len(SIGMAS) - 1)
    scheduler.betas, scheduler.alphas = torch.from_numpy(sigma), torch.from_numpy(alpha)
    scheduler.set_begin_index(0)
    r, x = Recorder(), torch.from_numpy(START * sigma[0])
    for i, t in enumerate(scheduler.timesteps):
        x0 = r.x0(x / alpha[i], SIGMAS[i])
        v = alpha[i] * (x - alpha[i] * x0) / sigma[i] - sigma[i] * x0
        x = scheduler.step(v, t, x).prev_sample
    return {"d.ipndm": r.case(x, "vp", SIGMAS)}


def constant(tau):
    """A constant stochasticity for the SA-Solver."""
    return lambda t: tau


def singlestep_grid(order: int) -> np.ndarray:
    """A grid whose every `order`-th point is a step, the others its stages at equal distances in log-SNR."""
    coarse = np.log(SIGMAS[::2])
    return np.exp(np.interp(np.arange((len(coarse) - 1) * order + 1) / order, np.arange(len(coarse)), coarse))


def patch_noise(module):
    """Let a scheduler draw from our stream; the returned function undoes it and gives what was drawn."""
    random, drawn, old = np.random.RandomState(11), [], module.randn_tensor

    def draw(shape, **_):
        drawn.append(random.randn(*shape))
        return torch.from_numpy(drawn[-1])

    module.randn_tensor = draw

    def undo():
        module.randn_tensor = old
        return np.stack(drawn)

    return undo


def discrete(peer) -> dict:
    """Schedulers that index a table of alpha-bar by integer times."""
    cases = {}
    bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    ratio = lambda t: float(((1 - bar[t]) / bar[t]) ** 0.5)

    def by_time(name, kind, steps=10, noisy=False, step=None, offset=1, **options):
        scheduler = getattr(peer, kind)(
            beta_schedule="linear", timestep_spacing="leading", steps_offset=offset, **options
        )
        scheduler.alphas_cumprod, scheduler.alphas = bar, torch.cat([bar[:1], bar[1:] / bar[:-1]])
        scheduler.betas, scheduler.final_alpha_cumprod = 1 - scheduler.alphas, bar[0]
        scheduler.set_timesteps(steps)
        module = importlib.import_module(type(scheduler).__module__)
        r, undo = Recorder(), None
        if noisy:
            undo = patch_noise(module)
        first = int(scheduler.timesteps[0])
        x = torch.from_numpy(START) * (1 - bar[first]) ** 0.5
        for t in scheduler.timesteps:
            t = int(t)
            eps = r.eps(x / bar[t] ** 0.5, ratio(t))
            x = scheduler.step(eps, t, x, **(step or {})).prev_sample
        leap = 1000 // steps
        grid = [ratio(leap * i + offset) for i in reversed(range(steps))] + [ratio(0) if offset else 0.0]
        case = r.case(x, "vp", grid)
        if undo:
            case["noise"] = undo()
        cases[f"d.{name}"] = case

    by_time("ddim", "DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    by_time("ddim@0.6", "DDIMScheduler", clip_sample=False, set_alpha_to_one=False, noisy=True, step={"eta": 0.6})
    for kind in ("small", "large"):
        by_time(f"ddpm_{kind}", "DDPMScheduler", clip_sample=False, variance_type=f"fixed_{kind}", noisy=True, offset=0)
    by_time("plms", "PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False)
    by_time("pndm", "PNDMScheduler", skip_prk_steps=False, set_alpha_to_one=False)
    return cases


def main() -> None:
    """Record every case."""
    cases = k_diffusion() | azula() | diffusers()
    flat = {f"{name}/{field}": value for name, case in cases.items() for field, value in case.items()}
    model = {"model/weights": WEIGHTS, "model/means": MEANS, "model/std": np.array(STD), "model/start": START}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, **model, **flat)
    print(f"{len(cases)} cases, {OUT.stat().st_size} bytes: {', '.join(cases)}")


if __name__ == "__main__":
    import torch

    torch.set_default_dtype(torch.float64)
    main()
