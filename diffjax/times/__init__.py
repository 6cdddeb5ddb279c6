"""Times: sampling grids, training-time laws and weightings."""

from diffjax.times.grids import cosine, karras, log_snr, quadratic, uniform

__all__ = ["cosine", "karras", "log_snr", "quadratic", "uniform"]
