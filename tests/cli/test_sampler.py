"""Which solver and grid the command line takes."""

import types

import jax
import numpy as np
import pytest

from diffjax import processes, solvers, times
from diffjax.cli import build, config
from diffjax.cli.sample import sampler_of

EDM = processes.edm()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.rows, b.rows)


def test_the_default_is_the_rule():
    same(build.solver(config.Sampler(steps=7), EDM), solvers.recommended(EDM, 7))
    guided = config.Sampler(steps=9, guidance=3.0)
    same(build.solver(guided, EDM), solvers.recommended(EDM, 9, guidance=3.0))


def test_a_grid_that_is_given_is_used():
    got = build.solver(config.Sampler(steps=30, grid="karras"), EDM)
    same(got, solvers.angle_abm(EDM, times.karras(EDM, 30), 6, 6, middle=(0.1, 4.0), ends=(4, 5)))
    other = build.solver(config.Sampler(solver="dpmpp_2m", steps=6), EDM)
    same(other, solvers.CATALOGUE["dpmpp_2m"].build(EDM, times.karras(EDM, 6)))


@pytest.mark.parametrize(
    ("solver", "grid", "expected"),
    [
        (None, None, ("dpmpp_2m", "karras")),
        ("recommended", None, ("recommended", "auto")),
        ("recommended", "log_snr", ("recommended", "log_snr")),
        ("ddim", None, ("ddim", "karras")),
    ],
)
def test_options_in_place_of_a_runs_own(solver, grid, expected):
    stored = config.DIGITS.sampler
    got = sampler_of(types.SimpleNamespace(solver=solver, grid=grid), stored)
    assert (got.solver, got.grid) == expected
