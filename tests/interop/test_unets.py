"""What the U-Nets of other libraries say and what is refused; their numbers are compared in test_goldens."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from diffjax import interop
from diffjax import networks as nw
from diffjax.interop import guided, text_unets, unets
from diffjax.interop.kinds import parted
from diffjax.interop.text_unets import text_time
from diffjax.interop.unet_rules import settled
from diffjax.networks.layers import GroupNorm
from diffjax.networks.transformer import transformer
from diffjax.networks.unet_parts import ResBlock, added, enlarged, strided
from diffjax.training import CheckpointError

PLAIN = dict(
    block_out_channels=[8, 16],
    norm_num_groups=4,
    layers_per_block=1,
    down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D"],
)
TEXT = dict(
    block_out_channels=[8, 16],
    norm_num_groups=4,
    layers_per_block=1,
    cross_attention_dim=6,
    attention_head_dim=2,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)
SKIP = dict(
    PLAIN,
    down_block_types=["SkipDownBlock2D", "SkipDownBlock2D"],
    up_block_types=["SkipUpBlock2D", "SkipUpBlock2D"],
    norm_num_groups=None,
    mid_block_scale_factor=2**0.5,
    attention_head_dim=None,
)
FLAGS = dict(image_size=8, num_channels=8, channel_mult="1,2", attention_resolutions="4", norm_groups=4)


def shapes(net, *args):
    return jax.eval_shape(net.init, jax.random.key(0), *args)["params"]


@pytest.mark.parametrize(
    "kind, config",
    [
        ("UNet2DModel", PLAIN | {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}),
        ("UNet2DModel", PLAIN | {"num_class_embeds": 3, "attention_head_dim": None, "in_channels": 7}),
        ("UNet2DModel", PLAIN | {"resnet_time_scale_shift": "scale_shift", "mid_block_type": None}),
        ("UNet2DModel", SKIP | {"time_embedding_type": "fourier"}),
        ("UNet2DConditionModel", TEXT | {"mid_block_type": "UNetMidBlock2D", "in_channels": 9}),
        ("UNet2DConditionModel", TEXT | {"transformer_layers_per_block": [2, 3], "attention_head_dim": [1, 4]}),
        ("UNet2DConditionModel", TEXT | {"time_cond_proj_dim": 5}),
        ("GuidedDiffusion", FLAGS | {"class_cond": True, "resblock_updown": True, "use_new_attention_order": True}),
        ("GuidedDiffusion", FLAGS | {"large_size": 8, "learn_sigma": True, "num_head_channels": 4}),
        ("ControlNetModel", {n: v for n, v in TEXT.items() if n != "up_block_types"}),
    ],
)
def test_the_configuration_of_a_module_makes_the_module(kind, config):
    peer = interop.CLASSES[kind]
    module = peer.network(config)
    page = peer.config(module)
    assert peer.network(page) == module
    tree = shapes(module, *peer.example(module, config))
    theirs = interop.save(peer.table(module, config), jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), tree))
    assert sum(theirs[name].size for name in theirs) == nw.parameter_count(tree)


@pytest.mark.parametrize(
    "kind, config, match",
    [
        ("UNet2DModel", PLAIN | {"act_fn": "gelu"}, "UNet2DModel: act_fn='gelu' has no counterpart"),
        ("UNet2DModel", PLAIN | {"center_input_sample": True}, "center_input_sample=True"),
        ("UNet2DModel", PLAIN | {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("UNet2DModel", PLAIN | {"time_embedding_type": "learned"}, "time_embedding_type='learned'"),
        ("UNet2DModel", PLAIN | {"mid_block_scale_factor": 2.0}, "mid_block_scale_factor=2.0"),
        ("UNet2DModel", PLAIN | {"attention_head_dim": 5}, "attention_head_dim=5 does not divide 16 channels"),
        ("UNet2DModel", PLAIN | {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "must mirror each other"),
        (
            "UNet2DModel",
            PLAIN | {"down_block_types": ["KDownBlock2D", "DownBlock2D"]},
            "down_block_types='KDownBlock2D'",
        ),
        ("UNet2DModel", SKIP | {"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]}, "resample in different ways"),
        ("UNet2DModel", SKIP | {"norm_num_groups": 4}, "blocks with skips need .* got {'norm_num_groups': 4}"),
        ("UNet2DModel", PLAIN | {"width": 3}, "UNet2DModel has no field width=3"),
        ("UNet2DConditionModel", TEXT | {"encoder_hid_dim": 5}, "encoder_hid_dim=5 has no counterpart"),
        (
            "UNet2DConditionModel",
            TEXT | {"time_cond_proj_dim": 256, "class_embed_type": "projection"},
            r"\('projection', None, True\)",
        ),
        ("UNet2DConditionModel", TEXT | {"conv_in_kernel": 5}, "conv_in_kernel=5"),
        ("UNet2DConditionModel", TEXT | {"norm_num_groups": None}, "norm_num_groups=None has no counterpart"),
        ("UNet2DConditionModel", TEXT | {"addition_embed_type": "text_time"}, "embeddings_input_dim=None has no"),
        (
            "UNet2DConditionModel",
            TEXT | {"attention_head_dim": 3},
            "attention_head_dim=3, the number of heads, does not",
        ),
        (
            "UNet2DConditionModel",
            TEXT | {"class_embed_type": "identity"},
            r"\('identity', None, False\) has no counterpart",
        ),
        ("UNet2DConditionModel", TEXT | {"layers_per_block": [1, 2]}, "layers_per_block=.* one value for all levels"),
        ("UNet2DConditionModel", TEXT | {"transformer_layers_per_block": [[1], [2]]}, "transformer_layers_per_block="),
        ("UNet2DConditionModel", TEXT | {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2}, "SimpleCrossAttn"),
        ("UNet2DConditionModel", TEXT | {"up_block_types": ["UpBlock2D"] * 2}, "must mirror each other"),
        ("ControlNetModel", {"controlnet_conditioning_channel_order": "bgr"}, "channel_order='bgr' has no counterpart"),
        ("GuidedDiffusion", FLAGS | {"num_heads_upsample": 2}, "num_heads_upsample=2"),
        ("GuidedDiffusion", {"image_size": 48}, "image_size=48"),
        ("GuidedDiffusion", FLAGS | {"num_head_channels": 3}, "do not divide 16 channels"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(kind, config, match):
    with pytest.raises(ValueError, match=match):
        interop.CLASSES[kind].network(config)


@pytest.mark.parametrize(
    "kind, change, match",
    [
        ("UNet2DModel", {"kernel": 5}, "cannot express this UNet: kernel=5, in UNet2DModel 3"),
        ("UNet2DModel", {"frequencies": (1.0, 256.0)}, "frequencies="),
        (
            "UNet2DModel",
            {"head_size": 4, "heads": (1, 3)},
            "attention_head_dim=5 does not divide 16 channels",
        ),
        ("UNet2DConditionModel", {"late": True}, "late=True, in UNet2DConditionModel False"),
        ("GuidedDiffusion", {"middle": (True,)}, "middle=.True,., in GuidedDiffusion .True, False."),
    ],
)
def test_modules_that_they_cannot_express_are_refused(kind, change, match):
    config = {"UNet2DModel": PLAIN, "UNet2DConditionModel": TEXT, "GuidedDiffusion": FLAGS}[kind]
    peer = interop.CLASSES[kind]
    with pytest.raises(ValueError, match=match):
        peer.config(peer.network(config).clone(**change))


def test_a_network_of_ours_becomes_one_of_theirs(tmp_path):
    norm = nw.part(GroupNorm, groups=4, eps=1e-5)
    mix = nw.part(transformer, norm=nw.part(GroupNorm, groups=4), depth=1, only_tokens=False)
    net = nw.UNet(
        widths=(8, 16), code=32, sinusoids=8, attention=(0,), heads=(2, 2), token_size=6, out_channels=4, middle=(False,),
        frequencies=nw.falling(), norm=norm, block=nw.part(ResBlock, modulation=added), down=strided, up=enlarged,
        mix=(mix, mix),
    )  # fmt: skip
    x, t, cond = (
        np.zeros((1, 4, 4, 4), np.float32),
        np.zeros(1, np.float32),
        {"tokens": np.zeros((1, 2, 6), np.float32)},
    )
    params = nw.random_parameters(net, x, t, cond)
    model = interop.as_pretrained("UNet2DConditionModel", net, params, use_linear_projection=True)
    interop.save_pretrained(tmp_path / "unet", model)
    again = interop.load_pretrained(tmp_path / "unet")
    assert again.module == net
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    assert interop.open_tensors(tmp_path / "unet").shapes["down_blocks.0.attentions.0.proj_in.weight"] == (8, 8)


def test_queries_keys_and_values_in_both_orders():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, 5)) for _ in range(3))  # heads, channels of a head, inputs
    by_kind = np.concatenate([a.reshape(6, 5) for a in (q, k, v)])[..., None]
    by_head = np.stack([q, k, v], axis=1).reshape(18, 5)
    kernel, _ = guided.fused(2)
    np.testing.assert_array_equal(kernel.read(by_kind), by_head.T)
    np.testing.assert_array_equal(kernel.write(by_head.T)[0], by_kind)


def test_a_file_of_guided_diffusion_with_its_flags(tmp_path):
    flags = FLAGS | {"learn_sigma": True, "class_cond": True, "num_classes": 5, "num_res_blocks": 1}
    net = guided.network(flags)
    x, t, label = np.zeros((2, 4, 4, 3), np.float32), np.float32([3.0, 9.0]), np.int32([0, 4])
    params = nw.random_parameters(net, x, t, label)
    interop.write(tmp_path / "adm.safetensors", interop.save(guided.rules(net, flags), params))
    model = interop.load_guided(tmp_path / "adm.safetensors", flags | {"noise_schedule": "cosine"})
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    interop.save_pretrained(tmp_path / "folder", model)
    again = interop.load_pretrained(tmp_path / "folder")
    assert again.module == net and again.scheduler == model.scheduler
    process = again.schedule().process
    steps = np.arange(1001)
    cosine = np.cos((steps / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = np.cumprod(1 - np.minimum(1 - cosine[1:] / cosine[:-1], 0.999))
    np.testing.assert_allclose(np.asarray(process.alpha(jnp.float32(0.501))) ** 2, alpha_bar[500], rtol=1e-4)
    with pytest.raises(ValueError, match="GuidedDiffusion: rescale_timesteps=True"):
        interop.load_guided(tmp_path / "adm.safetensors", flags | {"diffusion_steps": 4000, "rescale_timesteps": True})
    with pytest.raises(CheckpointError, match=r"missing .*input_blocks.2.0.emb_layers"):
        interop.load_guided(tmp_path / "adm.safetensors", FLAGS | {"class_cond": True, "num_res_blocks": 2})


def test_the_vector_of_sdxl_is_the_text_and_sinusoids_of_every_number():
    text, numbers = np.ones((2, 3), np.float32), np.float32([[1, 2], [3, 400]])
    found = np.asarray(text_time(jnp.asarray(text), jnp.asarray(numbers), 4))
    w = np.array([1.0, 0.01])
    rows = [np.concatenate([f(n * w) for n in row for f in (np.cos, np.sin)]) for row in numbers]
    np.testing.assert_allclose(found, np.concatenate([text, np.stack(rows)], axis=1), atol=1e-4)


def test_a_network_of_noise_levels_is_called_with_their_logarithm():
    net = unets.OfNoise(lambda params, x, t, cond, key: params * x * t.reshape(-1, 1))
    t = np.float32([2.0, 4.0])
    np.testing.assert_allclose(net(3.0, np.ones((2, 1), np.float32), t)[:, 0], 3 * np.log(t) / t, rtol=1e-6)


@pytest.mark.parametrize(
    "kind, name, fields, config",
    [
        ("UNet2DConditionModel", "sd-1", {}, dict(cross_attention_dim=768)),
        ("UNet2DConditionModel", "sd-2", {}, dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20])),
        (
            "UNet2DConditionModel",
            "sdxl",
            {},
            dict(block_out_channels=[320, 640, 1280], transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048)
            | dict(attention_head_dim=[5, 10, 20], addition_embed_type="text_time", addition_time_embed_dim=256)
            | dict(down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, use_linear_projection=True)
            | dict(
                up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], projection_class_embeddings_input_dim=2816
            ),
        ),
        (
            "UNet2DModel",
            "ddpm-256",
            dict(frequencies=nw.falling(1, False), out_channels=3),
            dict(
                block_out_channels=[128, 128, 256, 256, 512, 512], attention_head_dim=None, norm_eps=1e-6, freq_shift=1
            )
            | dict(down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"], downsample_padding=0)
            | dict(up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4, flip_sin_to_cos=False),
        ),
        (
            "UNet2DModel",
            "ncsn++-256",
            dict(frequencies=nw.kept_fourier(16.0), out_channels=3),
            dict(
                block_out_channels=[128, 128] + [256] * 5, attention_head_dim=None, norm_eps=1e-6, norm_num_groups=None
            )
            | dict(down_block_types=["SkipDownBlock2D"] * 4 + ["AttnSkipDownBlock2D"] + ["SkipDownBlock2D"] * 2)
            | dict(up_block_types=["SkipUpBlock2D"] * 2 + ["AttnSkipUpBlock2D"] + ["SkipUpBlock2D"] * 4)
            | dict(mid_block_scale_factor=2**0.5, time_embedding_type="fourier"),
        ),
        (
            "GuidedDiffusion",
            "adm-512",
            dict(num_classes=1000, null_label=False, out_channels=6),
            dict(image_size=512, num_channels=256, attention_resolutions="32,16,8", class_cond=True, learn_sigma=True)
            | dict(num_head_channels=64, resblock_updown=True),
        ),
        (
            "GuidedDiffusion",
            "adm-64-256",
            dict(num_classes=1000, null_label=False, out_channels=6),
            dict(large_size=256, small_size=64, num_channels=192, attention_resolutions="32,16,8", num_heads=4)
            | dict(class_cond=True, learn_sigma=True, resblock_updown=True),
        ),
    ],
)
def test_presets_are_what_published_configurations_make(kind, name, fields, config):
    fields = dict(frequencies=nw.falling(), **({"out_channels": 4} if kind == "UNet2DConditionModel" else {})) | fields
    peer = interop.CLASSES[kind]
    assert settled(peer.network(config)) == settled(nw.preset(name, **fields))
    assert peer.config(nw.preset(name, **fields)) == peer.config(peer.network(config))


def test_published_sizes():
    sd = text_unets.network(dict(cross_attention_dim=768))
    args = np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.float32), {"tokens": np.zeros((1, 77, 768), np.float32)}
    assert nw.parameter_count(shapes(sd, *args)) == 859_520_964
    adm = guided.network(
        dict(image_size=256, num_channels=256, attention_resolutions="32,16,8", class_cond=True, learn_sigma=True)
        | dict(num_head_channels=64, resblock_updown=True)
    )
    state = np.zeros((1, 32, 32, 3), np.float32)
    assert nw.parameter_count(shapes(adm, state, args[1], np.zeros(1, np.int32))) == 553_838_086
    ddpm = unets.network(
        dict(block_out_channels=[128, 256, 256, 256], attention_head_dim=None)
        | dict(down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"])
        | dict(up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])
    )
    assert nw.parameter_count(shapes(ddpm, state, args[1])) == 35_746_307


@pytest.mark.parametrize("shape", [(6, 5), (6,)])
def test_one_matrix_of_theirs_as_two_of_ours(shape):
    a = np.arange(np.prod(shape), dtype=ml_dtypes.bfloat16).reshape(shape)
    kind = parted(2)
    first, second = kind.read(a)
    np.testing.assert_array_equal(first.T, a[:3])
    np.testing.assert_array_equal(second.T, a[3:])
    np.testing.assert_array_equal(kind.write(first, second)[0], a)
    rules = [interop.Rule(("x", "y"), ("both",), kind)]
    ours = interop.load(rules, {"both": a}, {"x": first, "y": second})
    np.testing.assert_array_equal(interop.save(rules, ours)["both"], a)
    with pytest.raises(CheckpointError, match=r"both: \[2, 2\] instead of"):
        interop.load(rules, {"both": np.zeros((2, 2))}, {"x": first, "y": second})
    with pytest.raises(ValueError, match="the rules do not fit the network: y"):
        interop.load(rules, {"both": a}, {"x": first})
