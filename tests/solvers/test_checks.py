"""Options that a method does not take are refused by name, whatever kind of value they are."""

import inspect
import math

import numpy as np
import pytest

from diffjax import processes, solvers, times
from diffjax.solvers import checks

P, G = processes.vp(), times.uniform(4)
RANGES = [
    (solvers.ddim, "eta"), (solvers.dpmpp, "eta"), (solvers.exp_rk, "eta"), (solvers.dpm_solver_sde, "eta"),
    (solvers.analytic, "eta"), (solvers.ddim, "s_noise"), (solvers.edm_heun, "s_noise"),
    (solvers.ddpm, "variance"), (solvers.edm_rk2, "alpha"), (solvers.exp_abm, "blend"),
    (solvers.heavy_ball, "momentum"), (solvers.ghvb, "order"), (solvers.sa, "tau"), (solvers.sa, "low"),
    (solvers.dpm_v3, "correct_above"), (solvers.dpm_adaptive, "rtol"), (solvers.dpm_adaptive, "safety"),
]  # fmt: skip
INTEGERS = [
    (solvers.dpmpp, "order"), (solvers.dpm_solver_sde, "order"), (solvers.exp_ab, "order"), (solvers.exp_abm, "order"),
    (solvers.exp_abm, "corrector_order"), (solvers.exp_rk, "order"), (solvers.ipndm, "order"), (solvers.heavy_ball, "order"),
    (solvers.dpm_v3, "order"), (solvers.dpm_adaptive, "order"), (solvers.sa, "predictor"), (solvers.sa, "corrector"),
]  # fmt: skip


def call(method, name, value):
    """The method past the annotations, which are checked in tests alone."""
    return inspect.unwrap(method)(P, G, **{name: value})


@pytest.mark.parametrize(("method", "name"), RANGES)
def test_one_number_in_range(method, name):
    for bad in (math.nan, -1, np.ones(2), "2", None, True):
        with pytest.raises(ValueError, match=f"^{name}.* must be .*got "):
            call(method, name, bad)


@pytest.mark.parametrize(("method", "name"), INTEGERS)
def test_one_of_the_integers(method, name):
    for bad in (math.nan, -1, np.ones(2), "2", True, 2.0):
        with pytest.raises(ValueError, match=f"^{name} must be .*got "):
            call(method, name, bad)


def test_ranges_and_their_messages():
    checks.check_number("x", np.float32(0.5), high=1.0)
    checks.check_number("x", math.inf)
    with pytest.raises(ValueError, match=r"^x must be in \(0, 1\], so; got 0$"):
        checks.check_number("x", 0, high=1.0, above=True, hint="so")
    with pytest.raises(ValueError, match=r"^x must be > 0; got 0.0$"):
        checks.check_number("x", 0.0, above=True)
    with pytest.raises(ValueError, match=r"^n must be 1 or 2; got 3$"):
        checks.check_integer("n", 3, (1, 2))
    checks.check_integer("n", np.int64(2), (1, 2))
    with pytest.raises(ValueError, match="seed must be a number; got nan"):
        call(solvers.ghvb, "seed", math.nan)
    for bad in (9.0, "9", True):
        with pytest.raises(ValueError, match="evaluations must be an int or None"):
            call(solvers.dpm_solver_fast, "evaluations", bad)
    for bad, message in (((1.0, 0.0), "gains are three numbers"), ((0.0, math.nan, 0.0), "gain I must be")):
        with pytest.raises(ValueError, match=message):
            call(solvers.dpm_adaptive, "gains", bad)
