"""Solvers: `CATALOGUE[name].build(process, grid, **options) -> Solver`, and tables as values.

A family is a file, and its methods are the `CARDS` at the end of it.
"""

from diffjax.solvers import adams, multistep, onestep, runge_kutta
from diffjax.solvers.adams import EPS, X0, V, exp_ab
from diffjax.solvers.multistep import dpmpp
from diffjax.solvers.onestep import ancestral, ddim, ddpm, euler
from diffjax.solvers.plot import plot_table
from diffjax.solvers.runge_kutta import edm_heun, heun
from diffjax.solvers.table import compact, load_table, pad, save_table, stack
from diffjax.types import Card

CATALOGUE: dict[str, Card] = {**onestep.CARDS, **runge_kutta.CARDS, **multistep.CARDS, **adams.CARDS}

__all__ = [
    "CATALOGUE", "EPS", "V", "X0", "ancestral", "compact", "ddim", "ddpm", "dpmpp", "edm_heun", "euler", "exp_ab", "heun",
    "load_table", "pad", "plot_table", "save_table", "stack",
]  # fmt: skip
