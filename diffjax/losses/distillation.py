"""The loss of a network that is to do what another one does: its data, its output and the features inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax import numerics as nu
from diffjax.losses.checks import drop_labels
from diffjax.losses.coupling import independent
from diffjax.losses.denoising import as_tree, mean_square
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.prediction import to_velocity
from diffjax.times import laws
from diffjax.types import Aux, Cond, Denoiser, Key, PerExample, Prediction, Scalar


@pytree_dataclass
class Distillation:
    """See `distillation`; the teacher, the weights and the numbers of the law are leaves."""

    teacher: Any
    times: Any
    output: Any
    features: Any
    data: Any
    space: Callable[..., Any] = static(default=to_velocity)
    label_drop: float = static(default=0.1)

    def __call__(
        self, key: Key, student: Denoiser, x0: PyTree, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux`: `t`, `mse` to the data, `output` and `features` to the teacher, each [B]."""
        items, process = nu.item_indices(items, nu.batch_size(x0)), student.process
        k_time, k_noise, k_drop, k_net = jax.random.split(key, 4)
        t = self.times(k_time, process, items)
        eps = independent(k_noise, x0, items)
        cond = drop_labels(k_drop, student, cond, items, self.label_drop)
        x = process.add_noise(x0, eps, t)
        e = student.evaluate(x, t, cond, key=nu.item_keys(k_net, items))
        wanted = jax.lax.stop_gradient(self.teacher.evaluate(x, t, cond))
        read = lambda pair: self.space(pair, process, t)
        mse = mean_square(nu.sub(read(e.prediction), read(Prediction(x0, eps))))
        output = mean_square(nu.sub(read(e.prediction), read(wanted.prediction)))
        features = jnp.zeros_like(mse)
        got, want = jax.tree.leaves(e.aux), jax.tree.leaves(wanted.aux)
        if jax.tree.structure(e.aux) != jax.tree.structure(wanted.aux) or any(
            a.shape != b.shape for a, b in zip(got, want, strict=True)
        ):
            shapes = [jax.tree.map(jnp.shape, a) for a in (e.aux, wanted.aux)]
            raise ValueError(
                f"student and teacher must return features of the same names and shapes as aux; got {shapes[0]} and "
                f"{shapes[1]}. Read the same taps of both"
            )
        if got:
            features = sum(mean_square(nu.sub(a, b)) for a, b in zip(got, want, strict=True)) / len(got)
        loss = self.data * mse + self.output * output + self.features * features
        return loss, {"t": t, "mse": mse, "output": output, "features": features}


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
    if not 0 <= label_drop <= 1:
        raise ValueError(f"label_drop is a probability in [0, 1]; got {label_drop!r}")
    times = laws.uniform() if times is None else as_tree(times)
    return Distillation(teacher, times, output, features, data, space, float(label_drop))
