"""The product of a dense layer against the plain one, under the transformations that networks are used with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.networks.layers import Dense, product, rematerialised

plain = lambda x, kernel: x @ kernel


def draws(*shape):
    x, kernel, dx, dk = np.random.default_rng(0).standard_normal((4, *shape, 6)).astype(np.float32)
    kernel, dk = (a.reshape(-1, 6)[:6] @ np.ones((6, 5), np.float32) / 6 for a in (kernel, dk))
    return tuple(map(jnp.asarray, (x, kernel, dx, dk)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 4)])
def test_values_gradients_tangents_and_second_derivatives(shape, dtype):
    arrays = tuple(a.astype(dtype) for a in draws(*shape))

    def everything(f, x, kernel, dx, dk):
        loss = lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)).astype(jnp.float32))
        grad = jax.grad(loss, argnums=(0, 1))
        forward = lambda x, kernel: jax.jvp(f, (x, kernel), (dx, dk))[1]
        over_jvp = jax.grad(lambda k: jnp.sum(jnp.square(forward(x, k)).astype(jnp.float32)))(kernel)
        penalty = lambda k: jnp.sum(jnp.square(jax.grad(loss)(x, k)).astype(jnp.float32))
        batched = jax.vmap(f, (0, None))(jnp.stack([x, dx]), kernel), jax.vmap(f, (None, 0))(x, jnp.stack([kernel, dk]))
        return f(x, kernel), grad(x, kernel), forward(x, kernel), over_jvp, jax.grad(penalty)(kernel), batched

    run = jax.jit(everything, static_argnums=0)
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    for mine, theirs in zip(*(jax.tree.leaves(run(f, *arrays)) for f in (product, plain)), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        scale = float(jnp.abs(theirs.astype(jnp.float32)).max())
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs.astype(jnp.float32), atol=tolerance * scale)


def test_gradient_of_the_kernel_is_one_product_of_two_matrices():
    """What makes it fast: no axis of the operands is summed beside another, here and in a dense layer."""
    layer = Dense(5)
    x = jnp.ones((2, 3, 6))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    program = jax.make_jaxpr(jax.grad(lambda p: layer.apply(p, x).sum()))(params).jaxpr
    products = [e.params["dimension_numbers"] for e in program.eqns if e.primitive.name == "dot_general"]
    assert products and all(len(contracted[0]) == 1 for contracted, _ in products)


def test_rematerialised_layers_keep_the_product():
    layer = rematerialised(type(Dense(5)), "dots")(5, dot_general=product)
    x = jnp.ones((2, 3, 6))
    params = jax.tree.map(lambda a: jnp.ones(a.shape), jax.eval_shape(layer.init, jax.random.key(0), x))
    loss = lambda p: jnp.sum(jnp.tanh(layer.apply(p, x)))
    backward = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert backward.count("dot_general") == 2  # forward, and the kernel's gradient: none again
    assert jax.tree.all(jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), jax.grad(loss)(params)))


def test_axes_that_are_cut_over_devices_stay():
    """Rows of tokens cut along two mesh axes are not gathered, forward or backward."""
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), devices=jax.devices()[:8])
    x, kernel, _, _ = draws(4, 8)
    cut = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(lambda k, x: jnp.sum(jnp.sin(product(x, k)))))
        args = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())), jax.device_put(x, cut)
        text = run.lower(*args).compile().as_text()
        value, grad = run(*args)
    assert "all-gather" not in text and "all-to-all" not in text
    expected = jax.value_and_grad(lambda k, x: jnp.sum(jnp.sin(plain(x, k))))(kernel, x)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[1], atol=1e-4)


def test_scan_over_layers():
    x, kernel = jnp.ones((2, 3, 4)), jnp.full((3, 4, 4), 0.1)
    layers = lambda f, k: jax.lax.scan(lambda h, w: (jnp.tanh(f(h, w)), None), x, k)[0].sum()
    mine, theirs = (jax.jit(jax.grad(functools.partial(layers, f)))(kernel) for f in (product, plain))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
