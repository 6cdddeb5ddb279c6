"""from_linen and from_nnx: pure, equal by value, and clear about what they cannot take."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_cases import case_of

from diffjax import networks as nw

X, T = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32), np.full(6, 0.5, np.float32)


def test_two_equal_builds_are_one_trace():
    traces = []

    def run(fn, params, x):
        traces.append(1)
        return fn(params, x, 0.5)

    run = jax.jit(run, static_argnums=0)
    params = nw.random_parameters(nw.MLP(width=8, depth=1), X, T)
    for build in (lambda: nw.MLP(width=8, depth=1), lambda: nw.MLP(width=8, depth=1, act=nn.silu)):
        run(nw.from_linen(build()), params, X)
    assert len(traces) == 1
    run(nw.from_linen(nw.MLP(width=8, depth=1, act=jnp.tanh)), params, X)
    assert len(traces) == 2


class Own(nn.Module):
    """A user's network that knows nothing of `train`."""

    @nn.compact
    def __call__(self, x, t, cond):
        return nn.Dense(x.shape[-1])(x) * jnp.reshape(t, (-1, 1))


def test_a_users_linen_module(key):
    fn = nw.from_linen(Own())
    params = fn.init(key, X, T)
    want = X @ params["Dense_0"]["kernel"] * 0.5
    np.testing.assert_allclose(fn(params, X, T), want, atol=1e-5)
    np.testing.assert_allclose(fn(params, X, T, None, jax.random.key(1)), want, atol=1e-5)


class WithStatistics(nn.Module):
    @nn.compact
    def __call__(self, x, t, cond):
        return nn.BatchNorm(use_running_average=True)(x)


class WithList(nn.Module):
    widths: tuple

    @nn.compact
    def __call__(self, x, t, cond):
        return x


class Unhashable:
    __hash__ = None


def test_linen_modules_that_are_refused(key):
    with pytest.raises(ValueError, match="batch_stats"):
        nw.from_linen(WithStatistics()).init(key, X, T)
    with pytest.raises(ValueError, match="cannot be hashed"):
        nw.from_linen(WithList(Unhashable()))
    with pytest.raises(ValueError, match="unbound"):
        nw.from_linen(Own().bind({}))
    with pytest.raises(ValueError, match="flax.linen module"):
        nw.from_linen(jnp.tanh)


class Net(nnx.Module):
    """Dropout and batch statistics, on request."""

    def __init__(self, rngs, *, norm=False, dropout=0.5):
        self.a = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs) if norm else None
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(4, 3, rngs=rngs)])

    def __call__(self, x, t, cond):
        h = self.a(x) + jnp.reshape(t, (-1, 1))
        h = h if self.norm is None else self.norm(h)
        return self.rest[0](self.drop(h))


def test_nnx_under_jit_grad_and_scan_with_dropout():
    module = Net(nnx.Rngs(0))
    fn, params = nw.from_nnx(module)
    assert all(isinstance(p, jax.Array) for p in jax.tree.leaves(params)) and sorted(params) == ["a", "rest"]
    f = jax.jit(fn)
    y = f(params, X, T)
    module.eval()
    np.testing.assert_allclose(y, module(X, T, None), atol=1e-6)
    keys = [jax.random.key(i) for i in range(3)]
    a, b = f(params, X, T, None, keys[0]), f(params, X, T, None, keys[1])
    again = f(params, X, T, None, jax.random.key(0))
    np.testing.assert_array_equal(a, again)  # the key decides, not a hidden count
    assert np.abs(a - b).max() > 1e-3 and np.abs(a - y).max() > 1e-3
    g = jax.jit(jax.grad(lambda p: jnp.sum(fn(p, X, T) ** 2)))(params)
    assert np.abs(g["a"]["kernel"]).max() > 0

    def body(x, i):
        return fn(params, x, T, None, jax.random.fold_in(keys[2], i)), None

    x, _ = jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(3)))(X)
    assert np.isfinite(x).all()


def test_nnx_batch_statistics_are_threaded_not_lost():
    fn, params = nw.from_nnx(Net(nnx.Rngs(0), norm=True, dropout=0.0))
    assert sorted(params) == ["a", "norm", "rest"] and sorted(fn.state["norm"]) == ["mean", "var"]
    jax.jit(fn)(params, X, T)  # evaluation reads the statistics and changes none
    with pytest.raises(ValueError, match="norm/mean.*fn.threaded"):
        fn(params, X, T, None, jax.random.key(0))

    def body(state, i):
        y, state = fn.threaded(params, state, X, T, None, jax.random.fold_in(jax.random.key(1), i))
        return state, y

    state, ys = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(200)))(jax.tree.map(jnp.asarray, fn.state))
    h = X @ params["a"]["kernel"] + params["a"]["bias"].reshape(1, -1) + 0.5
    weight = 1 - 0.99**200
    np.testing.assert_allclose(state["norm"]["mean"], weight * h.mean(0), atol=1e-3)
    trained = fn.with_state(state)
    assert trained != fn and trained == fn.with_state(state) and hash(trained) == hash(fn.with_state(state))
    assert np.abs(trained(params, X, T) - fn(params, X, T)).max() > 1e-3


def test_two_equal_nnx_builds_are_equal_by_value():
    one, other = (nw.from_nnx(Net(nnx.Rngs(i)))[0] for i in range(2))
    assert one == other and hash(one) == hash(other)


def test_nnx_modules_that_are_refused():
    with pytest.raises(ValueError, match="flax.nnx module"):
        nw.from_nnx(Own())
    with pytest.raises(ValueError, match="inside a transformation"):
        jax.jit(lambda x: nw.from_nnx(Net(nnx.Rngs(0), norm=True))[0](x, X, T))(1.0)
    fn, params = nw.from_nnx(Net(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="params lack .'rest/0/bias'"):
        fn({"a": params["a"], "rest": {0: {"kernel": params["rest"][0]["kernel"]}}}, X, T)


def test_the_core_does_not_import_flax():
    import pathlib
    import subprocess
    import sys

    root = pathlib.Path(nw.__file__).parents[2]
    code = "import sys, diffjax, diffjax.types; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_tapped_adapter_keeps_the_signature():
    case = case_of("mlp", dropout=0.5)
    f = nw.tapped(case.fn, read="block_0/block")
    out, taps = f(case.params, case.x, case.t, case.cond, jax.random.key(0))
    np.testing.assert_allclose(out, case.fn(case.params, case.x, case.t, case.cond, jax.random.key(0)), atol=1e-5)
    with pytest.raises(ValueError, match="taps cannot be read where every item has a dropout key"):
        f(case.params, case.x, case.t, case.cond, jax.random.split(jax.random.key(0), 3))
