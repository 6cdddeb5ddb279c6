"""Transformers of other libraries: what their files say beyond the configuration, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import interop
from diffjax.interop import dit, dit_original, mmdit, transformers
from diffjax.networks import DiT, Learned, MMDiT, Sincos, random_parameters
from diffjax.networks.layers import stack_blocks
from diffjax.training import CheckpointError
from experiments.interop.goldens import FOLDER

DIT = dict(num_attention_heads=2, attention_head_dim=4, num_layers=2, num_embeds_ada_norm=5, sample_size=4)
SD3 = dict(
    num_attention_heads=2, attention_head_dim=4, num_layers=2, joint_attention_dim=6, pooled_projection_dim=5,
    caption_projection_dim=8, sample_size=4, pos_embed_max_size=4, in_channels=3, out_channels=3,
)  # fmt: skip
FLUX = dict(num_attention_heads=2, attention_head_dim=8, axes_dims_rope=[2, 2, 4], num_layers=1, num_single_layers=1)


@pytest.mark.parametrize(
    ("network", "config", "named"),
    [
        (dit.network, DIT | dict(norm_type="ada_norm"), "norm_type='ada_norm'"),
        (dit.network, DIT | dict(activation_fn="geglu"), "activation_fn='geglu'"),
        (dit.network, DIT | dict(dropout=0.1), "dropout=0.1"),
        (dit.network, DIT | dict(norm_elementwise_affine=True), "norm_elementwise_affine=True"),
        (dit.network, DIT | dict(num_embeds_ada_norm=None), "num_embeds_ada_norm"),
        (dit.network, DIT | dict(depth=3), "no field depth=3"),
        (mmdit.sd3_network, SD3 | dict(dual_attention_layers=[1]), "dual_attention_layers"),
        (mmdit.sd3_network, SD3 | dict(dual_attention_layers=[0, 1]), "number of dual_attention_layers=2"),
        (mmdit.sd3_network, SD3 | dict(caption_projection_dim=9), "caption_projection_dim=9"),
        (mmdit.sd3_network, SD3 | dict(qk_norm="layer_norm"), "qk_norm='layer_norm'"),
        (mmdit.flux_network, FLUX | dict(patch_size=2), "patch_size=2"),
        (mmdit.flux_network, FLUX | dict(num_single_layers=0), "num_single_layers=0"),
        (mmdit.flux_network, FLUX | dict(axes_dims_rope=[2, 2, 2]), "axes_dims_rope"),
        (mmdit.flux_network, FLUX | dict(in_channels=6), "in_channels=6"),
        (dit_original.network, dict(class_dropout_prob=0.0), "class_dropout_prob=0.0"),
        (dit_original.network, dict(mlp_ratio=2.5), "mlp_ratio=2.5"),
    ],
)
def test_options_without_counterpart_are_refused_by_name(network, config, named):
    with pytest.raises(ValueError, match=named):
        network(config)


@pytest.mark.parametrize(
    ("config_of", "module", "named"),
    [
        (dit.config, DiT(width=8, heads=2, num_classes=3), "frequencies"),
        (dit.config, dit.network(DIT).clone(qk_norm=True), "qk_norm=True"),
        (dit.config, dit.network(DIT).clone(num_classes=0), "num_classes=0"),
        (dit.config, dit.network(DIT).clone(positions=Sincos()), "positions"),
        (mmdit.sd3_config, mmdit.sd3_network(SD3).clone(num_classes=3), "num_classes=3"),
        (mmdit.sd3_config, mmdit.sd3_network(SD3).clone(vector_size=0), "vector_size=0"),
        (mmdit.flux_config, mmdit.flux_network(FLUX).clone(frequencies=(1.0, 256.0)), "frequencies"),
        (mmdit.flux_config, mmdit.flux_network(FLUX).clone(rope=None), "rope=None"),
    ],
)
def test_modules_without_counterpart_are_refused_by_name(config_of, module, named):
    with pytest.raises(ValueError, match=named):
        config_of(module)


def test_released_sizes_are_those_of_the_presets():
    from diffjax.networks import PRESETS

    for name, sizes in {
        "sd3-medium": dict(num_attention_heads=24, num_layers=24, caption_projection_dim=1536),
        "sd3.5-large": dict(num_attention_heads=38, num_layers=38, caption_projection_dim=2432, qk_norm="rms_norm"),
    }.items():
        make, fields = PRESETS[name]
        found = mmdit.sd3_network(sizes | dict(pos_embed_max_size=192))
        assert isinstance(found, MMDiT)
        assert found.clone(out_channels=None) == make(**fields)
    make, fields = PRESETS["flux-dev"]
    assert mmdit.flux_network(dict(guidance_embeds=True)).clone(out_channels=None) == make(**fields)


def test_kinds_are_inverse():
    rng = np.random.default_rng(0)
    for kind, shape in (
        (transformers.rising, (3, 8)),
        (transformers.pixels(2), (5, 3, 2, 2)),
        (transformers.packed_in(2), (5, 12)),
        (transformers.packed_out(2), (12, 5)),
        (transformers.packed_out(2), (12,)),
    ):
        a = rng.standard_normal(shape)
        (back,) = kind.write(kind.read(a))
        np.testing.assert_array_equal(back, a)


def test_table_of_positions_is_that_of_the_network():
    table = transformers.table_of(6, 4, 8)
    np.testing.assert_allclose(table[0], transformers.positions_of(4, 6)(6, 6, 8), atol=1e-6)
    assert transformers.is_table(table.astype(np.float16), 6, 4)
    assert not transformers.is_table(table + 1e-3, 6, 4)
    assert transformers.fitted(None, table + 1e-3, 6, 4) == Learned(6, 6, crop=True)


def test_learned_positions_are_cut_from_the_middle():
    net = DiT(width=8, depth=1, heads=2, positions=Learned(4, 4, crop=True))
    params = random_parameters(net, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    table = params["positions"]["table"].reshape(4, 4, 8)
    got = Learned(2, 2, crop=True)
    whole = {"positions": {"table": table[1:3, 1:3].reshape(4, 8)}}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 1)), jnp.float32)
    small = net.clone(positions=got).apply({"params": params | whole}, x, jnp.zeros(1))
    np.testing.assert_array_equal(net.apply({"params": params}, x, jnp.zeros(1)), small)
    with pytest.raises(ValueError, match="4 x 4 patches; got 5 x 5"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 10, 10, 1)), jnp.zeros(1))


def test_codes_of_blocks_that_are_equal_are_one_code(tmp_path):
    model = interop.load_pretrained(FOLDER / "DiTTransformer2DModel-tiny")
    assert model.module.own_codes
    tied = {k: a for k, a in model.params.items() if not k.startswith("code_")} | {"code": model.params["code_1"]}
    wanted = interop.as_pretrained(
        "DiTTransformer2DModel", model.module.clone(own_codes=False), tied, in_channels=3, out_channels=6
    )
    interop.save_pretrained(tmp_path / "tied", wanted)
    found = interop.load_pretrained(tmp_path / "tied")
    assert not found.module.own_codes
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    stacked = interop.as_pretrained(
        "DiTTransformer2DModel",
        wanted.module.clone(scan_layers=True),
        stack_blocks(tied),
        in_channels=3,
        out_channels=6,
    )
    interop.save_pretrained(tmp_path / "scanned", stacked)
    found = interop.load_pretrained(tmp_path / "scanned")
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


def test_earlier_name_of_the_class():
    earlier = {"only_cross_attention": False, "cross_attention_dim": None, **DIT}
    assert interop.CLASSES["Transformer2DModel"].network(earlier) == dit.network(DIT)
    with pytest.raises(ValueError, match="only_cross_attention=True"):
        interop.CLASSES["Transformer2DModel"].network(earlier | {"only_cross_attention": True})


def test_original_files_say_their_sizes():
    found = interop.load_dit(FOLDER / "SiT-tiny", "SiT", num_heads=2)
    assert found.module.depth == 2 and found.config["learn_sigma"]
    x, label = jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, jnp.int32)
    assert jax.eval_shape(found.fn, found.params, x, jnp.zeros(1), label).shape == x.shape
    with pytest.raises(ValueError, match="no published network has the width 8; give num_heads"):
        interop.load_dit(FOLDER / "SiT-tiny")
    with pytest.raises(ValueError, match="kind must be"):
        interop.load_dit(FOLDER / "SiT-tiny", "UViT")
    with pytest.raises(CheckpointError, match="is no DiT or SiT"):
        interop.load_dit(FOLDER / "DiTTransformer2DModel-tiny")
