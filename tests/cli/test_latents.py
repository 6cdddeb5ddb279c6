"""`diffjax train --latent`: the first stage, the run in latents, and what the other commands make of it."""

import json
import re
import types

import jax
import numpy as np
import pytest
from cli_tools import TINY, png_size

import diffjax
from diffjax import cli, latent
from diffjax import networks as nw
from diffjax.cli import config, evaluate, latents
from diffjax.cli import run as runs
from diffjax.networks import presets

SMALL = [
    *(o for o in TINY if "depth" not in o),
    "--model.multipliers",
    "1",
    "--model.attention",
    "--training.steps=4",
    "--training.save-every=4",
]
SMALL += ["--training.sample-every=4", "--latent-steps=2"]


@pytest.fixture
def tiny_preset(monkeypatch):
    """A smaller `kl4`: one pixel a place, so that digits keep 4 x 4 places."""
    fields = dict(widths=(8,), blocks=1, latent_channels=4, patch=2, linear=True, middle_attention=False)
    monkeypatch.setitem(presets.AUTOENCODER_PRESETS, "kl4", (nw.KLAutoencoder, fields))


@pytest.mark.slow
def test_a_run_in_latents_is_trained_sampled_and_scored(call, tmp_path, tiny_preset):
    code, out, err = call("train", "digits", "--run", "a", "--latent", "kl4", *SMALL)
    assert code == 0, err
    assert "first stage: kl4" in err and "64 numbers of an item as 64" in err
    about = json.loads((tmp_path / "a/model.json").read_text())
    assert about["shape"] == [4, 4, 4] and about["pixels"] == [8, 8, 1] and about["transform"]["shape"] == [8, 8, 1]
    assert min(png_size(tmp_path / "a/samples/step_0000004.png")) > 50
    scores = json.loads((tmp_path / "a/metrics.json").read_text())["scores"]
    assert np.isfinite(scores["frechet_randconv"]["score"])  # of decoded pictures: latents have no such score

    code, out, err = call("sample", "a", "--n", 4)
    assert code == 0, err
    (file,) = (tmp_path / "a/samples").glob("*.npz")
    with np.load(file) as found:
        assert found["x"].shape == (4, 8, 8, 1) and 0 <= found["x"].min() <= found["x"].max() <= 16
    run = diffjax.load("a")
    assert run.shape == (4, 4, 4) and run.decode(np.zeros((2, 4, 4, 4), np.float32)).shape == (2, 8, 8, 1)
    code, out, err = call("eval", "a", "--n", 16)
    assert code == 0, err

    assert call("train", "--resume", "a", "--training.steps", 5).code == 0
    code, _, err = call("train", "digits", "--run", "b", "--latent", "a", *SMALL[:-1], "--no-scores")
    assert code == 0 and "first stage" not in err
    np.testing.assert_array_equal(latent.load("b/autoencoder.safetensors").scale, run.space.scale)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["digits", "--latent", "kl5"], "neither a preset .* nor a run or file"),
        (["gaussians", "--latent", "kl4"], "--latent needs pictures"),
        (["digits", "--latent", "kl4", "--training.augment", "flip"], "moves pixels, not latents"),
        (["digits", "--latent", "kl4", "--latent-steps", "0"], "--latent-steps must be"),
        (["digits", "--latent", "kl4", "--network", "mlp"], "does not fit items of shape"),
        (["digits", "--latent", "kl4", "--init", "nowhere"], "--init nowhere"),
        (["digits", "--latent-steps", "50"], "--latent-steps 50 is for an autoencoder that is trained here"),
        (["digits", "--latent", "wrong.safetensors"], "does not fit items of shape"),
        (["digits", "--latent", "broken.safetensors"], "is no safetensors file, or damaged"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(call, argv, words, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "_train", lambda *_: pytest.fail("the first stage was trained"))
    fields = dict(widths=(8,), patch=1, latent_channels=2, linear=False)
    make, x = nw.autoencoder(nw.preset("kl4", **fields)), np.zeros((1, 4, 4, 3), np.float32)
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(make.init, jax.random.key(0), x))
    space = latent.LatentSpace(make(params), np.zeros(2, "f"), np.ones(2, "f"))
    whole = latent.save(tmp_path / "wrong.safetensors", space, "kl4", (4, 4, 3), **fields)
    (tmp_path / "broken.safetensors").write_bytes(whole.read_bytes()[:-100])
    code, _, err = call("train", *argv)
    assert code == 2 and re.search(words, err.replace("\n", " ")), err


def test_ctrl_c_in_the_first_stage_ends_the_run(call, tmp_path, tiny_preset, monkeypatch):
    stopped = types.SimpleNamespace(interrupted=2, exit_code=130, step=1, state=None)
    monkeypatch.setattr(latents.training, "fit", lambda *_, **__: stopped)
    code, _, err = call("train", "digits", "--run", "a", "--latent", "kl4", *SMALL)
    assert code == 130 and "interrupted at step 1 of the first stage" in err
    assert not (tmp_path / "a").exists()


def test_nothing_is_left_where_the_autoencoder_could_not_be_written(tmp_path):
    def fill(folder):
        (folder / latents.FILE).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        runs.start(tmp_path / "a", {"config.json": "{}"}, fill)
    assert not (tmp_path / "a").exists()


def test_a_run_is_not_continued_on_data_of_another_shape():
    data = types.SimpleNamespace(shape=(8, 8, 1), num_classes=10)
    about = {"shape": [4, 4, 4], "pixels": [8, 8, 1], "num_classes": 10}
    evaluate.same_data(config.preset("digits"), data, about)
    with pytest.raises(ValueError, match=r"was trained on \(16, 16, 1\) and 10"):
        evaluate.same_data(config.preset("digits"), data, about | {"pixels": [16, 16, 1]})


def test_an_option_that_is_given_is_not_taken_for_the_preset():
    photos = config.preset("photos")
    read = lambda *argv: cli._options("train", ["photos", *argv], photos)
    assert read("--network", "dit", "--model.width", str(photos.model.width)).model.width == photos.model.width
    assert read("--network", "dit").model.width is None
    assert read("--latent", "kl4").training.augment == "none"
    assert read("--latent", "kl4", "--training.augment", "flip").training.augment == "flip"  # which is refused


def test_latents_are_not_augmented_by_default_and_have_their_shape():
    default = config.preset("photos")
    given = config.dataclasses.replace(default, latent="kl4")
    assert default.training.augment == "flip" and config.settle(given, default).training.augment == "none"
    assert latents.shape_of(given, (32, 32, 3)) == (8, 8, 12)
    assert config.from_json(config.to_json(given)).latent == "kl4"
