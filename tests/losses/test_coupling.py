"""Couplings: cheaper transport, right marginals, no dependence on order, labels and data untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from diffjax import losses, processes, testing
from diffjax.losses import exact, independent, k_nearest_noise, minibatch_assignment, sinkhorn


def new(seed=0):
    """A key that was not used yet."""
    return jax.random.key(seed)


COUPLINGS = {
    "exact": minibatch_assignment(),
    "sinkhorn": minibatch_assignment(sinkhorn),
    "nearest": k_nearest_noise(8),
}


def cost(x, eps):
    return float(jnp.square(x - eps).sum(1).mean())


@pytest.fixture(scope="module")
def x0():
    return jnp.asarray(np.random.default_rng(0).normal(size=(32, 2)) + np.array([[2.0, 0.0]]), jnp.float32)


@pytest.mark.parametrize("name", COUPLINGS)
def test_the_transport_cost_drops_and_the_order_of_items_does_not_matter(x0, name):
    items = jnp.arange(32) + 100
    f = jax.jit(COUPLINGS[name])
    eps = f(new(), x0, items)
    assert cost(x0, eps) < 0.8 * cost(x0, independent(new(), x0, items))
    order = np.random.default_rng(1).permutation(32)
    np.testing.assert_allclose(f(new(), x0[order], items[order]), eps[order], atol=1e-6)


@pytest.mark.parametrize("name", ["exact", "sinkhorn"])
def test_assignment_permutes_the_noise_so_that_its_law_is_unchanged(x0, name):
    items = jnp.arange(32)
    eps, base = jax.jit(COUPLINGS[name])(new(), x0, items), independent(new(), x0, items)
    np.testing.assert_array_equal(np.sort(eps, axis=0), np.sort(base, axis=0))
    # and pooled over batches it is standard normal, although every batch is far from the data's mean
    f = jax.jit(COUPLINGS[name])
    many = np.concatenate([f(k, x0, items) for k in jax.random.split(new(), 100)])
    np.testing.assert_allclose(many.mean(0), 0, atol=4 / np.sqrt(3200))
    np.testing.assert_allclose(np.cov(many.T), np.eye(2), atol=6 / np.sqrt(3200))


@pytest.mark.parametrize("n", [2, 7, 40])
def test_exact_is_scipy_and_sinkhorn_is_close(n):
    gain = np.random.default_rng(n).normal(size=(n, n)).astype(np.float32)
    rows, best = linear_sum_assignment(gain, maximize=True)
    np.testing.assert_array_equal(jax.jit(exact)(gain), best)
    found = np.asarray(jax.jit(sinkhorn)(gain))
    assert sorted(found) == list(range(n))
    top = gain[rows, best].mean()
    assert top - gain[rows, found].mean() <= 0.1 * (top - gain.mean())


def test_sinkhorn_ends_on_ties_and_on_values_that_are_not_finite():
    solve = jax.jit(sinkhorn)
    for gain in (jnp.zeros((9, 9)), jnp.full((9, 9), jnp.nan), jnp.eye(9).at[2].set(jnp.inf)):
        assert sorted(np.asarray(solve(gain))) == list(range(len(gain)))


def test_assignment_works_on_a_sharded_batch_and_under_vmap(x0):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    items = jnp.arange(32)
    for coupling in COUPLINGS.values():
        one = jax.jit(coupling)(new(), x0, items)
        many = jax.jit(coupling)(new(), *jax.device_put((x0, items), split))
        np.testing.assert_allclose(one, many, atol=1e-6)
    keys = jax.random.split(new(), 2)
    stacked = jax.vmap(lambda k: COUPLINGS["exact"](k, x0, items))(keys)
    np.testing.assert_array_equal(stacked[1], COUPLINGS["exact"](keys[1], x0, items))


def test_nearest_noise_is_local_to_the_item(x0):
    f = k_nearest_noise(5)
    whole = f(new(), x0, jnp.arange(32))
    np.testing.assert_array_equal(f(new(), x0[3:6], jnp.arange(3, 6)), whole[3:6])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(new(), jnp.arange(32))
    candidates = np.stack([losses.coupling.nu.item_normal(keys, j, x0) for j in range(5)])
    best = np.square(candidates - np.asarray(x0)).sum(-1).argmin(0)
    np.testing.assert_array_equal(whole, candidates[best, np.arange(32)])
    np.testing.assert_array_equal(k_nearest_noise(1)(new(), x0, jnp.arange(32)), independent(new(), x0, jnp.arange(32)))


def test_pytree_states_are_coupled_as_one():
    x0 = {"u": jnp.ones((6, 2)), "v": jnp.full((6, 3, 1), -2.0)}
    for coupling in COUPLINGS.values():
        eps = coupling(new(), x0, jnp.arange(6))
        assert jax.tree.map(jnp.shape, eps) == jax.tree.map(jnp.shape, x0)


@pytest.mark.parametrize("name", COUPLINGS)
def test_labels_and_data_stay_paired(name):
    m = testing.mixture([1, 1], [[-3.0, 0.0], [3.0, 0.0]], stds=[0.1, 0.1])
    x0, label = testing.draw(jax.random.key(1), m, 64)
    d = testing.oracle(m, processes.rectified())
    late = lambda key, process, items: jnp.full(items.shape, 0.9)
    loss = jax.jit(losses.denoising_loss(late, coupling=COUPLINGS[name], label_drop=0.0))
    right, _ = loss(new(), d, x0, label)
    wrong, _ = loss(new(), d, x0, 1 - label)
    # with its own label every item is denoised to its own component, with the other's to the wrong one
    assert float(right.max()) < 0.2 < 10 < float(wrong.min())


def test_sizes_are_checked(x0):
    with pytest.raises(ValueError, match="the limit is 16"):
        minibatch_assignment(limit=16)(new(), x0, jnp.arange(32))
    with pytest.raises(ValueError, match="int >= 1"):
        k_nearest_noise(0)
    assert minibatch_assignment()(new(), x0[:1], jnp.arange(1)).shape == (1, 2)
