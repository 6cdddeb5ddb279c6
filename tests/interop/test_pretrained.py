"""Folders of weights: what is read and written, what is kept of licence and origin, and what is refused by name."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_tools import CONFIG, arrays, equal, folder_of, parameters
from test_tensors import Bomb

from diffjax import cli, interop, networks
from diffjax.interop import as_pretrained, load_pretrained, open_tensors, pretrained, rules, save_pretrained
from diffjax.training import CheckpointError

CARD = "---\nlicense: openrail++\ntags:\n- image\n---\n# A tiny autoencoder\n"


# --------------------------------------------------------------------------------------------------- read and written


def test_a_folder_is_read_and_written_back_in_every_bit(tmp_path):
    found = load_pretrained(folder_of(tmp_path / "theirs"))
    assert (found.kind, found.config) == ("AutoencoderKL", CONFIG)
    assert found.module == networks.KLAutoencoder(widths=(4, 4), latent_channels=2, groups=2)
    save_pretrained(tmp_path / "deep" / "ours", found, shard=3000)
    again = tmp_path / "deep" / "ours"
    assert equal(open_tensors(again), arrays()) and len(list(again.glob("*.safetensors"))) > 2
    assert json.loads((again / "config.json").read_text()) == CONFIG
    assert load_pretrained(again).module == found.module
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["ours"]


def test_variants_and_dtypes(tmp_path):
    folder = folder_of(tmp_path)
    half = {n: a.astype("float16") for n, a in arrays().items()}
    interop.write(folder / "diffusion_pytorch_model.fp16.safetensors", half)
    dtypes = lambda **options: {str(a.dtype) for a in jax.tree.leaves(load_pretrained(folder, **options).params)}
    assert dtypes() == {"float32"}
    assert dtypes(weights="diffusion_pytorch_model.fp16.safetensors") == {"float16"}
    assert dtypes(weights=["diffusion_pytorch_model.fp16.safetensors"], dtype=jnp.bfloat16) == {"bfloat16"}
    found = load_pretrained(folder, jnp.bfloat16)
    posterior = jax.eval_shape(lambda p, x: found.fn(p).encode(x), found.params, np.zeros((1, 4, 4, 3), np.float32))
    assert posterior.mean.dtype == np.float32


def test_names_of_attention_before_it_was_one_class(tmp_path):
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    old = {}
    for name, a in arrays().items():
        for before, after in new.items():
            name = name.replace(f"attentions.0.{after}.", f"attentions.0.{before}.")
        old[name] = a
    assert set(old) != set(arrays())
    save_pretrained(tmp_path / "new", load_pretrained(folder_of(tmp_path / "old", tensors=old)))
    assert equal(open_tensors(tmp_path / "new"), arrays())


def test_a_network_of_ours_goes_out_and_comes_back(tmp_path):
    net = networks.VQAutoencoder(
        widths=(8, 8), latent_channels=3, bottleneck=5, codes=7, act=jax.nn.relu, act_out=jax.nn.silu
    )
    made = as_pretrained("VQModel", net, parameters(net, 1), in_channels=1, scaling_factor=0.5)
    save_pretrained(tmp_path / "vq", made)
    found = load_pretrained(tmp_path / "vq")
    assert found.module == dataclasses.replace(net, groups=2, parent=None)
    assert found.config["vq_embed_dim"] == 3 and found.config["latent_channels"] == 5
    jax.tree.map(np.testing.assert_array_equal, found.params, made.params)


def test_the_autoencoder_of_stable_diffusion_has_its_published_size():
    # the fields of the configuration released with it
    config = dict(
        act_fn="silu", block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4, in_channels=3,
        latent_channels=4, layers_per_block=2, norm_num_groups=32, out_channels=3, sample_size=512,
        up_block_types=["UpDecoderBlock2D"] * 4, _class_name="AutoencoderKL",
    )  # fmt: skip
    peer = interop.CLASSES["AutoencoderKL"]
    module = peer.network(config)
    assert dataclasses.replace(module, groups=None, parent=None) == networks.preset("kl-f8")
    shapes = rules.shapes_of(peer.rules(module), pretrained.template_of(peer, module, config))
    assert sum(int(np.prod(s)) for s in shapes.values()) == 83_653_863
    assert shapes["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"] == (256, 512, 1, 1)


# ------------------------------------------------------------------------------------------------------ latent space


def shift_and_scale(**fields):
    net = networks.KLAutoencoder(widths=(4, 4), latent_channels=2, groups=2)
    space = as_pretrained("AutoencoderKL", net, parameters(net), **fields).latent_space()
    return np.asarray(space.shift).tolist(), np.asarray(space.scale).tolist()


def test_factors_of_the_latent_are_where_latent_spaces_have_them():
    assert shift_and_scale(scaling_factor=0.25) == ([0, 0], [4, 4])
    assert shift_and_scale(scaling_factor=0.5, shift_factor=0.25) == ([0.25, 0.25], [2, 2])
    moments = dict(latents_mean=[1.0, 2.0], latents_std=[0.5, 3.0])
    assert shift_and_scale(scaling_factor=0.5, **moments) == ([1, 2], [1, 6])
    with pytest.raises(ValueError, match="say two things or half a thing"):
        shift_and_scale(latents_mean=[1.0, 2.0])


def test_the_latent_is_that_of_their_pipelines(tmp_path):
    found = load_pretrained(folder_of(tmp_path, CONFIG | dict(scaling_factor=0.3, shift_factor=0.1)))
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype("float32")
    space, plain = found.latent_space(), found.fn(found.params)
    z = plain.encode(x).mean
    np.testing.assert_allclose(space.encode(x), (z - 0.1) * 0.3, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(space.decode((z - 0.1) * 0.3), plain.decode(z), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ licence and origin


def test_licence_and_origin_are_shown_and_kept(tmp_path):
    folder = folder_of(tmp_path / "vae", CONFIG | {"_name_or_path": "somebody/tiny-vae"})
    found = load_pretrained(folder)
    n = sum(a.size for a in arrays().values())
    assert repr(found) == f"Pretrained(AutoencoderKL, {n:,} parameters, licence: not stated, origin: somebody/tiny-vae)"
    licence = "\r\nTHE TINY \N{COPYRIGHT SIGN}\r\n".encode() + b"\xff\x1b[2J"
    (folder / "LICENSE.txt").write_bytes(licence)
    assert load_pretrained(folder).licence == "THE TINY \N{COPYRIGHT SIGN} (LICENSE.txt)"
    (folder / "README.md").write_text(CARD)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    found = load_pretrained(folder)
    assert found.licence == "openrail++"
    save_pretrained(tmp_path / "copy", found)
    assert (tmp_path / "copy" / "LICENSE.txt").read_bytes() == licence
    again = load_pretrained(tmp_path / "copy")
    assert (again.licence, again.origin) == ("openrail++", "somebody/tiny-vae")
    assert sorted(again.documents) == ["LICENSE.txt", "README.md"]


def test_texts_and_scheduler_of_a_pipeline_belong_to_its_networks(tmp_path):
    folder_of(tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "README.md").write_text(CARD)
    assert load_pretrained(tmp_path / "pipe" / "vae").documents == {}  # not yet a pipeline
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    (tmp_path / "pipe" / "scheduler").mkdir()
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    found = load_pretrained(tmp_path / "pipe" / "vae")
    assert (found.licence, found.origin) == ("openrail++", "A tiny autoencoder")
    assert found.scheduler == {"_class_name": "DDIMScheduler"}
    with pytest.raises(CheckpointError, match="pipe is a pipeline; give the folder of one of its networks: vae"):
        load_pretrained(tmp_path / "pipe")


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "UNet9DModel"}, "class 'UNet9DModel' has no counterpart here; there are .*AutoencoderKL"),
        (
            {"_class_name": "VQModel", "use_quant_conv": True},
            "VQModel has no field use_quant_conv=True; it has act_fn, ",
        ),
        ({"depth": 3}, "AutoencoderKL has no field depth=3"),
        ({"act_fn": "sine"}, "act_fn='sine' has no counterpart here; accepted is 'silu', 'swish'"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types='DownBlock2D' has no counterpart"),
        ({"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "must mirror each other"),
        ({"block_out_channels": [4, 4, 4]}, "must mirror each other"),
        ({"_class_name": "VQModel", "norm_type": "spatial", "norm_num_groups": 2}, "norm_type='spatial' has 32 groups"),
        ({"norm_num_groups": 3}, "channels divisible by groups=3"),
    ],
)
def test_configurations_that_cannot_be_expressed(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder_of(tmp_path, CONFIG | fields))


def test_configurations_that_are_none(tmp_path):
    folder = folder_of(tmp_path)
    for text, message in [
        ("{", "config.json cannot be read"),
        ("[]", "must hold a JSON object; it holds a list"),
        ("{}", "has no _class_name; known classes are"),
        ('{"_class_name": ["a"]}', "has no _class_name"),
    ]:
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        load_pretrained(folder)


def test_a_name_that_is_no_folder_is_not_downloaded():
    with pytest.raises(
        CheckpointError, match="no folder org/model. Nothing is downloaded: .*hf download org/model --local"
    ):
        load_pretrained("org/model")


def test_weights_of_another_size(tmp_path):
    folder = folder_of(tmp_path, CONFIG | {"latent_channels": 3})
    with pytest.raises(
        CheckpointError, match=r"of another shape.*decoder.conv_in.weight: \[4, 2, 3, 3\] instead of \[4, 3"
    ):
        load_pretrained(folder)


def test_missing_and_unexpected_weights(tmp_path):
    folder = folder_of(tmp_path, CONFIG | {"use_quant_conv": False, "layers_per_block": 2})
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)
    assert "unexpected (2): quant_conv.bias, quant_conv.weight" in str(error.value)
    assert "missing (32): decoder.up_blocks.0.resnets.2.conv1.bias" in str(error.value)


def test_a_folder_of_pickles(tmp_path):
    folder = folder_of(tmp_path)
    exploded = tmp_path / "exploded"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(exploded)))
    with pytest.raises(
        CheckpointError, match="pickles alone .diffusion_pytorch_model.bin.*never opened.*safe_serialization"
    ):
        load_pretrained(folder)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_pretrained(folder, weights="diffusion_pytorch_model.bin")
    assert not exploded.exists()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            networks.KLAutoencoder(patch=2),
            "KLAutoencoder.patch=2 has no counterpart in the other library; accepted is 1",
        ),
        (networks.KLAutoencoder(linear=True), "linear=True has no counterpart"),
        (networks.KLAutoencoder(bottleneck=7), "bottleneck=7 has no counterpart .* accepted is None, 4"),
        (networks.KLAutoencoder(act=jnp.tanh, act_out=jax.nn.silu), "act=.* has no name in the other library"),
        (networks.KLAutoencoder(act=jax.nn.relu), "last activation is SiLU"),
        (networks.KLAutoencoder(widths=(8, 16)), "one number of groups for all norms; .*have .2, 4."),
        (networks.VQAutoencoder(average=True), "average=True has no counterpart"),
    ],
)
def test_networks_that_the_other_library_lacks(net, message):
    kind = "VQModel" if isinstance(net, networks.VQAutoencoder) else "AutoencoderKL"
    with pytest.raises(ValueError, match=message):
        as_pretrained(kind, net, {})


# ------------------------------------------------------------------------------------------------------------ writing


def test_what_does_not_belong_together_is_not_written(tmp_path):
    found = load_pretrained(folder_of(tmp_path / "a"))
    with pytest.raises(ValueError, match="not that of the module: it has layers_per_block=1 instead of 2"):
        save_pretrained(tmp_path / "b", dataclasses.replace(found, module=found.module.clone(blocks=2)))
    with pytest.raises(
        ValueError, match=r"encoder/in/kernel has shape \[3, 3, 3, 4\], in the configuration \[3, 3, 1, 4\]"
    ):
        save_pretrained(tmp_path / "b", dataclasses.replace(found, config=CONFIG | {"in_channels": 1}))
    with pytest.raises(ValueError, match="a is there already; give a new folder"):
        save_pretrained(tmp_path / "a", found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_full_disk_leaves_no_folder(tmp_path, full_disk):
    found = load_pretrained(folder_of(tmp_path / "a"))
    with full_disk(15_000), pytest.raises(OSError, match="File too large"):
        save_pretrained(tmp_path / "b", found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


# ------------------------------------------------------------------------------------------------------- command line


def command(capsys, *argv):
    code = cli.main(["pretrained", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_shows_what_a_folder_holds_and_reads_no_array(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "vae", CONFIG | {"_name_or_path": "somebody/tiny-vae"})
    (folder / "LICENSE").write_text("MIT License")
    monkeypatch.setattr(interop.Tensors, "__getitem__", None)
    code, out, _ = command(capsys, folder)
    n = sum(a.size for a in arrays().values())
    assert code == 0
    assert out.splitlines()[:6] == [
        "class       AutoencoderKL",
        f"parameters  {n:,} (float32, {4 * n:,} bytes)",
        "licence     MIT License (LICENSE)",
        "origin      somebody/tiny-vae",
        "scheduler   none",
        "loads       yes",
    ]
    assert "  block_out_channels = [4, 4]" in out.splitlines()


def test_the_command_says_what_does_not_fit(tmp_path, capsys):
    folder = folder_of(tmp_path / "a", CONFIG | {"use_quant_conv": False})
    code, out, _ = command(capsys, folder)
    assert code == 2 and "loads       no\nunexpected (2): quant_conv.bias, quant_conv.weight\n" in out
    folder = folder_of(tmp_path / "b", CONFIG | {"_class_name": "UNet9DModel"})
    code, out, _ = command(capsys, folder)
    assert code == 2 and "class       UNet9DModel\n" in out and "'UNet9DModel' has no counterpart here" in out
    code, out, err = command(capsys, tmp_path / "c", "--weights", "d.safetensors")
    assert code == 2 and out == "" and "Nothing is downloaded" in err
    code, _, err = command(capsys, folder, "--weights", "d.safetensors")
    assert code == 2 and "there is no file" in err
