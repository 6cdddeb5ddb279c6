"""The prior on gates by time: its divergence, its matching, and what descent makes of gates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from diffjax import losses

T = np.linspace(0, 1, 40).astype(np.float32)


def gates(seed, layers=2, m=3, sharp=2.0):
    logits = sharp * np.random.default_rng(seed).standard_normal((layers, len(T), m))
    p = np.exp(logits)
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


def looped(g):
    return {f"block_{i}/switch/gates": layer for i, layer in enumerate(g)}


def by_hand(g, top, alpha):
    """All matchings of columns are tried; the least cost wins."""
    layers, b, m = g.shape
    units, size = layers * m, layers * top
    prior = np.zeros((b, units))
    for row, t in zip(prior, T, strict=True):
        start = int(np.round(t**alpha * (units - size)))
        row[start : start + size] = 1
    used = np.concatenate([(np.argsort(np.argsort(-layer)) < top).astype(float) for layer in g], axis=1)
    p = np.concatenate(list(g), axis=1) / layers
    cost = lambda q: np.abs(used - prior[:, q]).sum() - 1e-3 * layers * (p * prior[:, q]).sum()
    best = min(map(list, itertools.permutations(range(units))), key=cost)
    return jensenshannon(p, prior[:, best] / size, axis=1) ** 2


def test_it_is_the_divergence_from_the_best_matched_prior():
    g = gates(0)
    want = by_hand(g, 2, 4.0)
    np.testing.assert_allclose(losses.task_prior(2)(looped(g), T), want, atol=1e-5)
    scanned = losses.task_prior(2, 0.5)({"blocks/switch/gates": g}, T)
    np.testing.assert_allclose(scanned, 0.5 * want, atol=1e-5)


@pytest.mark.parametrize("solve", [losses.exact, losses.sinkhorn])
def test_the_order_of_experts_and_layers_does_not_matter(solve):
    """Gates that slide as the prior does, and random ones."""
    window = np.exp(-0.5 * ((T[:, None] ** 4 * 2 - np.arange(3)[None]) / 0.6) ** 2)
    g = gates(1) * window[None]
    g = (g / g.sum(-1, keepdims=True)).astype(np.float32)
    prior = losses.task_prior(2, solve=solve)
    want = prior(looped(g), T)
    rng = np.random.default_rng(0)
    for _ in range(4):
        moved = np.stack([layer[:, rng.permutation(3)] for layer in g[rng.permutation(2)]])
        np.testing.assert_allclose(prior(looped(moved), T), want, atol=1e-5)


def test_descent_makes_neighbours_in_time_share_gates():
    """Gates of free logits by time follow the windows: near times use the same ones, the first and the last others."""
    logits = jnp.asarray(0.1 * np.random.default_rng(0).standard_normal((2, len(T), 4)), jnp.float32)
    prior = losses.task_prior(2, solve=losses.sinkhorn)
    mean = lambda z: prior({"blocks/switch/gates": jax.nn.softmax(z)}, T).mean()

    @jax.jit
    def descend(z):
        return jax.lax.scan(lambda z, _: (z - 40 * jax.grad(mean)(z), mean(z)), z, None, length=200)

    end, values = descend(logits)
    assert values[-1] < 0.2 * values[0]
    used = np.asarray(end).argsort(-1)[..., -2:]
    share = lambda i, j: np.mean([len(set(a[i]) & set(a[j])) for a in used]) / 2
    assert np.mean([share(i, i + 1) for i in range(39)]) > 0.9 and share(0, 39) < 0.6


def test_bad_uses_are_refused():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        losses.task_prior(0)
    with pytest.raises(ValueError, match="taps that end in 'gates'"):
        losses.task_prior(1)({"block_0/block": jnp.ones(3)}, T)
