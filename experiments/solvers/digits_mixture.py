"""An exact model of pictures: one Gaussian around every one of some training digits, labelled with its class."""

import jax.numpy as jnp
import numpy as np

from diffjax import testing
from diffjax.testing import oracles

STD = 0.35  # of every component; the pictures have standard deviation 1


def mixture(digits, n):
    """The mixture [n components, 64 pixels], and the pictures it is made of."""
    train = digits.read("train", n)
    return testing.mixture(
        np.ones(n), np.asarray(train["x"]).reshape(n, -1), stds=np.full(n, STD), labels=np.asarray(train["label"])
    )


def labels(m, process, x, t=0.0):
    """The class of highest posterior probability, [B]."""
    scores = [oracles.log_density(m, process, x, t, jnp.full(len(x), c)) for c in range(10)]
    return jnp.argmax(jnp.stack(scores), 0)
