"""Solvers: `CATALOGUE[name].build(process, grid, **options) -> Solver`, and tables as values."""

import dataclasses

from diffjax.solvers.adams import EPS, X0, V, exp_ab
from diffjax.solvers.dpmpp import dpmpp
from diffjax.solvers.onestep import ancestral, ddim, ddpm, euler
from diffjax.solvers.runge_kutta import edm_heun, heun
from diffjax.solvers.table import compact, load_table, pad, save_table, stack
from diffjax.types import Card


@dataclasses.dataclass(frozen=True)
class _With:
    """A builder with some options fixed; prints and hashes by value."""

    f: object
    options: tuple

    def __call__(self, process, grid, **options):
        return self.f(process, grid, **dict(self.options), **options)


def _with(f, **options):
    return _With(f, tuple(options.items()))


_DPMPP = "DPM-Solver++ multistep, data prediction"
_AB = "exponential Adams-Bashforth on the kept"

CATALOGUE: dict[str, Card] = {
    "ddim": Card(ddim, "arXiv:2010.02502#Eq.12", "DDIM(eta), deterministic by default", 1, 1, exact=("x0", "eps")),
    "ddpm": Card(
        ddpm, "arXiv:2006.11239#Eq.6", "reverse Markov chain, posterior to transition variance", 1, 1, noise=True
    ),
    "ancestral": Card(ancestral, "arXiv:2011.13456#Eq.4", "Euler ancestral", 1, 1, noise=True),
    "euler": Card(euler, "arXiv:2210.02747#Sec.3", "Euler in t on the probability flow", 1, 1),
    "heun": Card(heun, "arXiv:2206.00364#Alg.1", "Heun in sigma / alpha", 2, 2, exact=("eps",)),
    "edm_heun": Card(edm_heun, "arXiv:2206.00364#Alg.2", "Heun with EDM's churn", 2, 2, noise=True),
    "dpmpp_1": Card(_with(dpmpp, order=1), "arXiv:2211.01095#Alg.2", _DPMPP, 1, 1, exact=("x0", "eps")),
    "dpmpp_2m": Card(_with(dpmpp, order=2), "arXiv:2211.01095#Alg.2", _DPMPP, 2, 1, exact=("x0",)),
    "dpmpp_3m": Card(_with(dpmpp, order=3), "arXiv:2211.01095#App.B", _DPMPP, 2, 1, exact=("x0",)),
    **{
        f"exp_ab{order}_{value.name}": Card(
            _with(exp_ab, order=order, value=value),
            "arXiv:2204.13902#Eq.14",
            f"{_AB} {value.name}",
            min(order, 2),
            1,
            exact={
                "x0": ("x0", "eps") if order == 1 else ("x0",),
                "eps": ("x0", "eps") if order == 1 else ("eps",),
                "v": (),
            }[value.name],
        )  # fmt: skip
        for value in (X0, EPS, V)
        for order in (1, 2, 3, 4)
    },
}

__all__ = [
    "CATALOGUE", "EPS", "V", "X0", "ancestral", "compact", "ddim", "ddpm", "dpmpp", "edm_heun", "euler", "exp_ab", "heun",
    "load_table", "pad", "save_table", "stack",
]  # fmt: skip
