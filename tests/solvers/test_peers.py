"""Tables against recorded trajectories of other libraries (experiments/peers/solvers.py), in float64.

A table is replayed in NumPy with the recorded normals: every point at which the model is asked, and the end, must agree.
"""

import pathlib

import host_tables
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes, solvers
from diffjax.solvers import CATALOGUE, lms, unipc
from diffjax.testing import mixture, oracle

STORED = dict(np.load(pathlib.Path(__file__).parent / "peers.npz"))
MODEL = {k.removeprefix("model/"): v for k, v in STORED.items() if k.startswith("model/")}
BETAS = np.linspace(1e-4, 2e-2, 1000)
FRAMES = {"ve": processes.edm(1e-3, 200.0), "vp": processes.vp(), "discrete": processes.from_betas(BETAS),
          "rectified": processes.rectified()}  # fmt: skip

# peer's case -> our builder and its options
CARD = lambda name: CATALOGUE[name].build
CASES = {
    "k.euler": (solvers.ddim, {}),
    "k.euler_ancestral": (solvers.ancestral, {}),
    "k.heun": (solvers.heun, {}),
    "k.heun_churn": (solvers.edm_heun, {"s_churn": 4.0, "s_min": 0.1, "s_max": 9.0, "s_noise": 1.01}),
    "k.dpm_2": (CARD("dpm2"), {}),
    "k.dpm_2_ancestral": (CARD("dpm2_ancestral"), {}),
    "k.dpmpp_2s": (CARD("dpmpp_2s"), {}),
    "k.dpmpp_2s_ancestral": (CARD("dpmpp_2s_ancestral"), {}),
    "k.dpmpp_2m": (CARD("dpmpp_2m"), {}),
    **{f"k.lms{'' if n == 4 else f'_{n}'}": (lms.lms, {"order": n}) for n in (1, 2, 3, 4)},
    **{f"k.dpmpp_2m_sde_midpoint@{eta}": (solvers.dpmpp, {"order": 2, "eta": eta}) for eta in (0.0, 0.7, 1.0)},
    **{
        f"k.dpmpp_2m_sde_heun@{eta}": (solvers.dpmpp, {"order": 2, "eta": eta, "heun": True}) for eta in (0.0, 0.7, 1.0)
    },
    **{f"k.dpmpp_3m_sde@{eta}": (solvers.dpmpp, {"order": 3, "eta": eta, "heun": True}) for eta in (0.0, 0.7, 1.0)},
    **{f"k.dpm_fast_{n}": (solvers.dpm_solver_fast, {"evaluations": n}) for n in (7, 8, 9)},
    **{f"azula.{a}{n}": (CARD(f"exp_ab{n}_{b}"), {}) for a, b in (("zeab", "eps"), ("xeab", "x0")) for n in (2, 3, 4)},
    **{f"d.dpmsolver++_{n}m": (solvers.dpmpp, {"order": n}) for n in (1, 2, 3)},
    "d.dpmsolver_1m": (solvers.ddim, {}),
    "d.dpmsolver_2m": (CARD("unip2_eps"), {}),
    "d.dpmsolver++_2m_heun": (solvers.dpmpp, {"order": 2, "heun": True}),
    "d.dpmsolver++_2s": (CARD("dpmpp_2s"), {}),
    **{
        f"d.unipc_{n}_{kind}_{value.name}": (unipc.unipc, {"order": n, "value": value, "scale": scale})
        for n in (1, 2, 3)
        for kind, scale in (("bh1", unipc.b1), ("bh2", unipc.b2))
        for value in (solvers.X0, solvers.EPS)
    },
    **{f"d.deis_{n}": (CARD(f"exp_ab{n}_eps"), {}) for n in (1, 2, 3)},  # its polynomials are in log(sigma / alpha)
    "d.euler": (solvers.ddim, {}),
    "d.ddim": (solvers.ddim, {}),
    "d.ddpm_small": (solvers.ddpm, {"variance": 0.0}),
    "d.ddpm_large": (solvers.ddpm, {"variance": 1.0}),
    "d.flow_euler": (solvers.euler, {}),
    "d.ddim@0.6": (solvers.ddim, {"eta": 0.6}),
    "d.pndm": (CARD("pndm"), {}),
    "d.ipndm": (CARD("ipndm4"), {}),
}


# where a peer does something else, on purpose or by accident: how many of its first evaluations agree all the same
DIFFERENT = {
    "d.heun": (solvers.heun, {}),  # its last step is first order even where sigma does not end at zero
    "d.flow_heun": (solvers.flow_heun, {}),  # the same
    "d.plms": (CARD("ipndm4"), {}),  # starts with one Heun step, at the price of an evaluation
    "d.dpmsolver++_3s": (CARD("dpmpp_3s"), {}),  # weighs the difference in its second stage as in the second-order step
    **{f"azula.vab{n}": (CARD(f"exp_ab{n}_v"), {}) for n in (2, 3, 4)},  # the polynomial is in time there
    **{  # its steps of two values use other coefficients than the paper's
        f"d.sa_p{n}c{n}@{tau}": (solvers.sa, {"predictor": n, "corrector": n, "tau": tau})
        for n in (2, 3)
        for tau in (0.0, 1.0)
    },
}
AGREE = {"d.heun": 21, "d.flow_heun": 21, "d.plms": 2, "d.dpmsolver++_3s": 2}
AGREE |= {name: 1 for name in DIFFERENT if name.startswith("azula")}
UNSEEN = {"d.dpmsolver_3m"}  # deprecated there: a Taylor step in eps with half its second difference


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

    def model(y, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        x0 = denoise(y / alpha, sigma / alpha)
        return x0, (y - alpha * x0) / sigma

    asked = []
    end = host_tables.run(solver, model, x, noise=noise, points=asked)
    t, points = (np.stack(a) for a in zip(*asked, strict=True))
    return points, process.sigma(t) / process.alpha(t), end


def case(name):
    fields = ("y", "sigma", "noise", "end", "grid", "frame")
    return {f: STORED[f"{name}/{f}"] for f in fields}


def times_of(process, ratios):
    """Times of sigma / alpha; 0 is the data themselves."""
    return np.array([process.time_of_log_snr(-np.log(r)) if r > 0 else 0.0 for r in ratios])


def table(name):
    """Our table of a case, on the peer's grid."""
    c = case(name)
    process = FRAMES["discrete" if name in ("d.pndm", "d.plms") else str(c["frame"])]  # these halve steps in time
    build, options = (CASES | DIFFERENT)[name]
    ratios = c["grid"]
    if build is solvers.dpm_solver_fast:  # the peer chooses its grid: equal steps in log-SNR
        ratios = np.geomspace(*ratios, options["evaluations"] // 3 + 2)
    if name in ("d.dpmsolver++_2s", "d.dpmsolver++_3s"):  # its grid holds the stages too
        ratios = ratios[:: int(name[-2])]
    return build(process, times_of(process, ratios), **options), process, c


@pytest.mark.parametrize("name", CASES)
def test_same_trajectory(name):
    solver, process, c = table(name)
    points, ratios, end = replay(solver, process, c["y"][0], c["noise"])
    assert len(points) == len(c["y"]), "another number of evaluations"
    np.testing.assert_allclose(ratios, c["sigma"], rtol=1e-9)
    np.testing.assert_allclose(points, c["y"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(end, c["end"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_peers_differ(name):
    solver, process, c = table(name)
    points, _, end = replay(solver, process, c["y"][0], c["noise"])
    same = AGREE.get(name, 2)
    np.testing.assert_allclose(points[:same], c["y"][:same], rtol=1e-5, atol=1e-7)
    assert 1e-6 < np.abs(end - c["end"]).max() < 1.5, "they agree, or are not the same method at all"


def test_every_recorded_case_is_used():
    assert {k.split("/")[0] for k in STORED} - {"model"} == set(CASES) | set(DIFFERENT) | UNSEEN


def test_replay_is_what_sample_does(x64):
    solver, process, c = table("k.heun")
    d = oracle(mixture(MODEL["weights"], MODEL["means"], stds=np.full(3, MODEL["std"])), process)
    got = diffjax.sample(jax.random.key(0), d, solver, jnp.asarray(c["y"][0]))
    np.testing.assert_allclose(got, c["end"], rtol=1e-9)
    assert solvers.compact(solver).evaluations == len(c["y"])
