"""Transforms from transforms and from plain functions, and one that counts evaluations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax import numerics as nu
from diffjax.guidance.skip import apply_transform, as_value
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.types import Cond, Denoiser, Evaluation


@pytree_dataclass
class Chain:
    """See `chain`."""

    transforms: tuple

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """All transforms, the first innermost."""
        for transform in self.transforms:
            denoiser = apply_transform(transform, denoiser)
        return denoiser


def chain(*transforms: Any) -> Chain:
    """Apply transforms one after the other; the first is innermost, `chain()` is the identity.

    What limits a guide wraps it: `chain(interval(cfg(2.0), 0.2, 0.8), clip_x0(1.0))`.
    Raises: ValueError: an entry that is not callable; when applied, one that returns no denoiser.

    Example:
        >>> from diffjax import guidance
        >>> len(jax.tree.leaves(chain(guidance.cfg(2.0), guidance.clip_x0(1.0))))
        3
    """
    return Chain(tuple(as_value(t) for t in transforms))


# -------------------------------------------------------------------------------------------------------------- lift


@pytree_dataclass
class Lift:
    """See `lift`."""

    fn: Callable[..., Any] = static()
    arity: int = static(default=1)

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser whose predictions are mapped."""
        return denoiser.wrap(_lifted, self)


def lift(fn: Any) -> Lift:
    """A function of predictions as a transform.   fn(prediction) or fn(prediction, x, t) -> prediction

    Args: fn: static by value (a module-level function): a fresh lambda compiles anew. It returns a whole pair;
    `with_x0` derives the eps of a changed x0.
    Raises: ValueError: fn takes another number of arguments.

    Example:
        >>> from diffjax import Prediction, denoiser, from_x0, processes
        >>> d = lift(lambda p: p)(denoiser(lambda x, t: x, processes.rectified(), from_x0))
        >>> d(jnp.ones((1, 2)), 0.5).x0.tolist()
        [[1.0, 1.0]]
    """
    if not callable(fn):
        raise ValueError(f"lift takes a function of predictions; got {fn!r}")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(fn).parameters.values()
    arity = sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
    if arity not in (1, 3):
        raise ValueError(f"lift takes fn(prediction) or fn(prediction, x, t); got a function of {arity} arguments")
    return Lift(fn, arity)


def _lifted(own: Lift, inner: Denoiser, state: PyTree, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    e = inner.evaluate(x, t, cond, state=state, key=key)
    return e._replace(prediction=own.fn(e.prediction) if own.arity == 1 else own.fn(e.prediction, x, t))


# ----------------------------------------------------------------------------------------------------------- counting


class Count(NamedTuple):
    """Network evaluations so far: batched calls, and items over all calls (int32 scalars)."""

    calls: Any
    items: Any


class Counted(NamedTuple):
    """The state of a denoiser that counts: its count and the state of what it wraps."""

    count: Count
    inner: PyTree


@pytree_dataclass
class CountCalls:
    """See `count_calls`."""

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser whose state counts."""
        return denoiser.wrap(_count, self, _count_init)


def count_calls() -> CountCalls:
    """Count the evaluations of the denoiser that this wraps, in the state; put it innermost to count the network's.

    `x, state = sample(..., return_state=True)`, then `counted(state)`: evaluations that a guide skips are not counted.

    Example:
        >>> from diffjax import denoiser, from_x0, processes
        >>> d = count_calls()(denoiser(lambda x, t: x, processes.rectified(), from_x0))
        >>> counted(d.evaluate(jnp.ones((3, 2)), 0.5).state)
        Count(calls=1, items=3)
    """
    return CountCalls()


def counted(state: PyTree) -> Count:
    """The sum of every count in a denoiser's state, as ints."""
    counts = [c for c in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, Count)) if isinstance(c, Count)]
    return Count(sum(int(c.calls) for c in counts), sum(int(c.items) for c in counts))


def _count_init(own: CountCalls, inner: Denoiser, x: PyTree, cond: Cond) -> Counted:
    return Counted(Count(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), inner.init_state(x, cond))


def _count(own: Any, inner: Denoiser, state: Counted, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    e = inner.evaluate(x, t, cond, state=state.inner, key=key)
    count = Count(state.count.calls + 1, state.count.items + nu.batch_size(x))
    return e._replace(state=Counted(count, e.state))
