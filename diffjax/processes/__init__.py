"""Gaussian processes `x_t = alpha(t) x0 + sigma(t) eps`, each a static family and parameters that are leaves."""

import numpy as np

from diffjax.processes.betas import from_betas, step_of_time
from diffjax.processes.gaussian import cosine, edm, rectified, sigmoid, sub_vp, ve, vp
from diffjax.processes.learned import learned
from diffjax.processes.wrappers import shifted, truncated, zero_terminal_snr
from diffjax.types import Card, Process


def _linear_betas(k: int = 1000) -> Process:
    return from_betas(np.linspace(1e-4, 0.02, k))


CATALOGUE = {
    "vp": Card(vp, "arXiv:2011.13456#Eq.33", "variance preserving, linear beta"),
    "sub_vp": Card(sub_vp, "arXiv:2011.13456#Eq.29", "less noise than VP"),
    "cosine": Card(cosine, "arXiv:2102.09672#Eq.17", "constant angular speed"),
    "sigmoid": Card(sigmoid, "arXiv:2212.11972#Alg.1", "alpha^2 a logistic function"),
    "ve": Card(ve, "arXiv:2011.13456#Eq.30", "variance exploding, geometric sigma"),
    "edm": Card(edm, "arXiv:2206.00364#Table.1", "sigma proportional to time"),
    "rectified": Card(rectified, "arXiv:2209.03003#Eq.1", "the straight path"),
    "from_betas": Card(_linear_betas, "arXiv:2006.11239#Eq.4", "any discrete schedule"),
    "learned": Card(learned, "arXiv:2107.00630#App.H", "monotone network for log-SNR"),
    "shifted": Card(lambda shift=3.0: shifted(rectified(), shift), "arXiv:2403.03206#Eq.23", "noise times a factor"),
    "shifted_vp": Card(lambda shift=4.0: shifted(vp(), shift), "arXiv:2301.11093#Sec.2.2", "resolution shift"),
    "shifted_sub_vp": Card(lambda shift=0.5: shifted(sub_vp(), shift), "arXiv:2403.03206#Eq.23", "less noise"),
    "zero_vp": Card(
        lambda beta_min=0.1, beta_max=20.0: zero_terminal_snr(vp(beta_min, beta_max)),
        "arXiv:2305.08891#Alg.1",
        "VP that ends in pure noise",
    ),
    "zero_sub_vp": Card(
        lambda beta_min=0.1, beta_max=20.0: zero_terminal_snr(sub_vp(beta_min, beta_max)),
        "arXiv:2305.08891#Alg.1",
        "sub-VP, pure noise",
    ),
    "zero_betas": Card(
        lambda k=1000: zero_terminal_snr(_linear_betas(k)), "arXiv:2305.08891#Alg.1", "discrete, pure noise"
    ),
    "truncated": Card(
        lambda start=0.98, stop=0.001: truncated(cosine(), start, stop), "arXiv:2202.09671#Sec.3", "a part of it"
    ),
}

__all__ = [
    "CATALOGUE",
    "cosine",
    "edm",
    "from_betas",
    "learned",
    "rectified",
    "shifted",
    "sigmoid",
    "step_of_time",
    "sub_vp",
    "truncated",
    "ve",
    "vp",
    "zero_terminal_snr",
]
