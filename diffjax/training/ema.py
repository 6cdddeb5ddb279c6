"""Exponential and power-function moving averages of parameters, several at once.

An average is a value: a frozen dataclass that gives the weight of the newest parameters at update `t = 1, 2, ...`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.numerics import PyTree

Ema = Callable[[Any], Any]  # t (1-based update, int array) -> weight of the new parameters, in (0, 1]


@dataclasses.dataclass(frozen=True)
class Decay:
    """Classic average.   m_t = beta m_{t-1} + (1 - beta) p_t

    `warmup` uses `min(beta, (1 + t) / (10 + t))`, so that the first parameters are forgotten early.
    """

    beta: float
    warmup: bool = False

    def __call__(self, t: Any) -> Any:
        """The weight of the parameters of update `t`: `1 - beta_t`."""
        weight = jnp.asarray(1.0 - self.beta, jnp.result_type(float))
        return jnp.maximum(weight, 9.0 / (10.0 + t.astype(weight.dtype))) if self.warmup else weight


@dataclasses.dataclass(frozen=True)
class Power:
    """Average whose profile is a power of time.   m_t = beta_t m_{t-1} + (1 - beta_t) p_t,  beta_t = (1 - 1/t)^{gamma+1}

    Its length grows with the run: the relative width of the profile is constant (see `power`).
    """

    gamma: float

    def __call__(self, t: Any) -> Any:
        """The weight of the parameters of update `t`: `1 - beta_t`, by `expm1` so that it is exact for large `t`."""
        t = t.astype(jnp.result_type(float))
        return -jnp.expm1((self.gamma + 1.0) * jnp.log1p(-1.0 / t))


def decay(beta: float, *, warmup: bool = False) -> Decay:
    """Classic average with decay `beta` per update, in [0, 1).

    Raises: ValueError: beta outside [0, 1).

    Example:
        >>> decay(0.999)
        Decay(beta=0.999, warmup=False)
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), the share of the old average that is kept; got {beta}")
    return Decay(float(beta), warmup)


def power(sigma_rel: float) -> Power:
    """Power-function average of relative width `sigma_rel`, the profile's standard deviation over the training time.

    Args: sigma_rel: in (0, 0.288]; typical 0.05 and 0.10.
    Raises: ValueError: sigma_rel out of range.

    Example:
        >>> round(power(0.10).gamma, 2)
        6.94

    Reference: Karras et al. 2024, arXiv:2312.02696, Eq. 123 (width of the profile) and Eq. 127 (the update).
    """
    return Power(std_to_exp(sigma_rel))


def exp_to_std(gamma: float) -> float:
    """Relative width of the profile `tau^gamma`.   sigma_rel = (gamma+1)^{1/2} (gamma+2)^{-1} (gamma+3)^{-1/2}

    Example:
        >>> round(exp_to_std(6.94), 4)
        0.1

    Reference: arXiv:2312.02696, Eq. 123.
    """
    return float(np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2))


def std_to_exp(sigma_rel: float) -> float:
    """The exponent of the profile of relative width `sigma_rel`; the inverse of `exp_to_std`.

    Squared, Eq. 123 is a cubic: `gamma^3 + 7 gamma^2 + (16 - q) gamma + 12 - q = 0` with `q = sigma_rel^{-2}`.

    Raises: ValueError: sigma_rel outside (0, 12^{-1/2}], the widths of profiles that do not fall.

    Example:
        >>> round(std_to_exp(0.05), 2)
        16.97
    """
    if not 0 < sigma_rel <= 12**-0.5 + 1e-12:
        raise ValueError(f"sigma_rel must be in (0, {12**-0.5:.4f}], where gamma >= 0; got {sigma_rel}")
    q = float(sigma_rel) ** -2
    return max(float(np.roots([1, 7, 16 - q, 12 - q]).real.max()), 0.0)


def ema_update(t: Any, ema: dict, params: PyTree, emas: Mapping[str, Ema]) -> dict:
    """Every average after update `t`.   m += weight(t) (p - m)

    Args: t: int array [], 1 at the first update.   ema: name -> averaged parameters.   emas: name -> average.
    Returns: name -> averaged parameters, in the dtypes of `ema`.
    """

    def moved(weight: Any, average: PyTree) -> PyTree:
        def leaf(m: Any, p: Any) -> Any:
            if not jnp.issubdtype(m.dtype, jnp.inexact):
                return p
            return m + weight.astype(m.dtype) * (p.astype(m.dtype) - m)

        return jax.tree.map(leaf, average, params)

    return {name: moved(emas[name](t), average) for name, average in ema.items()}


def describe(emas: Mapping[str, Ema]) -> dict:
    """The averages as plain JSON, saved with each checkpoint: what a later reconstruction needs beside `updates`."""
    kinds = {Decay: "decay", Power: "power"}
    return {
        name: {"kind": kinds.get(type(e), type(e).__name__), **dataclasses.asdict(e)}
        for name, e in emas.items()
        if dataclasses.is_dataclass(e)
    }
