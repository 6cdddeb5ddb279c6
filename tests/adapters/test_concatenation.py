"""State and reference on one canvas: what the network is given, what comes back, and guidance by an empty reference."""

import jax
import numpy as np
import pytest
from adapter_cases import moved, network

import diffjax
from diffjax import adapters, guidance, networks, processes


@pytest.mark.parametrize("axis", [1, 2])
def test_the_output_is_the_half_of_the_state_on_the_canvas(axis):
    net, base, x, t, cond = network("unet")
    fn = adapters.adapt(net, wear=adapters.concatenation(axis))
    params = moved(jax.jit(fn.init)(jax.random.key(0), base, x, t, cond))
    r = np.ascontiguousarray(x[::-1])
    deltas = params["adapters"]["wear"]
    assert all("attention" in name for name, _ in training_names(deltas)) and len(training_names(deltas)) == 16
    tuned = adapters.added(base, dict(training_names(deltas)))
    whole = jax.jit(net)(tuned, np.concatenate([x, r], axis), t, cond)
    run = jax.jit(fn)
    got = run(params, x, t, {**cond, "wear": {"reference": r}})
    np.testing.assert_allclose(got, np.split(np.asarray(whole), 2, axis)[0], rtol=1e-4, atol=1e-4)
    canvas = run(params, {"x": x, "reference": r}, t, cond)
    both = np.concatenate([canvas["x"], canvas["reference"]], axis)
    np.testing.assert_allclose(both, whole, rtol=1e-4, atol=1e-4)


def training_names(tree):
    return diffjax.training.partial.named(tree)


def test_an_image_of_the_condition_goes_on_with_the_clean_reference():
    rng = np.random.default_rng(0)
    net = networks.from_linen(networks.DiT(width=8, depth=1, heads=2, image_channels=2))
    x, r, known = (rng.normal(size=(2, 4, 4, 1)).astype(np.float32) for _ in range(3))
    mask, t = np.ones_like(x), np.float32([0.3, 0.6])
    image = np.concatenate([known, mask], -1)
    base = networks.random_parameters(net.module, x, t, {"image": image})
    fn = adapters.adapt(net, wear=adapters.concatenation())
    params = fn.init(jax.random.key(0), base, x, t, {"image": image})
    noisy = {"x": x, "reference": 0.5 * r}
    got = jax.jit(fn)(params, noisy, t, {"image": image, "wear": {"reference": r}})
    shown = np.concatenate([image, np.concatenate([r, 0 * r], -1)], 1)
    want = jax.jit(net)(base, np.concatenate([x, 0.5 * r], 1), t, {"image": shown})
    np.testing.assert_allclose(np.concatenate([got["x"], got["reference"]], 1), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="clean reference"):
        fn(params, noisy, t, {"image": image})


def test_guidance_by_an_empty_reference_keeps_the_label():
    net, base, x, t, cond = network("unet")
    fn = adapters.adapt(net, wear=adapters.concatenation())
    params = moved(jax.jit(fn.init)(jax.random.key(0), base, x, t, cond))
    null = {"wear": {"reference": np.zeros(x.shape[1:], np.float32)}}
    d = diffjax.denoiser(fn, processes.rectified(), diffjax.from_velocity, params, null=null)
    r = np.ascontiguousarray(x[::-1])
    x = jax.numpy.asarray(x)
    at = jax.jit(lambda d, r: d(x, 0.5, {**cond, "wear": {"reference": r}}).x0)
    want = 3 * at(d, r) - 2 * at(d, 0 * r)
    np.testing.assert_allclose(at(guidance.cfg(3.0)(d), r), want, rtol=1e-3, atol=1e-3)


def test_bad_input():
    net, base, x, t, cond = network("unet")
    fn = adapters.adapt(net, wear=adapters.concatenation())
    params = fn.init(jax.random.key(0), base, x, t, cond)
    with pytest.raises(ValueError, match='takes {"reference"'):
        fn(params, x, t, {**cond, "wear": x})
    with pytest.raises(ValueError, match="one shape"):
        fn(params, x, t, {**cond, "wear": {"reference": x[:, :2]}})
    with pytest.raises(ValueError, match="one of its places"):
        adapters.adapt(net, wear=adapters.concatenation(3))(params, x, t, {**cond, "wear": {"reference": x}})
