"""Penalties on how a network routes: what `denoising_loss(penalty=...)` adds to the loss, read from the network's aux.

A network knows nothing of its loss; the probabilities of its routers are taps, and `networks.tapped(net, read=...)` returns
them beside the output, which is what `denoiser(..., aux=True)` takes:

    routers = [name for name in networks.tap_names(net, params, x, t) if name.endswith("/probabilities")]
    model = lambda params: diffjax.denoiser(networks.tapped(net, read=routers), process, read, params, aux=True)
    loss = losses.denoising_loss(penalty=losses.balance(top=2))

It works as taps do: in loops and scans of layers, rematerialised, jitted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax import numerics as nu
from diffjax.losses.coupling import exact
from diffjax.numerics import pytree_dataclass, static


def routers(aux: Any, name: str = "probabilities") -> list[Any]:
    """The probabilities of every routing layer in the network's aux, one array [B, ..., E] each.

    Args: aux: `{tap: value}`; values of scanned layers have a leading axis of layers.   name: last part of the taps' names.
    Raises: ValueError: there is none.

    Example:
        >>> [p.shape for p in routers({"blocks/experts/probabilities": jnp.ones((2, 3, 4, 5))})]
        [(3, 4, 5), (3, 4, 5)]
    """
    taps = aux if isinstance(aux, dict) else {}
    found: list[Any] = []
    for path, value in taps.items():
        parts = path.split("/")
        if parts[-1] == name:
            found += list(value) if "blocks" in parts else [value]
    if not found:
        raise ValueError(
            f"the network's aux must hold taps that end in {name!r}; got {sorted(taps) or type(aux).__name__}. Make the "
            "denoiser with fn=networks.tapped(net, read=...) and aux=True"
        )
    return found


def expert_load(probabilities: Any, top: int) -> jax.Array:
    """The share of all visits that each expert gets; the sum is one.   [..., E] -> [E]

    Args: probabilities: of the routers.   top: experts that each token visits.

    Example:
        >>> expert_load(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]), 2).tolist()
        [0.25, 0.5, 0.25]
    """
    probabilities = jnp.asarray(probabilities)
    e = probabilities.shape[-1]
    _, chosen = jax.lax.top_k(probabilities.reshape(-1, e), top)
    return jax.nn.one_hot(chosen.ravel(), e, dtype=probabilities.dtype).mean(0)


@pytree_dataclass
class Balance:
    """See `balance`; the weight is a leaf."""

    weight: Any
    top: int = static()
    name: str = static()

    def __call__(self, aux: Any, t: Any) -> jax.Array:
        """The penalty of a batch, a scalar."""
        return self.weight * sum(self.layer(p) for p in routers(aux, self.name))

    def layer(self, probabilities: Any) -> jax.Array:
        """Of one routing layer."""
        f = expert_load(probabilities, self.top) * probabilities.shape[-1]
        return jnp.sum(f * probabilities.reshape(-1, probabilities.shape[-1]).mean(0))


def balance(top: int, weight: Any = 0.01, *, name: str = "probabilities") -> Balance:
    """A penalty on experts that get more than their share.   weight sum_layers sum_i f_i P_i

    f_i = E / (K N) times the number of tokens that visit expert i, P_i = the mean probability that the router gives to it,
    over the N tokens of the batch. It is `weight` for each layer where the load is even. The gradient is that of P; f is
    counted.

    Args: top: K, experts that each token visits.   weight: a leaf.   name: last part of the taps' names.
    Returns: `(aux, t) -> []`, for `denoising_loss(penalty=...)`. A batch that `pmap` or `shard_map` cuts is balanced within
    each part.
    Raises: ValueError: top < 1; at the call, an aux without routers.
    Reference: arXiv:2407.11633, the expert-level balance loss; arXiv:2401.06066.

    Example:
        >>> even = {"experts/probabilities": jnp.full((2, 3, 4), 0.25)}
        >>> round(float(balance(1, 0.01)(even, None)), 6)
        0.01
    """
    if top < 1:
        raise ValueError(f"top is how many experts each token visits, at least 1; got {top}")
    return Balance(weight, int(top), name)


@pytree_dataclass
class TaskPrior:
    """See `task_prior`; the numbers are leaves."""

    weight: Any
    alpha: Any
    top: int = static()
    solve: Callable[[Any], Any] = static()
    name: str = static()

    def __call__(self, aux: Any, t: Any) -> jax.Array:
        """The penalty of each item, [B]."""
        layers = routers(aux, self.name)
        p = jnp.concatenate([jnp.asarray(g) for g in layers], axis=-1)  # [B, layers M]
        units, size = p.shape[-1], self.top * len(layers)
        prior = nu.sliding_window(t, units, size, self.alpha).astype(p.dtype)
        p = p / len(layers)
        q = prior[:, self.match(layers, prior)] / size
        return self.weight * divergence(p, q)

    def match(self, layers: list[Any], prior: jax.Array) -> jax.Array:
        """The column of the prior that belongs to each gate, [layers M]; what is nearest to being used at the same times."""
        used = [jax.nn.one_hot(jax.lax.top_k(g, self.top)[1], g.shape[-1], dtype=prior.dtype).sum(-2) for g in layers]
        used, gates = jnp.concatenate(used, axis=-1), jnp.concatenate([jnp.asarray(g) for g in layers], axis=-1)
        # sum_b |a - m| differs from -2 sum_b a m by terms that no matching changes; the gates decide between equals
        return self.solve(jax.lax.stop_gradient((used + 1e-3 * gates).T @ prior))


def divergence(p: Any, q: Any) -> jax.Array:
    """The Jensen-Shannon divergence of probabilities, in nats.   KL(p || m) / 2 + KL(q || m) / 2,  m = (p + q) / 2

    Example:
        >>> round(float(divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))), 4)
        0.6931
    """
    kl = jax.scipy.special.rel_entr
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)).sum(-1) / 2


def task_prior(
    top: int, weight: Any = 1.0, alpha: Any = 4.0, *, solve: Callable[[Any], Any] = exact, name: str = "gates"
) -> TaskPrior:
    """A penalty that makes similar times share experts, and unlike times not.   weight JSD(gates of all layers, prior)

    The M gates of L layers are L M columns, divided by L so that they sum to one. The prior of a time t in [0, 1] is even on
    L k columns, a window that slides with t^alpha. Which column belongs to which gate is matched, by the times of the batch
    at which the gate is among the k largest of its layer: so the prior asks that experts are shared by neighbours in time,
    not which ones.

    Args: top: k, gates that are used at each time.   weight, alpha: leaves.   solve: permutation of the largest gain,
    `losses.exact` (SciPy on the host) or `losses.sinkhorn` (on the device).   name: last part of the taps' names.
    Returns: `(aux, t) -> [B]`, for `denoising_loss(penalty=...)`.
    Raises: ValueError: top < 1; at the call, an aux without gates.
    Reference: arXiv:2403.09176, the diffusion prior loss. There the matching is over all timesteps; here over the batch's.

    Example:
        >>> gates = {"block_0/switch/gates": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
        >>> task_prior(1)(gates, jnp.array([0.0, 1.0])).tolist()
        [0.0, 0.0]
    """
    if top < 1:
        raise ValueError(f"top is how many gates are used at each time, at least 1; got {top}")
    return TaskPrior(weight, alpha, int(top), solve, name)
