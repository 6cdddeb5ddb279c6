import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import numerics as nu


def test_namespace_is_numpy_only_for_host_values():
    assert nu.namespace(1.0, np.ones(2)) is np
    assert nu.namespace(1.0, jnp.ones(2)) is jnp
    assert jax.jit(lambda a: jnp.zeros(()) if nu.namespace(a) is jnp else 1 / 0)(1.0) == 0


def test_expand_refuses_what_cannot_broadcast_from_the_left():
    with pytest.raises(ValueError, match="broadcast from the left"):
        nu.expand(np.ones((2, 3)), np.ones(2))


def test_item_noise_does_not_depend_on_the_batch(key):
    like = {"a": jnp.zeros((6, 3)), "b": jnp.zeros((6,))}
    whole = nu.item_normal(nu.item_keys(key, jnp.arange(6)), 4, like)
    part = nu.item_normal(nu.item_keys(key, jnp.arange(2, 5)), 4, jax.tree.map(lambda a: a[2:5], like))
    jax.tree.map(lambda w, p: np.testing.assert_array_equal(w[2:5], p), whole, part)
    assert not np.allclose(whole["a"][:, 0], whole["b"])


def test_divide_by_zero_is_zero_with_zero_gradient():
    value, grad = jax.value_and_grad(lambda a: nu.divide(jnp.ones(2), a).sum())(0.0)
    assert value == 0 and grad == 0


@pytest.mark.parametrize("bad", [np.ones((0, 2)), {"a": np.ones(2), "b": np.ones(3)}, np.float32(1)])
def test_batch_size_names_the_shapes(bad):
    with pytest.raises(ValueError, match="shape"):
        nu.batch_size(bad)


@pytest.mark.parametrize("on_device", [False, True])
def test_diffusion_is_finite_where_sigma_starts_like_a_root(on_device):
    from diffjax import processes

    vp = processes.vp(0.1, 20.0)
    g2 = vp.diffusion(jnp.zeros(()) if on_device else 0.0)
    np.testing.assert_allclose(g2, 0.1, rtol=1e-3)  # g^2 = beta(t)
    np.testing.assert_allclose(vp.diffusion(np.array([0.0, 1.0])), [0.1, 20.0], rtol=1e-9)
