"""Counted operations against counts by hand and against the compiler's own. About 6 s."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from diffjax import networks
from diffjax.training import flops, step


def shape(*n, dtype=np.float32):
    return jax.ShapeDtypeStruct(n, dtype)


def test_products_and_elementwise_work():
    f = lambda a, b: jnp.exp(jnp.einsum("bij,bjk->bik", a, b)) - 1.0
    assert flops.count(f, shape(5, 2, 3), shape(5, 3, 7)) == (2 * 5 * 2 * 3 * 7, 0, 2 * 5 * 2 * 7)
    assert flops.count(lambda a: a.sum(0), shape(4, 6)) == (0, 0, 24)
    moved = lambda a, i: jnp.concatenate([a.T, a.T], 0).reshape(-1)[i] > 0
    assert flops.count(moved, shape(4, 6), shape(3, dtype=np.int32)).total == 0
    assert flops.count(lambda i: i * 2 + 1, shape(3, dtype=np.int32)).total == 0


def test_triangular_systems_and_fourier_transforms():
    solve = lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True)
    assert flops.count(solve, shape(5, 8, 8), shape(5, 8, 3)) == (5 * 8 * 8 * 3, 0, 0)
    assert flops.count(jnp.fft.fft, shape(3, 16, dtype=np.complex64)).total == 3 * 5 * 16 * 4
    there_and_back = lambda a: jnp.fft.irfft(jnp.fft.rfft(a))
    assert flops.count(there_and_back, shape(3, 16)).total == 3 * 5 * 16 * 4


def test_loops_branches_and_calls():
    w, x = shape(4, 4), shape(4)
    product = 2 * 4 * 4
    scanned = lambda w, x: lax.scan(lambda x, _: (jax.jit(jnp.dot)(w, x), None), x, None, length=7)[0]
    assert flops.count(scanned, w, x).matmul == 7 * product
    either = lambda w, x: lax.cond(x[0] > 0, lambda: w @ (w @ x), lambda: w @ x)
    assert flops.count(either, w, x).matmul == 2 * product

    @jax.custom_vjp
    def custom(w, x):
        return w @ x

    custom.defvjp(lambda w, x: (w @ x, (w, x)), lambda kept, g: (jnp.outer(g, kept[1]), kept[0].T @ g))
    assert flops.count(custom, w, x).matmul == product
    assert flops.count(jax.grad(lambda w, x: custom(w, x).sum(), argnums=1), w, x).matmul == 2 * product


def test_a_loop_of_unknown_length_needs_a_number():
    f = lambda w, x, n: lax.fori_loop(0, n, lambda _, x: w @ x, x)
    args = shape(4, 4), shape(4), shape(dtype=np.int32)
    with pytest.raises(ValueError, match="give trips="):
        flops.count(f, *args)
    assert flops.count(f, *args, trips=5).matmul == 5 * 32


def test_what_is_hidden_from_the_program_is_refused():
    f = lambda x: jax.pure_callback(np.sin, shape(3), x)
    with pytest.raises(ValueError, match="pure_callback cannot be counted"):
        flops.count(f, shape(3))


def test_a_program_of_each_device_counts_for_all():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    cut = PartitionSpec("data")
    f = jax.shard_map(lambda x: x @ jnp.ones((3, 5)), mesh=mesh, in_specs=cut, out_specs=cut)
    assert flops.count(f, shape(8, 3)).matmul == 2 * 8 * 3 * 5


@pytest.mark.parametrize("stride, dilate", [(1, 1), (2, 1), (1, 2)])
def test_convolutions_do_not_count_padding(stride, dilate):
    n, k, c, d, b = 7, 3, 2, 4, 3
    f = lambda x, w: lax.conv_general_dilated(
        x, w, (stride, stride), ((1, 1), (1, 1)), lhs_dilation=(dilate, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, w = shape(b, n, n, c), shape(k, k, c, d)
    pairs = 1
    for factor in (dilate, 1):
        row = np.zeros((n - 1) * factor + 1)
        row[::factor] = 1  # real values; the rest is dilation
        row = np.pad(row, 1)
        pairs *= int(sum(row[o : o + k].sum() for o in range(0, len(row) - k + 1, stride)))
    assert flops.count(f, x, w).conv == 2 * b * c * d * pairs


def network(**options):
    net = networks.DiT(width=64, depth=1, heads=4, num_classes=3, **options)
    args = shape(4, 8, 8, 3), shape(4), shape(4, dtype=np.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    return (lambda p, *args: (net.apply({"params": p}, *args) ** 2).mean()), (params, *args)


def test_a_gradient_counts_as_the_compiler_counts_it():
    f, args = network()
    g = jax.value_and_grad(f)
    found = jax.jit(g).lower(*args).compile().cost_analysis()["flops"]
    assert flops.count(g, *args).total == pytest.approx(found, rel=0.05)  # 0.97


def test_model_flops_leave_out_what_is_recomputed():
    plain, args = network()
    rematted, _ = network(remat="full")
    one, two = flops.count(jax.grad(plain), *args).matmul, flops.count(jax.grad(rematted), *args).matmul
    assert two > 1.2 * one
    assert flops.count(jax.grad(flops.saving(rematted)), *args).matmul == one


def test_model_flops_of_a_step_scale_with_the_batch():
    train_step = step.make_train_step(toy.model, toy.loss, optax.sgd(0.1), accumulate=2)
    one, two = (flops.model_flops(train_step, toy.params(), toy.batch(0, size)) for size in (8, 16))
    d = toy.D
    assert one.matmul == 2 * (2 * 8 * d * d)  # forward, and the gradient of w: x needs none
    assert two.matmul == 2 * one.matmul and two.total == pytest.approx(2 * one.total, rel=0.02)
    frozen = step.make_train_step(toy.model, toy.loss, optax.sgd(0.1), trainable="^b$")
    assert flops.model_flops(frozen, toy.params(), toy.batch(0, 8)).matmul == 2 * 8 * d * d  # forward alone


def test_devices_and_utilisation():
    assert flops.device("NVIDIA A100-SXM4-80GB") == (312e12, 80e9)
    assert flops.device("NVIDIA A100-SXM4-40GB") == (312e12, 40e9)
    assert flops.device("NVIDIA H100 PCIe")[0] == 756e12 and flops.device("NVIDIA H200")[1] == 141e9
    assert flops.peak("NVIDIA L40S") is None  # not taken for an L4
    assert flops.peak("TPU v3") == 61.5e12  # a core, half a chip
    assert flops.peak(jax.devices()[0]) is None
    assert flops.utilisation(1.0, 1.0, jax.devices()) is None
    assert flops.utilisation(275e12, 2.0, ["TPU v4", "TPU v4"]) == 0.25
    with pytest.raises(ValueError, match="seconds must be positive"):
        flops.utilisation(1.0, 0.0, ["TPU v4"])
