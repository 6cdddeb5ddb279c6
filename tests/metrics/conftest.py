"""Digits in three parts, and the corruptions that a score must see."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits():
    """`(x, y)` of three disjoint parts: 720 and 718 to compare, 359 to train feature nets; in [-1, 1], [N, 8, 8, 1]."""
    data = load_digits()
    x, y = (data.images[..., None] / 8 - 1).astype(np.float32), data.target
    order = np.random.default_rng(0).permutation(len(x))
    return [(x[i], y[i]) for i in np.split(order, [720, 1438])]


@pytest.fixture(scope="session")
def corruptions(digits):
    """Sets of 718 pictures by name, from held-out real to the moment-matched Gaussian."""
    (a, _), (b, labels), _ = digits
    rng = np.random.default_rng(1)
    n = len(b)
    noise = rng.standard_normal(b.shape).astype(np.float32)
    flat = a.reshape(len(a), -1).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    gauss = flat.mean(0) + rng.standard_normal((n, 64)) * np.sqrt(np.maximum(values, 0)) @ vectors.T
    return {
        "real": b,
        "noise 0.1": b + 0.1 * noise,
        "noise 0.3": b + 0.3 * noise,
        "blur": np.stack([gaussian_filter(picture, (0.7, 0.7, 0)) for picture in b]),
        "half the classes": np.resize(b[labels < 5], b.shape),
        "ten memorised": a[rng.integers(0, 10, n)],
        "gaussian": gauss.reshape(b.shape).astype(np.float32),
    }
