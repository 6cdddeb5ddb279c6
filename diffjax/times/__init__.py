"""Times: sampling grids `[n+1]`, training-time laws `t ~ p(t)`, weightings `w(process, t)` of the squared x0-error."""

from diffjax.times import laws, weights
from diffjax.times.grids import cosine, curvature, discrete, karras, log_snr, power, quadratic, uniform
from diffjax.times.laws import TimeLaw
from diffjax.times.weights import Weighting
from diffjax.types import Card

GRIDS = {
    "uniform": Card(lambda process, n, **k: uniform(n, **k), "arXiv:2010.02502#App.D.2", "equal steps in time"),
    "quadratic": Card(lambda process, n, **k: quadratic(n, **k), "arXiv:2010.02502#App.D.2", "shorter towards data"),
    "power": Card(lambda process, n, **k: power(n, **k), "arXiv:2510.02390", "equal steps in t^(1/rho)"),
    "cosine": Card(lambda process, n, **k: cosine(n, **k), "", "Chebyshev points: shorter at both ends"),
    "log_snr": Card(log_snr, "arXiv:2206.00927#Sec.3.3", "equal steps in log-SNR"),
    "karras": Card(karras, "arXiv:2206.00364#Eq.5", "equal steps in (sigma / alpha)^(1/rho)"),
    "curvature": Card(curvature, "", "denser where trajectories bend"),
    "discrete": Card(discrete, "arXiv:2305.08891#Table.2", "integer steps of a discrete schedule", flags=("integer",)),
}

LAWS = {
    "uniform": Card(laws.uniform, "arXiv:2006.11239#Alg.1", "uniform in time"),
    "stratified": Card(
        lambda batch=64: laws.stratified(laws.uniform(), batch), "arXiv:2107.00630#App.I.1", "one per stratum"
    ),
    "truncated": Card(
        lambda low=0.25, high=0.75: laws.truncated(laws.logit_normal(), low, high), "arXiv:2312.16486", "in a range"
    ),
    "log_snr": Card(laws.log_snr, "arXiv:2303.00848#Sec.2.2", "uniform in log-SNR"),
    "lognormal": Card(laws.lognormal, "arXiv:2206.00364#Table.1", "log(sigma / alpha) normal"),
    "logit_normal": Card(laws.logit_normal, "arXiv:2403.03206#Eq.19", "logit of time normal"),
    "mode": Card(laws.mode, "arXiv:2403.03206#Eq.20", "heavy tails, a mode in the middle"),
    "cosmap": Card(laws.cosmap, "arXiv:2403.03206#Eq.21", "log-SNR of the cosine process"),
    "adaptive": Card(
        lambda state=None: laws.adaptive(laws.adaptive_init() if state is None else state),
        "arXiv:2102.09672#Eq.18",
        "importance sampling by loss",
    ),
}

WEIGHTS = {
    "unit": Card(weights.unit, "arXiv:2006.11239#Eq.14", "one, in a chosen space"),
    "edm": Card(weights.edm, "arXiv:2206.00364#Table.1", "1 / c_out^2"),
    "min_snr": Card(weights.min_snr, "arXiv:2303.09556#Sec.3.4", "min(snr, gamma)"),
    "truncated_snr": Card(weights.truncated_snr, "arXiv:2202.00512#Sec.4", "max(snr, 1)"),
    "p2": Card(weights.p2, "arXiv:2204.00227#Eq.8", "perception prioritised"),
    "likelihood": Card(weights.likelihood, "arXiv:2107.00630#Eq.15", "the exact bound, in nats"),
    "sigmoid": Card(weights.sigmoid, "arXiv:2303.00848#Sec.4", "sigmoid of log-SNR times the bound"),
}

CATALOGUE = {
    **{f"grids.{name}": card for name, card in GRIDS.items()},
    **{f"laws.{name}": card for name, card in LAWS.items()},
    **{f"weights.{name}": card for name, card in WEIGHTS.items()},
}

__all__ = [
    "CATALOGUE",
    "GRIDS",
    "LAWS",
    "WEIGHTS",
    "TimeLaw",
    "Weighting",
    "cosine",
    "curvature",
    "discrete",
    "karras",
    "laws",
    "log_snr",
    "power",
    "quadratic",
    "uniform",
    "weights",
]
