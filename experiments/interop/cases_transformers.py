"""Transformers of diffusers, and DiT and SiT in the format of their authors: sizes, heads, norms, classes, text, guidance."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax import interop
from experiments.interop.case import Arrays, Case, build, first, last

# ----------------------------------------------------------------------------------------------------------------- DiT


def labels(shape: tuple[int, ...], classes: int, span: float = 1000.0) -> Callable[[np.random.Generator], Arrays]:
    """A picture, times, and labels of which the first is no label."""

    def inputs(rng: np.random.Generator) -> Arrays:
        label = rng.integers(0, classes, shape[0])
        label[0] = classes
        t = (span * rng.random(shape[0])).astype(np.float32)
        return {"x": rng.standard_normal(shape).astype(np.float32), "t": t, "label": label.astype(np.int32)}

    return inputs


def dit_theirs(model: Any, inputs: Arrays) -> Arrays:
    """What it gives."""
    return {"out": model(inputs["x"], inputs["t"], inputs["label"].long()).sample}


def learned(build: Callable[[Case], Any], table: Callable[[Any], Any]) -> Callable[[Case], Any]:
    """The network with positions that are not those of the formula."""

    def changed(case: Case) -> Any:
        model = build(case)
        table(model).mul_(0.5)
        return model

    return changed


def dit_ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours."""
    return {"out": first(model.fn(params, last(inputs["x"]), inputs["t"], inputs["label"]))}


def tied(case: Case) -> Any:
    """The same code in all blocks, as in published files."""
    model = build(case)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = first
    return model


def untie(case: Case, model: Any, folder: str) -> None:
    """The network to disk, where a shared tensor would be written once."""
    import copy

    for block in model.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    model.save_pretrained(folder)


def dit(variant: str, shape: tuple[int, ...], **config: Any) -> Case:
    """A case of DiTTransformer2DModel; `shape` of the picture."""
    fields = {k: config.pop(k) for k in ("golden", "build", "write") if k in config}
    config = dict(num_attention_heads=2, attention_head_dim=4, num_layers=2, num_embeds_ada_norm=5) | config
    config |= dict(in_channels=shape[1], norm_num_groups=1)
    kind, inputs = "DiTTransformer2DModel", labels(shape, config["num_embeds_ada_norm"])
    return Case(f"{kind}-{variant}", kind, config, inputs, dit_theirs, dit_ours, **fields)


# --------------------------------------------------------------------------------------------------------- SD3 and Flux


def sd3(variant: str, shape: tuple[int, ...], golden: bool = False, build: Any = build, **config: Any) -> Case:
    """A case of SD3Transformer2DModel; `shape` of the picture."""
    kind = "SD3Transformer2DModel"
    config = dict(num_attention_heads=2, attention_head_dim=4, num_layers=2, in_channels=shape[1]) | config
    config = dict(joint_attention_dim=6, pooled_projection_dim=5, sample_size=8, pos_embed_max_size=8) | config
    config["caption_projection_dim"] = config["num_attention_heads"] * config["attention_head_dim"]

    def inputs(rng: np.random.Generator) -> Arrays:
        array = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        found = {"x": array(*shape), "t": (1000 * rng.random(shape[0])).astype(np.float32)}
        tokens, vector = config["joint_attention_dim"], config["pooled_projection_dim"]
        return found | {"tokens": array(shape[0], 3, tokens), "vector": array(shape[0], vector)}

    return Case(f"{kind}-{variant}", kind, config, inputs, sd3_theirs, sd3_ours, golden=golden, build=build)


def sd3_theirs(model: Any, inputs: Arrays) -> Arrays:
    """What it gives."""
    return {"out": model(inputs["x"], inputs["tokens"], inputs["vector"], inputs["t"]).sample}


def sd3_ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours."""
    cond = {"tokens": inputs["tokens"], "vector": inputs["vector"]}
    return {"out": first(model.fn(params, last(inputs["x"]), inputs["t"], cond))}


def flux(variant: str, shape: tuple[int, ...], golden: bool = False, image: int = 0, **config: Any) -> Case:
    """A case of FluxTransformer2DModel; `shape` of the latents, `image` channels beside them."""
    kind, channels = "FluxTransformer2DModel", shape[1]
    config = dict(num_attention_heads=2, attention_head_dim=8, axes_dims_rope=[2, 2, 4]) | config
    config = dict(num_layers=1, num_single_layers=1, joint_attention_dim=6, pooled_projection_dim=5) | config
    config |= dict(in_channels=4 * (channels + image)) | (dict(out_channels=4 * channels) if image else {})

    def inputs(rng: np.random.Generator) -> Arrays:
        array = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        b, _, h, w = shape
        found = {
            "x": array(*shape),
            "t": rng.random(b).astype(np.float32),
            "tokens": array(b, 3, 6),
            "vector": array(b, 5),
        }
        found |= {"guidance": (4 * rng.random(b)).astype(np.float32)} if config.get("guidance_embeds") else {}
        return found | ({"image": array(b, image, h, w)} if image else {})

    return Case(f"{kind}-{variant}", kind, config, inputs, flux_theirs, flux_ours, golden=golden)


def pack(x: Any) -> Any:
    """Latents as the tokens that the network is given.   [B, C, H, W] -> [B, H/2 W/2, 4 C]"""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def flux_theirs(model: Any, inputs: Arrays) -> Arrays:
    """What it gives, as latents again."""
    import torch

    x = inputs["x"]
    b, c, h, w = x.shape
    z = torch.cat([pack(x), pack(inputs["image"])], dim=-1) if "image" in inputs else pack(x)
    row, column = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
    out = model(
        z, inputs["tokens"], inputs["vector"], inputs["t"], places, torch.zeros(inputs["tokens"].shape[1], 3),
        inputs.get("guidance"),
    ).sample  # fmt: skip
    return {"out": out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)}


def flux_ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours."""
    vector = inputs["vector"]
    if "guidance" in inputs:
        vector = jnp.concatenate([vector, 1000 * inputs["guidance"][:, None]], axis=1)
    cond = {"tokens": inputs["tokens"], "vector": vector}
    if "image" in inputs:
        cond["image"] = last(inputs["image"])
    return {"out": first(model.fn(params, last(inputs["x"]), 1000 * inputs["t"], cond))}


# -------------------------------------------------------------------------------------------- DiT and SiT of their authors


def original_build(case: Case) -> Any:
    """DiT as the paper and its released weights describe it."""
    from experiments.interop.dit_reference import reference

    return reference(case.kind, **case.config)


def original_write(case: Case, model: Any, folder: str) -> None:
    """The tensors alone, and the arguments of the class beside them."""
    from safetensors.torch import save_file

    place = pathlib.Path(folder)
    place.mkdir(parents=True)
    save_file(model.state_dict(), place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"_class_name": case.kind, **case.config}))


def original_reopen(case: Case, folder: str) -> Any:
    """From disk, strictly."""
    from safetensors.torch import load_file

    model = original_build(case)
    (file,) = pathlib.Path(folder).glob("*.safetensors")
    model.load_state_dict(load_file(file), strict=True)
    return model


def original_theirs(model: Any, inputs: Arrays) -> Arrays:
    """What it gives."""
    return {"out": model(inputs["x"], inputs["t"], inputs["label"].long())}


def original_load(folder: str) -> Any:
    """By names and shapes, without the configuration but for the kind and heads."""
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    return interop.load_dit(folder, config["_class_name"], num_heads=config["num_heads"])


def original(
    kind: str, variant: str, shape: tuple[int, ...], golden: bool = False, build: Any = original_build, **config: Any
) -> Case:
    """A case of DiT or SiT; `shape` of the picture."""
    config = dict(hidden_size=8, depth=2, num_heads=2, num_classes=5, patch_size=2, in_channels=shape[1]) | config
    config |= dict(input_size=shape[2])
    inputs = labels(shape, config["num_classes"], 1000.0 if kind == "DiT" else 1.0)
    fields = dict(build=build, write=original_write, reopen=original_reopen, load=original_load, golden=golden)
    return Case(f"{kind}-{variant}", kind, config, inputs, original_theirs, dit_ours, **fields)


CASES = (
    dit("tiny", (2, 3, 4, 4), golden=True, sample_size=4, out_channels=6),
    dit(
        "wide", (3, 4, 8, 8), sample_size=8, num_attention_heads=4, attention_head_dim=16, num_layers=4, out_channels=8
    ),
    dit("other-grid", (2, 4, 12, 12), sample_size=8, attention_bias=False, activation_fn="gelu", norm_eps=1e-3),
    dit("patch-4", (2, 1, 16, 16), sample_size=16, patch_size=4, activation_fn="geglu-approximate", num_layers=3),
    dit("silu", (2, 2, 6, 6), sample_size=6, patch_size=1, activation_fn="linear-silu", upcast_attention=True),
    dit("tied", (2, 4, 8, 8), sample_size=8, num_layers=3, build=tied, write=untie),
    sd3("tiny", (2, 3, 4, 8), True, qk_norm="rms_norm", dual_attention_layers=[0]),
    sd3("plain", (2, 4, 8, 8), num_layers=3),
    sd3("deep", (3, 4, 8, 4), num_layers=5, num_attention_heads=3, attention_head_dim=8, dual_attention_layers=[0, 1]),
    sd3("norm", (2, 4, 12, 8), num_layers=4, qk_norm="rms_norm", pos_embed_max_size=12, out_channels=8),
    sd3("patch-4", (2, 2, 16, 8), patch_size=4, num_layers=1, qk_norm="rms_norm", sample_size=20, pos_embed_max_size=7),
    sd3("learned", (2, 3, 8, 4), build=learned(build, lambda model: model.pos_embed.pos_embed)),
    flux("tiny", (2, 2, 4, 6), True, guidance_embeds=True),
    flux("schnell", (2, 4, 8, 8), num_layers=2, num_single_layers=3),
    flux("wide", (3, 4, 6, 4), num_attention_heads=3, attention_head_dim=16, axes_dims_rope=[4, 6, 6], num_layers=3),
    flux("dev", (2, 16, 4, 8), num_layers=2, num_single_layers=2, guidance_embeds=True, axes_dims_rope=[4, 2, 2]),
    flux("image", (2, 4, 8, 4), image=5, guidance_embeds=True),
    original("DiT", "tiny", (2, 3, 4, 4), True),
    original("DiT", "wide", (3, 4, 8, 8), hidden_size=32, depth=4, num_heads=4),
    original("DiT", "no-variance", (2, 4, 8, 8), learn_sigma=False, mlp_ratio=3.0),
    original("DiT", "patch-4", (2, 1, 16, 16), patch_size=4, num_heads=1),
    original("DiT", "learned", (2, 3, 8, 8), build=learned(original_build, lambda model: model.pos_embed)),
    original("SiT", "tiny", (2, 3, 4, 4), True),
    original("SiT", "wide", (3, 4, 8, 8), hidden_size=48, depth=3, num_heads=3),
    original("SiT", "no-variance", (2, 4, 8, 8), learn_sigma=False),
    original("SiT", "patch-4", (2, 2, 16, 16), patch_size=4, num_classes=3),
)
