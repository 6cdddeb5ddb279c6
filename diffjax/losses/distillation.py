"""The loss of a network that is to do what another one does: its data, its output and the features inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.losses.denoising import DenoisingLoss, Noised, denoising_loss, mean_square
from diffjax.numerics import PyTree, pytree_dataclass
from diffjax.prediction import to_velocity
from diffjax.types import Aux, Cond, Denoiser, Evaluation, Key, PerExample, Scalar


def beside_teacher(
    loss: DenoisingLoss, teacher: Denoiser, key: Key, student: Denoiser, x0: PyTree, cond: Cond, items: Any
) -> tuple[PerExample, Aux, tuple[PyTree, PyTree], tuple[Evaluation, Evaluation]]:
    """The loss of a student, and what student and teacher say of the same noised batch; the teacher takes no gradient.

    Returns: the loss and its aux; the outputs of both in the space of the loss; the evaluations of both.
    """
    noised: Noised = loss.noised(key, student, x0, cond, items)
    both = noised.evaluated(student), jax.lax.stop_gradient(teacher.evaluate(noised.x, noised.t, noised.cond))
    value, aux = loss.compared(noised, student.process, x0, both[0])
    outputs = tuple(loss.space(e.prediction, student.process, noised.t) for e in both)
    return value, aux, outputs, both


def difference(a: PyTree, b: PyTree) -> PyTree:
    """`a - b`, leaf by leaf, each in at least float32: one of the two may compute in bfloat16."""

    def leaf(a: Any, b: Any) -> jax.Array:
        a, b = jnp.asarray(a), jnp.asarray(b)
        wide = max((jnp.dtype(jnp.float32), a.dtype, b.dtype), key=lambda d: jnp.finfo(d).bits)
        return a.astype(wide) - b.astype(wide)

    return jax.tree.map(leaf, a, b)


@pytree_dataclass
class Distillation:
    """See `distillation`; the teacher, the weights and the numbers of the law are leaves."""

    loss: DenoisingLoss
    teacher: Any
    output: Any
    features: Any
    data: Any

    def __call__(
        self, key: Key, student: Denoiser, x0: PyTree, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux`: that of a denoising loss, `output` and `features` to the teacher, each [B]."""
        mse, aux, outputs, evaluations = beside_teacher(self.loss, self.teacher, key, student, x0, cond, items)
        output = mean_square(difference(*outputs))
        got, want = (e.aux for e in evaluations)
        shapes = [jax.tree.map(jnp.shape, a) for a in (got, want)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"student and teacher must return features of the same names and shapes as aux; got {shapes[0]} and "
                f"{shapes[1]}. Read the same taps of both"
            )
        found = [mean_square(a) for a in jax.tree.leaves(difference(got, want))]
        features = sum(found) / len(found) if found else jnp.zeros_like(mse)
        total = self.data * mse + self.output * output + self.features * features
        return total, {**aux, "output": output, "features": features}


def distillation(
    teacher: Denoiser,
    times: Any = None,
    *,
    output: Scalar = 1.0,
    features: Scalar = 1.0,
    data: Scalar = 1.0,
    space: Callable[..., Any] = to_velocity,
    label_drop: float = 0.1,
) -> Distillation:
    """Regression on the data, on a teacher's output and on its features.

    data |v_S - v|^2 + output |v_S - v_T|^2 + features mean_l |f_S,l - f_T,l|^2, all at the same noisy state.

    Args: teacher: its `aux`, and that of the student, are the features: a dict of [B, ...] arrays, such as what
    `networks.tapped(apply, read=...)` returns beside the output (`denoiser(..., aux=True)`), or None.   times: law
    `(key, process, items [B]) -> t [B]`, default `times.laws.uniform()`.   output, features, data: weights of the three.
    space: the reader in which outputs are compared.   label_drop: as in `denoising_loss`.
    Returns: `loss(key, student, x0, cond, items=None) -> ([B], aux)`.
    Raises: ValueError: label_drop outside [0, 1]; at the call, features that do not match.
    Reference: Liu et al. 2024, arXiv:2412.16112 (`space` velocity, features the outputs of attention).

    Example:
        >>> from diffjax import processes, testing
        >>> d = testing.oracle(testing.gaussian([0.0, 0.0], 1.0), processes.rectified())
        >>> loss, aux = distillation(d)(jax.random.key(0), d, jnp.zeros((4, 2)))
        >>> aux["output"].tolist(), bool(jnp.all(loss == aux["mse"]))
        ([0.0, 0.0, 0.0, 0.0], True)
    """
    return Distillation(denoising_loss(times, space, label_drop=label_drop), teacher, output, features, data)
