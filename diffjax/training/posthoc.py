"""Averages of any length after the run: a weighted sum of stored averages whose profile is the nearest to the one asked for.

The profile of an average says how much the parameters of each past time count in it. That of `ema.power` at time `t` is
`p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)` on [0, t]; sums of averages have the sums of their profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SMALLEST = 1e-12  # singular values below this share of the largest are noise of float64


class Fit(NamedTuple):
    """Weights of the stored averages, and the distance of their profile from the target's, as a share of its norm."""

    weights: np.ndarray
    residual: float


def inner_products(t: Any, gamma: Any, t_other: Any, gamma_other: Any) -> Any:
    """Inner products of power-function profiles, in float64; the arguments broadcast.

    <p_a, p_b> = (a + 1)(b + 1) / (a + b + 1) * (t_a / t_b)^e / max(t_a, t_b),   e = b if t_a < t_b, else -a

    Args: t, t_other: ends of the profiles, > 0.   gamma, gamma_other: their exponents, >= 0.

    Example:
        >>> float(inner_products(2.0, 0.0, 4.0, 0.0))  # of the densities 1/2 on [0, 2] and 1/4 on [0, 4]
        0.25

    Reference: Karras et al. 2024, arXiv:2312.02696, Eq. 151.
    """
    t_a, a, t_b, b = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (t, gamma, t_other, gamma_other)))
    shorter = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    return (a + 1) * (b + 1) / (a + b + 1) * shorter ** np.where(t_a < t_b, b, a) / np.maximum(t_a, t_b)


def coefficients(stored: Sequence[Any], target: Any) -> Fit:
    """The weights whose summed profile is the nearest to the target's.   min_c |sum_i c_i p_i - p|,  A c = b

    `A_ij = <p_i, p_j>`, `b_i = <p_i, p>`. The profiles are scaled to norm one first, and directions that float64 cannot
    resolve are left out, so that equal or nearly equal stored averages do no harm.

    Args: stored: (t_i, gamma_i) of the stored averages, in updates.   target: (t, gamma), t in the same unit.
    Raises: ValueError: nothing stored, or times and exponents out of range.

    Example:
        >>> fit = coefficients([(64, 6.94), (128, 6.94), (128, 16.97)], (128, 16.97))
        >>> bool(np.allclose(fit.weights, [0, 0, 1])), fit.residual < 1e-6
        (True, True)

    Reference: Karras et al. 2024, arXiv:2312.02696, Algorithm 3 and Eq. 151.
    """
    pairs = np.asarray([*stored, target], np.float64).reshape(-1, 2)
    if len(pairs) < 2:
        raise ValueError("stored must hold the (t, gamma) of at least one average; got none")
    t, gamma = pairs.T
    if not (np.isfinite(pairs).all() and (t > 0).all() and (gamma >= 0).all()):
        raise ValueError(f"every (t, gamma) needs t > 0 and gamma >= 0; got {[tuple(map(float, p)) for p in pairs]}")
    gram = inner_products(t[:, None], gamma[:, None], t[None], gamma[None])
    norm = np.sqrt(np.diag(gram))
    cosines = gram / np.outer(norm, norm)
    a, b = cosines[:-1, :-1], cosines[:-1, -1]
    c = np.linalg.lstsq(a, b, rcond=SMALLEST)[0]
    squared = 1 - 2 * c @ b + c @ a @ c
    return Fit(c * norm[-1] / norm[:-1], float(np.sqrt(max(squared, 0.0))))
