"""Dynamic blocks: closed forms of linear oscillators, orders of the rules, and outputs that steps refine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffjax import networks as nw
from diffjax.networks.continuous import Adaptive, Force, Steps, heun, rk4

SMALL = dict(widths=(4, 8), attention=(1,), head_size=4, code=8)


def damped(z, v, tau):
    """z'' = -5 z - 2 v + 10 tau: decaying oscillations around 2 tau - 4/5."""
    return -5 * z - 2 * v + 10 * tau


def exact(z0, v0):
    a, b = z0 + 0.8, (v0 - 2 + z0 + 0.8) / 2
    return np.exp(-1) * (a * np.cos(2) + b * np.sin(2)) + 2 - 0.8


@pytest.mark.parametrize(("rule", "order"), [(heun, 2), (rk4, 4)])
def test_the_order_of_a_rule_is_the_slope_of_its_error(rule, order, x64):
    z0, v0 = jnp.array([1.0, -0.5]), jnp.array([0.3, 2.0])
    error = [
        np.abs(np.asarray(jax.jit(Steps(n, rule), static_argnums=0)(damped, z0, v0)[0]) - exact(z0, v0)).max()
        for n in (128, 256)
    ]
    assert abs(np.log2(error[0] / error[1]) - order) < 0.15


def test_the_adaptive_solver_meets_its_tolerance(x64):
    z0, v0 = jnp.array([1.0, -0.5]), jnp.array([0.3, 2.0])
    error = [np.abs(np.asarray(Adaptive(r, r)(damped, z0, v0)[0]) - exact(z0, v0)).max() for r in (1e-3, 1e-8)]
    assert error[0] < 1e-2 and error[1] < 1e-7 < error[0]


def test_doubling_the_steps_changes_little_and_ever_less():
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((3, 4, 4, 2)).astype(np.float32), rng.uniform(size=3).astype(np.float32)
    net = nw.ContinuousUNet(**SMALL)
    params = nw.random_parameters(net, x, t)
    y = {n: np.asarray(jax.jit(nw.from_linen(net.clone(solve=Steps(n))))(params, x, t)) for n in (1, 2, 4)}
    adaptive = jax.jit(nw.from_linen(net.clone(solve=Adaptive(1e-5, 1e-5))))(params, x, t)
    assert np.abs(y[4] - y[2]).max() < 1e-3 < np.std(y[4])
    assert np.abs(y[4] - y[2]).max() < 0.25 * np.abs(y[2] - y[1]).max()
    np.testing.assert_allclose(y[4], adaptive, atol=1e-3)


def test_a_block_is_the_textbook_loop_over_its_force():
    """Heun's rule written out in NumPy around the module that computes the acceleration."""
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((2, 4, 4, 3)).astype(np.float32), np.array([0.2, 0.7], np.float32)
    net = nw.ContinuousUNet(widths=(4,), attention=(), code=8, solve=Steps(3, heun))
    params = nw.random_parameters(net, x, t)
    names = ("down_0_0/velocity", "down_0_0/block")
    _, taps = jax.jit(nw.tapped(nw.from_linen(net), read=names))(params, x, t)
    force = jax.jit(Force(4, net.act, net.conv, net.dtype).apply)
    kernel = params["in"]["kernel"]
    z = np.asarray(nw.native(x, kernel)) + params["in"]["bias"].reshape(1, 1, 1, -1)
    v = np.asarray(taps[names[0]])
    # the code of time is not tapped: the module that makes it is called by itself
    code = nw.conditions.Code(8).apply({"params": params["code"]}, jnp.asarray(t), nw.Condition())
    f = lambda z, v, tau: np.asarray(force({"params": params["down_0_0"]["force"]}, z, v, code, np.float32(tau)))
    for i in range(3):
        a = f(z, v, i / 3)
        ahead_z, ahead_v = z + v / 3, v + a / 3
        b = f(ahead_z, ahead_v, (i + 1) / 3)
        z, v = z + (v + ahead_v) / 6, v + (a + b) / 6
    np.testing.assert_allclose(taps[names[1]], z, atol=2e-5)


def test_parameters_do_not_depend_on_the_solver_and_a_block_starts_as_the_identity():
    x, t = np.ones((1, 4, 4, 2), np.float32), np.ones(1, np.float32)
    shapes = [
        jax.eval_shape(nw.ContinuousUNet(**SMALL, solve=s).init, jax.random.key(0), x, t)
        for s in (Steps(1), Steps(9, heun), Adaptive())
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    net = nw.ContinuousUNet(widths=(4,), attention=(), code=8)
    params = nw.initialise(net, jax.random.key(1), x, t)
    _, taps = jax.jit(nw.tapped(nw.from_linen(net), read=("down_0_0/block",)))(params, x, t)
    z = nw.native(x, params["in"]["kernel"])
    np.testing.assert_allclose(taps["down_0_0/block"], z, atol=1e-6)


@pytest.mark.slow
def test_gradients_pass_through_the_adaptive_solver():
    x, t = np.random.default_rng(2).standard_normal((2, 4, 4, 2)).astype(np.float32), np.full(2, 0.5, np.float32)
    net = nw.ContinuousUNet(widths=(4,), attention=(), code=8)
    params = nw.random_parameters(net, x, t)
    slope = lambda solve: ravel_pytree(
        jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(nw.from_linen(net.clone(solve=solve))(p, x, t)))))(params)
    )[0]
    a, b = slope(Steps(4)), slope(Adaptive(1e-5, 1e-5))
    assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(a)


def test_bad_sizes_are_refused():
    x, t = np.ones((1, 4, 4, 2), np.float32), np.ones(1, np.float32)
    with pytest.raises(ValueError, match="count of steps must be at least 1; got 0"):
        Steps(0)
    with pytest.raises(ValueError, match="token_size=3 needs attention"):
        jax.eval_shape(nw.ContinuousUNet(attention=(), token_size=3).init, jax.random.key(0), x, t)
    with pytest.raises(ValueError, match="divisible by 4"):
        jax.eval_shape(nw.ContinuousUNet(widths=(4, 4, 4)).init, jax.random.key(0), x[:, :2], t)
