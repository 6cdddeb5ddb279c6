"""The types of diffjax and its conventions, each stated once.

Time `t` runs in [0, 1]: `t = 0` is data, `t = 1` is noise. A step goes from `t`, where we are, to `s < t`, where we go; a
grid `[n+1]` decreases, and the same solver on an increasing grid inverts. `x_t = alpha(t) x0 + sigma(t) eps`, and
`log_snr` is always `lambda(t) = log(alpha / sigma)`, the half log-SNR. Arrays are batch-first and channels-last. A time is
a scalar, `[B]`, any shape that broadcasts from the left against the state, or a pytree prefix of a pytree state.
Keys come first and are used once; noise is drawn per item from its global index, so that a sample does not depend on
batch size, chunking or devices. Guidance weight `w = 1` is the conditional model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree, pytree_dataclass, static

Key = jax.Array
Cond = PyTree  # None, an array of labels, or a pytree whose fields the network documents; leaves are batch-first
Scalar = Any  # float, NumPy or JAX scalar


class Prediction(NamedTuple):
    """What a denoiser believes, as a pair.   alpha(t) * x0 + sigma(t) * eps == x

    Every Gaussian parameterisation is linear in `(x0, eps)`, so readers and constructors are enough (see `prediction`).
    """

    x0: PyTree
    eps: PyTree


# ----------------------------------------------------------------------------------------------------------- process


@dataclasses.dataclass(frozen=True)
class Curve:
    """The set of `(alpha, sigma)` pairs that a process runs along, as a norm that is homogeneous of degree one.

    `(a / norm(a, b), b / norm(a, b))` lies on the curve for every `a, b >= 0`, so a process whose noise is multiplied
    stays on its curve. `gradient(a, b)` is `(d norm / da, d norm / db)`.
    """

    name: str
    norm: Callable[[Any, Any, Any], Any]  # (xp, a, b) -> n
    gradient: Callable[[Any, Any, Any], tuple[Any, Any]]  # (xp, a, b) -> (n_a, n_b)


@dataclasses.dataclass(frozen=True)
class Family:
    """The functions that define a kind of process; all take `(xp, p, t, u)` with `u = 1 - t` given without cancellation.

    `p` are the parameters, `xp` is NumPy or `jax.numpy`. `dalpha`, `dsigma` are closed forms of the time derivatives.
    `ends` are the times between which grids in log-SNR are spaced where log-SNR is infinite at an end of [0, 1].
    """

    name: str
    curve: Curve
    alpha: Callable[..., Any]
    sigma: Callable[..., Any]
    log_snr: Callable[..., Any]
    time_of_log_snr: Callable[..., Any]  # (xp, p, lam) -> t
    dalpha: Callable[..., Any]
    dsigma: Callable[..., Any]
    ends: Callable[..., Any]  # (xp, p) -> (t_data, t_noise), 0 <= t_data < t_noise <= 1


@pytree_dataclass
class Process:
    """A Gaussian process `x_t = alpha(t) x0 + sigma(t) eps`: a static family and parameters that are leaves.

    Every method takes a time of any shape, or a pytree of times, and returns the same structure. NumPy float64 in and
    host parameters give NumPy float64 out; one JAX value makes the result JAX. Endpoint values may be infinite where the
    mathematics says so (`log_snr` at `sigma = 0`).

    Example:
        >>> from diffjax import processes
        >>> p = processes.rectified()
        >>> float(p.alpha(0.25)), float(p.sigma(0.25))
        (0.75, 0.25)
    """

    params: PyTree
    family: Family = static()

    def _call(self, name: str, t: PyTree, *rest: Any) -> PyTree:
        f = getattr(self.family, name)

        def leaf(ti: Any) -> Any:
            xp, (ti, p) = nu.host_float64(ti, self.params)
            with np.errstate(divide="ignore"):
                return f(xp, p, ti, 1 - ti) if name != "time_of_log_snr" else f(xp, p, ti)

        return jax.tree.map(leaf, t)

    def alpha(self, t: PyTree) -> PyTree:
        """The scale of the data at time `t`, in [0, 1]."""
        return self._call("alpha", t)

    def sigma(self, t: PyTree) -> PyTree:
        """The standard deviation of the noise at time `t`."""
        return self._call("sigma", t)

    def log_snr(self, t: PyTree) -> PyTree:
        """`lambda(t) = log(alpha / sigma)`, strictly decreasing; the half log-SNR."""
        return self._call("log_snr", t)

    def time_of_log_snr(self, lam: PyTree) -> PyTree:
        """The time at which `log_snr` equals `lam`."""
        return self._call("time_of_log_snr", lam)

    def radius(self, t: PyTree) -> PyTree:
        """`sqrt(alpha^2 + sigma^2)`, > 0: the length of the pair that turns by the angle atan(sigma / alpha); 1 for VP."""
        return jax.tree.map(lambda a, s: (a * a + s * s) ** 0.5, self.alpha(t), self.sigma(t))

    def dalpha(self, t: PyTree) -> PyTree:
        """`d alpha / dt`."""
        return self._call("dalpha", t)

    def dsigma(self, t: PyTree) -> PyTree:
        """`d sigma / dt`; infinite at `t = 0` where `sigma` starts like a square root."""
        return self._call("dsigma", t)

    def ends(self) -> tuple[Any, Any]:
        """`(t_data, t_noise)`: the times with finite log-SNR between which grids in log-SNR are spaced."""
        xp, p = nu.host_float64(self.params)
        return self.family.ends(xp, p[0])

    # The kernels below are derived here, once, for every family.

    def drift(self, t: PyTree) -> PyTree:
        """`f(t) = alpha' / alpha` of the forward SDE `dx = f x dt + g dW`; infinite where `alpha = 0`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return jax.tree.map(lambda da, a: da / a, self.dalpha(t), self.alpha(t))

    def diffusion(self, t: PyTree) -> PyTree:
        """`g(t)^2 = 2 sigma (sigma' - sigma alpha' / alpha)`, the squared diffusion coefficient, >= 0.

        At `t = 0`, where sigma' may be infinite while `sigma sigma'` is not, this is the value just beside it.
        """

        def inside(ti: Any) -> Any:
            xp, (ti,) = nu.host_float64(ti)
            return xp.where(ti == 0, 1e-12 if xp is np else 1e-6, ti)

        t = jax.tree.map(inside, t)
        with np.errstate(divide="ignore", invalid="ignore"):
            return jax.tree.map(lambda s, ds, f: 2 * s * (ds - s * f), self.sigma(t), self.dsigma(t), self.drift(t))

    def transition(self, s: Any, t: Any) -> tuple[Any, Any]:
        """`q(x_t | x_s) = N(scale x_s, variance I)` for `s < t`.   variance = -sigma_t^2 expm1(2 (lam_t - lam_s))

        Returns: `(scale, variance)`.
        """
        xp = nu.namespace(s, t, self.params)
        scale = self.alpha(t) / self.alpha(s)
        return scale, -(self.sigma(t) ** 2) * xp.expm1(2 * (self.log_snr(t) - self.log_snr(s)))

    def posterior(self, s: Any, t: Any) -> tuple[Any, Any, Any]:
        """`q(x_s | x_t, x0) = N(c_t x_t + c_0 x0, variance I)` for `s < t`.

        c_t = (sigma_s / sigma_t) e^{lam_t - lam_s}   c_0 = -alpha_s expm1(2 (lam_t - lam_s))   variance = sigma_s^2 c_0 / alpha_s

        Returns: `(c_t, c_0, variance)`.
        """
        xp = nu.namespace(s, t, self.params)
        gap = self.log_snr(t) - self.log_snr(s)
        gain = -xp.expm1(2 * gap)
        sigma_s = self.sigma(s)
        return sigma_s / self.sigma(t) * xp.exp(gap), self.alpha(s) * gain, sigma_s**2 * gain

    def add_noise(self, x0: PyTree, eps: PyTree, t: PyTree) -> PyTree:
        """`alpha(t) x0 + sigma(t) eps`, with `t` broadcast from the left."""
        return nu.add(nu.scale(self.alpha(t), x0), nu.scale(self.sigma(t), eps))

    def prior(self, key: Key, shape: PyTree, items: Any = None, dtype: Any = None) -> PyTree:
        """Draw the start of a trajectory, per item.   x_1 = sigma(1) z,  z ~ N(0, I)

        Args: shape: `(B, ...)`, or a pytree of arrays or `ShapeDtypeStruct`.   items: [B] global indices, default arange.

        Example:
            >>> from diffjax import processes
            >>> processes.vp().prior(jax.random.key(0), (4, 2)).shape
            (4, 2)
        """
        if isinstance(shape, tuple) and all(isinstance(n, (int, np.integer)) for n in shape):
            shape = jax.ShapeDtypeStruct(shape, dtype or jnp.result_type(float))
        n = nu.batch_size(shape)
        keys = nu.item_keys(key, nu.item_indices(items, n))
        return nu.scale(self.sigma(1.0), nu.item_normal(keys, nu.PRIOR_STEP, shape))


# ---------------------------------------------------------------------------------------------------------- denoiser


class Evaluation(NamedTuple):
    """One evaluation of a denoiser: the pair, the denoiser's next state, and what else the network returned."""

    prediction: Prediction
    state: PyTree = ()
    aux: PyTree = None


class _Unbound:
    """The condition of a denoiser that has none yet; compares by type."""

    def __repr__(self) -> str:
        return "UNBOUND"


jax.tree_util.register_pytree_node(_Unbound, lambda _: ((), None), lambda *_: UNBOUND)
UNBOUND = _Unbound()


@pytree_dataclass
class Denoiser:
    """`(x, t, cond) -> Prediction`, with optional state; parameters, guidance weights and process are leaves.

    `apply(denoiser, state, x, t, cond, key) -> Evaluation` and `init(denoiser, x, cond) -> state` are static by value:
    module-level functions or frozen dataclasses, never a fresh closure; they read `denoiser.leaves` and
    `denoiser.process`. `leaves` is whatever they need: the parameters of a network, or a transform's own numbers beside
    the denoiser that it wraps. `null` is the condition that means "no condition", without batch axis. New leaves never
    recompile.
    """

    leaves: PyTree
    process: Any
    cond: Cond = UNBOUND
    null: Cond = None
    init: Callable[..., PyTree] | None = static(default=None)
    apply: Callable[..., Evaluation] = static(default=None)

    def __call__(self, x: PyTree, t: PyTree, cond: Cond = UNBOUND) -> Prediction:
        """The prediction at `x, t`; a stateful denoiser starts from its first state."""
        return self.evaluate(x, t, cond).prediction

    def evaluate(
        self, x: PyTree, t: PyTree, cond: Cond = UNBOUND, *, state: PyTree = None, key: Key | None = None
    ) -> Evaluation:
        """One evaluation with state and auxiliary outputs.   `key`: dropout key, only while training."""
        cond = self.resolve(cond)
        if state is None:
            state = self.init_state(x, cond)
        return self.apply(self, state, x, t, cond, key)

    def init_state(self, x: PyTree, cond: Cond = UNBOUND) -> PyTree:
        """The state that `evaluate` threads through a trajectory; `()` for a stateless denoiser."""
        return () if self.init is None else self.init(self, x, self.resolve(cond))

    def stateful(self, x: PyTree) -> bool:
        """Whether a state is threaded through a trajectory of states like `x`; nothing is computed."""
        return bool(jax.tree.leaves(jax.eval_shape(self.init_state, x)))

    def resolve(self, cond: Cond) -> Cond:
        """The condition given, else the one bound, else None."""
        cond = self.cond if cond is UNBOUND else cond
        return None if cond is UNBOUND else cond

    def bind(self, cond: Cond) -> Denoiser:
        """This denoiser with its condition closed."""
        return dataclasses.replace(self, cond=cond)

    def wrap(
        self, apply: Callable[..., Evaluation], own: PyTree = (), init: Callable[..., PyTree] | None = None
    ) -> Denoiser:
        """A denoiser around this one.   apply(own, inner, state, x, t, cond, key) -> Evaluation

        Args: apply: static by value.   own: the transform's numbers, leaves.   init: `(own, inner, x, cond) -> state`; None
        keeps the inner state. A condition already bound stays bound; null condition and process are kept.
        """
        inner = dataclasses.replace(self, process=None, cond=UNBOUND, null=None)
        return dataclasses.replace(self, leaves=(own, inner), init=_WrapInit(init), apply=_WrapApply(apply))


def _unwrap(outer: Denoiser) -> tuple[PyTree, Denoiser]:
    own, inner = outer.leaves  # the process and the null condition exist once, in the outermost denoiser
    return own, dataclasses.replace(inner, process=outer.process, null=outer.null)


@dataclasses.dataclass(frozen=True)
class _WrapApply:
    f: Callable[..., Evaluation]

    def __call__(self, outer: Any, state: Any, x: Any, t: Any, cond: Any, key: Any) -> Evaluation:
        return self.f(*_unwrap(outer), state, x, t, cond, key)


@dataclasses.dataclass(frozen=True)
class _WrapInit:
    f: Callable[..., PyTree] | None

    def __call__(self, outer: Any, x: Any, cond: Any) -> PyTree:
        own, inner = _unwrap(outer)
        return inner.init_state(x, cond) if self.f is None else self.f(own, inner, x, cond)


def batched_cond(cond: Cond, batch: int) -> Cond:
    """A bound condition with scalars repeated for the batch, or an error that names both sizes."""
    if cond is UNBOUND or cond is None:
        return cond

    def leaf(c: Any) -> jax.Array:
        c = jnp.asarray(c)
        if c.ndim == 0:
            return jnp.broadcast_to(c, (batch,))
        if c.shape[0] != batch:
            raise ValueError(
                f"the bound condition has {c.shape[0]} items and the state {batch}; bind a condition of shape "
                f"({batch}, ...), or a scalar for all items"
            )
        return c

    return jax.tree.map(leaf, cond)


Transform = Callable[[Denoiser], Denoiser]
Read = Callable[[PyTree, PyTree, Process, Any], Prediction]  # (network output, x, process, t) -> pair


# ------------------------------------------------------------------------------------------------------------ solver


@pytree_dataclass
class Noise:
    """Where a step draws from: item keys [B] and the index of the step. `draw(like)` gives one normal per item.

    The keys are kept as raw words: a typed key may not pass through the `select` that `vmap` makes of `lax.cond`.
    """

    words: Any  # [B, ...] uint32
    step: Any
    impl: Any = static(default=None)

    @classmethod
    def at(cls, keys: Key, step: Any) -> Noise:
        """The noise of one step of the items with these keys."""
        return cls(jax.random.key_data(keys), step, jax.random.key_impl(keys))

    def draw(self, like: PyTree, stream: int = 0) -> PyTree:
        """A standard normal shaped like the state `like`; `stream` (0 or 1) separates two draws of one step."""
        keys = jax.random.wrap_key_data(self.words, impl=self.impl)
        return nu.item_normal(keys, 2 * self.step + stream, like)


@pytree_dataclass
class Solver:
    """Rows of numbers and a rule to apply one row.

    `rows` are scanned over; their leading axis is the number of evaluations. `step(noise, denoiser, (state, model_state),
    row) -> (state, model_state)`, `init(x, constants) -> state` and `read(state) -> x` are static by value. `rows.t` are the
    times of evaluation, `rows.accept` says whether the state after a row is at the next point of `grid`. `constants` are
    arrays like the state that every row may use (a measurement, a bias). `count`, if given, is the number of rows that are
    real: the others are padding, and the loop is a forward-only `fori_loop` that stops there.
    """

    rows: PyTree
    grid: Any = None  # [steps + 1]
    constants: PyTree = ()
    count: Any = None
    init: Callable[..., PyTree] = static(default=None)
    step: Callable[..., tuple[PyTree, PyTree]] = static(default=None)
    read: Callable[[PyTree], PyTree] = static(default=None)

    @property
    def steps(self) -> int:
        """Grid intervals of one trajectory (padding included)."""
        return np.shape(self.grid)[0] - 1

    @property
    def evaluations(self) -> int:
        """Network evaluations of one trajectory (padding included)."""
        return jax.tree.leaves(self.rows)[0].shape[0]


# ------------------------------------------------------------------------------------------------- losses and metrics

PerExample = jax.Array  # [B]
Aux = dict[str, Any]
# (key, denoiser, x0, cond, items=None) -> ([B], aux); never reduced inside, `items` [B] are global positions
Loss = Callable[..., tuple[PerExample, Aux]]


class Metric(NamedTuple):
    """A streaming, mergeable score.   init() -> state;  update(state, batch) -> state;  merge(a, b) -> state;  compute(state)

    States are pytrees of arrays, so that they add up across batches, devices and hosts.
    """

    init: Callable[..., PyTree]
    update: Callable[..., PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    compute: Callable[..., Any]


# -------------------------------------------------------------------------------------------------------------- card


@dataclasses.dataclass(frozen=True)
class Card:
    """One catalogue line: what a method is, what it claims, and where it comes from. Every claim is tested.

    `paper` is a key of `diffjax.references` with the equation or algorithm number after `#`.
    """

    build: Callable[..., Any]
    paper: str = ""
    summary: str = ""
    order: int | None = None
    evals: int | float | None = None  # network evaluations per step
    noise: bool = False
    exact: tuple[str, ...] = ()  # 'x0', 'eps', 'gaussian': problems that one step solves exactly
    flags: tuple[str, ...] = ()
