"""Predictions are pairs: constructors from every parameterisation, readers back to it, and the denoiser of a network.

With `x = alpha x0 + sigma eps` every parameterisation is linear in `(x0, eps)`:
v = alpha eps - sigma x0,   velocity = alpha' x0 + sigma' eps,   score = -eps / sigma.
A constructor is `read(out, x, process, t) -> Prediction`; one that must divide by an alpha or sigma that is exactly zero
returns zero for the part that the input does not determine (x0 at pure noise: the mean of standardised data).
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.types import Cond, Denoiser, Evaluation, Prediction, Process, Read

# ------------------------------------------------------------------------------------------------------- constructors


def from_x0(out: PyTree, x: PyTree, process: Process, t: PyTree) -> Prediction:
    """The network returns the clean data.   eps = (x - alpha x0) / sigma

    Example:
        >>> from diffjax import processes
        >>> p = from_x0(jnp.zeros((1, 2)), jnp.ones((1, 2)), processes.rectified(), 0.5)
        >>> p.eps.tolist()
        [[2.0, 2.0]]
    """
    return Prediction(out, nu.divide(nu.sub(x, nu.scale(process.alpha(t), out)), process.sigma(t)))


def from_eps(out: PyTree, x: PyTree, process: Process, t: PyTree) -> Prediction:
    """The network returns the noise.   x0 = (x - sigma eps) / alpha"""
    return Prediction(nu.divide(nu.sub(x, nu.scale(process.sigma(t), out)), process.alpha(t)), out)


def from_score(out: PyTree, x: PyTree, process: Process, t: PyTree) -> Prediction:
    """The network returns the score of x_t.   eps = -sigma score"""
    return from_eps(nu.scale(process.sigma(t), jax.tree.map(jnp.negative, out)), x, process, t)


def from_v(out: PyTree, x: PyTree, process: Process, t: PyTree) -> Prediction:
    """The network returns `v = alpha eps - sigma x0`.   x0 = (alpha x - sigma v) / r^2,  eps = (sigma x + alpha v) / r^2

    `r^2 = alpha^2 + sigma^2` is 1 for variance-preserving processes.   Reference: arXiv:2202.00512, Appendix D.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    a, s = _over(alpha, alpha, sigma), _over(sigma, alpha, sigma)
    return Prediction(
        nu.sub(nu.scale(a, x), nu.scale(s, out)),
        nu.add(nu.scale(s, x), nu.scale(a, out)),
    )


def _over(part: PyTree, alpha: PyTree, sigma: PyTree) -> PyTree:
    return jax.tree.map(lambda c, a, s: c / (a * a + s * s), part, alpha, sigma)


def from_velocity(out: PyTree, x: PyTree, process: Process, t: PyTree) -> Prediction:
    """The network returns `u = dx_t/dt = alpha' x0 + sigma' eps`.

    x0 = (sigma' x - sigma u) / det,  eps = (alpha u - alpha' x) / det,  det = alpha sigma' - alpha' sigma

    The target is unbounded where `sigma'` or `alpha'` is (`t = 0` of VP); rectified flow is `det = 1`.
    Reference: arXiv:2303.08797, Section 4.
    """
    alpha, sigma, da, ds = process.alpha(t), process.sigma(t), process.dalpha(t), process.dsigma(t)
    det = jax.tree.map(lambda a, s, u, w: a * w - u * s, alpha, sigma, da, ds)
    over = lambda c: jax.tree.map(operator.truediv, c, det)
    return Prediction(
        nu.sub(nu.scale(over(ds), x), nu.scale(over(sigma), out)),
        nu.sub(nu.scale(over(alpha), out), nu.scale(over(da), x)),
    )


@dataclasses.dataclass(frozen=True)
class EdmReader:
    """The reader of an EDM-preconditioned network for data of standard deviation `sigma_data`; see `from_edm`."""

    sigma_data: float = 0.5

    def __call__(self, out: PyTree, x: PyTree, process: Process, t: PyTree) -> Prediction:
        """The pair, with c_skip and c_out simplified so that nothing is divided by alpha or sigma."""
        d = self.sigma_data
        alpha, sigma = process.alpha(t), process.sigma(t)
        n2 = jax.tree.map(lambda a, s: s * s + a * a * d * d, alpha, sigma)
        skip_x0 = jax.tree.map(lambda a, n: a * d * d / n, alpha, n2)
        skip_eps = jax.tree.map(lambda s, n: s / n, sigma, n2)
        out_x0 = jax.tree.map(lambda s, n: s * d / n**0.5, sigma, n2)
        out_eps = jax.tree.map(lambda a, n: a * d / n**0.5, alpha, n2)
        return Prediction(
            nu.add(nu.scale(skip_x0, x), nu.scale(out_x0, out)),
            nu.sub(nu.scale(skip_eps, x), nu.scale(out_eps, out)),
        )


def from_edm(out: PyTree, x: PyTree, process: Process, t: PyTree) -> Prediction:
    """The network is EDM-preconditioned with sigma_data = 0.5 (`EdmReader(sigma_data)` for another value).

    x0 = (alpha d^2 x + sigma d n F) / n^2,  eps = (sigma x - alpha d n F) / n^2,  n^2 = sigma^2 + alpha^2 d^2

    In EDM's own coordinates `x / alpha`, `sigma / alpha` this is `c_skip x + c_out F`. Use `input_scale=edm_scale(d)`.
    Reference: arXiv:2206.00364, Table 1 and Eq. 7.
    """
    return EdmReader()(out, x, process, t)


# ------------------------------------------------------------------------------------------------------------ readers


def to_x0(p: Prediction, process: Process, t: PyTree) -> PyTree:
    """The clean data of a pair."""
    return p.x0


def to_eps(p: Prediction, process: Process, t: PyTree) -> PyTree:
    """The noise of a pair."""
    return p.eps


def to_v(p: Prediction, process: Process, t: PyTree) -> PyTree:
    """`v = alpha eps - sigma x0`."""
    return nu.sub(nu.scale(process.alpha(t), p.eps), nu.scale(process.sigma(t), p.x0))


def to_velocity(p: Prediction, process: Process, t: PyTree) -> PyTree:
    """`u = alpha' x0 + sigma' eps`, the probability-flow velocity dx/dt."""
    return nu.add(nu.scale(process.dalpha(t), p.x0), nu.scale(process.dsigma(t), p.eps))


def to_score(p: Prediction, process: Process, t: PyTree) -> PyTree:
    """`score = -eps / sigma`; zero where sigma is exactly zero."""
    return jax.tree.map(jnp.negative, nu.divide(p.eps, process.sigma(t)))


@dataclasses.dataclass(frozen=True)
class EdmTarget:
    """What an EDM-preconditioned network must return for a pair.   F = (sigma x0 - alpha d^2 eps) / (d n)

    `n^2 = sigma^2 + alpha^2 d^2`; the inverse of `EdmReader(sigma_data)`.
    """

    sigma_data: float = 0.5

    def __call__(self, p: Prediction, process: Process, t: PyTree) -> PyTree:
        """The target in the network's own space."""
        d = self.sigma_data
        alpha, sigma = process.alpha(t), process.sigma(t)
        n = jax.tree.map(lambda a, s: d * (s * s + a * a * d * d) ** 0.5, alpha, sigma)
        return nu.sub(
            nu.scale(jax.tree.map(lambda s, m: s / m, sigma, n), p.x0),
            nu.scale(jax.tree.map(lambda a, m: a * d * d / m, alpha, n), p.eps),
        )


READERS = {
    from_x0: to_x0,
    from_eps: to_eps,
    from_v: to_v,
    from_velocity: to_velocity,
    from_score: to_score,
    from_edm: EdmTarget(),
}  # constructor -> its inverse


# --------------------------------------------------------------------------------------------- input and time codes


@dataclasses.dataclass(frozen=True)
class edm_scale:
    """`c_in = 1 / sqrt(sigma^2 + alpha^2 d^2)`: the factor that gives a network's input unit variance."""

    sigma_data: float = 0.5

    def __call__(self, process: Process, t: PyTree) -> PyTree:
        """The factor at time `t`."""
        return jax.tree.map(
            lambda a, s: (s * s + a * a * self.sigma_data**2) ** -0.5, process.alpha(t), process.sigma(t)
        )


def time_itself(process: Process, t: PyTree) -> PyTree:
    """The time code `t` in [0, 1]."""
    return t


def time_1000(process: Process, t: PyTree) -> PyTree:
    """The time code `1000 t`, for networks with the field's integer-step embeddings."""
    return jax.tree.map(lambda ti: 1000.0 * ti, t)


def time_log_sigma(process: Process, t: PyTree) -> PyTree:
    """The time code `log(sigma / alpha) / 4` of EDM, clipped to +-20 where it is infinite at an end."""
    return jax.tree.map(lambda lam: jnp.clip(-lam / 4, -20.0, 20.0), process.log_snr(t))


# ----------------------------------------------------------------------------------------------- network -> denoiser


@dataclasses.dataclass(frozen=True)
class _Network:
    """The `apply` of a bare network: input scale, time code, call, read."""

    fn: Callable[..., Any]
    read: Read
    arity: int
    input_scale: Callable[..., Any] | None
    time: Callable[..., Any]
    dropout: bool
    aux: bool

    def __call__(self, d: Any, state: Any, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
        n = jax.tree.leaves(x)[0].shape[0]
        dtype = jax.tree.leaves(x)[0].dtype
        t = jax.tree.map(lambda ti: jnp.asarray(ti, dtype), t)
        code = jax.tree.map(
            lambda c: jnp.broadcast_to(c, (n,) + c.shape[1:]) if c.ndim else jnp.full((n,), c),
            self.time(d.process, t),
        )
        inputs = x if self.input_scale is None else nu.scale(self.input_scale(d.process, t), x)
        args = {2: (inputs, code), 3: (inputs, code, cond), 4: (d.leaves, inputs, code, cond)}[self.arity]
        out = self.fn(*args, **({"key": key} if self.dropout else {}))
        out, aux = out if self.aux else (out, None)
        out = jax.tree.map(lambda o, xi: o.astype(xi.dtype), out, x)
        return Evaluation(self.read(out, x, d.process, t), state, aux)


def denoiser(
    fn: Callable[..., Any],
    process: Process,
    read: Read,
    params: PyTree = None,
    *,
    null: Cond = None,
    input_scale: Callable[..., Any] | None = None,
    time: Callable[..., Any] = time_itself,
    dropout: bool = False,
    aux: bool = False,
) -> Denoiser:
    """The denoiser of a network.   read(fn(params, c_in x, code(t), cond), x, process, t)

    Args: fn: `fn(x, t)`, `fn(x, t, cond)` or `fn(params, x, t, cond)`, pure; the time it gets is `[B]`.   read: `from_x0`,
    `from_eps`, `from_v`, `from_velocity`, `from_score`, `from_edm` or your own.   params: leaves.   null: the condition that
    means "no condition", without batch axis.   input_scale: `(process, t) -> c_in`, e.g. `edm_scale(0.5)`.   time:
    `(process, t) -> code`, e.g. `time_1000`, `time_log_sigma`.   dropout: fn takes `key=`: one key per item [B] in losses,
    None when sampling.   aux: fn returns `(out, aux)`.
    Raises: ValueError: `fn` takes another number of arguments, or `params` is given to one that takes none.

    Example:
        >>> from diffjax import processes
        >>> d = denoiser(lambda x, t: 0.5 * x, processes.rectified(), from_x0)
        >>> d(jnp.ones((2, 3)), 0.5).eps.shape
        (2, 3)
    """
    required, most = _positional(fn)
    arity = required if params is None else 4
    if params is not None and not required <= 4 <= most:
        raise ValueError(
            f"params were given, but fn takes {required} to {most} positional arguments; use fn(params, x, t, cond)"
        )
    if arity not in (2, 3, 4):
        raise ValueError(
            f"fn must be fn(x, t), fn(x, t, cond) or fn(params, x, t, cond); got {required} positional arguments. "
            "Wrap it in a function of one of these forms"
        )
    network = _Network(fn, read, arity, input_scale, time, dropout, aux)
    return Denoiser(leaves=params, process=process, null=null, apply=network)


def _positional(fn: Callable[..., Any]) -> tuple[int, int]:
    """How many positional arguments a function needs, and how many it takes."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return 4, 4
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return sum(p.default is p.empty for p in named), 4 if more else len(named)


def broadcast_null(null: Cond, cond: Cond, n: int) -> Cond:
    """The condition of a batch of `n` items without condition: `null` repeated, with the dtypes of `cond`.

    Fields of a dict condition that `null` does not have are kept: they are never dropped (an image to continue from, say).

    Raises: ValueError: `null` has fields that `cond` lacks, or a batch axis.

    Example:
        >>> broadcast_null({"label": 10}, {"label": jnp.array([1, 2]), "vector": jnp.ones((2, 1))}, 2)["label"].tolist()
        [10, 10]
    """
    if isinstance(null, dict) and isinstance(cond, dict) and set(null) <= set(cond):
        return {k: broadcast_null(null[k], c, n) if k in null else c for k, c in cond.items()}
    if jax.tree.structure(null) != jax.tree.structure(cond):
        raise ValueError(
            f"the null condition has the fields {jax.tree.structure(null)}, the condition {jax.tree.structure(cond)}; "
            "give both the same fields, or leave fields that are never dropped out of the null condition"
        )

    def leaf(z: Any, c: Any) -> jax.Array:
        if np.ndim(z) > np.ndim(c) - 1:
            raise ValueError(
                f"a null condition has no batch axis; got shape {np.shape(z)} for a condition {np.shape(c)}"
            )
        return jnp.broadcast_to(jnp.asarray(z, jnp.asarray(c).dtype), (n, *np.shape(c)[1:]))

    return jax.tree.map(leaf, null, cond)
