"""Learned uncertainty: a small function u of the noise level that divides the loss by its own size while training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.numerics import PyTree
from diffjax.prediction import time_log_sigma
from diffjax.types import Denoiser, Evaluation


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """u(sigma) as a linear function of random Fourier features of `log(sigma / alpha) / 4`; see `uncertainty`."""

    features: int
    seed: int

    def init(self, params: PyTree) -> dict[str, PyTree]:
        """Parameters to train: `{"net": params, "u": weights}`; u starts at zero, where the loss is the plain one."""
        return {"net": params, "u": np.zeros(self.features + 1, np.float32)}

    def value(self, weights: Any, process: Any, t: Any) -> jax.Array:
        """u [B] at times t [B]."""
        rng = np.random.default_rng(self.seed)
        f, phase = rng.standard_normal(self.features), rng.uniform(size=self.features)
        code = jnp.asarray(time_log_sigma(process, t), weights.dtype)[..., None]
        lift = lambda a: jnp.asarray(a, weights.dtype).reshape((1,) * (code.ndim - 1) + (-1,))
        waves = np.sqrt(2) * jnp.cos(2 * np.pi * (code * lift(f) + lift(phase)))
        return waves @ weights[:-1] + weights[-1]

    def model(self, model: Callable[[PyTree], Denoiser]) -> Callable[[PyTree], Denoiser]:
        """The model of `init`'s parameters: its denoiser returns u as `aux["log_variance"]`."""
        return WithUncertainty(self, model)


@dataclasses.dataclass(frozen=True)
class WithUncertainty:
    """See `Uncertainty.model`."""

    u: Uncertainty
    inner: Callable[[PyTree], Denoiser]

    def __call__(self, params: PyTree) -> Denoiser:
        """The network's denoiser with `log_variance` in its aux."""
        return self.inner(params["net"]).wrap(_Evaluate(self.u), own=params["u"])


@dataclasses.dataclass(frozen=True)
class _Evaluate:
    u: Uncertainty

    def __call__(self, own: Any, inner: Denoiser, state: Any, x: Any, t: Any, cond: Any, key: Any) -> Evaluation:
        e = inner.evaluate(x, t, cond, state=state, key=key)
        aux = dict(e.aux) if isinstance(e.aux, dict) else {}
        return e._replace(aux={**aux, "log_variance": self.u.value(own, inner.process, t)})


def uncertainty(features: int = 64, *, seed: int = 0) -> Uncertainty:
    """Learned weighting by noise level.   loss(sigma) / exp(u(sigma)) + u(sigma),  minimal at u = log E[loss | sigma]

    So every noise level contributes equally to the gradient, as the loss falls. u is trained with the network and
    dropped afterwards: `u = uncertainty()`, train `u.init(params)` by `u.model(model)` with
    `denoising_loss(..., log_variance=log_variance_of_aux)`; then `params["net"]` are the network's.

    Args: features: of the noise level.   seed: of their frequencies, which are N(0, 1) and fixed.
    Raises: ValueError: features not positive.

    Example:
        >>> u = uncertainty(8)
        >>> sorted(u.init({"w": np.ones(2)})), u == uncertainty(8)
        (['net', 'u'], True)

    Reference: Karras et al. 2024, arXiv:2312.02696, Eq. 21; Kendall et al. 2018, arXiv:1705.07115.
    """
    if features < 1:
        raise ValueError(f"features must be at least 1; got {features}")
    return Uncertainty(int(features), int(seed))
