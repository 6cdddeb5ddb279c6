"""ControlNetModel of diffusers: what it adds to every skip and to the bottleneck."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.adapters import Site
from diffjax.interop.control import example
from diffjax.interop.text_unets import text_time
from diffjax.networks import from_linen
from experiments.interop.case import Arrays, Case, first, last
from experiments.interop.cases_unets import crossed, inputs


def theirs(model: Any, inputs: Arrays) -> Arrays:
    """What theirs adds."""
    more = {"class_labels": inputs["label"].long()} if "label" in inputs else {}
    if "pooled" in inputs:
        more["added_cond_kwargs"] = {"text_embeds": inputs["pooled"], "time_ids": inputs["numbers"]}
    found = model(inputs["x"], inputs["t"], inputs["tokens"], inputs["picture"], **more)
    named = {f"skip_{k}": a for k, a in enumerate(found.down_block_res_samples)}
    return named | {"bottleneck": found.mid_block_res_sample}


def ours(model: Any, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours, beside a network of zeros: what it adds does not depend on it."""
    cond = {name: inputs[name] for name in ("tokens", "label") if name in inputs}
    if "pooled" in inputs:
        cond["vector"] = text_time(inputs["pooled"], inputs["numbers"], model.config["addition_time_embed_dim"])
    net = model.module.net
    shapes = jax.eval_shape(net.init, jax.random.key(0), *example(model.module, model.config)[:3])["params"]
    base = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    site = Site(from_linen(net), base, last(inputs["x"]), inputs["t"], cond, last(inputs["picture"]))
    write = model.fn.change(params, site, None).write
    return {name: first(add(jnp.zeros(()))) for name, add in write.items()}


def control(variant: str, picture: tuple[int, ...], golden: bool = False, more: Any = (), **config: Any) -> Case:
    """A case of ControlNetModel."""
    kind = "ControlNetModel"
    tokens = (2, 5, config["cross_attention_dim"])
    arrays = inputs((2, config.get("in_channels", 4), 8, 8), (0.0, 999.0), tokens=tokens, picture=picture, **dict(more))
    return Case(f"{kind}-{variant}", kind, config, arrays, theirs, ours, golden=golden)


def levels(*attends: bool) -> dict:
    """Types of the blocks on the way down."""
    return dict(down_block_types=crossed(*attends)["down_block_types"])


CASES = (
    # as those of Stable Diffusion 1
    control(
        "sd1", (2, 3, 64, 64), block_out_channels=[16, 32], norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=4, layers_per_block=2, **levels(True, False),
    ),
    control(
        "small", (2, 3, 16, 16), True, block_out_channels=[8, 16], norm_num_groups=4, cross_attention_dim=6,
        attention_head_dim=2, layers_per_block=1, conditioning_embedding_out_channels=[4, 6], **levels(True, False),
    ),
    # as those of Stable Diffusion 2
    control(
        "sd2", (2, 1, 32, 32), block_out_channels=[16, 32, 32], norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=[1, 2, 4], use_linear_projection=True, layers_per_block=1, conditioning_channels=1,
        conditioning_embedding_out_channels=[4, 8, 12], **levels(True, True, False),
    ),
    # as those of Stable Diffusion XL
    control(
        "sdxl", (2, 3, 16, 16), False, (("pooled", (2, 20)), ("numbers", (2, 6))), block_out_channels=[16, 32],
        norm_num_groups=8, cross_attention_dim=12, attention_head_dim=[2, 4], transformer_layers_per_block=[1, 2],
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8, layers_per_block=1,
        projection_class_embeddings_input_dim=68, conditioning_embedding_out_channels=[4, 8], **levels(False, True),
    ),
)  # fmt: skip
