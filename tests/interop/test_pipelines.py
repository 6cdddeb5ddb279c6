"""A pipeline of diffusers, from its folder to samples: those that diffusers draws from the same noise."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import interop
from diffjax.training import CheckpointError
from experiments.interop.goldens import VALUES
from experiments.interop.pipelines import PIPELINE, SAMPLERS, STEPS

values = lambda: interop.open_tensors([PIPELINE / VALUES])


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_those_of_diffusers(name):
    pipe = interop.load_pipeline(PIPELINE)
    s = interop.read_schedule({**pipe.schedule.config, "_class_name": name, **SAMPLERS[name]})
    noise = jnp.moveaxis(jnp.array(values()["noise"]), 1, -1)
    x = jax.jit(diffjax.sample)(jax.random.key(0), pipe.network.denoiser(s), s.solver(STEPS), noise)
    wanted = np.moveaxis(np.array(values()[name]), 1, -1)
    assert np.abs(np.asarray(x) - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_three_lines_and_what_is_known_of_it():
    pipe = interop.load_pipeline(PIPELINE)
    x = jax.jit(diffjax.sample)(
        jax.random.key(0), pipe.denoiser(), pipe.schedule.solver(3), pipe.process.prior(jax.random.key(1), (2, 8, 8, 3))
    )
    assert x.shape == (2, 8, 8, 3) and bool(jnp.isfinite(x).all())
    assert pipe.kind == "DDPMPipeline" and pipe.network.kind == "UNet2DModel"
    assert pipe.network.licence == "cc0-1.0" and "cc0-1.0" in repr(pipe)
    with pytest.raises(ValueError, match="this pipeline has no autoencoder; it has unet"):
        pipe.latent_space()


def test_a_pipeline_written_back_is_the_same(tmp_path):
    pipe = interop.load_pipeline(PIPELINE)
    interop.save_pipeline(tmp_path / "again", pipe)
    again = interop.load_pipeline(tmp_path / "again")
    assert again.schedule.config == pipe.schedule.config and again.kind == pipe.kind and again.index == pipe.index
    jax.tree.map(np.testing.assert_array_equal, again.network.params, pipe.network.params)
    assert again.network.licence == "cc0-1.0"
    with pytest.raises(ValueError, match="is there already"):
        interop.save_pipeline(tmp_path / "again", pipe)


def test_parts_without_counterpart_are_named(tmp_path):
    shutil.copytree(PIPELINE, tmp_path / "p")
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    index |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderDC"],
        "safe": [None, None],
    }
    (tmp_path / "p/model_index.json").write_text(json.dumps(index))
    pipe = interop.load_pipeline(tmp_path / "p")
    assert dict(pipe.others) == {"tokenizer": "CLIPTokenizer", "vae": "AutoencoderDC"}
    with pytest.raises(ValueError, match="autoencoder of this pipeline is a AutoencoderDC, which has no counterpart"):
        pipe.latent_space()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has no model_index.json, so that it is no pipeline"):
        interop.load_pipeline(PIPELINE / "unet")
    shutil.copytree(PIPELINE, tmp_path / "p")
    (tmp_path / "p/scheduler/scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no scheduler/scheduler_config.json"):
        interop.load_pipeline(tmp_path / "p")
    with pytest.raises(ValueError, match=r"no scheduler_config.json was found beside this UNet2DModel"):
        interop.load_pretrained(tmp_path / "p/unet").denoiser()
    shutil.rmtree(tmp_path / "p/unet")
    with pytest.raises(CheckpointError, match="lacks the folder unet of its UNet2DModel"):
        interop.load_pipeline(tmp_path / "p")
