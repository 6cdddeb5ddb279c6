"""Prior preservation: two losses of independent draws, whatever the loss is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import losses, processes, testing

ORACLE = testing.oracle(testing.gaussian([0.3, -0.2], 0.7), processes.rectified())
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32))


def squared(key, denoiser, x0, cond, items=None):
    """A loss without draws."""
    return jnp.square(x0 - (0 if cond is None else cond[:, None])).sum(-1), {"half": x0[:, 0]}


def test_each_item_has_one_of_the_samples_with_its_condition():
    samples = 100.0 * jnp.arange(1, 6, dtype=jnp.float32)[:, None] + jnp.zeros((5, 2))
    loss = losses.prior_preservation(squared, samples, samples[:, 0] - 1, weight=0.25)
    value, aux = jax.jit(loss)(jax.random.key(0), ORACLE, X, jnp.zeros(6))
    np.testing.assert_allclose(aux["prior"], 2.0)  # |sample - its condition|^2
    np.testing.assert_allclose(value, np.square(X).sum(-1) + 0.5, rtol=1e-6)
    np.testing.assert_array_equal(aux["half"], X[:, 0])
    _, found = losses.prior_preservation(squared, samples)(jax.random.key(0), ORACLE, X.repeat(40, 0), None)
    assert set(np.unique(found["prior"])) == {2 * (100.0 * k) ** 2 for k in range(1, 6)}


def test_items_draw_for_themselves():
    loss = losses.prior_preservation(losses.flow_matching(), np.asarray(X))  # as a file has them
    whole = jax.jit(lambda key: loss(key, ORACLE, X)[0])(jax.random.key(1))
    part, _ = loss(jax.random.key(1), ORACLE, X[2:4], items=jnp.arange(2, 4))
    np.testing.assert_allclose(part, whole[2:4], rtol=1e-6)


def test_the_sum_is_that_of_the_two_losses():
    inner = losses.denoising_loss(weight=lambda process, t: 1 + t)
    n, means = 4000, []
    many = jnp.tile(X[:1], (n, 1))
    for x in (X[:1], X[1:2]):  # one sample: the prior is the loss of a batch of it
        value, aux = losses.prior_preservation(inner, x, weight=2.0)(jax.random.key(2), ORACLE, many)
        alone, _ = inner(jax.random.key(3), ORACLE, jnp.tile(x, (n, 1)))
        assert abs(aux["prior"].mean() - alone.mean()) < 4 * (alone.std() / n**0.5) * 2**0.5
        means.append(float(aux["subject"].mean()))
        np.testing.assert_allclose(value, aux["subject"] + 2 * aux["prior"], rtol=1e-5)
    assert means[0] == means[1]


def test_bad_input():
    with pytest.raises(ValueError, match="conditions of as many items as samples, 6"):
        losses.prior_preservation(squared, X, jnp.zeros(5))
    with pytest.raises(ValueError, match="batch is empty"):
        losses.prior_preservation(squared, X[:0])
    for weight in (-0.5, jnp.float32(-1e-3), np.inf, np.nan):
        with pytest.raises(
            ValueError, match="weight must be a finite number >= 0, 0 for the loss on new data alone; got"
        ):
            losses.prior_preservation(squared, X, weight=weight)


def test_the_weight_may_be_zero_or_traced():
    value, aux = losses.prior_preservation(squared, X, weight=0)(jax.random.key(0), ORACLE, X)
    np.testing.assert_array_equal(value, aux["subject"])
    total = lambda w: losses.prior_preservation(squared, X, weight=w)(jax.random.key(0), ORACLE, X)[0].sum()
    np.testing.assert_allclose(jax.grad(total)(1.5), aux["prior"].sum(), rtol=1e-6)
