"""Learning-rate schedules and AdamW, as plain functions that return optax objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax.numerics import PyTree
from diffjax.training.patterns import checked, pattern


def constant(peak: float, *, warmup: int = 0) -> optax.Schedule:
    """Constant learning rate after a linear warm-up.   lr(i) = peak min(1, (i + 1) / warmup)

    Args: peak: learning rate, > 0.   warmup: updates until the peak is reached.
    Raises: ValueError: peak not positive or warmup negative.

    Example:
        >>> float(constant(2.0, warmup=4)(0)), float(constant(2.0, warmup=4)(9))
        (0.5, 2.0)
    """
    return _warm(peak, warmup, optax.constant_schedule(peak))


def cosine(peak: float, steps: int, *, warmup: int = 0, final: float = 0.0) -> optax.Schedule:
    """Half a cosine from the end of the warm-up to `steps`.   lr = final + (peak - final) (1 + cos(pi u)) / 2

    Raises: ValueError: warmup not shorter than steps, or peak not positive.

    Example:
        >>> round(float(cosine(1.0, 100)(50)), 3)
        0.5
    """
    _check_length(steps, warmup)
    return _warm(peak, warmup, optax.cosine_decay_schedule(peak, steps - warmup, final / peak))


def linear_tail(peak: float, steps: int, *, warmup: int = 0, tail: float = 0.5, final: float = 0.0) -> optax.Schedule:
    """Constant, then linear to `final` over the last fraction `tail` of the run.

    Args: tail: in (0, 1].
    Raises: ValueError: tail out of range, or warmup that reaches into the tail.

    Example:
        >>> s = linear_tail(1.0, 100, tail=0.5)
        >>> float(s(10)), float(s(75)), float(s(100))
        (1.0, 0.5, 0.0)
    """
    _check_length(steps, warmup)
    if not 0 < tail <= 1:
        raise ValueError(f"tail must be in (0, 1], the fraction of the run that decays; got {tail}")
    length = max(round(tail * steps), 1)
    if warmup > steps - length:
        raise ValueError(f"warmup ({warmup}) must end before the decay, the last {length} of {steps} steps; lower one")
    return _warm(peak, warmup, optax.linear_schedule(peak, final, length, steps - length - warmup))


def inverse_sqrt(peak: float, *, reference: int, warmup: int = 0) -> optax.Schedule:
    """Constant up to `reference` updates, then a falling square root.   lr(i) = peak / sqrt(max(i / reference, 1))

    Raises: ValueError: reference not positive.

    Example:
        >>> float(inverse_sqrt(1.0, reference=100)(400))
        0.5

    Reference: Karras et al. 2024, arXiv:2312.02696, which trains with `reference = 35000` to `70000` updates.
    """
    if reference <= 0:
        raise ValueError(f"reference must be positive, the number of updates before the decay; got {reference}")
    return _warm(peak, warmup, lambda i: peak / jnp.sqrt(jnp.maximum((i + warmup) / reference, 1.0)))


def adamw(
    learning_rate: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
    decay_mask: Any = None,
    moment_dtype: Any = None,
) -> optax.GradientTransformation:
    """AdamW after clipping the gradient's global norm.   g <- g min(1, clip / |g|)

    Args: learning_rate: float or schedule.   clip: largest norm, None for no clipping.   decay_mask: which parameters
        decay, a tree of bools or a function of the parameters such as `matrices`; default all.   moment_dtype: type in
        which the first moment is kept, bfloat16 to save memory; default that of the parameters. The second moment
        stays as it is: eight bits of mantissa cannot hold `b2 = 0.999`.
    Raises: ValueError: clip not positive, or weight_decay negative.

    Example:
        >>> adamw(linear_tail(2e-3, 9500, warmup=200), b2=0.99, weight_decay=0.01, clip=1.0).update is not None
        True

    Reference: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be a positive norm, or None for no clipping; got {clip}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative; got {weight_decay}")
    adam = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask, mu_dtype=moment_dtype)
    return adam if clip is None else optax.chain(optax.clip_by_global_norm(clip), adam)


def by_path(rules: Mapping[str, optax.GradientTransformation], rest: optax.GradientTransformation) -> Any:
    """An optimiser for each part of the parameters, by the names of the arrays.

    Clipping and moments of one do not see the arrays of another.
    Args: rules: regular expression -> optimiser; the first that is found in the path `a/b/c` of an array decides.   rest: of
        all other arrays.
    Raises: ValueError: a rule that is no regular expression.

    Example:
        >>> both = by_path({"^age$": optax.sgd(1.0)}, optax.sgd(0.5))
        >>> p = {"age": jnp.zeros(()), "w": jnp.zeros(())}
        >>> updates, _ = both.update({"age": jnp.ones(()), "w": jnp.ones(())}, both.init(p), p)
        >>> float(updates["age"]), float(updates["w"])
        (-1.0, -0.5)
    """
    checked("rules", *rules)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    part = lambda path: next((rule for rule in rules if pattern(rule, "rules").search(name(path))), "")
    labels = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: part(path), params)
    return optax.multi_transform({**rules, "": rest}, labels)


def matrices(params: PyTree) -> PyTree:
    """A mask that is true for parameters with two axes or more: weights decay, biases and scales do not."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _warm(peak: float, warmup: int, after: optax.Schedule) -> optax.Schedule:
    """`after`, preceded by `warmup` updates that rise linearly and never use a zero rate."""
    if not peak > 0:
        raise ValueError(f"peak must be a positive learning rate; got {peak}")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative; got {warmup}")
    if warmup == 0:
        return after
    return optax.join_schedules([lambda i: peak * (i + 1) / warmup, after], [warmup])


def _check_length(steps: int, warmup: int) -> None:
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be shorter than the run; got warmup={warmup} for steps={steps}")
