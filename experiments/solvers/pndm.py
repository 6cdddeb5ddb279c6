"""PNDM: multistep and Runge-Kutta slopes put through the transfer of DDIM.

phi(x, e, t, s) = (alpha_s / alpha_t) x + alpha_s (rho_s - rho_t) e,   rho = sigma / alpha
`pndm`: three pseudo Runge-Kutta steps, then x_s = phi(x, (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24, t, s) with e_j = eps j steps
back. `ipndm` starts with lower orders instead. The data are a smooth mixture of Gaussians, whose probability flow is known to
1e-12, so that errors are those of the solver alone: order 2, because the weights are those of equal steps.
"""

import jax
import numpy as np

import diffjax
from diffjax import processes, solvers, testing, times
from diffjax.solvers import pndm
from experiments.recipe import Recipe, at_least, at_most, between

RECIPE = Recipe(
    ledger=238,
    paper="arXiv:2202.09778",
    claim="order about 2 against 1 for DDIM; 50 evaluations are more accurate than 250 of DDIM; e' = e is DDIM",
    expect={
        "pndm_order": at_least(1.7),
        "ipndm_order": at_least(1.7),
        "ddim_order": between(0.9, 1.1),
        "error_at_50_over_ddim_at_250": at_most(0.5),
        "ipndm_error_at_50_over_ddim_at_250": at_most(0.5),
        "gap_to_ddim_for_equal_slopes": at_most(1e-7),
    },
    minutes=0.5,
)

START, STOP = 0.98, 0.02
METHODS = {"pndm": pndm.pndm, "ipndm": solvers.ipndm, "ddim": solvers.ddim}
sample = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))


def steps(name, evaluations):
    """The steps that take this many evaluations: the three Runge-Kutta steps take 12."""
    return evaluations - 9 if name == "pndm" else evaluations


@jax.enable_x64(True)
def run(preset):
    n, counts = (256, (50, 100, 200, 250)) if preset == "full" else (8, (20, 40, 50, 60))
    process, mixture = processes.vp(), testing.smooth_mixture()
    x, _ = testing.draw(jax.random.key(0), mixture, n, process, START)
    exact = testing.flow(mixture, process, x, START, STOP)
    grid = lambda n: times.log_snr(process, n, start=START, stop=STOP)

    def ends(tables, denoiser):
        return np.asarray(sample(jax.random.key(1), denoiser, solvers.stack(tables), x))

    tables = {(m, c): METHODS[m](process, grid(steps(m, c))) for m in METHODS for c in counts}
    end = dict(zip(tables, ends(list(tables.values()), testing.oracle(mixture, process)), strict=True))
    error = {k: np.sqrt(((e - exact) ** 2).sum(-1).mean()) for k, e in end.items()}
    slope = lambda m: (
        np.log(error[m, counts[0]] / error[m, counts[2]]) / np.log(steps(m, counts[2]) / steps(m, counts[0]))
    )

    constant = diffjax.denoiser(lambda x, t: 0 * x + 0.7, process, diffjax.from_eps)
    equal = ends([f(process, grid(12)) for f in METHODS.values()], constant)
    return {
        **{f"{m}_order": slope(m) for m in METHODS},
        **{f"{m}_error_at_{c}": error[m, c] for m in METHODS for c in counts[:1]},
        f"ddim_error_at_{counts[3]}": error["ddim", counts[3]],
        "error_at_50_over_ddim_at_250": error["pndm", counts[0]] / error["ddim", counts[3]],
        "ipndm_error_at_50_over_ddim_at_250": error["ipndm", counts[0]] / error["ddim", counts[3]],
        "gap_to_ddim_for_equal_slopes": np.abs(equal[:2] - equal[2]).max(),
        "exact_grid": exact,
        **{f"{m}_grid": end[m, counts[0]] for m in METHODS},
    }
