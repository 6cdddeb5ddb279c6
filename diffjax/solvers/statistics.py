"""Numbers measured on a model that a solver is built from: those of DPM-Solver-v3 and of Analytic-DPM, and their files."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.solvers.checks import check_number
from diffjax.solvers.table_files import read_arrays
from diffjax.types import UNBOUND, Denoiser, Key

FORMAT = 1  # version of a saved file


class ModelStatistics(NamedTuple):
    """The affine parameterisation of DPM-Solver-v3, per dimension or one number for all.

    f = (sigma eps - l x) / alpha,   df/dlam = s f + b along a trajectory, as nearly as least squares can make it.
    """

    log_snr: Any  # [K], increasing, K >= 2
    l: Any  # [K, *dims]
    s: Any  # [K, *dims]
    b: Any  # [K, *dims]


class NoiseMoment(NamedTuple):
    """The mean square of the predicted noise, which fixes the optimal reverse variance.   E |eps(x_t, t)|^2 / dims"""

    log_snr: Any  # [K], increasing
    square: Any  # [K], in [0, 1] for an exact model


_KINDS = {"model_statistics": ModelStatistics, "noise_moment": NoiseMoment}


def model_statistics(
    key: Key, denoiser: Denoiser, x0: Any, times: Any, *, probes: int = 1, ridge: float = 1e-7
) -> ModelStatistics:
    """Measure l, s and b of a model at noised data.   l = E[diag d(sigma eps)/dx],  s = Cov(f, f') / Var(f),  b = E f' - s E f

    f' = e^{-lam} ((l - 1) eps + deps/dlam) - l' x / alpha is the total derivative along the probability flow, with l' from
    finite differences over `times`. The diagonal is estimated by `probes` random signs v per item, v * (J v), which is
    exact for a diagonal Jacobian.

    Args: key: PRNG key.   denoiser: with condition and guidance bound as they will be sampled.   x0: [N, ...] data, or a
    function `key -> x0` that draws it (samples of the model, where there are no data).   times: [K], K >= 3, at finite
    log-SNR, where the process is differentiable; 100 to 1000 between the ends of the sampling grids.   probes: >= 1.
    ridge: >= 0, share of |l'| Var(x / alpha) that is added to Var(f): where l alone explains the model, f is rounding noise.
    Returns: float64 statistics on increasing log-SNR, one per dimension.
    Raises: ValueError: times that are fewer than three, repeated or at infinite log-SNR; a state that is not one array;
    statistics that are not finite.
    Reference: Zheng et al. 2023, arXiv:2310.13268, Section 3.

    Example:
        >>> from diffjax import processes, testing
        >>> d = testing.oracle(testing.gaussian([0.0, 0.0], 1.0), processes.vp())
        >>> m = model_statistics(jax.random.key(0), d, jnp.ones((8, 2)), np.linspace(0.9, 0.1, 9))
        >>> bool(abs(m.l - 1 / (1 + np.exp(2 * m.log_snr))[:, None]).max() < 1e-5)
        True
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be an int >= 1; got {probes!r}")
    check_number("ridge", ridge)
    denoiser, x0, times, lam = _prepare(denoiser, jax.random.fold_in(key, 1), x0, times, least=3)
    moments = _model_moments(jax.random.fold_in(key, 0), denoiser, x0, jnp.asarray(times, x0.dtype), probes=probes)
    m = {name: np.asarray(value, np.float64) for name, value in moments.items()}
    l = m["l"]
    slope = np.gradient(l, lam, axis=0, edge_order=2)
    variance = m["ff"] + ridge * np.abs(slope) * m["zz"] + np.finfo(np.float64).tiny
    s = (m["fa"] - slope * m["fz"]) / variance
    b = m["a"] - slope * m["z"] - s * m["f"]
    return check_statistics(ModelStatistics(lam, l, s, b), ModelStatistics)


def noise_moment(key: Key, denoiser: Denoiser, x0: Any, times: Any) -> NoiseMoment:
    """Measure E |eps(x_t, t)|^2 / dims of a model at noised data, one number per time.

    Args: as `model_statistics`; `times` [K], K >= 1, at finite log-SNR.
    Reference: Bao et al. 2022, arXiv:2201.06503, Section 3.

    Example:
        >>> from diffjax import processes, testing
        >>> d = testing.oracle(testing.gaussian([0.0], 1.0), processes.rectified())
        >>> x0 = jax.random.normal(jax.random.key(1), (4000, 1))
        >>> float(noise_moment(jax.random.key(0), d, x0, [0.5]).square[0]).__round__(1)  # sigma^2 / (alpha^2 + sigma^2)
        0.5
    """
    denoiser, x0, times, lam = _prepare(denoiser, jax.random.fold_in(key, 1), x0, times, least=1)
    square = _noise_moments(jax.random.fold_in(key, 0), denoiser, x0, jnp.asarray(times, x0.dtype))
    return NoiseMoment(lam, np.asarray(square, np.float64))


def _prepare(denoiser: Denoiser, key: Key, x0: Any, times: Any, least: int) -> tuple[Denoiser, Any, Any, Any]:
    """The denoiser with a batched condition, the data, the times by increasing log-SNR, and that log-SNR."""
    x0 = x0(key) if isinstance(x0, Callable) else x0
    if len(jax.tree.leaves(x0)) != 1 or np.ndim(x0) < 2:
        raise ValueError(f"x0 must be one array of items [N, ...]; got {jax.tree.map(np.shape, x0)}")
    times = np.asarray(times, np.float64)
    lam = np.asarray(denoiser.process.log_snr(times), np.float64)
    if times.ndim != 1 or len(times) < least or not np.all(np.isfinite(lam)) or len(np.unique(lam)) < len(lam):
        raise ValueError(
            f"times must be one axis of at least {least} distinct times with finite log-SNR (alpha > 0 and sigma > 0); "
            f"got shape {times.shape}, log-SNR {np.array2string(lam[:3], precision=3)} ... . Use start= and stop= of times.*"
        )
    order = np.argsort(lam)
    x0 = jnp.asarray(x0, jnp.result_type(float))
    if denoiser.cond is not UNBOUND:
        n = x0.shape[0]
        whole = lambda c: jnp.broadcast_to(c, (n,)) if jnp.ndim(c) == 0 else jnp.asarray(c)
        denoiser = denoiser.bind(jax.tree.map(whole, denoiser.cond))
    return denoiser, x0, times[order], lam[order]


def _noised(key: Key, denoiser: Denoiser, x0: Any, t: Any) -> Any:
    """The data at time t, with the same noise at every time, so that what is measured is smooth in t."""
    return denoiser.process.add_noise(x0, nu.item_normal(nu.item_keys(key, jnp.arange(x0.shape[0])), 0, x0), t)


@jax.jit
def _noise_moments(key: Key, denoiser: Denoiser, x0: Any, times: Any) -> Any:
    return jax.lax.map(lambda t: jnp.mean(denoiser(_noised(key, denoiser, x0, t), t).eps ** 2), times)


@partial(jax.jit, static_argnames="probes")
def _model_moments(key: Key, denoiser: Denoiser, x0: Any, times: Any, probes: int) -> dict[str, Any]:
    """The expectations that l, s and b are made of, [K, *dims]; f' is `a - l' z` with `z = x / alpha`."""
    process = denoiser.process

    def one(t: Any) -> dict[str, Any]:
        x = _noised(jax.random.fold_in(key, 0), denoiser, x0, t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        dalpha, dsigma = process.dalpha(t), process.dsigma(t)
        rate = dalpha / alpha - dsigma / sigma  # dlam / dt
        noise = lambda y, u: denoiser(y, u).eps

        def probe(k: Any) -> Any:
            signs = jax.random.rademacher(jax.random.fold_in(jax.random.fold_in(key, 1), k), x.shape, x.dtype)
            _, moved = jax.jvp(lambda y: sigma * noise(y, t), (x,), (signs,))
            return jnp.mean(signs * moved, axis=0)

        l = jnp.mean(jax.lax.map(probe, jnp.arange(probes)), axis=0)
        pair = denoiser(x, t)
        velocity = (dalpha * pair.x0 + dsigma * pair.eps) / rate
        _, deps = jax.jvp(noise, (x, t), (velocity, 1 / rate))  # the total derivative of eps in lam
        wide = l[None]
        rest, z = sigma / alpha, x / alpha
        from_x0, from_eps = -wide * pair.x0, (1 - wide) * rest * pair.eps
        f, a = from_x0 + from_eps, rest * ((wide - 1) * pair.eps + deps)
        centred = lambda y: y - jnp.mean(y, axis=0, keepdims=True)
        mean = lambda y: jnp.mean(y, axis=0)
        cf = centred(f)
        return {
            "l": l, "f": mean(f), "a": mean(a), "z": mean(z), "ff": mean(cf**2), "fa": mean(cf * centred(a)),
            "fz": mean(cf * centred(z)), "zz": mean(centred(z) ** 2),
        }  # fmt: skip

    return jax.lax.map(one, times)


# ---------------------------------------------------------------------------------------------------------- files


def check_statistics(statistics: Any, kind: type) -> Any:
    """`statistics` as float64, if it is a consistent `ModelStatistics` or `NoiseMoment`.

    Raises: ValueError: another kind, arrays of different lengths, log-SNR that does not increase, values not finite.
    """
    if not isinstance(statistics, kind):
        raise ValueError(f"expected {kind.__name__}; got {type(statistics).__name__}")
    arrays = kind(*(np.asarray(a, np.float64) for a in statistics))
    lam, rest = arrays.log_snr, arrays[1:]
    least = 2 if kind is ModelStatistics else 1  # they are integrated, hence interpolated
    if lam.ndim != 1 or len(lam) < least or any(a.shape[:1] != lam.shape or a.shape != rest[0].shape for a in rest):
        raise ValueError(
            f"{kind.__name__} needs log_snr [K >= {least}] and [K, ...] arrays of one shape; got {[a.shape for a in arrays]}"
        )
    if not all(np.all(np.isfinite(a)) for a in arrays) or not np.all(np.diff(lam) > 0):
        raise ValueError(f"{kind.__name__} must be finite, on log_snr that increases; got log_snr[:3] = {lam[:3]}")
    return arrays


def save_statistics(path: str | pathlib.Path, statistics: ModelStatistics | NoiseMoment) -> None:
    """Write statistics as `.npz`, float64, with their kind and format version.

    Raises: ValueError: neither kind, or not consistent.
    """
    names = {kind: name for name, kind in _KINDS.items()}
    if type(statistics) not in names:
        raise ValueError(f"expected {' or '.join(k.__name__ for k in names)}; got {type(statistics).__name__}")
    arrays = check_statistics(statistics, type(statistics))._asdict()
    with open(path, "wb") as f:  # np.savez would add a suffix to a path without one
        np.savez(f, format=FORMAT, kind=names[type(statistics)], **arrays)


def load_statistics(path: str | pathlib.Path) -> ModelStatistics | NoiseMoment:
    """Read statistics written by `save_statistics`.

    Raises: ValueError: not such a file, damaged, or written by a newer version of diffjax.
    """
    arrays = read_arrays(path, "save_statistics", FORMAT)
    kind = _KINDS.get(str(arrays.pop("kind", "")))
    if kind is None or set(arrays) != set(kind._fields):
        raise ValueError(f"{path} is not a file written by save_statistics; it holds {sorted(arrays)}")
    return check_statistics(kind(**arrays), kind)
