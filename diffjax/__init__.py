"""diffjax: diffusion, flow and score models in JAX. A model is a process, a denoiser and a solver."""

__version__ = "0.1.0"

import importlib
from typing import Any

from diffjax import cooperation, experts, guidance, losses, processes, solvers, starts, testing, times, types
from diffjax.adjoint import adjoint_sample
from diffjax.guidance import chain
from diffjax.likelihood import bits_per_dim, log_density
from diffjax.parallel import sample_parallel
from diffjax.prediction import denoiser, from_edm, from_eps, from_score, from_v, from_velocity, from_x0
from diffjax.references import cite
from diffjax.sampling import sample, sample_chunks
from diffjax.types import Card, Denoiser, Prediction, Process, Solver

_LAZY = (
    "adapters",
    "cli",
    "data",
    "interop",
    "metrics",
    "networks",
    "training",
)  # need Flax, Grain, Orbax or scikit-learn: imported when used


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"diffjax.{name}")
    if name == "load":
        from diffjax.cli.run import load

        return load
    raise AttributeError(f"module 'diffjax' has no attribute {name!r}")


__all__ = [
    "Card",
    "Denoiser",
    "Prediction",
    "Process",
    "Solver",
    "bits_per_dim",
    "adjoint_sample",
    "chain",
    "cite",
    "cooperation",
    "denoiser",
    "experts",
    "from_edm",
    "from_eps",
    "from_score",
    "from_v",
    "from_velocity",
    "from_x0",
    "guidance",
    "load",
    "log_density",
    "losses",
    "processes",
    "sample",
    "sample_chunks",
    "sample_parallel",
    "solvers",
    "starts",
    "testing",
    "times",
    "types",
]
