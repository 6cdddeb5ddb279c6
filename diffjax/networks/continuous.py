"""A U-Net whose blocks are ordinary differential equations of second order in their own depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from diffjax.networks.conditions import Code, condition_of, read_state, read_time
from diffjax.networks.convolution import Conv, ConvForm
from diffjax.networks.embeddings import UNIT, Frequencies
from diffjax.networks.layers import Dense, GroupNorm, at_least_float32, modulate, rematerialised
from diffjax.networks.partition import ATTENTION, CODE, COLUMN, FILM, RESIDUAL, Rules, constrain
from diffjax.networks.resample import double, halve
from diffjax.networks.taps import Tap
from diffjax.networks.unet import check_levels
from diffjax.networks.unet_parts import attend

Acceleration = Callable[[Any, Any, Any], Any]  # (z, v, tau) -> z''
Pair = tuple[Any, Any]
Slope = Callable[[Pair, Any], Pair]  # ((z, v), tau) -> (z', v')
Rule = Callable[[Slope, Pair, Any, float], Pair]
Solve = Callable[[Acceleration, Any, Any], Pair]  # (f, z(0), v(0)) -> (z(1), v(1))


# --------------------------------------------------------------------------------------------------------- solvers


def _ahead(state: Pair, h: Any, slope: Pair) -> Pair:
    return jax.tree.map(lambda y, k: y + h * k, state, slope)


def heun(slope: Slope, state: Pair, tau: Any, h: float) -> Pair:
    """A step of Heun's rule, of second order.   y + h/2 (k1 + k2),  k2 = slope(y + h k1, tau + h)"""
    k1 = slope(state, tau)
    k2 = slope(_ahead(state, h, k1), tau + h)
    return jax.tree.map(lambda y, a, b: y + h / 2 * (a + b), state, k1, k2)


def rk4(slope: Slope, state: Pair, tau: Any, h: float) -> Pair:
    """A step of the classical Runge-Kutta rule, of fourth order.   y + h/6 (k1 + 2 k2 + 2 k3 + k4)"""
    k1 = slope(state, tau)
    k2 = slope(_ahead(state, h / 2, k1), tau + h / 2)
    k3 = slope(_ahead(state, h / 2, k2), tau + h / 2)
    k4 = slope(_ahead(state, h, k3), tau + h)
    return jax.tree.map(lambda y, a, b, c, d: y + h / 6 * (a + 2 * b + 2 * c + d), state, k1, k2, k3, k4)


@dataclasses.dataclass(frozen=True)
class Steps:
    """z'' = f(z, z', tau) from 0 to 1 by equal steps of one rule.   (z, v)' = (v, f(z, v, tau))

    Args: count: of steps, >= 1.   rule: `rk4` (four evaluations a step) or `heun` (two).
    Raises: ValueError: count < 1.

    Example:
        >>> z, v = Steps(8)(lambda z, v, tau: -z, jnp.ones(()), jnp.zeros(()))  # cos, -sin
        >>> round(float(z), 4), round(float(v), 4)
        (0.5403, -0.8415)
    """

    count: int = 2
    rule: Rule = rk4

    def __post_init__(self) -> None:
        """Refuse a count that is no number of steps."""
        if self.count < 1:
            raise ValueError(f"count of steps must be at least 1; got {self.count}")

    def __call__(self, f: Acceleration, z: Any, v: Any) -> Pair:
        """The pair at 1, from that at 0."""
        slope = lambda y, tau: (y[1], f(y[0], y[1], tau))
        at = jnp.arange(self.count, dtype=z.dtype) / self.count
        return lax.scan(lambda y, tau: (self.rule(slope, y, tau, 1 / self.count), None), (z, v), at)[0]


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """The same by steps of the size that a tolerance asks for: Dormand and Prince's fifth order, from diffrax.

    One size serves the whole batch, so that an item depends on the others by about the tolerance.
    Args: rtol, atol: relative and absolute tolerance.   most: steps, after which it fails.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    most: int = 256

    def __call__(self, f: Acceleration, z: Any, v: Any) -> Pair:
        """The pair at 1, from that at 0."""
        import diffrax

        term = diffrax.ODETerm(lambda tau, y, _: (y[1], f(y[0], y[1], tau)))
        control = diffrax.PIDController(rtol=self.rtol, atol=self.atol)
        found = diffrax.diffeqsolve(
            term, diffrax.Dopri5(), 0.0, 1.0, None, (z, v), stepsize_controller=control, max_steps=self.most
        )
        return jax.tree.map(lambda a: a[0], found.ys)


# ---------------------------------------------------------------------------------------------------------- blocks


class Force(nn.Module):
    """The acceleration of a dynamic block.   f = Conv(act(FiLM(norm(Conv([act(norm(z)), v]))))),  FiLM by (code, tau)

    The velocity is not normalised: it is small at first, and a norm would make f steep there.

    Args: z, v: [B, H, W, c].   c: [B, k].   tau: scalar.   Returns: [B, H, W, c], zero at the start.
    """

    features: int
    act: Callable[[Any], Any]
    form: ConvForm | None
    dtype: Any

    @nn.compact
    def __call__(self, z: Any, v: Any, c: Any, tau: Any) -> jax.Array:
        """The acceleration at (z, v) and block time tau."""
        n = self.features
        h = self.act(GroupNorm(name="norm_in")(z.astype(self.dtype)))
        h = jnp.concatenate([h, v.astype(self.dtype)], axis=-1)
        h = constrain(Conv(n, form=self.form, dtype=self.dtype, name="conv_in")(h), "batch", ..., "wide")
        c = jnp.concatenate([c, jnp.full_like(c[:, :1], tau)], axis=-1)
        film = constrain(Dense(2 * n, dtype=self.dtype, name="film")(c), "batch", ...)
        h = self.act(modulate(GroupNorm(name="norm_out")(h), *jnp.split(film, 2, axis=-1)))
        return Conv(n, form=self.form, zero=True, dtype=self.dtype, name="conv_out")(h).astype(z.dtype)


class DynamicBlock(nn.Module):
    """A block of continuous depth, then attention if asked.   z'' = f(z, z', c, tau), z(0) = x, z'(0) = W norm(x)

    The state is float32 at least, whatever f computes in. It starts as the identity. Taps: `velocity` is z'(0), `block`.
    """

    features: int
    solve: Solve
    heads: int  # 0: no attention
    act: Callable[[Any], Any]
    form: ConvForm | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, c: Any, tokens: Any, mask: Any) -> Any:
        """One block at code c, with the tokens and mask of the condition."""
        n = self.features
        z = x.astype(at_least_float32(x.dtype))
        v = Dense(n, zero=True, dtype=self.dtype, name="velocity_in")(GroupNorm(name="norm_velocity")(x))
        v = Tap(name="velocity")(v).astype(z.dtype)
        force = Force(n, self.act, self.form, self.dtype, name="force")
        if self.is_initializing():
            force(z, v, c, 0.0)
        pure, variables = force.clone(parent=None, name=None), force.variables
        z, _ = self.solve(lambda z, v, tau: pure.apply(variables, z, v, c, tau), z, v)
        x = constrain(z.astype(x.dtype), "batch", ...)
        if self.heads:
            x = attend(x, tokens, mask, heads=self.heads, dtype=self.dtype)
        return Tap(name="block")(x)


# --------------------------------------------------------------------------------------------------------- network


class ContinuousUNet(nn.Module):
    """A U-Net of dynamic blocks, whose parameters serve every block time.   [B, H, W, C] -> [B, H, W, C]

    Level i works at H / 2^i, with `blocks` dynamic blocks downwards and upwards, and one way only at the last. Between
    levels: 2 x 2 means or copies, what the way down left, and a 1 x 1 convolution to the next width. Conditions: label and
    vector by FiLM, tokens by cross-attention wherever there is self-attention, image by channels. Taps: `down_i_j`,
    `up_i_j`, each with `/{velocity,block}`, `/attention/{q,k,v,logits,weights}`, `/cross/...`; `skip_i`; `bottleneck`. The
    output starts at zero. There is no dropout: it would be another equation at every evaluation.
    Args of a call: x: [B, H, W, C], H and W divisible by 2^(levels - 1).   t: scalar or [B].   train: changes nothing.
    Returns: [B, H, W, out_channels or C], at least float32.
    Raises: ValueError: H or W not divisible; a level of attention that does not exist; conditions that do not fit.

    Example:
        >>> net = ContinuousUNet(widths=(8,), attention=())
        >>> v = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
        >>> v["params"]["down_0_0"]["force"]["conv_in"]["kernel"].shape
        (3, 3, 16, 8)

    Reference: Calvo-Ordonez et al. 2023, arXiv:2310.20092; second order: Norcliffe et al. 2020, arXiv:2006.07220.
    """

    widths: tuple[int, ...] = (16, 32)
    blocks: int = 1
    attention: tuple[int, ...] = (1,)
    solve: Solve = Steps()
    head_size: int = 16
    code: int = 64
    num_classes: int = 0
    vector_size: int = 0
    token_size: int = 0
    image_channels: int = 0
    out_channels: int | None = None  # default those of x
    frequencies: Frequencies = UNIT
    act: Callable[[Any], Any] = nn.silu
    conv: ConvForm | None = None  # `native`, `slices`, or None: the faster
    remat: str = "none"  # see `layers.rematerialised`
    dtype: Any = jnp.float32
    RULES: ClassVar[Rules] = (*ATTENTION, *RESIDUAL, (r"force/norm_out/(scale|bias)$", COLUMN), *FILM, *CODE)

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any = None, *, train: bool = False) -> jax.Array:
        """The network at state x, time code t and condition."""
        x = read_state(x, "[B, H, W, C]")
        check_levels(self, x)
        if self.token_size and not self.attention:
            raise ValueError(f"token_size={self.token_size} needs attention at some level; got attention=()")
        condition = condition_of(self, cond, x)
        code = Code(self.code, self.num_classes, self.vector_size, self.frequencies, self.act, self.dtype, name="code")
        c = code(read_time(t, x), condition)
        make = rematerialised(DynamicBlock, self.remat)

        def level(h: Any, i: int, way: str) -> Any:
            n = self.widths[i]
            heads = max(1, n // self.head_size) if i in self.attention else 0
            if h.shape[-1] != n:
                h = Dense(n, dtype=self.dtype, name=f"{way}_{i}_in")(h)
            for j in range(self.blocks):
                made = make(n, self.solve, heads, self.act, self.conv, self.dtype, name=f"{way}_{i}_{j}")
                h = made(h, c, condition.tokens, condition.mask)
            return h

        h = condition.joined(x, self.dtype)
        h = Conv(self.widths[0], form=self.conv, dtype=self.dtype, name="in")(h)
        skips = []
        for i in range(len(self.widths)):
            if i:
                skips.append(h)
                h = halve(h)
            h = level(h, i, "down")
        h = Tap(name="bottleneck")(h)
        for i in reversed(range(len(skips))):
            h = level(jnp.concatenate([double(h), Tap(name=f"skip_{i}")(skips[i])], axis=-1), i, "up")
        h = self.act(GroupNorm(name="norm_out")(h))
        out = self.out_channels or x.shape[-1]
        y = Conv(out, form=self.conv, zero=True, dtype=self.dtype, name="out")(h)
        return y.astype(at_least_float32(x.dtype))
