"""LoRA files in the layouts of other libraries: the change of the weights, by hand, and files that are refused."""

import json

import jax
import numpy as np
import pytest

from diffjax import adapters, interop
from diffjax.interop.lora import METADATA
from diffjax.training import CheckpointError
from experiments.interop.goldens import FOLDER

FLUX = FOLDER / "FluxTransformer2DModel-tiny"
SD3 = FOLDER / "SD3Transformer2DModel-tiny"
LAYERS = {  # shapes of their weights
    "transformer_blocks.0.attn.to_q": (16, 16),
    "transformer_blocks.0.attn.to_v": (16, 16),
    "single_transformer_blocks.0.proj_out": (16, 80),
    "x_embedder": (16, 8),
    "proj_out": (8, 16),
    "norm_out.linear": (32, 16),
    "time_text_embed.timestep_embedder.linear_1": (16, 256),
}


def factors(layers, rank=2, seed=0):
    rng = np.random.default_rng(seed)
    array = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {name: (array(rank, shape[1]), array(shape[0], rank)) for name, shape in layers.items()}


def merged(path, adapter, low, tmp_path):
    """Their weights with the adapter merged by us."""
    model = interop.load_pretrained(path)
    params = adapters.adapt(model.fn, a=adapter).merge({"base": model.params, "adapters": {"a": low}})
    interop.save_pretrained(tmp_path / "merged", interop.Pretrained(model.kind, model.module, params, model.config))
    return interop.open_tensors(tmp_path / "merged"), interop.open_tensors(path)


NAMES = {
    "peft": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "transformer.{}.alpha"),
    "bare": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", "{}.alpha"),
    "older": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", "transformer.{}.alpha"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}


@pytest.mark.parametrize("layout", NAMES)
def test_a_file_changes_their_weights_by_alpha_over_r_b_a(layout, tmp_path):
    pairs = factors(LAYERS)
    alpha = {name: 3.0 + i for i, name in enumerate(LAYERS)} if layout == "older" else dict.fromkeys(LAYERS, 3.0)
    flat = (lambda name: name.replace(".", "_")) if layout == "kohya" else (lambda name: name)
    arrays = {}
    for name, (down, up) in pairs.items():
        values = (down, up, np.asarray(alpha[name], np.float32))
        arrays |= {pattern.format(flat(name)): a for pattern, a in zip(NAMES[layout], values, strict=True)}
    interop.write(tmp_path / "a.safetensors", arrays)
    adapter, low = interop.load_lora(tmp_path / "a.safetensors", interop.load_pretrained(FLUX))
    assert adapter.parts == ("q", "v")
    changed, base = merged(FLUX, adapter, low, tmp_path)
    for name, a in base.items():
        layer = name.removesuffix(".weight")
        delta = 0.0
        if layer in pairs:
            down, up = pairs[layer]
            delta = alpha[layer] / 2 * up @ down
        np.testing.assert_allclose(changed[name], a + delta, atol=1e-5, err_msg=name)


def test_metadata_of_peft_say_the_scale(tmp_path):
    pairs = factors({name: LAYERS[name] for name in list(LAYERS)[:2]}, rank=4)
    config = {"r": 4, "lora_alpha": 8.0, "alpha_pattern": {"to_v": 2.0}, "use_rslora": True}
    arrays = {f"{name}.lora_{h}.weight": a for name, pair in pairs.items() for h, a in zip("AB", pair, strict=True)}
    interop.write(tmp_path / "a.safetensors", arrays, {METADATA: json.dumps(config)})
    adapter, low = interop.load_lora(tmp_path / "a.safetensors", interop.load_pretrained(FLUX))
    changed, base = merged(FLUX, adapter, low, tmp_path)
    for name, scale in zip(pairs, (4.0, 1.0), strict=True):
        down, up = pairs[name]
        np.testing.assert_allclose(changed[f"{name}.weight"], base[f"{name}.weight"] + scale * up @ down, atol=1e-5)
    for field, value in (("use_dora", True), ("init_lora_weights", "pissa")):
        interop.write(tmp_path / "b.safetensors", arrays, {METADATA: json.dumps({**config, field: value})})
        with pytest.raises(CheckpointError, match=f"{field}="):
            interop.load_lora(tmp_path / "b.safetensors", interop.load_pretrained(FLUX))


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_ours_come_back(layout, tmp_path):
    model = interop.load_pretrained(FLUX)
    for fields in (dict(rank=2, parts=("k",)), dict(rank=2, alpha=4.0, targets=r"(qkv|project|hidden|out|in)/kernel$")):
        adapter = adapters.lora(**{"targets": r"attention/qkv(_1)?/kernel$", **fields})
        cond = {"tokens": np.zeros((1, 3, 6), np.float32), "vector": np.zeros((1, 6), np.float32)}
        args = model.params, np.zeros((1, 4, 4, 2), np.float32), np.zeros(1, np.float32), cond
        fn = adapters.adapt(model.fn, a=adapter)
        low = jax.eval_shape(fn.init, jax.random.key(0), *args)["adapters"]["a"]
        low = jax.tree.map(lambda a: np.sin(np.arange(a.size, dtype=np.float32)).reshape(a.shape), low)
        file = interop.save_lora(tmp_path / "a.safetensors", adapter, low, model, layout=layout)
        again, back = interop.load_lora(file, model)
        wanted = fn.merge({"base": model.params, "adapters": {"a": low}})
        found = adapters.adapt(model.fn, a=again).merge({"base": model.params, "adapters": {"a": back}})
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_files_that_do_not_fit_are_refused_by_name(tmp_path):
    model, path = interop.load_pretrained(SD3), tmp_path / "a.safetensors"
    good = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": np.ones((2, 8), np.float32),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": np.ones((8, 2), np.float32),
    }
    first = next(iter(good))
    for arrays, message in (
        ({**good, "text_encoder.q.lora_A.weight": np.ones((2, 8), np.float32)}, "text_encoder.q.lora_A.weight"),
        ({**good, f"{first[:-14]}.dora_scale": np.ones(8, np.float32)}, "dora_scale"),
        ({first: good[first]}, "one of two factors alone, of transformer_blocks.0.attn.to_q"),
        ({**good, first: np.ones((2, 7), np.float32)}, r"which do not fit .*attention/qkv/kernel"),
        ({**good, first: np.ones((3, 8), np.float32)}, r"has factors \[3, 8\] and \[8, 2\]"),
        ({"w": np.ones(2, np.float32)}, "no LoRA factors of layers of this network: w"),
    ):
        interop.write(path, arrays)
        with pytest.raises(CheckpointError, match=message):
            interop.load_lora(path, model)
    interop.write(path, {**good, "text_encoder.q.lora_A.weight": np.ones((2, 8), np.float32)})
    adapter, low = interop.load_lora(path, model, ignored=(r"^text_encoder",))
    assert adapter.parts == ("q",)
    with pytest.raises(ValueError, match="writes the layouts peft, kohya"):
        interop.save_lora(path, adapter, low, model, layout="civitai")
    with pytest.raises(ValueError, match="have no place in SD3Transformer2DModel"):
        interop.save_lora(
            path, adapter, {"nowhere": {"kernel": low["dual"]["block_0"]["attention"]["qkv"]["kernel"]["q"]}}, model
        )
