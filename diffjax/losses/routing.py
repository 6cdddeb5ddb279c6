"""The loss of a router: which cluster a noisy state came from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax import numerics as nu
from diffjax.losses.coupling import independent
from diffjax.losses.denoising import as_tree
from diffjax.numerics import PyTree, pytree_dataclass
from diffjax.times import laws
from diffjax.types import Aux, Cond, Key, PerExample


@pytree_dataclass
class RouterLoss:
    """See `router_loss`; the numbers of the law are leaves."""

    times: Any

    def __call__(
        self, key: Key, router: Any, x0: PyTree, cond: Cond = None, items: Any = None
    ) -> tuple[PerExample, Aux]:
        """Losses [B] and `aux`: `t` [B], `accuracy` [B] of the most probable cluster.

        Args: key: one key for the batch.   router: `(x, t, cond) -> logits [B, K]` with a `process`.   x0: [B, ...] or a
        pytree.   cond: the clusters [B], integers, or a dict with the field `cluster`, whose others condition the router.
        items: [B] global positions of the items, default arange.
        """
        cluster, rest = cond, None
        if isinstance(cond, dict):
            rest = {name: c for name, c in cond.items() if name != "cluster"}
            cluster, rest = cond.get("cluster"), rest["label"] if set(rest) == {"label"} else rest or None
        if cluster is None or not jnp.issubdtype(jnp.result_type(cluster), jnp.integer):
            raise ValueError(
                "a router is trained on the clusters of its items: give them as integers [B], or as the field 'cluster' of "
                f"the condition; got {jax.tree.map(jnp.result_type, cond)}"
            )
        items, process = nu.item_indices(items, nu.batch_size(x0)), router.process
        k_time, k_noise = jax.random.split(key)
        t = self.times(k_time, process, items)
        logits = router(process.add_noise(x0, independent(k_noise, x0, items), t), t, rest)
        log_r = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        loss = -jnp.take_along_axis(log_r, cluster[:, None], axis=1)[:, 0]
        return loss, {"t": t, "accuracy": (logits.argmax(1) == cluster).astype(loss.dtype)}


def router_loss(times: Any = None) -> RouterLoss:
    """Cross-entropy of the cluster of the clean item, read from its noisy state.   -log r_k(x_t, t, cond)

    x_t = alpha(t) x0 + sigma(t) eps. It is least at the posterior p_t(k | x_t, cond), with which a mixture of experts is
    exact; weights of time change how well each is fitted, not what is fitted.

    Args: times: law `(key, process, items [B]) -> t [B]`, default `times.laws.uniform()`.
    Returns: `loss(key, router, x0, cond, items=None) -> ([B], aux)`; train it as any loss, with `model = params -> router`.
    Raises: ValueError: when called without integer clusters.
    Reference: arXiv:2501.05450.

    Example:
        >>> from diffjax import processes, testing
        >>> m, p = testing.mixture([1, 1], [[-9.0], [9.0]], stds=[0.5, 0.5]), processes.rectified()
        >>> x0, k = testing.draw(jax.random.key(0), m, 8)
        >>> loss, aux = router_loss()(jax.random.key(1), testing.exact_router(m, p), x0, k)
        >>> loss.shape, sorted(aux)
        ((8,), ['accuracy', 't'])
    """
    return RouterLoss(laws.uniform() if times is None else as_tree(times))
