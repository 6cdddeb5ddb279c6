"""Laws of the training time: how often each `t` is drawn, with its density where a weighting needs correcting.

A law maps one uniform number to one time by its inverse distribution function. The numbers come from the global index
of the item, so a batch that is cut or sharded otherwise draws the same times; `stratified` replaces them by a
low-discrepancy set without touching the law. Times lie in [1e-6, 1 - 1e-6], where every process is accurate in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from diffjax import numerics as nu
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.processes.gaussian import number
from diffjax.types import Key, Process, Scalar

NEAREST = 1e-6  # to either end


@pytree_dataclass
class TimeLaw:
    """A law of `t`: leaves, an inverse distribution function and a log-density, both static by value.

    `place(params, process, u) -> t` and `density(params, process, t) -> log p(t)`. `batch` is the global batch size
    of a stratified law, else None.

    Example:
        >>> from diffjax import processes
        >>> t = uniform()(jax.random.key(0), processes.vp(), jnp.arange(4))
        >>> t.shape, bool(jnp.all((t > 0) & (t < 1)))
        ((4,), True)
    """

    params: PyTree
    place: Callable[..., Any] = static(default=None)
    density: Callable[..., Any] = static(default=None)
    batch: int | None = static(default=None)

    def __call__(self, key: Key, process: Process, items: Any) -> Any:
        """Times [B] of the items with global indices `items` [B]."""
        u = _independent(key, items) if self.batch is None else _stratified(key, items, self.batch)
        t = self.place(self.params, process, u)
        return jnp.clip(t, NEAREST, 1 - NEAREST).astype(u.dtype)

    def log_density(self, process: Process, t: Any) -> Any:
        """`log p(t)`, normalised over (0, 1)."""
        return self.density(self.params, process, nu.as_float(t))


def _independent(key: Key, items: Any) -> Any:
    keys = nu.item_keys(key, items)
    return jax.vmap(lambda k: jax.random.uniform(k, (), minval=NEAREST, maxval=1 - NEAREST))(keys)


def _stratified(key: Key, items: Any, batch: int) -> Any:
    # One offset for all items, and one fixed permutation: multiplication by a number coprime to the batch, near its
    # golden section, so that every contiguous shard or chunk is spread over [0, 1] as well.
    stride = max(1, min(round(0.618 * batch), (2**32 - 1) // batch))
    while math.gcd(stride, batch) > 1:
        stride -= 1
    place = (jnp.asarray(items).astype(jnp.uint32) % batch) * jnp.uint32(stride) % batch
    u = jax.random.uniform(key) + place.astype(jnp.result_type(float)) / batch
    return NEAREST + (1 - 2 * NEAREST) * (u - jnp.floor(u))


def stratified(law: TimeLaw, batch: int) -> TimeLaw:
    """`law` with evenly spread uniforms, one per stratum of width 1 / B.   u_b = (u_0 + perm(b) / B) mod 1

    The mean over a whole batch has less variance; the times of one batch are not independent.
    Args: law: any.   batch: the global batch size, over all devices and accumulation steps; `items` count modulo it.
    Raises: ValueError: batch is not an int >= 1.
    Reference: arXiv:2107.00630, Appendix I.1.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an int >= 1, the global batch size; got {batch!r}")
    return dataclasses.replace(law, batch=batch)


@pytree_dataclass
class Separate:
    """See `separate`."""

    laws: dict[str, Any]

    def __call__(self, key: Key, process: Process, items: Any) -> dict[str, Any]:
        """Times [B] of each part."""
        keys = jax.random.split(key, len(self.laws))
        return {name: law(k, process, items) for k, (name, law) in zip(keys, sorted(self.laws.items()), strict=True)}


def separate(**laws: Any) -> Separate:
    """A time for each part of a state that is a dict, drawn apart from the others.   {name: t_name ~ law_name}

    A model of several parts that was trained so can be asked for any of them given any others.
    Args: laws: name of the part -> law.
    Raises: ValueError: none.
    Reference: arXiv:2303.06555 (independent times of two modalities).

    Example:
        >>> from diffjax import processes
        >>> t = separate(x=uniform(), y=uniform())(jax.random.key(0), processes.vp(), jnp.arange(4))
        >>> t["x"].shape, bool((t["x"] == t["y"]).any())
        ((4,), False)
    """
    if not laws:
        raise ValueError("separate needs a law for each part of the state, such as separate(x=uniform(), y=uniform())")
    return Separate(laws)


@dataclasses.dataclass(frozen=True)
class _Restricted:
    """The inverse distribution function and the log-density of a law inside [low, high]."""

    place_: Callable[..., Any]
    density_: Callable[..., Any]

    def place(self, p: Any, process: Process, u: Any) -> Any:
        below, above = self._mass(p, process, u.dtype)
        return jnp.clip(self.place_(p["law"], process, below + u * (above - below)), p["low"], p["high"])

    def density(self, p: Any, process: Process, t: Any) -> Any:
        below, above = self._mass(p, process, t.dtype)
        inside = (t >= p["low"]) & (t <= p["high"])
        return jnp.where(inside, self.density_(p["law"], process, t) - jnp.log(above - below), -jnp.inf)

    def _mass(self, p: Any, process: Process, dtype: Any) -> tuple[Any, Any]:
        """The law's mass below `low` and below `high`, where its inverse distribution function crosses them."""
        bounds = jnp.stack([jnp.asarray(p["low"], dtype), jnp.asarray(p["high"], dtype)])

        def halve(_: Any, ends: Any) -> Any:
            left, right = ends
            middle = 0.5 * (left + right)
            early = self.place_(p["law"], process, middle) < bounds
            return jnp.where(early, middle, left), jnp.where(early, right, middle)

        ends = jnp.full_like(bounds, NEAREST), jnp.full_like(bounds, 1 - NEAREST)
        left, right = jax.lax.fori_loop(0, 30, halve, ends)
        return tuple(0.5 * (left + right))


@dataclasses.dataclass(frozen=True)
class _Part:
    """One of the two functions of a `_Restricted`, hashed by value as a bound method is not."""

    law: _Restricted
    name: str

    def __call__(self, p: Any, process: Process, a: Any) -> Any:
        return getattr(self.law, self.name)(p, process, a)


def truncated(law: TimeLaw, low: Scalar, high: Scalar) -> TimeLaw:
    """`law` given that the time lies in [low, high].   p(t) / P(low <= t <= high)

    For an expert of a range of times; a stratified law stays stratified.
    Args: law: whose times increase with their uniform number, as those of all laws here do.   low, high: bounds, leaves.
    Raises: ValueError: concrete bounds that are not in order inside [0, 1].
    Reference: arXiv:2312.16486 (the ranges of its two models).

    Example:
        >>> from diffjax import processes
        >>> t = truncated(uniform(), 0.5, 0.75)(jax.random.key(0), processes.vp(), jnp.arange(64))
        >>> bool(jnp.all((t >= 0.5) & (t <= 0.75)))
        True
    """
    if nu.namespace(low, high) is np and not 0 <= low < high <= 1:
        raise ValueError(f"a truncated law needs 0 <= low < high <= 1; got low={low}, high={high}")
    inside = _Restricted(law.place, law.density)
    p = {"law": law.params, "low": low, "high": high}
    return TimeLaw(p, _Part(inside, "place"), _Part(inside, "density"), law.batch)


def slope_of_log_snr(process: Process, t: Any) -> Any:
    """`-d lambda / dt = sigma' / sigma - alpha' / alpha`, > 0."""
    return process.dsigma(t) / process.sigma(t) - process.dalpha(t) / process.alpha(t)


# ------------------------------------------------------------------------------------------ uniform in t and lambda


def _uniform_place(p: Any, process: Process, u: Any) -> Any:
    return u


def _uniform_density(p: Any, process: Process, t: Any) -> Any:
    return jnp.zeros_like(t)


def uniform() -> TimeLaw:
    """Uniform in time.   p(t) = 1

    Reference: arXiv:2006.11239, Algorithm 1.
    """
    return TimeLaw({}, _uniform_place, _uniform_density)


def _log_snr_range(p: Any, process: Process) -> tuple[Any, Any]:
    data, noise = (process.log_snr(jnp.asarray(t)) for t in process.ends())
    return data, noise


def _log_snr_place(p: Any, process: Process, u: Any) -> Any:
    data, noise = _log_snr_range(p, process)
    return process.time_of_log_snr(data + u * (noise - data))


def _log_snr_density(p: Any, process: Process, t: Any) -> Any:
    data, noise = _log_snr_range(p, process)
    lam = process.log_snr(t)
    inside = jnp.log(slope_of_log_snr(process, t)) - jnp.log(data - noise)
    return jnp.where((lam <= data) & (lam >= noise), inside, -jnp.inf)


def log_snr() -> TimeLaw:
    """Uniform in log-SNR between `process.ends()`.   p(t) = -lambda'(t) / (lambda(t_data) - lambda(t_noise))

    Reference: arXiv:2303.00848, Section 2.2.
    """
    return TimeLaw({}, _log_snr_place, _log_snr_density)


# ---------------------------------------------------------------------------------------------- normal laws


def _normal_range(p: Any, process: Process) -> tuple[Any, Any]:
    """Standardised `log(sigma / alpha)` at the two extreme times."""
    ends = process.log_snr(jnp.asarray([NEAREST, 1 - NEAREST]))
    return (-ends[0] - p["mean"]) / p["std"], (-ends[1] - p["mean"]) / p["std"]


def _lognormal_place(p: Any, process: Process, u: Any) -> Any:
    low, high = _normal_range(p, process)
    below = ndtr(low)
    z = ndtri(jnp.clip(below + u * (ndtr(high) - below), 1e-7, 1 - 1e-7))
    return process.time_of_log_snr(-(p["mean"] + p["std"] * jnp.clip(z, low, high)))


def _lognormal_density(p: Any, process: Process, t: Any) -> Any:
    low, high = _normal_range(p, process)
    z = (-process.log_snr(t) - p["mean"]) / p["std"]
    mass = jnp.log(ndtr(high) - ndtr(low))
    return _log_normal(z) - jnp.log(p["std"]) + jnp.log(slope_of_log_snr(process, t)) - mass


def _log_normal(z: Any) -> Any:
    return -0.5 * z * z - 0.5 * math.log(2 * math.pi)


def lognormal(mean: Scalar = -1.2, std: Scalar = 1.2) -> TimeLaw:
    """EDM's law.   log(sigma / alpha) ~ N(mean, std^2), restricted to the range of the process

    Args: mean: EDM's -1.2 is for data of standard deviation 0.5; add log(2) for unit data.   std: > 0.
    Raises: ValueError: a concrete std that is not positive.
    Reference: arXiv:2206.00364, Table 1.
    """
    return TimeLaw({"mean": number("mean", mean), "std": number("std", std, 0)}, _lognormal_place, _lognormal_density)


def _logit_normal_place(p: Any, process: Process, u: Any) -> Any:
    return jax.nn.sigmoid(p["mean"] + p["std"] * ndtri(u))


def _logit_normal_density(p: Any, process: Process, t: Any) -> Any:
    z = (jnp.log(t) - jnp.log1p(-t) - p["mean"]) / p["std"]
    return _log_normal(z) - jnp.log(p["std"]) - jnp.log(t) - jnp.log1p(-t)


def logit_normal(mean: Scalar = 0.0, std: Scalar = 1.0) -> TimeLaw:
    """Logit-normal in time.   logit(t) ~ N(mean, std^2); mean > 0 favours noise

    Raises: ValueError: a concrete std that is not positive.
    Reference: arXiv:2403.03206, Eq. 19.
    """
    p = {"mean": number("mean", mean), "std": number("std", std, 0)}
    return TimeLaw(p, _logit_normal_place, _logit_normal_density)


# --------------------------------------------------------------------------------------------- mode and cosmap


def _mode_place(p: Any, process: Process, u: Any) -> Any:
    v = 1 - u  # the paper's map decreases; 1 - cos^2(pi v / 2) = sin^2
    return u + p["scale"] * (jnp.sin(0.5 * math.pi * v) ** 2 - v)


def _mode_density(p: Any, process: Process, t: Any) -> Any:
    def halve(_: Any, bounds: Any) -> Any:
        low, high = bounds
        middle = 0.5 * (low + high)
        early = _mode_place(p, process, middle) < t
        return jnp.where(early, middle, low), jnp.where(early, high, middle)

    low, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(t), jnp.ones_like(t)))
    u = 0.5 * (low + high)
    return -jnp.log(1 + p["scale"] * (1 - 0.5 * math.pi * jnp.sin(math.pi * (1 - u))))


def mode(scale: Scalar = 1.29) -> TimeLaw:
    """SD3's law with a mode in the middle.   t = 1 - u - s (cos^2(pi u / 2) - 1 + u)

    Args: scale: s in (-1, 2 / (pi - 2)); 0 is uniform, > 0 favours the middle, < 0 the ends.
    Raises: ValueError: a concrete scale out of range.
    Reference: arXiv:2403.03206, Eq. 20.
    """
    return TimeLaw({"scale": number("scale", scale, -1, 2 / (math.pi - 2))}, _mode_place, _mode_density)


def _cosmap_place(p: Any, process: Process, u: Any) -> Any:
    s, c = jnp.sin(0.5 * math.pi * u), jnp.sin(0.5 * math.pi * (1 - u))
    return s / (s + c)


def _cosmap_density(p: Any, process: Process, t: Any) -> Any:
    return jnp.log(2 / math.pi) - jnp.log(1 - 2 * t + 2 * t * t)


def cosmap() -> TimeLaw:
    """The law that gives a straight path the log-SNR of the cosine process.   p(t) = 2 / (pi (1 - 2 t + 2 t^2))

    Reference: arXiv:2403.03206, Eq. 21.
    """
    return TimeLaw({}, _cosmap_place, _cosmap_density)


# ------------------------------------------------------------------------------------------------------ adaptive


class AdaptiveState(NamedTuple):
    """Running mean of the squared loss in equal bins of time, [K], and how often each was seen, [K]."""

    square: Any
    count: Any


def adaptive_init(bins: int = 32) -> AdaptiveState:
    """No loss seen: the law is uniform.   Raises: ValueError: bins is not an int >= 1."""
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be an int >= 1; got {bins!r}")
    return AdaptiveState(jnp.zeros(bins), jnp.zeros(bins))


def adaptive_update(state: AdaptiveState, t: Any, loss: Any, decay: Scalar = 0.95) -> AdaptiveState:
    """Fold a batch of losses into their bins.   square_k <- decay square_k + (1 - decay) mean_{b in k} loss_b^2

    A bin that the batch did not reach is unchanged, the first visit sets it. Losses that are not finite are left out.
    Args: state: from `adaptive_init`.   t: [B] times.   loss: [B] before division by the density.   decay: in [0, 1).
    Reference: arXiv:2102.09672, Section 3.3.
    """
    bins = state.square.shape[0]
    ok = jnp.isfinite(loss)
    which = jnp.clip((t * bins).astype(jnp.int32), 0, bins - 1)
    hits = jnp.zeros(bins).at[which].add(ok.astype(jnp.float32))
    mean = jnp.zeros(bins).at[which].add(jnp.where(ok, jnp.square(loss), 0.0)) / jnp.maximum(hits, 1.0)
    blended = jnp.where(state.count > 0, decay * state.square + (1 - decay) * mean, mean)
    return AdaptiveState(jnp.where(hits > 0, blended, state.square), state.count + hits)


def adaptive(state: AdaptiveState, floor: Scalar = 0.1, visits: Scalar = 10) -> TimeLaw:
    """Importance sampling by the loss seen so far.   p_k ~ (1 - floor) sqrt(square_k) / sum + floor / K

    Uniform until every bin was visited `visits` times. Divide the loss by the density, `weights.over_density`, to keep
    the same expectation.
    Args: state: from `adaptive_update`.   floor: in (0, 1], the share that stays uniform.   visits: >= 1.
    Raises: ValueError: a concrete floor out of range.
    Reference: arXiv:2102.09672, Eq. 18.
    """
    bins = state.square.shape[0]
    floor = number("floor", floor, 0, 1 + 1e-9)
    root = jnp.sqrt(state.square) + 1e-30
    ready = jnp.all(state.count >= visits)
    share = jnp.where(ready, (1 - floor) * root / jnp.sum(root) + floor / bins, 1 / bins)
    return TimeLaw({"share": share}, _adaptive_place, _adaptive_density)


def _adaptive_place(p: Any, process: Process, u: Any) -> Any:
    share = p["share"]
    mass = jnp.concatenate([jnp.zeros_like(share[:1]), jnp.cumsum(share)])
    return jnp.interp(u, mass / mass[-1], jnp.asarray(np.linspace(0, 1, share.shape[0] + 1), share.dtype))


def _adaptive_density(p: Any, process: Process, t: Any) -> Any:
    bins = p["share"].shape[0]
    which = jnp.clip((t * bins).astype(jnp.int32), 0, bins - 1)
    return jnp.log(p["share"][which] * bins)
