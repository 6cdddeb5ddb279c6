"""The feed-forward part of a transformer block: one MLP, or many experts of which every token visits a few.

A feed-forward part is a function `f(x, *, expand, act, dropout, train, dtype)` of tokens [B, T, d] that makes its layers
in the module that calls it: `mlp`, or `sparse(...)`. A network takes it as a field.

The experts of a token are data, and shapes are not, so what is computed is one of three forms, `(x [B, T, d], gate
[B, T, K], chosen [B, T, K], kernels, hidden) -> [B, T, d]`, where `hidden` is what happens between the layers:
- `dense`: all experts for all tokens, with weight zero where they are not chosen; exact, E / K times the work;
- `ragged`: pairs of token and expert sorted by expert, products of groups of rows by `jax.lax.ragged_dot`; exact. JAX 0.10.2
  has no rule to `vmap` it over tokens alone, and computes it as a masked dense product on a CPU: for accelerators;
- `capacity(factor)`: every expert has as many seats in each item, and tokens that find none are left out; equal to the
  others where all fit, and fast everywhere. Experts that are cut over devices get their tokens in one exchange.

Milliseconds of one product on a CPU, forward / with gradient, 2 cores, JAX 0.10.2, K = 2; the last row has E equal groups of
rows, the work of `capacity(1)`:

    tokens x d x f, E   1024 x 64 x 256, 8   2048 x 384 x 1536, 8   1024 x 128 x 512, 16
    dense                     1.2 / 13             118 / 573              16 / 116
    ragged                    2.3 / 26             229 / 825              20 / 135
    equal groups               .3 / 1.1             21 / 74              1.5 / 3.9
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.layers import Dense, fan_in_uniform
from diffjax.networks.partition import constrain
from diffjax.networks.taps import Tap

Form = Callable[..., jax.Array]


def mlp(
    x: Any, *, expand: int, act: Callable[[Any], Any], dropout: float = 0.0, train: bool = False, dtype: Any = None
) -> jax.Array:
    """The feed-forward part with one hidden layer, in the layers `hidden` and `out` of its caller.   W2 act(W1 x)

    To be called inside a compact method.
    Args: x: [B, T, d].   expand: hidden features per feature.   dropout: of the hidden features.
    Returns: [B, T, d].
    """
    h = Dense(expand * x.shape[-1], dtype=dtype, name="hidden")(x)
    h = act(constrain(h, "batch", "some_tokens", "wide"))
    h = nn.Dropout(dropout, deterministic=not train)(h)
    return Dense(x.shape[-1], dtype=dtype, name="out")(h)


# ------------------------------------------------------------------------------------------------------------- forms


def dense(x: Any, gate: Any, chosen: Any, kernels: tuple, hidden: Callable[[Any, Any], Any]) -> jax.Array:
    """All experts for all tokens; see the module.   [B, T, d] -> [B, T, d]"""
    first, second, last = kernels
    share = (gate[..., None] * jax.nn.one_hot(chosen, len(last), dtype=gate.dtype)).sum(-2)  # [B, T, E]
    into = lambda kernel: constrain(jnp.einsum("btd,edf->btef", x, kernel), "batch", "some_tokens", "experts", None)
    return jnp.einsum("btef,efd->btd", hidden(into(first), into(second)) * share[..., None], last)


def ragged(x: Any, gate: Any, chosen: Any, kernels: tuple, hidden: Callable[[Any, Any], Any]) -> jax.Array:
    """Tokens sorted by expert; see the module.   [B, T, d] -> [B, T, d]"""
    top, flat = chosen.shape[-1], chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rows = x.reshape(-1, x.shape[-1])[order // top]
    sizes = jnp.bincount(flat, length=len(kernels[0])).astype(jnp.int32)
    product = lambda rows, kernel: jax.lax.ragged_dot(rows, kernel, sizes)
    y = product(hidden(product(rows, kernels[0]), product(rows, kernels[1])), kernels[2])
    y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)  # back to [B, T, K, d]
    return (y * gate[..., None]).sum(-2)


@dataclasses.dataclass(frozen=True)
class capacity:  # noqa: N801  (reads as a function: sparse(form=capacity(1.25)))
    """Seats for each expert in each item; see the module.   seats = ceil(factor T K / E), at most T

    First choices are seated before second ones, and tokens in their order. Items are seated apart, so that none depends on
    the others, and a batch that is cut over devices needs no message for it.
    Args: factor: seats per pair of token and expert; E / K leaves nobody out.
    Raises: ValueError: factor not positive.

    Reference: Lepikhin et al. 2020, arXiv:2006.16668.
    """

    factor: float = 1.25

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(
                f"factor must be positive, 1 for as many seats as tokens need on average; got {self.factor}"
            )

    def __call__(self, x: Any, gate: Any, chosen: Any, kernels: tuple, hidden: Callable[[Any, Any], Any]) -> jax.Array:
        """[B, T, d] -> [B, T, d]"""
        (b, t, k), e = chosen.shape, len(kernels[0])
        seats = min(t, math.ceil(self.factor * t * k / e))
        asked = chosen.swapaxes(1, 2).reshape(b, k * t)  # all first choices, then all second ones
        queue = jnp.cumsum(jax.nn.one_hot(asked, e, dtype=jnp.int32), axis=1, dtype=jnp.int32)
        place = jnp.take_along_axis(queue, asked[..., None], axis=-1)[..., 0] - 1
        seated = place < seats
        seat = jnp.where(seated, asked * seats + place, e * seats)  # the last one is outside
        token = jnp.broadcast_to(jnp.tile(jnp.arange(t, dtype=jnp.int32), k)[None], (b, k * t))
        item = jnp.arange(b)[:, None]
        sitting = jnp.full((b, e * seats), t, jnp.int32).at[item, seat].set(token, mode="drop")
        empty = jnp.zeros((b, 1, x.shape[-1]), x.dtype)
        rows = jnp.concatenate([x, empty], axis=1)[item, sitting].reshape(b, e, seats, -1)
        rows = constrain(rows, "batch", "experts", None, None)
        h = hidden(*(jnp.einsum("becd,edf->becf", rows, kernel) for kernel in kernels[:2]))
        y = constrain(jnp.einsum("becf,efd->becd", h, kernels[2]), "batch", "experts", None, None)
        y = jnp.concatenate([y.reshape(b, e * seats, -1), empty], axis=1)[item, seat].reshape(b, k, t, -1)
        return (y * gate.swapaxes(1, 2)[..., None]).sum(1)


# ----------------------------------------------------------------------------------------------------------- experts


@dataclasses.dataclass(frozen=True)
class sparse:  # noqa: N801  (reads as a function: DiT(feed_forward=sparse(8)))
    """The feed-forward part of which every token visits `top` of many experts.   See `SparseMLP`.

    Args: experts: how many are routed to.   top: visited by each token, in 1..experts.   shared: width of the part that
    all tokens visit, as a multiple of the token's; 0 for none.   form: `dense`, `ragged` or `capacity(factor)`, see the
    module.
    Raises: ValueError: top not in 1..experts; a negative `shared`.

    Example:
        >>> from diffjax.networks import DiT
        >>> net = DiT(width=8, depth=1, heads=2, feed_forward=sparse(4, top=2, shared=1))
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
        >>> v["params"]["block_0"]["experts"]["up"]["kernel"].shape
        (4, 8, 32)
    """

    experts: int = 8
    top: int = 2
    shared: int = 2
    form: Form = dense

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.experts:
            raise ValueError(f"top must be in 1..{self.experts}, the number of experts; got {self.top}")
        if self.shared < 0:
            raise ValueError(f"shared is a width in multiples of the token's, 0 for none; got {self.shared}")

    def __call__(self, x: Any, **fields: Any) -> jax.Array:
        """The part for x [B, T, d], in the layer `experts` of its caller."""
        return SparseMLP(self.experts, self.top, self.shared, self.form, **fields, name="experts")(x)


class Kernels(nn.Module):
    """The kernels of all experts as one array.   [E, d, f]"""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> Any:
        """The array; each expert's kernel starts as that of a dense layer."""
        return self.param("kernel", fan_in_uniform(self.shape[1]), self.shape, jnp.float32)


class SparseMLP(nn.Module):
    """Experts by token, and one part for all tokens.   sum_{i in top K} p_i E_i(x) + E_shared(x),  p = softmax(x W_r)

    E(x) = W_down (act(W_gate x) * (W_up x)) without biases. The K probabilities are not normalised again. The router and its
    softmax are float32. Tap: `probabilities`, p [B, T, E].
    Args of a call: x: [B, T, d].
    Returns: [B, T, d], of `dtype`.

    Example:
        >>> v = jax.eval_shape(SparseMLP(4, 2, 1).init, jax.random.key(0), jnp.zeros((1, 3, 8)))
        >>> sorted(v["params"])
        ['down', 'gate', 'router', 'shared_down', 'shared_gate', 'shared_up', 'up']

    Reference: Fei et al. 2024, arXiv:2407.11633; shared experts: Dai et al. 2024, arXiv:2401.06066; the form of E:
    Shazeer 2020, arXiv:2002.05202.
    """

    experts: int
    top: int
    shared: int = 0
    form: Form = dense
    expand: int = 4
    act: Callable[[Any], Any] = nn.silu
    dropout: float = 0.0
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """Route x [B, T, d]."""
        d, e = x.shape[-1], self.experts
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        hidden = lambda gate, up: drop(self.act(gate) * up)
        logits = Dense(e, bias=False, name="router")(x.astype(jnp.float32))
        x = x.astype(self.dtype)
        gate, chosen = jax.lax.top_k(Tap(name="probabilities")(jax.nn.softmax(logits, axis=-1)), self.top)
        shapes = {"gate": (e, d, self.expand * d), "up": (e, d, self.expand * d), "down": (e, self.expand * d, d)}
        kernels = tuple(Kernels(shape, name=name)().astype(self.dtype) for name, shape in shapes.items())
        y = self.form(x, gate.astype(x.dtype), chosen, kernels, hidden)
        if self.shared:
            dense = lambda n, name: Dense(n, bias=False, dtype=self.dtype, name=f"shared_{name}")
            wide = lambda name: constrain(dense(self.shared * d, name)(x), "batch", "some_tokens", "wide")
            y = y + dense(d, "down")(hidden(wide("gate"), wide("up")))
        return y
