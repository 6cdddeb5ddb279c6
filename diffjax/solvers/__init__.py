"""Solvers: `CATALOGUE[name].build(process, grid, **options) -> Solver`, and tables as values.

A family is a file, and its methods are the `CARDS` at the end of it.
"""

from diffjax.solvers import adams, adaptive, multistep, onestep, runge_kutta, singlestep
from diffjax.solvers import adams, dpm_v3, multistep, onestep, runge_kutta
from diffjax.solvers.adams import EPS, X0, V, exp_ab
from diffjax.solvers.adaptive import dpm_adaptive, reported
from diffjax.solvers.multistep import dpm_solver_sde, dpmpp, dpmpp_3m_exact
from diffjax.solvers.onestep import ancestral, ddim, ddpm, euler
from diffjax.solvers.plot import plot_table
from diffjax.solvers import adams, deis, lms, momentum, multistep, onestep, pndm, runge_kutta, unipc
from diffjax.solvers.adams import EPS, LAMBDA, RHO, TIME, X0, V, exp_ab, exp_abm
from diffjax.solvers.momentum import ghvb, heavy_ball
from diffjax.solvers import adams, multistep, onestep, runge_kutta
from diffjax.solvers import unified as _unified
from diffjax.solvers.adams import EPS, X0, V, exp_ab
from diffjax.solvers.learn import Problems, from_table, learn, save_learned
from diffjax.solvers import adams, corrector, multistep, onestep, runge_kutta, sde
from diffjax.solvers.adams import EPS, X0, V, exp_ab
from diffjax.solvers.brownian import brownian
from diffjax.solvers.corrector import predictor_corrector
from diffjax.solvers.integrate import integrate
from diffjax.solvers.multistep import dpmpp
from diffjax.solvers.onestep import ancestral, ddim, ddpm, euler
from diffjax.solvers.pndm import ipndm
from diffjax.solvers.runge_kutta import edm_heun, heun
from diffjax.solvers.singlestep import dpm_solver_fast, exp_rk
from diffjax.solvers import adams, multistep, onestep, runge_kutta
from diffjax.solvers import dpm_v3 as _dpm_v3
from diffjax.solvers import sa as _sa
from diffjax.solvers import variance as _variance
from diffjax.solvers.adams import EPS, X0, V, exp_ab
from diffjax.solvers.dpm_v3 import DATA, NOISE, dpm_v3
from diffjax.solvers.multistep import dpmpp
from diffjax.solvers.onestep import ancestral, ddim, ddpm, euler
from diffjax.solvers.runge_kutta import edm_heun, edm_rk2, flow_heun, flow_midpoint, flow_rk4, heun
from diffjax.solvers.sa import sa
from diffjax.solvers.statistics import (
    ModelStatistics,
    NoiseMoment,
    load_statistics,
    model_statistics,
    noise_moment,
    save_statistics,
)
from diffjax.solvers.sde import annealed_langevin, euler_maruyama, langevin, reverse_diffusion, sra1
from diffjax.solvers.table import compact, load_table, pad, save_table, stack
from diffjax.solvers.variance import analytic, ddpm_learned, fraction_of_aux, log_variance_of_aux
from diffjax.types import Card

CATALOGUE: dict[str, Card] = {
    **onestep.CARDS, **runge_kutta.CARDS, **multistep.CARDS, **adams.CARDS, **singlestep.CARDS, **adaptive.CARDS
}  # fmt: skip
CATALOGUE: dict[str, Card] = {**onestep.CARDS, **runge_kutta.CARDS, **multistep.CARDS, **adams.CARDS, **dpm_v3.CARDS}

__all__ = [
    "CATALOGUE", "EPS", "V", "X0", "ancestral", "compact", "ddim", "ddpm", "dpmpp", "edm_heun", "euler", "exp_ab", "heun",
    "load_table", "pad", "plot_table", "save_table", "stack",
    "CATALOGUE", "EPS", "V", "X0", "ancestral", "compact", "ddim", "ddpm", "dpm_solver_fast", "dpm_solver_sde", "dpmpp",
    "dpmpp_3m_exact", "edm_heun", "euler", "exp_ab", "exp_rk", "heun", "load_table", "pad", "save_table", "stack",
    "CATALOGUE", "EPS", "V", "X0", "ancestral", "compact", "ddim", "ddpm", "dpm_adaptive", "dpm_solver_fast", "dpm_solver_sde",
    "dpmpp", "dpmpp_3m_exact", "edm_heun", "euler", "exp_ab", "exp_rk", "heun", "load_table", "pad", "reported", "save_table",
    "stack",
    **onestep.CARDS, **runge_kutta.CARDS, **multistep.CARDS, **adams.CARDS, **deis.CARDS, **lms.CARDS, **unipc.CARDS,
    **pndm.CARDS, **momentum.CARDS,
}  # fmt: skip

__all__ = [
    "CATALOGUE", "EPS", "LAMBDA", "RHO", "TIME", "V", "X0", "ancestral", "compact", "ddim", "ddpm", "dpmpp", "edm_heun",
    "euler", "exp_ab", "exp_abm", "ghvb", "heavy_ball", "heun", "ipndm", "load_table", "pad", "save_table", "stack",
    **onestep.CARDS,
    **_variance.CARDS,
    **runge_kutta.CARDS,
    **multistep.CARDS,
    **adams.CARDS,
    **_dpm_v3.CARDS,
    **_sa.CARDS,
}

__all__ = [
    "CATALOGUE", "DATA", "EPS", "ModelStatistics", "NOISE", "NoiseMoment", "V", "X0", "analytic", "ancestral", "compact",
    "ddim", "ddpm", "ddpm_learned", "dpm_v3", "dpmpp", "edm_heun", "edm_rk2", "euler", "exp_ab", "flow_heun",
    "flow_midpoint", "flow_rk4", "fraction_of_aux", "heun", "load_statistics", "load_table", "log_variance_of_aux",
    "model_statistics", "noise_moment", "pad", "sa", "save_statistics", "save_table", "stack",
from diffjax.solvers.search import evolve, predict_and_search, score_tables
from diffjax.solvers.table import compact, load_table, pad, save_table, stack
from diffjax.solvers.unified import Decisions, unified
from diffjax.types import Card

CATALOGUE: dict[str, Card] = {**onestep.CARDS, **runge_kutta.CARDS, **multistep.CARDS, **adams.CARDS, **_unified.CARDS}

__all__ = [
    "CATALOGUE", "EPS", "Decisions", "Problems", "V", "X0", "ancestral", "compact", "ddim", "ddpm", "dpmpp", "edm_heun",
    "euler", "evolve", "exp_ab", "from_table", "heun", "learn", "load_table", "pad", "predict_and_search", "save_learned",
    "save_table", "score_tables", "stack", "unified",
    **onestep.CARDS, **runge_kutta.CARDS, **multistep.CARDS, **adams.CARDS, **sde.CARDS, **corrector.CARDS,
}  # fmt: skip

__all__ = [
    "CATALOGUE", "EPS", "V", "X0", "ancestral", "annealed_langevin", "brownian", "compact", "ddim", "ddpm", "dpmpp", "edm_heun",
    "euler", "euler_maruyama", "exp_ab", "heun", "integrate", "langevin", "load_table", "pad", "predictor_corrector", "reverse_diffusion",
    "save_table", "sra1", "stack",
]  # fmt: skip
