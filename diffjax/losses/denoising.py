"""The regression loss of diffusion, score and flow models: one loss, with the space, the weighting and the law of time as
arguments. Never reduced: one number per item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.losses.checks import drop_labels
from diffjax.losses.coupling import independent
from diffjax.numerics import PyTree, pytree_dataclass, static
from diffjax.prediction import to_eps, to_score, to_v, to_velocity, to_x0
from diffjax.times import laws
from diffjax.types import Aux, Cond, Denoiser, Evaluation, Key, PerExample, Prediction, Process

Space = Callable[[Prediction, Process, Any], PyTree]


@pytree_dataclass
class Function:
    """A plain function where a pytree is stored, as static structure."""

    f: Callable[..., Any] = static()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.f(*args, **kwargs)


def as_tree(f: Any) -> Any:
    """`f` itself if it is a pytree of arrays, else wrapped as static structure."""
    return Function(f) if jax.tree.structure(f) == jax.tree.structure(0) else f


def log_variance_of_aux(aux: Any) -> Any:
    """The learned log-variance [B] that a network returned as `aux['log_variance']`."""
    return aux["log_variance"]


class Noised(NamedTuple):
    """A batch as a denoiser is given it."""

    x: PyTree
    t: Any
    eps: PyTree
    cond: Cond
    keys: Any  # of dropout, one per item

    def evaluated(self, denoiser: Denoiser) -> Evaluation:
        """What the denoiser says of it."""
        return denoiser.evaluate(self.x, self.t, self.cond, key=self.keys)


@pytree_dataclass
class DenoisingLoss:
    """See `denoising_loss`. The numbers of the law and the weighting are leaves; the rest is static by value."""

    times: Any
    weight: Any = None
    space: Space = static(default=to_x0)
    label_drop: float = static(default=0.1)
    coupling: Callable[..., PyTree] = static(default=independent)
    log_variance: Callable[[Any], Any] | None = static(default=None)
    condition: Any = None
    penalty: Any = None
    sides: Any = None

    def __call__(
        self, key: Key, denoiser: Denoiser, x0: PyTree, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux`, a dict of [B] arrays.

        Args: key: one key for the batch.   denoiser: its process adds the noise.   x0: [B, ...] or a pytree.   cond:
        batched condition or None.   items: [B] global positions of the items, default arange.
        """
        noised = self.noised(key, denoiser, x0, cond, items)
        return self.compared(noised, denoiser.process, x0, noised.evaluated(denoiser))

    def noised(self, key: Key, denoiser: Denoiser, x0: PyTree, cond: Cond, items: Any) -> Noised:
        """What is drawn for a batch: times, noise, and the conditions that are left."""
        items, process = nu.item_indices(items, nu.batch_size(x0)), denoiser.process
        k_time, k_noise, k_drop, k_net = jax.random.split(key, 4)
        t = self.times(k_time, process, items)
        eps = self.coupling(k_noise, x0, items)
        if self.condition is not None:
            k_cond, k_drop = jax.random.split(k_drop)
            cond = self.condition(k_cond, cond, t, items)
        cond = drop_labels(k_drop, denoiser, cond, items, self.label_drop)
        return Noised(process.add_noise(x0, eps, t), t, eps, cond, nu.item_keys(k_net, items))

    def compared(self, noised: Noised, process: Process, x0: PyTree, e: Evaluation) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux` of an evaluation at what was drawn."""
        t = noised.t
        target = self.space(Prediction(x0, noised.eps), process, t)
        mse = mean_square(nu.sub(self.space(e.prediction, process, t), target))
        aux = {**_parts("t", t), "mse": mse, **_parts("log_snr", process.log_snr(t))}
        loss = mse
        if self.sides is not None:
            aux["sides"] = self.sides(e.aux, target).astype(mse.dtype)
            loss = mse + aux["sides"]
        if self.weight is not None:
            factor = self.weight(process, t) / error_scale(self.space, process, t) ** 2
            loss = jnp.asarray(factor, mse.dtype) * loss
        if self.log_variance is not None:
            u = self.log_variance(e.aux).reshape(mse.shape).astype(mse.dtype)
            aux |= {"weighted": loss, "log_variance": u}
            loss = loss * jnp.exp(-u) + u
        if self.penalty is not None:
            extra = jnp.broadcast_to(jnp.asarray(self.penalty(e.aux, t), mse.dtype), mse.shape)
            aux |= {"penalty": extra}
            loss = loss + extra
        return loss, aux


def denoising_loss(
    times: Any = None,
    space: Space = to_x0,
    weight: Any = None,
    *,
    label_drop: float = 0.1,
    coupling: Callable[..., PyTree] = independent,
    log_variance: Callable[[Any], Any] | None = None,
    condition: Any = None,
    penalty: Any = None,
    sides: Any = None,
) -> DenoisingLoss:
    """Regression on the clean data, the noise, or any blend of them.   w(t) mean |space(x0, eps) - space(prediction)|^2

    x_t = alpha(t) x0 + sigma(t) eps, t from the law, eps from the coupling, one draw of each per item.

    Args: times: law `(key, process, items [B]) -> t [B]`, default `times.laws.uniform()`.   space: the reader in which
    the error is measured: `to_x0`, `to_eps`, `to_v`, `to_velocity`, `to_score`, `EdmTarget(d)`.   weight: `times.weights`,
    `w(process, t)` of the squared x0-error whatever `space` is; None is weight one in `space`.   label_drop: in [0, 1],
    how often an item's whole condition becomes `denoiser.null`; nothing is dropped where the condition is None.
    coupling: `(key, x0, items) -> eps`.   log_variance: reads `u` [B] from the network's aux, and the loss becomes
    `loss / exp(u) + u`.   condition: `(key, cond, t, items) -> cond`, e.g. `condition_noise(beta)`; comes before dropping.
    penalty: `(aux of the network, t [B]) -> [] or [B]`, added to the loss and returned as aux `penalty`, e.g. `balance(2)`.
    sides: `(aux of the network, target) -> [B]`, added to the error in `space` before it is weighted and returned as aux
    `sides`, e.g. `side_outputs()`.
    Returns: `loss(key, denoiser, x0, cond, items=None) -> ([B], aux)` with aux `t`, `mse` (unweighted, in `space`),
    `log_snr`; the mean over all axes but the first, and over all leaves of a pytree state.
    Raises: ValueError: label_drop outside [0, 1]; at the call, a condition to drop without `denoiser.null`, an empty
    batch, items of another size.
    Reference: arXiv:2006.11239, Eq. 14; arXiv:2206.00364, Eq. 2 and 8; log-variance: arXiv:2312.02696, Appendix B.

    Example:
        >>> from diffjax import processes, testing
        >>> d = testing.oracle(testing.gaussian([0.0, 0.0], 1.0), processes.rectified())
        >>> loss, aux = denoising_loss()(jax.random.key(0), d, jnp.zeros((4, 2)))
        >>> loss.shape, sorted(aux)
        ((4,), ['log_snr', 'mse', 't'])
    """
    if not 0 <= label_drop <= 1:
        raise ValueError(f"label_drop is a probability in [0, 1]; got {label_drop!r}")
    times = laws.uniform() if times is None else as_tree(times)
    weight = None if weight is None else as_tree(weight)
    condition = None if condition is None else as_tree(condition)
    penalty = None if penalty is None else as_tree(penalty)
    sides = None if sides is None else as_tree(sides)
    return DenoisingLoss(times, weight, space, float(label_drop), coupling, log_variance, condition, penalty, sides)


def flow_matching(times: Any = None, **options: Any) -> DenoisingLoss:
    """Conditional flow matching: regression on `dx_t/dt = alpha' x0 + sigma' eps`; for `rectified`, on `eps - x0`.

    Equal to the v-loss with weight `(alpha sigma' - alpha' sigma)^2 / (alpha^2 + sigma^2)^2`.
    Args: as `denoising_loss`.
    Reference: arXiv:2210.02747, Eq. 14.
    """
    return denoising_loss(times, to_velocity, **options)


def _sigma_squared(process: Process, t: Any) -> Any:
    # sigma^2 for the score-error, stated as all weightings are: for the x0-error
    return jnp.exp(2 * process.log_snr(t))


def score_matching(times: Any = None, **options: Any) -> DenoisingLoss:
    """Denoising score matching with weight sigma^2 on the score-error, which is the eps-loss.

    sigma^2 |score - score_hat|^2 = |eps - eps_hat|^2,   score = -eps / sigma.

    Args: as `denoising_loss`; `weight` replaces the sigma^2.
    Reference: arXiv:2011.13456, Eq. 7; arXiv:1907.05600, Eq. 6.
    """
    return denoising_loss(times, to_score, options.pop("weight", _sigma_squared), **options)


def noise_prediction(times: Any = None, **options: Any) -> DenoisingLoss:
    """The simple loss of DDPM.   mean |eps - eps_hat|^2

    Args: as `denoising_loss`.
    Reference: arXiv:2006.11239, Eq. 14.
    """
    return denoising_loss(times, to_eps, **options)


def v_prediction(times: Any = None, **options: Any) -> DenoisingLoss:
    """Regression on `v = alpha eps - sigma x0`; for variance-preserving processes, weight `snr + 1` on the x0-error.

    Args: as `denoising_loss`.
    Reference: arXiv:2202.00512, Section 4.
    """
    return denoising_loss(times, to_v, **options)


# ------------------------------------------------------------------------------------------------------------ helpers


def mean_square(error: PyTree) -> jax.Array:
    """The mean of the squares over all axes but the first, over all leaves, in at least float32.   [B]"""
    leaves = jax.tree.leaves(error)
    wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in leaves]
    total = sum(jnp.square(a).reshape(a.shape[0], -1).sum(1) for a in wide)
    return total / sum(int(np.prod(a.shape[1:])) for a in leaves)


def _parts(name: str, tree: PyTree) -> dict[str, Any]:
    """A number of an item under its name, or `name/part` for each part of a state with times of their own."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    return {f"{name}/{path(p)}" if p else name: leaf for p, leaf in leaves}


def error_scale(space: Space, process: Process, t: Any) -> Any:
    """The error in `space` per error in x0, for predictions with alpha x0 + sigma eps = x.   space(1, -alpha / sigma)

    Every space is linear in the pair, so this one number per time converts weightings; see `times.weights.error_factor`.

    Example:
        >>> from diffjax import processes
        >>> error_scale(to_eps, processes.rectified(), jnp.array([0.25])).tolist()
        [-3.0]
    """
    ratio = jnp.asarray(process.alpha(t) / process.sigma(t))
    return space(Prediction(jnp.ones_like(ratio), -ratio), process, t)
