"""What a network could do before it was trained on something new, kept by a second loss on samples of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.losses.denoising import as_tree
from diffjax.numerics import PyTree, pytree_dataclass
from diffjax.types import Aux, Cond, Denoiser, Key, PerExample, Scalar


@pytree_dataclass
class PriorPreservation:
    """See `prior_preservation`; samples and weight are leaves."""

    loss: Any
    x: PyTree
    cond: Cond
    weight: Any

    def __call__(
        self, key: Key, denoiser: Denoiser, x0: PyTree, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux`, that of the loss on x0, with `subject` and `prior` [B]."""
        items = nu.item_indices(items, nu.batch_size(x0))
        k_own, k_pick, k_prior = jax.random.split(key, 3)
        draw = lambda k: jax.random.randint(k, (), 0, nu.batch_size(self.x))
        pick = jax.vmap(draw)(nu.item_keys(k_pick, items))
        x, c = jax.tree.map(lambda a: jnp.asarray(a)[pick], (self.x, self.cond))
        subject, aux = self.loss(k_own, denoiser, x0, cond, items=items)
        prior, _ = self.loss(k_prior, denoiser, x, c, items=items)
        return subject + self.weight * prior, {**aux, "subject": subject, "prior": prior}


def prior_preservation(loss: Any, x: PyTree, cond: Cond = None, weight: Scalar = 1.0) -> PriorPreservation:
    """A loss on new data, and the same on samples of the network as it was.   L(x0, c) + w L(x_pr, c_pr)

    For each item of a batch one of the samples is drawn; times and noises of the two are independent.
    Args: loss: any `(key, denoiser, x0, cond, items=) -> ([B], aux)`.   x: [N, ...] drawn from the frozen network for the
        class that the new subject belongs to.   cond: for which they were drawn, batched [N], or None; of the structure
        that the batch's has.   weight: w >= 0.
    Returns: a loss of the same form.
    Raises: ValueError: no samples, a condition of another number of items, a concrete weight that is negative or not finite.

    Example:
        >>> from diffjax import losses, processes, testing
        >>> import jax.numpy as jnp
        >>> d = testing.oracle(testing.gaussian([0.0, 0.0], 1.0), processes.rectified())
        >>> both = prior_preservation(losses.flow_matching(), jnp.ones((8, 2)), weight=0.5)
        >>> value, aux = both(jax.random.key(0), d, jnp.zeros((4, 2)))
        >>> bool(jnp.allclose(value, aux["subject"] + 0.5 * aux["prior"]))
        True

    Reference: Ruiz et al. 2023, arXiv:2208.12242, section 3.3.
    """
    if not isinstance(weight, jax.core.Tracer) and not (np.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be a finite number >= 0, 0 for the loss on new data alone; got {weight!r}")
    n = nu.batch_size(x)
    wrong = sorted({np.shape(a)[:1] for a in jax.tree.leaves(cond)} - {(n,)})
    if wrong:
        raise ValueError(f"prior_preservation needs conditions of as many items as samples, {n}; got {wrong}")
    return PriorPreservation(as_tree(loss), x, cond, weight)
