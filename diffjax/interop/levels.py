"""Noise levels as schedulers of other libraries lay them out: betas, timesteps and spacings of sigma, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import special

from diffjax.interop import options

FLOOR = 2.0**-24  # the last alpha^2 of schedulers that divide by it
FREE = 1e-9  # two levels that are closer are one


# -------------------------------------------------------------------------------------------------------------- betas


def betas_of(kind: str, c: Any) -> np.ndarray:
    """The betas of a configuration.   [K]

    Args: kind: name of the class, for messages.   c: its fields, with `trained_betas` before `beta_schedule`.
    Raises: ValueError: betas that are not in (0, 1), another number than `num_train_timesteps`, an unknown schedule.
    Reference: `squaredcos_cap_v2`: Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17.
    """
    k = c.num_train_timesteps
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{kind}: num_train_timesteps must be an int >= 1; got {k!r}")
    if c.trained_betas is not None:
        betas = np.asarray(c.trained_betas, np.float64)
        if betas.shape != (k,):
            raise ValueError(
                f"{kind}: trained_betas has shape {betas.shape} and num_train_timesteps={k}; give both the same number"
            )
    else:
        made = options.accept(kind, "beta_schedule", c.beta_schedule, BETAS)
        betas = made(float(c.beta_start), float(c.beta_end), k)
    if not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
        raise ValueError(
            f"{kind}: betas must lie in (0, 1), the last in (0, 1]; got values from {betas.min():.3g} to {betas.max():.3g}"
        )
    if getattr(c, "rescale_betas_zero_snr", False):
        return without_signal(betas, FLOOR if kind in DIVIDING else 0.0)
    return betas


def _linear(start: float, end: float, k: int) -> np.ndarray:
    return np.linspace(start, end, k)


def _scaled_linear(start: float, end: float, k: int) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, k) ** 2


def _squared_cosine(start: float, end: float, k: int) -> np.ndarray:
    left = np.cos((np.arange(k + 1) / k + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - left[1:] / left[:-1], 0.999)


def _sigmoid(start: float, end: float, k: int) -> np.ndarray:
    return special.expit(np.linspace(-6, 6, k)) * (end - start) + start


BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squared_cosine,
    "sigmoid": _sigmoid,
}
DIVIDING = {
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
}


def without_signal(betas: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """The betas of alpha shifted and scaled so that the last is zero and the first stays.   [K]

    Args: floor: alpha^2 of the last instead of zero.
    Reference: Lin et al. 2023, arXiv:2305.08891, Algorithm 1.

    Example:
        >>> float(without_signal(np.array([0.1, 0.2]))[-1])
        1.0
    """
    alpha = np.exp(0.5 * np.cumsum(np.log1p(-betas)))
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    left = np.concatenate([[1.0], alpha**2])
    left[-1] = floor
    return 1 - left[1:] / left[:-1]


# ----------------------------------------- timesteps, decreasing; log_snr [K] is that of all, and most do not depend on it


def rounded(kind: str, c: Any, n: int, log_snr: Any) -> np.ndarray:
    """n of the integers 0 ... K - 1, from DDPM, DDIM and PNDM.   [n]"""
    k = c.num_train_timesteps
    if c.timestep_spacing == "linspace":
        return np.linspace(0, k - 1, n).round()[::-1]
    return _spaced(kind, c, n)


def fractional(kind: str, c: Any, n: int, log_snr: Any) -> np.ndarray:
    """The same, with fractions where the spacing is `linspace`, from Euler, Heun and LMS.   [n]"""
    if c.timestep_spacing == "linspace":
        return np.linspace(0, c.num_train_timesteps - 1, n)[::-1]
    return _spaced(kind, c, n)


def _spaced(kind: str, c: Any, n: int) -> np.ndarray:
    k = c.num_train_timesteps
    if c.timestep_spacing == "leading":
        return np.arange(n)[::-1] * float(k // n) + c.steps_offset
    options.accept(kind, "timestep_spacing", c.timestep_spacing, ("leading", "linspace", "trailing"))
    return np.round(np.arange(k, 0, -k / n)) - 1


def one_less(kind: str, c: Any, n: int, log_snr: np.ndarray) -> np.ndarray:
    """The first n of n + 1 integers, from DPM-Solver and UniPC, beginning where log-SNR is at least `lambda_min_clipped`.

    Args: log_snr: [K] of the timesteps.
    """
    k = c.num_train_timesteps
    last = int(np.sum(log_snr >= float(getattr(c, "lambda_min_clipped", -math.inf))))
    spacing = getattr(c, "timestep_spacing", "linspace")
    if spacing == "linspace":
        return np.linspace(0, last - 1, n + 1).round()[:0:-1]
    if spacing == "leading":
        return np.arange(n + 1)[:0:-1] * float(last // (n + 1)) + c.steps_offset
    options.accept(kind, "timestep_spacing", spacing, ("leading", "linspace", "trailing"))
    return np.arange(last, 0, -k / n).round() - 1


# ------------------------------------------------------------------------------------------ sigmas between two of them


def karras(high: float, low: float, n: int, rho: float = 7.0) -> np.ndarray:
    """Equal steps in sigma^(1/rho), decreasing.   [n]"""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho


def exponential(high: float, low: float, n: int) -> np.ndarray:
    """Equal steps in log(sigma), decreasing.   [n]"""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta(high: float, low: float, n: int) -> np.ndarray:
    """Quantiles of the distribution Beta(0.6, 0.6) between both, decreasing.   [n]"""
    return low + special.betaincinv(0.6, 0.6, np.linspace(1, 0, n)) * (high - low)


CONVERSIONS = {
    "use_karras_sigmas": karras,  # arXiv:2206.00364, Eq. 5
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,  # arXiv:2407.12173
    "use_lu_lambdas": exponential,  # equal steps in log-SNR, arXiv:2206.00927
}


def conversion(kind: str, c: Any) -> Callable[[float, float, int], np.ndarray] | None:
    """The spacing of sigma `(high, low, n) -> [n]` that a configuration asks for, None for that of its timesteps.

    Raises: ValueError: it asks for several.
    """
    asked = [name for name in CONVERSIONS if getattr(c, name, False)]
    if len(asked) > 1:
        raise ValueError(f"{kind}: {' and '.join(f'{a}=True' for a in asked)} exclude each other; set one of them")
    return CONVERSIONS[asked[0]] if asked else None


def decreasing(levels: np.ndarray) -> np.ndarray:
    """The levels without those at the end that repeat the last: steps of no length.

    Raises: ValueError: they do not decrease.

    Example:
        >>> decreasing(np.array([2.0, 1.0, 1.0])).tolist()
        [2.0, 1.0]
    """
    while len(levels) > 2 and abs(levels[-1] - levels[-2]) <= FREE * abs(levels[0]):
        levels = levels[:-1]
    if not np.all(np.diff(levels) < 0):
        raise ValueError(
            f"the noise levels of this configuration do not decrease: {np.array2string(levels, precision=4, threshold=6)}; "
            "take fewer steps or another spacing"
        )
    return levels
