"""Solvers: `CATALOGUE[name].build(process, grid, **options) -> Solver`, and tables as values.

A family is a file, and its methods are the `CARDS` at the end of it.
"""

from diffjax.solvers import (
    adams,
    adaptive,
    corrector,
    deis,
    lms,
    momentum,
    multistep,
    onestep,
    pndm,
    reversible,
    runge_kutta,
    sde,
    singlestep,
    unipc,
    variance,
)
from diffjax.solvers import dpm_v3 as _dpm_v3
from diffjax.solvers import recommended as _recommended
from diffjax.solvers import sa as _sa
from diffjax.solvers import unified as _unified
from diffjax.solvers.adams import EPS, LAMBDA, RHO, TIME, X0, V, exp_ab, exp_abm
from diffjax.solvers.adaptive import dpm_adaptive, reported
from diffjax.solvers.brownian import brownian
from diffjax.solvers.corrector import predictor_corrector
from diffjax.solvers.dense import check_reversible, exposed, invert
from diffjax.solvers.dpm_v3 import DATA, NOISE, dpm_v3
from diffjax.solvers.integrate import integrate
from diffjax.solvers.inversion import NoiseMap, encode, replay
from diffjax.solvers.learn import Problems, from_table, learn, save_learned
from diffjax.solvers.momentum import ghvb, heavy_ball
from diffjax.solvers.multistep import dpm_solver_sde, dpmpp, dpmpp_3m_exact
from diffjax.solvers.onestep import ancestral, ddim, ddpm, euler
from diffjax.solvers.plot import plot_table
from diffjax.solvers.pndm import ipndm
from diffjax.solvers.recommended import angle_abm, recommended
from diffjax.solvers.reversible import bdia, edict, o_belm
from diffjax.solvers.runge_kutta import edm_heun, edm_rk2, flow_heun, flow_midpoint, flow_rk4, heun
from diffjax.solvers.sa import sa
from diffjax.solvers.sde import annealed_langevin, euler_maruyama, langevin, reverse_diffusion, sra1
from diffjax.solvers.search import evolve, predict_and_search, score_tables
from diffjax.solvers.singlestep import dpm_solver_fast, exp_rk
from diffjax.solvers.statistics import (
    ModelStatistics,
    NoiseMoment,
    load_statistics,
    model_statistics,
    noise_moment,
    save_statistics,
)
from diffjax.solvers.table import compact, load_about, load_table, pad, save_table, stack
from diffjax.solvers.unified import Decisions, unified
from diffjax.solvers.variance import analytic, ddpm_learned, fraction_of_aux, log_variance_of_aux
from diffjax.types import Card

_FAMILIES = (
    onestep,
    variance,
    runge_kutta,
    singlestep,
    multistep,
    adams,
    deis,
    lms,
    unipc,
    pndm,
    momentum,
    _sa,
    _dpm_v3,
    _unified,
    _recommended,
    sde,
    corrector,
    reversible,
    adaptive,
)
CATALOGUE: dict[str, Card] = {name: card for family in _FAMILIES for name, card in family.CARDS.items()}

__all__ = [
    "CATALOGUE",
    "DATA",
    "Decisions",
    "EPS",
    "LAMBDA",
    "ModelStatistics",
    "NOISE",
    "NoiseMap",
    "NoiseMoment",
    "Problems",
    "RHO",
    "TIME",
    "V",
    "X0",
    "analytic",
    "ancestral",
    "angle_abm",
    "annealed_langevin",
    "bdia",
    "brownian",
    "check_reversible",
    "compact",
    "ddim",
    "ddpm",
    "ddpm_learned",
    "dpm_adaptive",
    "dpm_solver_fast",
    "dpm_solver_sde",
    "dpm_v3",
    "dpmpp",
    "dpmpp_3m_exact",
    "edict",
    "edm_heun",
    "edm_rk2",
    "encode",
    "euler",
    "euler_maruyama",
    "evolve",
    "exp_ab",
    "exp_abm",
    "exp_rk",
    "exposed",
    "flow_heun",
    "flow_midpoint",
    "flow_rk4",
    "fraction_of_aux",
    "from_table",
    "ghvb",
    "heavy_ball",
    "heun",
    "integrate",
    "invert",
    "ipndm",
    "langevin",
    "learn",
    "load_about",
    "load_statistics",
    "load_table",
    "log_variance_of_aux",
    "model_statistics",
    "noise_moment",
    "o_belm",
    "pad",
    "plot_table",
    "predict_and_search",
    "predictor_corrector",
    "recommended",
    "replay",
    "reported",
    "reverse_diffusion",
    "sa",
    "save_learned",
    "save_statistics",
    "save_table",
    "score_tables",
    "sra1",
    "stack",
    "unified",
]
