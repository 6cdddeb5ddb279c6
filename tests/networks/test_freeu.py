"""FreeU: the identity at factors of one, the published filter in NumPy, and the taps that it writes."""

import jax
import numpy as np
import pytest
from network_cases import inputs

from diffjax import networks as nw
from diffjax.networks.freeu import ScaleHalf, ScaleLow, freeu


@pytest.fixture(scope="module")
def case():
    net = nw.UNet(widths=(4, 8), attention=(), code=8)
    x, t, _ = inputs(net, (4, 4, 2))
    return net, nw.random_parameters(net, x, t), x, t


def test_factors_of_one_change_nothing_and_others_do(case):
    net, params, x, t = case
    apply = lambda b, s: jax.jit(nw.tapped(net.apply, write=freeu(net, {0: b, 1: b}, {0: s, 1: s})))(
        {"params": params}, x, t
    )
    plain = jax.jit(net.apply)({"params": params}, x, t)
    np.testing.assert_allclose(apply(1.0, 1.0), plain, atol=1e-6)
    assert np.abs(apply(1.2, 1.0) - plain).max() > 1e-2 and np.abs(apply(1.0, 0.2) - plain).max() > 1e-3


def test_the_writers_are_the_published_filters():
    h = np.random.default_rng(0).normal(size=(2, 6, 8, 4)).astype(np.float32)
    for radius in (1, 2):
        f = np.fft.fftshift(np.fft.fft2(h, axes=(1, 2)), axes=(1, 2))
        f[:, 3 - radius : 3 + radius, 4 - radius : 4 + radius] *= 0.3
        want = np.fft.ifft2(np.fft.ifftshift(f, axes=(1, 2)), axes=(1, 2)).real
        np.testing.assert_allclose(ScaleLow(0.3, radius)(h), want, atol=1e-5)
    want = np.concatenate([1.4 * h[..., :2], h[..., 2:]], -1)
    np.testing.assert_allclose(ScaleHalf(1.4)(h), want, rtol=1e-6)


def test_every_level_is_written_where_its_backbone_meets_a_skip(case):
    net, params, x, t = case
    assert sorted(freeu(net, {1: 1.2}, {})) == ["bottleneck", "up_0", "up_1_0/block"]
    assert sorted(freeu(net, {}, {1: 1.2})) == ["skip_1", "skip_2", "skip_3"]
    assert sorted(freeu(net, {0: 1.2}, {0: 0.5})) == ["skip_0", "up_0_0/block"]
    names = nw.tap_names(net.apply, {"params": params}, x, t)
    assert set(freeu(net, {0: 1, 1: 1}, {0: 1, 1: 1})) <= set(names)
    read = jax.jit(nw.tapped(net.apply, read="bottleneck", write=freeu(net, {1: 1.5}, {})))
    scaled = read({"params": params}, x, t)[1]["bottleneck"]
    plain = jax.jit(nw.tapped(net.apply, read="bottleneck"))({"params": params}, x, t)[1]["bottleneck"]
    np.testing.assert_allclose(scaled[..., :4], 1.5 * plain[..., :4], rtol=1e-5)
    np.testing.assert_array_equal(scaled[..., 4:], plain[..., 4:])


def test_bad_levels(case):
    with pytest.raises(ValueError, match=r"levels 0 to 1 and radius >= 1; got levels \[2\] and radius 1"):
        freeu(case[0], {2: 1.1}, {})
    with pytest.raises(ValueError, match="radius 0"):
        freeu(case[0], {}, {}, radius=0)
