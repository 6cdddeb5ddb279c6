"""Weightings of the training loss, all stated in one space: they multiply the squared error of x0.

loss = E_t[ w(process, t) |x0 - x0_hat|^2 ],  t from the training law (uniform, unless the weighting says otherwise)

Errors in other spaces are the same error times a factor of `t` (`error_factor`), because all of them are linear in the
pair: a weighting for the eps-error is `w / error_factor(process, t, 'eps')`. Each function below names the space that
its paper uses. `snr = (alpha / sigma)^2 = e^{2 lambda}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from diffjax import numerics as nu
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.processes.gaussian import number
from diffjax.times.laws import TimeLaw, slope_of_log_snr
from diffjax.types import Process, Scalar

TARGETS = ("x0", "eps", "v", "velocity", "score")


@pytree_dataclass
class Weighting:
    """`w(process, t)`, the factor of the squared x0-error; parameters are leaves, `f(params, process, t)` is static.

    Example:
        >>> from diffjax import processes
        >>> round(float(min_snr(5.0)(processes.rectified(), 0.5)), 12)
        1.0
    """

    params: PyTree
    f: Callable[..., Any] = static(default=None)

    def __call__(self, process: Process, t: Any) -> Any:
        """The weight at times of any shape, or at a pytree of times."""
        return jax.tree.map(lambda ti: self.f(self.params, process, ti), t)


def _exp(a: Any) -> Any:
    return nu.namespace(a).exp(a)


def snr(process: Process, t: Any) -> Any:
    """`(alpha / sigma)^2`."""
    return _exp(2 * process.log_snr(t))


def error_factor(process: Process, t: Any, target: str) -> Any:
    """`|error of target|^2 / |error of x0|^2` for predictions that satisfy alpha x0 + sigma eps = x.

    x0: 1;  eps: snr;  v: (sigma + alpha^2 / sigma)^2;  velocity: (alpha lambda')^2;  score: (alpha / sigma^2)^2.
    Args: process, t: any.   target: 'x0', 'eps', 'v' (alpha eps - sigma x0), 'velocity' (alpha' x0 + sigma' eps) or
        'score' (-eps / sigma).
    Raises: ValueError: unknown target.

    Example:
        >>> from diffjax import processes
        >>> float(error_factor(processes.rectified(), 0.5, "velocity"))
        4.0
    """
    a, s = process.alpha(t), process.sigma(t)
    if target == "x0":
        return nu.namespace(a).ones_like(a)
    if target == "eps":
        return snr(process, t)
    if target == "v":
        return (s + a * a / s) ** 2
    if target == "velocity":
        return (a * slope_of_log_snr(process, t)) ** 2
    if target == "score":
        return (a / (s * s)) ** 2
    raise ValueError(f"target must be one of {TARGETS}; got {target!r}")


@dataclasses.dataclass(frozen=True)
class _Unit:
    target: str

    def __call__(self, p: Any, process: Process, t: Any) -> Any:
        return error_factor(process, t, self.target)


def unit(target: str = "eps") -> Weighting:
    """Weight one in the space of `target`; 'eps' is the simple loss, 'velocity' the flow-matching loss.

    Args: target: 'x0', 'eps', 'v', 'velocity' or 'score'.
    Raises: ValueError: unknown target.
    Reference: arXiv:2006.11239, Eq. 14.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}; got {target!r}")
    return Weighting({}, _Unit(target))


def _edm(p: Any, process: Process, t: Any) -> Any:
    return snr(process, t) + 1 / p["sigma_data"] ** 2


def edm(sigma_data: Scalar = 0.5) -> Weighting:
    """EDM, in x0-space.   w = (s^2 + sigma_data^2) / (s sigma_data)^2,  s = sigma / alpha

    Args: sigma_data: > 0, the standard deviation of the data.
    Raises: ValueError: a concrete value that is not positive.
    Reference: arXiv:2206.00364, Table 1.
    """
    return Weighting({"sigma_data": number("sigma_data", sigma_data, 0)}, _edm)


def _min_snr(p: Any, process: Process, t: Any) -> Any:
    ratio = snr(process, t)
    return nu.namespace(ratio).minimum(ratio, p["gamma"])


def min_snr(gamma: Scalar = 5.0) -> Weighting:
    """Min-SNR-gamma, in x0-space.   w = min(snr, gamma)

    Args: gamma: > 0.
    Raises: ValueError: a concrete value that is not positive.
    Reference: arXiv:2303.09556, Section 3.4.
    """
    return Weighting({"gamma": number("gamma", gamma, 0)}, _min_snr)


def _truncated_snr(p: Any, process: Process, t: Any) -> Any:
    ratio = snr(process, t)
    return nu.namespace(ratio).maximum(ratio, p["floor"])


def truncated_snr(floor: Scalar = 1.0) -> Weighting:
    """Truncated SNR, in x0-space: the larger of the x0- and eps-errors.   w = max(snr, floor)

    Args: floor: > 0.
    Raises: ValueError: a concrete value that is not positive.
    Reference: arXiv:2202.00512, Section 4.
    """
    return Weighting({"floor": number("floor", floor, 0)}, _truncated_snr)


def _p2(p: Any, process: Process, t: Any) -> Any:
    # snr / (k + snr)^gamma as a product of e^{2 lambda (1 - gamma)}, which stays finite near data.
    lam = process.log_snr(t)
    return _exp(2 * lam * (1 - p["gamma"])) / (1 + p["k"] * _exp(-2 * lam)) ** p["gamma"]


def p2(k: Scalar = 1.0, gamma: Scalar = 1.0) -> Weighting:
    """Perception-prioritised, 1 / (k + snr)^gamma in eps-space.   w = snr / (k + snr)^gamma

    Args: k: > 0.   gamma: the paper uses 0.5 and 1; 0 is the simple loss.
    Raises: ValueError: a concrete k that is not positive.
    Reference: arXiv:2204.00227, Eq. 8.
    """
    return Weighting({"k": number("k", k, 0), "gamma": number("gamma", gamma)}, _p2)


def _likelihood(p: Any, process: Process, t: Any) -> Any:
    return slope_of_log_snr(process, t) * snr(process, t)


def likelihood() -> Weighting:
    """The exact variational bound, t uniform.   w = -(1/2) d snr / dt = -lambda' snr

    In nats, with the error summed over dimensions. In score space this is g(t)^2 / 2. Under another law use `over_density`.
    Reference: arXiv:2107.00630, Eq. 15; arXiv:2101.09258, Theorem 1.
    """
    return Weighting({}, _likelihood)


def _sigmoid(p: Any, process: Process, t: Any) -> Any:
    # The sigmoid of the paper's log-SNR, 2 lambda; jax.nn.sigmoid would leave NumPy.
    lam = 2 * process.log_snr(t) - p["bias"]
    xp = nu.namespace(lam)
    return xp.exp(-xp.logaddexp(xp.zeros_like(lam), lam)) * _likelihood(p, process, t)


def sigmoid(bias: Scalar = 2.0) -> Weighting:
    """A sigmoid of log-SNR times the bound, t uniform.   w = sigmoid(bias - 2 lambda) (-lambda') snr

    This is sigmoid(bias - log snr) as the paper's w(lambda), which multiplies (1/2) (-d log snr / dt) |eps error|^2.
    Args: bias: real; larger puts more weight on data.
    Reference: arXiv:2303.00848, Section 4.
    """
    return Weighting({"bias": number("bias", bias)}, _sigmoid)


def _over_density(p: Any, process: Process, t: Any) -> Any:
    return p["weighting"](process, t) * _exp(-p["law"].log_density(process, t))


def over_density(weighting: Weighting, law: TimeLaw) -> Weighting:
    """A weighting that is stated for uniform `t`, under another law, with the same expectation.   w(t) / p(t)

    Args: weighting: any.   law: a law with a density.
    """
    return Weighting({"weighting": weighting, "law": law}, _over_density)


def in_space(weighting: Weighting, target: str) -> Weighting:
    """The factor of the squared error of `target` instead of x0.   w / error_factor

    Raises: ValueError: unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}; got {target!r}")
    return Weighting(weighting, _InSpace(target))


@dataclasses.dataclass(frozen=True)
class _InSpace:
    target: str

    def __call__(self, p: Any, process: Process, t: Any) -> Any:
        return p(process, t) / error_factor(process, t, self.target)
