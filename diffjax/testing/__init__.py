"""Exact oracles and the contract checks of every type, for diffjax's own tests and for yours."""

from diffjax.testing.contracts import (
    ContractError,
    check_denoiser,
    check_loss,
    check_metric,
    check_process,
    check_solver,
    measured_order,
    smooth_mixture,
)
from diffjax.testing.oracles import (
    ALL,
    Mixture,
    draw,
    exact_router,
    flow,
    gaussian,
    log_density,
    mixture,
    oracle,
    posterior,
    predict,
    score,
)

__all__ = [
    "ALL", "ContractError", "Mixture", "check_denoiser", "check_loss", "check_metric", "check_process", "check_solver",
    "draw", "exact_router", "flow", "gaussian", "log_density", "measured_order", "mixture", "oracle", "posterior", "predict",
    "score", "smooth_mixture",
]  # fmt: skip
