"""Several denoisers as one: a mixture of experts by the posterior of their clusters, and experts of ranges of time.

If the data are a mixture of K clusters and expert k knows the k-th alone, then with r_k = p_t(k | x_t) the prediction of
the whole is the mean of theirs: `x0 = sum_k r_k x0_k`, `eps = sum_k r_k eps_k`, and so for v, velocity and score.

Experts are a sequence of denoisers of any architecture, or one denoiser whose leaves have a leading axis of K (`stack`, or
a network called with stacked parameters), which is traced once. What is evaluated, with B items:
- all experts: K B item evaluations, together under `vmap` where experts are stacked;
- `top=k` or drawn: an expert is evaluated, for the whole batch, if any item has chosen it, and skipped otherwise. A batch
  of one, and one whose items agree (experts of ranges of time), makes k evaluations; items that choose all experts between
  them make K. Items are not regrouped by expert: that is for the host, between steps, and gathering parameters per item
  would hold B copies of an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.prediction import time_itself
from diffjax.types import UNBOUND, Cond, Denoiser, Evaluation, Prediction, Process

Experts = Sequence[Denoiser] | Denoiser


# ----------------------------------------------------------------------------------------------------------- routers


@pytree_dataclass
class Router:
    """`(x, t, cond) -> logits` [B, K] of the clusters given the noisy state; made by `router`, parameters are leaves."""

    params: PyTree
    process: Any
    fn: Callable[..., Any] = static()
    input_scale: Callable[..., Any] | None = static(default=None)
    time: Callable[..., Any] = static(default=time_itself)

    def __call__(self, x: PyTree, t: PyTree, cond: Cond = None) -> jax.Array:
        """Logits [B, K] at state x [B, ...] and times t, scalar or [B]."""
        n, dtype = nu.batch_size(x), jax.tree.leaves(x)[0].dtype
        t = jax.tree.map(lambda ti: jnp.asarray(ti, dtype), t)
        full = lambda c: jnp.broadcast_to(jnp.asarray(c), (n, *np.shape(c)[1:]))
        code = jax.tree.map(full, self.time(self.process, t))
        inputs = x if self.input_scale is None else nu.scale(self.input_scale(self.process, t), x)
        return self.fn(self.params, inputs, code, cond)


def router(
    fn: Callable[..., Any],
    process: Process,
    params: PyTree,
    *,
    input_scale: Callable[..., Any] | None = None,
    time: Callable[..., Any] = time_itself,
) -> Router:
    """A classifier of noisy states.   logits = fn(params, c_in x, code(t), cond)

    Args: fn: pure, static by value, returns [B, K]; `networks.Classifier` through `networks.from_linen`.   process: whose
    noise it has learnt to look through.   params: leaves.   input_scale, time: as for `denoiser`.
    Returns: a router; train it with `losses.router_loss`.

    Example:
        >>> from diffjax import processes
        >>> r = router(lambda w, x, t, cond: x @ w, processes.rectified(), jnp.ones((2, 3)))
        >>> r(jnp.ones((4, 2)), 0.5).shape
        (4, 3)
    """
    return Router(params, process, fn, input_scale, time)


@pytree_dataclass
class Clock:
    """The router of `by_time`: certain, from the time alone."""

    boundaries: tuple

    def __call__(self, x: PyTree, t: Any, cond: Cond = None) -> jax.Array:
        """Zero for the expert of the time of each item, minus infinity for the others; [B, K]."""
        if not jax.tree_util.all_leaves([t]) or np.ndim(t) > 1:
            raise ValueError(
                f"experts of ranges of time are chosen by one time per item, a scalar or [B]; got {jax.tree.map(np.shape, t)}"
            )
        t = nu.as_float(t)
        later = sum((t > jnp.asarray(b, t.dtype)).astype(jnp.int32) for b in self.boundaries)
        place = jnp.broadcast_to(later, (nu.batch_size(x),))
        here = place[:, None] == jnp.arange(len(self.boundaries) + 1)[None]
        return jnp.where(here, jnp.zeros((), t.dtype), -jnp.inf)


# ----------------------------------------------------------------------------------------------------------- mixture


def stack(experts: Sequence[Denoiser]) -> Denoiser:
    """Equal denoisers as one whose leaves have a leading axis of experts.

    Args: experts: of one architecture, without bound conditions.
    Raises: ValueError: none, or denoisers that differ in more than the values of their leaves.

    Example:
        >>> from diffjax import denoiser, from_x0, processes
        >>> fn = lambda w, x, t, cond: w * x
        >>> stack([denoiser(fn, processes.rectified(), from_x0, w) for w in (1.0, 2.0)]).leaves.tolist()
        [1.0, 2.0]
    """
    experts = list(experts)
    outline = lambda e: (jax.tree.structure(e), [np.shape(leaf) for leaf in jax.tree.leaves(e.leaves)])
    if not experts or any(outline(e) != outline(experts[0]) for e in experts):
        raise ValueError(
            "stack takes denoisers of one architecture, which differ in the values of their leaves alone; give others to "
            f"mixture as a sequence. Got {len(experts)} denoisers"
        )
    if experts[0].cond is not UNBOUND:
        raise ValueError("stack takes denoisers without a bound condition; bind the mixture instead")
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(a) for a in leaves]), *[e.leaves for e in experts])
    return dataclasses.replace(experts[0], leaves=stacked)


def mixture(experts: Experts, router: Any, *, top: int | None = None, keys: Any = None) -> Denoiser:
    """The denoiser of a mixture of clusters from the denoisers of the clusters.   sum_k r_k(x, t) prediction_k

    r = softmax(router(x, t, cond)): the posterior p_t(k | x_t), which makes the mixture exact; `top` keeps the k most
    probable experts of every item and renormalises; `keys` draws one expert per item and evaluation.

    Args: experts: a sequence of denoisers, or one with stacked leaves (see the module for what is evaluated); of one
    process.   router: `(x, t, cond) -> logits [B, K]`, a pytree, e.g. from `router`.   top: in 1..K, default all.   keys:
    [B] keys, one per item, such as `numerics.item_keys(key, items)`; evaluation i of an item draws from
    `fold_in(keys[b], i)`.
    Returns: a denoiser; experts and router get its condition, experts that have one bound keep it where it is None. Its
    aux is r [B, K], and its state holds those of the experts; one that is skipped does not move.
    Raises: ValueError: no experts, other processes, `top` out of range, both `top` and `keys`, stacked leaves without a
    common leading axis; when called, logits that are not [B, K] or keys that are not [B].
    Reference: arXiv:2501.05450; top-k: arXiv:2510.03434.

    Example:
        >>> from diffjax import processes, testing
        >>> m, p = testing.mixture([1, 1], [[-1.0], [1.0]], stds=[0.5, 0.5]), processes.rectified()
        >>> whole = testing.oracle(m, p)
        >>> d = mixture([whole.bind(0), whole.bind(1)], testing.exact_router(m, p))
        >>> bool(jnp.allclose(d(jnp.ones((1, 1)), 0.5).x0, whole(jnp.ones((1, 1)), 0.5).x0))
        True
    """
    stacked = isinstance(experts, Denoiser)
    experts = experts if stacked else tuple(experts)
    count = _leading(experts.leaves) if stacked else len(experts)
    if not count:
        raise ValueError("a mixture needs at least one expert; got none")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= count):
        raise ValueError(f"top must be an int in 1..{count}, the number of experts; got {top!r}")
    if top is not None and keys is not None:
        raise ValueError("give either top, the experts to keep, or keys, to draw one expert; got both")
    first = experts if stacked else experts[0]
    if not stacked:
        _check_processes([e.process for e in experts])
    bare = lambda e: dataclasses.replace(e, process=None, null=None)  # both exist once, in the mixture
    inner = bare(experts) if stacked else tuple(map(bare, experts))
    rule = _Rule(count, None if top == count else top, keys is not None)
    leaves = {"experts": inner, "router": router, "keys": keys}
    return Denoiser(leaves, first.process, null=first.null, init=_Init(count), apply=_Apply(rule))


def by_time(experts: Experts, boundaries: Sequence[Any]) -> Denoiser:
    """Experts of ranges of time: expert i where boundaries[i-1] < t <= boundaries[i].

    With one time for the whole batch, as in `sample`, one expert is evaluated; with times per item those that any item
    asks for. Train each with `times.laws.truncated(law, low, high)` on its range.

    Args: experts: K denoisers from data to noise, or one with stacked leaves.   boundaries: K - 1 increasing times in
    (0, 1), leaves.
    Returns: a denoiser, a `mixture` whose router is the clock.
    Raises: ValueError: another number of boundaries, or ones out of order; when called, a time per frame or per leaf.
    Reference: arXiv:2312.16486 (two experts: texture, then structure).

    Example:
        >>> from diffjax import denoiser, from_x0, processes
        >>> texture, structure = (denoiser(lambda w, x, t, c: w * x, processes.vp(), from_x0, w) for w in (1.0, 2.0))
        >>> d = by_time([texture, structure], [0.5])
        >>> [float(d(jnp.ones((1, 1)), t).x0[0, 0]) for t in (0.3, 0.5, 0.6)]
        [1.0, 1.0, 2.0]
    """
    boundaries = tuple(boundaries)
    count = _leading(experts.leaves) if isinstance(experts, Denoiser) else len(experts)
    if len(boundaries) != count - 1:
        raise ValueError(f"{count} experts of ranges of time need {count - 1} boundaries; got {len(boundaries)}")
    if nu.namespace(boundaries) is np and not np.all(np.diff([0.0, *boundaries, 1.0]) > 0):
        raise ValueError(f"boundaries must increase inside (0, 1), from data to noise; got {boundaries}")
    return mixture(experts, Clock(boundaries), top=1)


def _leading(leaves: PyTree) -> int:
    """The number of experts in stacked leaves."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(leaves)]
    sizes = {s[:1] for s in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "one denoiser as experts needs a leading axis of experts on every leaf, as `stack` gives; got shapes "
            f"{shapes}. Apply guidance to the mixture, not to its experts"
        )
    return sizes.pop()[0]


def _check_processes(processes: Sequence[Any]) -> None:
    """Refuse experts of different processes, as far as that shows before anything runs."""
    first, host = processes[0], nu.namespace(processes) is np
    for i, other in enumerate(processes[1:], 1):
        same = jax.tree.structure(other) == jax.tree.structure(first)
        if same and host:
            same = all(map(np.array_equal, jax.tree.leaves(other), jax.tree.leaves(first)))
        if not same:
            raise ValueError(
                f"experts must share one process; expert {i} has {other}, expert 0 {first}. Networks of any parameterisation "
                "fit, but wrap one of another process first"
            )


# -------------------------------------------------------------------------------------------------------- evaluation


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How logits become weights."""

    count: int
    top: int | None
    drawn: bool

    @property
    def sparse(self) -> bool:
        """Whether some weights are exactly zero."""
        return self.top is not None or self.drawn

    def weights(self, logits: jax.Array, keys: Any, step: Any) -> jax.Array:
        """The share of every expert, [B, K], each row with the sum one."""
        if self.drawn:
            draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)
            return jax.nn.one_hot(jax.vmap(draw)(keys, logits), self.count, dtype=logits.dtype)
        if self.top is not None:
            chosen = jax.lax.top_k(logits, self.top)[1]
            kept = (chosen[..., None] == jnp.arange(self.count)[None, None]).any(1)
            logits = jnp.where(kept, logits, -jnp.inf)
        return jax.nn.softmax(logits, axis=-1)


@dataclasses.dataclass(frozen=True)
class _Init:
    """`(evaluations so far, states of the experts)`; the first is needed to draw experts alone."""

    count: int

    def __call__(self, d: Denoiser, x: PyTree, cond: Cond) -> PyTree:
        experts = d.leaves["experts"]
        first = lambda e: _whole(e, d).init_state(x, _given(cond))
        if isinstance(experts, Denoiser):
            states = jax.vmap(lambda p: first(dataclasses.replace(experts, leaves=p)), axis_size=self.count)(
                experts.leaves
            )
        else:
            states = tuple(map(first, experts))
        return (jnp.zeros((), jnp.int32) if d.leaves["keys"] is not None else (), states)


@dataclasses.dataclass(frozen=True)
class _Apply:
    rule: _Rule

    def __call__(self, d: Denoiser, state: PyTree, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
        experts, n, (step, states) = d.leaves["experts"], nu.batch_size(x), state
        logits = d.leaves["router"](x, t, cond)
        if logits.shape != (n, self.rule.count):
            raise ValueError(f"the router must return logits [B, K] = {(n, self.rule.count)}; got {logits.shape}")
        keys = d.leaves["keys"]
        if keys is not None and np.shape(keys) != (n,):
            raise ValueError(f"keys must hold one key per item, shape ({n},); got {np.shape(keys)}")
        r = self.rule.weights(logits, keys, step)

        def one(expert: Denoiser, state: PyTree, i: Any) -> Evaluation:
            own = None if key is None else _fold(key, i)
            return _whole(expert, d).evaluate(x, t, _given(cond), state=state, key=own)

        def add(total: Prediction, expert: Denoiser, state: PyTree, i: Any, share: Any) -> tuple[Prediction, PyTree]:
            """`total` and the prediction of one expert, and its next state."""

            def on() -> tuple[Prediction, PyTree]:
                e = one(expert, state, i)
                some = lambda p: nu.tree_where(share > 0, nu.scale(share, p), jax.tree.map(jnp.zeros_like, p))
                return Prediction(*(nu.add(a, some(p)) for a, p in zip(total, e.prediction, strict=True))), e.state

            return jax.lax.cond((share > 0).any(), on, lambda: (total, state)) if self.rule.sparse else on()

        nothing = Prediction(*(jax.tree.map(jnp.zeros_like, x) for _ in range(2)))
        if not isinstance(experts, Denoiser):
            total, after = nothing, []
            for i, expert in enumerate(experts):
                total, new = add(total, expert, states[i], i, r[:, i])
                after.append(new)
            after = tuple(after)
        else:
            indices = jnp.arange(self.rule.count)
            with_leaves = lambda p: dataclasses.replace(experts, leaves=p)
            if self.rule.sparse:
                body = lambda total, row: add(total, with_leaves(row[0]), *row[1:])
                total, after = jax.lax.scan(body, nothing, (experts.leaves, states, indices, r.T))
            else:
                e = jax.vmap(lambda p, s, i: one(with_leaves(p), s, i)._replace(aux=None))(
                    experts.leaves, states, indices
                )
                total = jax.tree.map(lambda a: a.sum(0), Prediction(*(nu.scale(r.T, p) for p in e.prediction)))
                after = e.state
        return Evaluation(total, (step + 1 if keys is not None else (), after), r)


def _whole(expert: Denoiser, d: Denoiser) -> Denoiser:
    """An expert with the process and the null condition of the mixture."""
    return dataclasses.replace(expert, process=d.process, null=d.null)


def _given(cond: Cond) -> Cond:
    """A condition to pass on: none leaves the one that an expert has bound."""
    return UNBOUND if cond is None else cond


def _fold(key: Any, i: Any) -> Any:
    """The dropout key of expert i, for one key or one per item."""
    return jax.random.fold_in(key, i) if np.ndim(key) == 0 else jax.vmap(jax.random.fold_in, (0, None))(key, i)
