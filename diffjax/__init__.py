"""diffjax: diffusion, flow and score models in JAX. A model is a process, a denoiser and a solver."""

__version__ = "0.1.0"

from diffjax import processes, solvers, testing, times, types
from diffjax.prediction import denoiser, from_edm, from_eps, from_score, from_v, from_velocity, from_x0
from diffjax.sampling import sample, sample_chunks
from diffjax.types import Card, Denoiser, Prediction, Process, Solver

__all__ = [
    "Card", "Denoiser", "Prediction", "Process", "Solver", "denoiser", "from_edm", "from_eps", "from_score", "from_v",
    "from_velocity", "from_x0", "processes", "sample", "sample_chunks", "solvers", "testing", "times", "types",
]  # fmt: skip
