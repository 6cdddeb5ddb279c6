"""The measure of solvers on many problems: its fast denoiser against the exact one, its figures against numbers by hand."""

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
    m, x = accuracy.problems(np.random.default_rng(3), 3, 2, 16)
    table = solvers.ddim(accuracy.PROCESS, times.log_snr(accuracy.PROCESS, 6))
    end, mode = accuracy.ends(m, table, x)
    rng = np.random.default_rng(3)
    for i in range(2):
        mixture = accuracy.random_mixture(rng, 3, "sharp")
        one = diffjax.sample(jax.random.key(0), oracle(mixture, accuracy.PROCESS), table, jnp.asarray(x[i]))
        np.testing.assert_allclose(end[i], one, rtol=1e-8, atol=1e-10)
        spread = mixture.spectra[:, 0] + accuracy.PROCESS.sigma(0.0) ** 2
        gap = ((np.asarray(one)[:, None] - mixture.means) ** 2).sum(-1)
        joint = mixture.log_weights - 0.5 * gap / spread - 1.5 * np.log(spread)
        np.testing.assert_array_equal(mode[i], joint.argmax(-1))


def test_figures_by_hand():
    squared = {
        "recommended": np.array([[1.0, 1.0, 4.0], [1.0, 1.0, 1.0]]),
        "a": np.array([[4.0, 4.0, 4.0], [16.0, 16.0, 16.0]]),
        "b": np.array([[9.0, 9.0, 9.0], [9.0, 9.0, 0.0]]),
    }
    flips = {name: np.zeros((2, 3), bool) for name in squared}
    flips["recommended"][0, 2] = flips["a"][0, 2] = flips["b"][1, 2] = True
    got = accuracy.summary(squared, flips, (0.5, 0.4))
    # rms ratios sqrt(2 / 4), sqrt(1 / 6); medians 1 / 2, 1 / 3; pooled 9 / 45, without two items 4 / 36
    worst = [0.5**0.5, 0.5]
    assert got["worst"] == pytest.approx(worst, rel=0.05)
    assert got["middle"] == pytest.approx([(0.5**0.5 + 6**-0.5) / 2, (1 / 2 + 1 / 3) / 2], rel=0.05)
    assert got["within"] == [0.5, 0.5] and got["best"] == "b"
    assert got["pooled"] == pytest.approx([(9 / 45) ** 0.5, (4 / 36) ** 0.5], rel=0.05)
    assert got["flips"] == pytest.approx([1 / 6, 1 / 6], rel=0.05)
