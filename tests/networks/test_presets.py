"""Published networks have the published numbers of parameters."""

import jax
import jax.numpy as jnp
import pytest

from diffjax import networks as nw

# Millions of parameters of the four sizes with patches of 2, for 32 x 32 x 4 latents, 1000 classes and learned variances:
# arXiv:2212.09748. The fixed table of positions is no parameter.
PUBLISHED = {"dit-s/2": 33, "dit-b/2": 130, "dit-l/2": 458, "dit-xl/2": 675}


def count(name):
    net = nw.preset(name, num_classes=1000, out_channels=8, scan_layers=True)
    x, t, label = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    return nw.parameter_count(jax.eval_shape(net.init, jax.random.key(0), x, t, label)["params"])


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_are_those_published(name):
    assert round(count(name) / 1e6) == PUBLISHED[name]


def test_dit_xl_2_to_the_last_parameter():
    """By hand: patches, time, labels, 28 blocks, last layer. With its positions the released network has 675,129,632."""
    d, out = 1152, 2 * 2 * 8
    block = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 6 * d * d + 6 * d
    rest = 16 * d + d + 256 * d + d + d * d + d + 1001 * d + d * out + out + 2 * d * d + 2 * d
    n = count("dit-xl/2")
    assert n == 28 * block + rest == 675_129_632 - 256 * d


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown network 'dit-xll'.*Did you mean dit-xl"):
        nw.preset("dit-xll")
