"""Fixtures for the tests of networks."""

import jax
import pytest
from network_cases import FULL, case_of


@pytest.fixture(scope="session", params=list(FULL))
def case(request):
    return case_of(request.param)


@pytest.fixture(scope="session")
def forward():
    """`f(case)`: the compiled network (params, x, t, cond) of a case; compiled once."""
    compiled = {}

    def make(case):
        if case.net not in compiled:
            compiled[case.net] = jax.jit(case.fn)
        return compiled[case.net]

    return make
