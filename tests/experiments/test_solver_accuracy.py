"""The measure of solvers on many problems: its fast denoiser against the exact one, its figures against numbers by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import solvers, times
from diffjax.testing import oracle
from experiments.benchmarks import solver_accuracy as accuracy


def test_problems_side_by_side_are_the_mixtures_one_by_one(x64):
    """Components that fill up a mixture change nothing, and a mode is the component of the largest posterior weight."""
    m, x = accuracy.problems(3, 2, 16, seed=5)
    table = solvers.ddim(accuracy.PROCESS, times.log_snr(accuracy.PROCESS, 6))
    end, mode = accuracy.ends(m, table, x)
    rng = np.random.default_rng([5, 3])
    for i in range(2):
        mixture = accuracy.random_mixture(rng, 3, "sharp")
        one = diffjax.sample(jax.random.key(0), oracle(mixture, accuracy.PROCESS), table, jnp.asarray(x[i]))
        np.testing.assert_allclose(end[i], one, rtol=1e-8, atol=1e-10)
        spread = mixture.spectra[:, 0] + accuracy.PROCESS.sigma(0.0) ** 2
        gap = ((np.asarray(one)[:, None] - mixture.means) ** 2).sum(-1)
        joint = mixture.log_weights - 0.5 * gap / spread - 1.5 * np.log(spread)
        np.testing.assert_array_equal(mode[i], joint.argmax(-1))


def test_figures_by_hand():
    squared = np.array([[1.0, 1.0, 4.0], [1.0, 1.0, 1.0]])
    flips = np.array([[False, False, True], [False, False, False]])
    best = np.array([[2.0, 2.0], [6**0.5, 3.0]])
    got = accuracy.summary(squared, flips, best, 7.5**0.5, (0.5, 0.4))
    # rms ratios sqrt(2 / 4), sqrt(1 / 6); medians 1 / 2, 1 / 3; pooled 9 / 45
    assert got["worst"] == pytest.approx([0.5**0.5, 0.5], rel=0.05)
    assert got["middle"] == pytest.approx([(0.5**0.5 + 6**-0.5) / 2, (1 / 2 + 1 / 3) / 2], rel=0.05)
    assert got["within"] == [0.5, 0.5] and got["within without flips"] == [1, 1]
    assert got["pooled"] == pytest.approx([(9 / 45) ** 0.5], rel=0.05)
    assert got["flips"] == pytest.approx([1 / 6], rel=0.05)


def test_the_stored_peers_are_of_these_problems():
    """As many problems as are drawn, and errors of the size that the problems allow."""
    stored = json.loads(accuracy.BARS.read_text())
    assert sorted(map(int, stored)) == sorted(accuracy.DIMENSIONS)
    for d, found in stored.items():
        assert len(found["best"]) == accuracy.COUNT
        for n in map(str, accuracy.EVALUATIONS):
            errors = np.array([[e for _, e in row[n]] for row in found["best"]])
            assert np.all(errors > 0) and np.all(errors < np.sqrt(int(d)))
            assert found["pooled"][n][1] > 0.99 * np.sqrt(np.mean(errors[:, 0] ** 2))


def test_a_stored_peer_is_measured_again(x64):
    """The best median of the first problem in two dimensions at 20 evaluations is that of our own card of that sampler."""
    name, error = json.loads(accuracy.BARS.read_text())["2"]["best"][0]["20"][1]
    assert name == "azula.zeab4@log_snr"
    m, x = accuracy.problems(2)
    m, x = jax.tree.map(lambda a: a[:1], m), x[:1]
    exact = accuracy.ends(m, accuracy.fine(), x)[0]
    card = solvers.CATALOGUE["exp_ab4_eps"].build(accuracy.PROCESS, times.log_snr(accuracy.PROCESS, 20))
    squared = ((accuracy.ends(m, card, x)[0] - exact) ** 2).sum(-1)
    np.testing.assert_allclose(np.sqrt(np.median(squared)), error, rtol=1e-3)
