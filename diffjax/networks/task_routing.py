"""Blocks by denoising task: channels, or a mixture of experts, that the time chooses.

A block of a residual network becomes x -> block(m x) + (1 - m) x, where m says how much of each channel goes through it.
`task_routed` takes m from the time alone, without parameters, and wraps any network from outside; `switch` learns it from
time and tokens, as the `route` of a DiT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.networks.dit import SIZES, DiT, DiTBlock
from diffjax.networks.layers import Dense
from diffjax.networks.taps import Tap
from diffjax.networks.unet import ResBlock
from diffjax.numerics import sliding_window


def itself(t: Any) -> Any:
    """The time code as the task in [0, 1], from data to noise."""
    return t


@dataclasses.dataclass(frozen=True)
class TaskRouted:
    """What `task_routed` returns: a function of the same arguments, equal by value to its equals."""

    apply: Any
    beta: float
    alpha: float
    task: Callable[[Any], Any]
    blocks: tuple[type, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`apply(*args, **kwargs)`, its blocks masked by the time that the network gets."""
        times: list[Any] = []
        whole: dict[tuple, Any] = {}  # path of a block that runs -> its whole input

        def interceptor(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if not module.path:
                times.append(args[1] if len(args) > 1 else kwargs["t"])
            elif module.name == "skip" and module.path[:-1] in whole:
                return call(whole.pop(module.path[:-1]))
            elif type(module) in self.blocks:  # and not a class that lifts one, which calls the block itself
                return self._masked(call, args, kwargs, module.path, times[-1], whole)
            return call(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            out = self.apply(*args, **kwargs)
        if not times:
            raise ValueError(
                "no network was called: the apply is jitted, or no flax.linen module. Give the raw module.apply"
            )
        return out

    def _masked(self, call: Callable, args: tuple, kwargs: dict, path: tuple, t: Any, whole: dict) -> Any:
        """The output of one block whose input is masked; what the mask leaves out passes by it."""
        x = args[0]
        size = math.floor(self.beta * x.shape[-1] + 1e-9)  # 0.29 * 100 is below 29
        if size == 0:
            raise ValueError(
                f"beta={self.beta} leaves none of the {x.shape[-1]} channels of block {'/'.join(path)}; give at least "
                f"{1 / x.shape[-1]:.3g}"
            )
        if size == x.shape[-1]:
            return call(*args, **kwargs)
        mask = sliding_window(self.task(jnp.asarray(t)), x.shape[-1], size, self.alpha).astype(x.dtype)
        mask = jnp.broadcast_to(mask, (x.shape[0], x.shape[-1])).reshape(x.shape[0], *[1] * (x.ndim - 2), -1)
        whole[path] = x
        out = call(mask * x, *args[1:], **kwargs)
        if whole.pop(path, None) is None:  # its layer `skip` has read the whole input
            return out
        first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        if first.shape != x.shape:
            raise ValueError(
                f"the block {'/'.join(path)} makes {first.shape} of {x.shape} without a layer `skip`, so nothing can pass "
                "by it; leave its class out of blocks"
            )
        first = first + (1 - mask) * x
        return first if rest is None else (first, *rest)


def task_routed(
    apply: Any,
    beta: float = 0.8,
    alpha: float = 4.0,
    *,
    task: Callable[[Any], Any] = itself,
    blocks: tuple[type, ...] = (DiTBlock, ResBlock),
) -> TaskRouted:
    """A network whose blocks see a window of channels that slides with the time.   x -> block(m_t x) + (1 - m_t) x

    m_t is one on floor(beta C) of C channels from round(task(t)^alpha (C - floor(beta C))) on, zero elsewhere. Adjacent times
    share nearly all channels, and for alpha > 1 the window moves little near the data, where tasks are alike. It adds no
    parameters: those of the network are used, from its own `init`. Where a block changes the number of channels, its layer
    `skip` reads the whole input.

    Args: apply: `module.apply` or a `from_linen` function, of a network called as `net(x, t, ...)`; not jitted.   beta: in
    (0, 1], 1 is the network itself.   alpha: > 0.   task: the time code -> [0, 1] from data to noise, default the code
    itself.   blocks: module classes whose first argument is the state [B, ..., C]; also inside scans and remat.
    Returns: a function of the same arguments; it composes with `tapped`.
    Raises: ValueError: beta or alpha out of range; when called, a jitted apply, a window of no channel, a block without
        a way past it.

    Example:
        >>> from diffjax.networks import from_linen, random_parameters
        >>> net, x, t = DiT(width=8, depth=1, heads=2), jnp.ones((2, 4, 4, 1)), jnp.array([0.0, 1.0])
        >>> params = random_parameters(net, x, t)
        >>> task_routed(from_linen(net), beta=0.5)(params, x, t).shape
        (2, 4, 4, 1)

    Reference: Park et al. 2024, arXiv:2310.07138.
    """
    if not 0 < beta <= 1 or not alpha > 0:
        raise ValueError(f"task_routed needs beta in (0, 1] and alpha > 0; got beta={beta} and alpha={alpha}")
    if isinstance(apply, jax.stages.Wrapped):
        raise ValueError(
            "task_routed needs the raw apply; got a jitted function. Write jax.jit(task_routed(apply)) instead"
        )
    return TaskRouted(apply, float(beta), float(alpha), task, tuple(blocks))


# ------------------------------------------------------------------------------------------------------------ switch


@dataclasses.dataclass(frozen=True)
class switch:  # noqa: N801  (reads as a function: DiT(route=switch(3, 2)))
    """The route of a DiT through experts that the time gates.   See `Switch`.

    Args: experts: M.   top: k of them for each time, in 1..M.
    Raises: ValueError: top not in 1..experts.

    Example:
        >>> net = DiT(width=8, depth=1, heads=2, route=switch(3, 2))
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
        >>> v["params"]["block_0"]["switch"]["kernel"].shape
        (3, 8, 8)
    """

    experts: int = 3
    top: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.experts:
            raise ValueError(f"top must be in 1..{self.experts}, the number of experts; got {self.top}")

    def __call__(self, x: Any, time: Any, *, dtype: Any = jnp.float32) -> jax.Array:
        """m for x [B, T, d] and the code of the time [B, c], in the layer `switch` of its caller."""
        return Switch(self.experts, self.top, dtype, name="switch")(x, time)


class Switch(nn.Module):
    """A mask for the input of a block.   m = 1 + sum_{i in top k} g_i (x W_i + b_i),  g = softmax(W code(t))

    It starts at m = 1: the experts at zero, so that the network starts as the one without. The gates know the time
    alone. Tap: `gates`, g [B, M] before the k largest are kept, float32.
    Args: x: [B, T, d].   time: [B, c].
    Returns: [B, T, d], of `dtype`.

    Example:
        >>> v = Switch(3, 2).init(jax.random.key(0), jnp.ones((1, 2, 4)), jnp.ones((1, 4)))
        >>> Switch(3, 2).apply(v, jnp.ones((1, 2, 4)), jnp.ones((1, 4))).ravel().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    Reference: Park et al. 2024, arXiv:2403.09176.
    """

    experts: int
    top: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, time: Any) -> jax.Array:
        """The mask."""
        d, zero = x.shape[-1], nn.initializers.zeros
        logits = Dense(self.experts, name="gate")(time.astype(jnp.float32))
        gates = Tap(name="gates")(jax.nn.softmax(logits, axis=-1))
        best, chosen = jax.lax.top_k(gates, self.top)
        share = (best[..., None] * jax.nn.one_hot(chosen, self.experts, dtype=best.dtype)).sum(-2).astype(self.dtype)
        kernel = self.param("kernel", zero, (self.experts, d, d), jnp.float32).astype(self.dtype)
        bias = self.param("bias", zero, (self.experts, d), jnp.float32).astype(self.dtype)
        return 1 + jnp.einsum("bm,btd,mdf->btf", share, x.astype(self.dtype), kernel) + (share @ bias)[:, None]


# The released code of arXiv:2403.09176: a DiT with two of three experts for each block
PRESETS = {
    f"switch-dit-{name}/2": (DiT, dict(width=w, depth=d, heads=h, sinusoids=256, route=switch(3, 2)))
    for name, (w, d, h) in SIZES.items()
}
