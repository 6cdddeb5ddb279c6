"""Gaussian processes `x_t = alpha(t) x0 + sigma(t) eps`, each a static family and parameters that are leaves."""

from diffjax.processes.gaussian import cosine, edm, rectified, sigmoid, sub_vp, ve, vp

__all__ = ["cosine", "edm", "rectified", "sigmoid", "sub_vp", "ve", "vp"]
