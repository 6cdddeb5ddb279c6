"""Models that live in different latent spaces or resolutions, joined through pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from diffjax import numerics as nu
from diffjax.losses.denoising import as_tree
from diffjax.numerics import PyTree
from diffjax.prediction import from_x0
from diffjax.types import UNBOUND, Cond, Denoiser, Evaluation, Key, Prediction

HANDOVER_STEP = nu.PRIOR_STEP - 2  # the draw that takes a state over; solvers and starts use other indices


class Code(NamedTuple):
    """A latent space.   encode: pixels [B, ...] -> z [B, ...];  decode: z -> pixels

    Each is a function of the module, static by value, or a callable pytree whose leaves are its parameters.
    """

    encode: Callable[[PyTree], PyTree]
    decode: Callable[[PyTree], PyTree]


def cooperate(
    a: Denoiser, b: Denoiser, code_a: Code, code_b: Code, *, weight: Any = 0.5, weight_b: Any = None
) -> Denoiser:
    """Two models of different latent spaces over one pair of states.

    For A: x~ = encode_a(decode_b(x0_b)),  eps~ = (z_a - alpha x~) / sigma,  eps = w eps~ + (1 - w) eps_a, and likewise
    for B with the estimate of A, so that nothing is noised anew and each chain keeps its own current state.

    The state is the pair `(z_a, z_b)`, of any two shapes, and any solver moves both: sample from
    `x = (prior of a, prior of b)` and decode either. (Published for equal shapes, which start from the same noise.)
    Args: a, b: of one process; conditions that they have bound are kept, or one is given as a pair.   code_a, code_b:
    see `Code`.   weight: the share of B in A's estimate, leaf; 0 is A alone.   weight_b: of A in B's, default `weight`.
    Returns: a denoiser of pairs; each step evaluates each model once, and encodes and decodes each estimate once.
    Raises: ValueError: other processes; when called, a state or a condition that is no pair.
    Reference: arXiv:2312.16486, Algorithm 1.

    Example:
        >>> from diffjax import denoiser, processes
        >>> import jax.numpy as jnp
        >>> zero, half = (denoiser(lambda w, z, t, c: 0 * z + w, processes.vp(), from_x0, w) for w in (0.0, 0.5))
        >>> twice, itself = Code(lambda x: 2 * x, lambda z: z / 2), Code(lambda x: x, lambda z: z)
        >>> d = cooperate(zero, half, twice, itself, weight=0.25)
        >>> [float(z[0, 0]) for z in d((jnp.ones((1, 1)), jnp.ones((1, 1))), 0.5).x0]
        [0.25, 0.375]
    """
    if jax.tree.structure(a.process) != jax.tree.structure(b.process):
        raise ValueError(f"models that cooperate must share one process; got {a.process} and {b.process}")
    bare = tuple(dataclasses.replace(d, process=None) for d in (a, b))
    codes = jax.tree.map(as_tree, (Code(*code_a), Code(*code_b)), is_leaf=callable)
    weights = (weight, weight if weight_b is None else weight_b)
    return Denoiser((bare, codes, weights), a.process, init=_init, apply=_apply)


def _pair(what: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"models that cooperate need a pair as {what}, one for each; got {type(value).__name__}")
    return value


def _conditions(cond: Cond) -> tuple[Cond, Cond]:
    return (UNBOUND, UNBOUND) if cond is None else _pair("condition", cond)


def _init(d: Denoiser, x: PyTree, cond: Cond) -> PyTree:
    both = zip(d.leaves[0], _pair("state", x), _conditions(cond), strict=True)
    return tuple(dataclasses.replace(one, process=d.process).init_state(z, c) for one, z, c in both)


def _apply(d: Denoiser, state: PyTree, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    models, (code_a, code_b), (w_a, w_b) = d.leaves
    t_a, t_b = t if isinstance(t, tuple) else (t, t)
    z_a, z_b = _pair("state", x)
    rows = zip(models, state, (z_a, z_b), (t_a, t_b), _conditions(cond), strict=True)
    e_a, e_b = (
        dataclasses.replace(one, process=d.process).evaluate(z, ti, c, state=s, key=None) for one, s, z, ti, c in rows
    )

    def fused(w: Any, own: Prediction, other: PyTree, z: PyTree, ti: PyTree) -> Prediction:
        bridged = from_x0(other, z, d.process, ti)
        return Prediction(*(nu.add(nu.scale(w, q), nu.scale(1 - w, p)) for q, p in zip(bridged, own, strict=True)))

    a = fused(w_a, e_a.prediction, code_a.encode(code_b.decode(e_b.prediction.x0)), z_a, t_a)
    b = fused(w_b, e_b.prediction, code_b.encode(code_a.decode(e_a.prediction.x0)), z_b, t_b)
    return Evaluation(Prediction((a.x0, b.x0), (a.eps, b.eps)), (e_a.state, e_b.state), (e_a.aux, e_b.aux))


def hand_over(
    key: Key, denoiser: Denoiser, x: PyTree, t: Any, bridge: Callable[[PyTree], PyTree], *, items: Any = None
) -> PyTree:
    """The state at time t of another model, from the clean estimate of this one.   alpha bridge(x0) + sigma eps, eps fresh

    One model after the other: sample the low-resolution model down to t, hand over with
    `bridge = encode(upsample(decode(.)))`, and sample the high-resolution model from t on.

    Args: key: may be that of `sample`.   denoiser: the first model, stateless, its condition bound; one evaluation.   x:
    its state at t.   t: scalar or [B].   items: [B] global indices that the noise is drawn from, default arange(B).
    Returns: the state of the second model, of whatever shape `bridge` returns.
    Reference: arXiv:2312.16486.

    Example:
        >>> from diffjax import denoiser, processes
        >>> import jax.numpy as jnp
        >>> low = denoiser(lambda z, t: 0 * z + 1, processes.rectified(), from_x0)
        >>> hand_over(jax.random.key(0), low, jnp.ones((3, 4)), 0.0, lambda x: jnp.repeat(x, 2, 1))[0].tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    x0 = bridge(denoiser(x, t).x0)
    keys = nu.item_keys(key, nu.item_indices(items, nu.batch_size(x0)))
    return denoiser.process.add_noise(x0, nu.item_normal(keys, HANDOVER_STEP, x0), t)
