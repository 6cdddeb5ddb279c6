"""Tables against recorded trajectories of other libraries (experiments/peers/solvers.py), in float64.

A table is replayed in NumPy with the recorded normals: every point at which the model is asked, and the end, must agree.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes, solvers
from diffjax.solvers import CATALOGUE
from diffjax.testing import mixture, oracle

STORED = dict(np.load(pathlib.Path(__file__).parent / "peers.npz"))
MODEL = {k.removeprefix("model/"): v for k, v in STORED.items() if k.startswith("model/")}
FRAMES = {"ve": processes.edm(1e-3, 200.0), "vp": processes.vp()}

# peer's case -> (our card, options)
CASES = {
    "k.euler": ("ddim", {}),
    "k.euler_ancestral": ("ancestral", {}),
    "k.heun": ("heun", {}),
    "k.heun_churn": ("edm_heun", {"s_churn": 4.0, "s_min": 0.1, "s_max": 9.0, "s_noise": 1.01}),
    "k.dpmpp_2m": ("dpmpp_2m", {}),
    "d.dpmsolver++_1m": ("dpmpp_1", {}),
    "d.dpmsolver++_2m": ("dpmpp_2m", {}),
    "d.euler": ("ddim", {}),
    "d.ddim": ("ddim", {}),
    "d.ddim@0.6": ("ddim", {"eta": 0.6}),
    **{f"azula.{a}{n}": (f"exp_ab{n}_{b}", {}) for a, b in (("zeab", "eps"), ("xeab", "x0")) for n in (2, 3, 4)},
}


def denoise(z, sigma):
    """`E[x0 | z]` of the recorded model."""
    spread = MODEL["std"] ** 2 + sigma**2
    gap = z[:, None] - MODEL["means"][None]
    logit = np.log(MODEL["weights"]) - 0.5 * (gap**2).sum(-1) / spread
    r = np.exp(logit - logit.max(1, keepdims=True))
    r = (r / r.sum(1, keepdims=True))[..., None]
    return (r * (MODEL["means"][None] + MODEL["std"] ** 2 / spread * gap)).sum(1)


def replay(solver, process, x, noise):
    """The rows of a table in NumPy; normals are taken from `noise` in order.   Returns: points, ratios, end."""
    r, noise = solver.rows, iter(noise)
    xs, ds = [x] * r.px.shape[1], [np.zeros_like(x)] * r.pd.shape[1]
    mix = lambda c, registers: sum(a * b for a, b in zip(c, registers, strict=True))
    points, ratios = [], []
    for i, t in enumerate(r.t):
        shared = r.pz is not None and (r.pz[i] != 0 or r.qz[i] != 0)
        z = next(noise) if shared else np.zeros_like(x)
        y = mix(r.px[i], xs) + mix(r.pd[i], ds) + (r.pz[i] * z if shared else 0)
        alpha, sigma = process.alpha(t), process.sigma(t)
        x0 = denoise(y / alpha, sigma / alpha)
        d = r.u[i, 0] * x0 + r.u[i, 1] * (y - alpha * x0) / sigma
        new = mix(r.qx[i], xs) + mix(r.qd[i], ds) + r.qn[i] * d + (r.qz[i] * z if shared else 0)
        if r.noise is not None and r.noise[i] != 0:
            new = new + r.noise[i] * next(noise)
        points.append(y)
        ratios.append(sigma / alpha)
        xs = [new, *xs[:-1]]
        if ds and r.keep[i]:
            ds = [d, *ds[:-1]]
    return np.stack(points), np.array(ratios), xs[0]


def case(name):
    fields = ("y", "sigma", "noise", "end", "grid", "frame")
    return {f: STORED[f"{name}/{f}"] for f in fields}


def table(name):
    """Our table of a case, on the peer's grid."""
    c = case(name)
    process = FRAMES[str(c["frame"])]
    card, options = CASES[name]
    return CATALOGUE[card].build(process, process.time_of_log_snr(-np.log(c["grid"])), **options), process, c


@pytest.mark.parametrize("name", CASES)
def test_same_trajectory(name):
    solver, process, c = table(name)
    points, ratios, end = replay(solver, process, c["y"][0], c["noise"])
    assert len(points) == len(c["y"]), "another number of evaluations"
    np.testing.assert_allclose(ratios, c["sigma"], rtol=1e-9)
    np.testing.assert_allclose(points, c["y"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(end, c["end"], rtol=1e-5, atol=1e-7)


def test_replay_is_what_sample_does(x64):
    solver, process, c = table("k.heun")
    d = oracle(mixture(MODEL["weights"], MODEL["means"], stds=np.full(3, MODEL["std"])), process)
    got = diffjax.sample(jax.random.key(0), d, solver, jnp.asarray(c["y"][0]))
    np.testing.assert_allclose(got, c["end"], rtol=1e-9)
    assert solvers.compact(solver).evaluations == len(c["y"])
