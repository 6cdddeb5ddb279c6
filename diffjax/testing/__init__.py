"""Exact oracles and the contract checks of every type, for diffjax's own tests and for yours."""

from diffjax.testing.oracles import ALL, Mixture, draw, flow, gaussian, log_density, mixture, oracle, posterior, predict, score

__all__ = ["ALL", "Mixture", "draw", "flow", "gaussian", "log_density", "mixture", "oracle", "posterior", "predict", "score"]
