"""Latent spaces: unit deviation, moments against NumPy, chunks, encoded data sets, and the file."""

import jax
import numpy as np
import pytest

from diffjax import data, latent
from diffjax import networks as nw
from diffjax.training import CheckpointError

FIELDS = dict(widths=(8,), latent_channels=5)


@pytest.fixture(scope="module")
def photos():
    return data.load("photos", size=96)


@pytest.fixture(scope="module")
def space(photos):
    """An untrained autoencoder whose latents are far from unit deviation, in its normalised space."""
    net = nw.preset("kl4", **FIELDS)
    make, x = nw.autoencoder(net), photos.read("train")["x"]
    params = nw.start_linear(net, make.init(jax.random.key(0), x[:1]), x)
    params["linear_in"]["map"] = jax.tree.map(lambda a: 3 * a + 0.5, params["linear_in"]["map"])
    params["quant"] = {**params["quant"], "bias": params["quant"]["bias"].at[5:].set(0.5)}  # a wide posterior
    return latent.latent_space(make(params), x, chunk=20)


def test_latents_have_mean_zero_and_deviation_one(space, photos):
    x = photos.read("train")["x"]
    posterior = space.autoencoder.encode(x)
    mean, var = np.asarray(posterior.mean, np.float64), np.exp(np.asarray(posterior.log_variance, np.float64))
    np.testing.assert_allclose(space.shift, mean.mean((0, 1, 2)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(space.scale, np.sqrt(mean.var((0, 1, 2)) + var.mean((0, 1, 2))), rtol=1e-4)
    z = space.encode_all(x, jax.random.key(0))
    count = z[..., 0].size
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, atol=5 / np.sqrt(count))
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=5 / np.sqrt(count))
    assert space.encode_all(x).std((0, 1, 2)).max() < 0.999  # without the posterior's own deviation


def test_one_scale_for_all_channels_is_that_of_all_numbers(space, photos):
    x = photos.read("train")["x"]
    plain = latent.latent_space(space.autoencoder, x, per_channel=False, shift=False)
    z = plain.encode_all(x, jax.random.key(0))
    assert np.unique(plain.scale).size == 1 and not plain.shift.any()
    assert z.std() == pytest.approx(1, abs=0.02) and abs(z.mean()) > 0.01


def test_chunks_do_not_change_the_result_and_the_way_back_undoes_the_scale(space, photos):
    x = photos.read("train", 10)["x"]
    key = jax.random.key(4)
    np.testing.assert_allclose(space.encode_all(x, key, chunk=3), space.encode_all(x, key, chunk=10), atol=1e-5)
    z = space.encode_all(x, chunk=4)
    direct = space.autoencoder.decode(space.autoencoder.encode(x).mean)
    np.testing.assert_allclose(space.decode_all(z, chunk=7), direct, atol=1e-4)
    with pytest.raises(ValueError, match="chunk must be positive"):
        space.encode_all(x, chunk=0)


def test_an_encoded_data_set_keeps_all_but_its_items(space, photos):
    found = latent.encoded(space, photos)
    assert found.shape == (8, 8, 5) and found.num_classes == 2 and len(found) == len(photos)
    rows, source = found.read("test"), photos.read("test")
    np.testing.assert_array_equal(rows["label"], source["label"])
    np.testing.assert_allclose(rows["x"], space.encode_all(source["x"]), atol=1e-5)
    drawn = latent.encoded(space, photos, jax.random.key(0)).read("test")["x"]
    assert np.abs(drawn - rows["x"]).max() > 0.1


def test_save_and_load(space, photos, tmp_path):
    x = photos.read("test", 3)["x"]
    path = latent.save(tmp_path / "autoencoder.safetensors", space, "kl4", photos.shape, **FIELDS)
    again = latent.load(path)
    np.testing.assert_array_equal(again.encode(x), space.encode(x))
    assert again.autoencoder.module == space.autoencoder.module
    with pytest.raises(ValueError, match="is not the preset 'kl4'"):
        latent.save(path, space, "kl4", photos.shape)
    with pytest.raises(CheckpointError, match="there is no file"):
        latent.load(tmp_path / "none.safetensors")


def test_a_channel_that_does_not_vary_is_refused(space, photos):
    params = space.autoencoder.params
    still = {**params, "linear_in": jax.tree.map(np.zeros_like, params["linear_in"])}
    still["quant"] = {**params["quant"], "bias": params["quant"]["bias"].at[5:].set(-100.0)}
    still["quant"]["kernel"] = still["quant"]["kernel"].at[:, 1:].set(0.0).at[:, 0].set(1.0)
    a = nw.autoencoder(space.autoencoder.module)(still)
    with pytest.raises(ValueError, match="of the latent do not vary"):
        latent.latent_space(a, photos.read("train", 4)["x"])
