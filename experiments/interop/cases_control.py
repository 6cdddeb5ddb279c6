"""ControlNetModel of diffusers: what it adds to every skip and to the bottleneck."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax import interop
from diffjax.adapters import Site, adapt
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


# ------------------------------------------------------------------------------- beside the network that it is made for


class Both(NamedTuple):
    """A network and its ControlNet, of ours."""

    base: interop.Pretrained
    control: interop.Pretrained

    @property
    def params(self) -> Any:
        """Their parameters, as `adapt` takes them."""
        return {"base": self.base.params, "adapters": {"edge": self.control.params}}


def build_both(case: Case) -> Any:
    """A network and its ControlNet, of theirs."""
    import diffusers
    import torch

    both = {kind: getattr(diffusers, kind)(**config) for kind, config in case.config.items()}
    return torch.nn.ModuleDict(both).eval()


def write_both(case: Case, model: Any, folder: str) -> None:
    """Two folders."""
    for kind in model:
        model[kind].save_pretrained(f"{folder}/{kind}")


def reopen_both(case: Case, folder: str) -> Any:
    """The two folders again."""
    import diffusers
    import torch

    both = {kind: getattr(diffusers, kind).from_pretrained(f"{folder}/{kind}") for kind in case.config}
    return torch.nn.ModuleDict(both).eval()


def load_both(folder: str) -> Both:
    """The two folders, by us."""
    return Both(*(interop.load_pretrained(f"{folder}/{kind}") for kind in KINDS))


def save_both(folder: str, both: Both) -> None:
    """Two folders, by us."""
    for kind, model in zip(KINDS, both, strict=True):
        interop.save_pretrained(f"{folder}/{kind}", model)


def both_theirs(model: Any, inputs: Arrays) -> Arrays:
    """The output of the controlled network, of theirs."""
    state = inputs["x"], inputs["t"], inputs["tokens"]
    found = model["ControlNetModel"](*state, inputs["picture"])
    more = dict(down_block_additional_residuals=found.down_block_res_samples)
    more |= dict(mid_block_additional_residual=found.mid_block_res_sample)
    return {"y": model["UNet2DConditionModel"](*state, **more).sample}


def both_ours(both: Both, params: Any, inputs: Arrays) -> Arrays:
    """The same of ours."""
    cond = {"tokens": inputs["tokens"], "edge": last(inputs["picture"])}
    return {"y": first(adapt(both.base.fn, edge=both.control.fn)(params, last(inputs["x"]), inputs["t"], cond))}


def levels(*attends: bool) -> dict:
    """Types of the blocks on the way down."""
    return dict(down_block_types=crossed(*attends)["down_block_types"])


KINDS = ("UNet2DConditionModel", "ControlNetModel")
SIZES = dict(
    block_out_channels=[16, 24], norm_num_groups=8, cross_attention_dim=12, attention_head_dim=4, layers_per_block=2
)  # fmt: skip
BOTH = Case(
    "ControlNetModel-beside",
    "ControlNetModel",
    dict(
        zip(
            KINDS,
            (
                SIZES | crossed(True, False),
                SIZES | levels(True, False) | dict(conditioning_embedding_out_channels=[4, 8]),
            ),
            strict=True,
        )
    ),
    inputs((2, 4, 8, 8), (10.0, 900.0), tokens=(2, 5, 12), picture=(2, 3, 16, 16)),
    both_theirs,
    both_ours,
    build=build_both,
    write=write_both,
    reopen=reopen_both,
    load=load_both,
    save=save_both,
)

CASES = (
    BOTH,
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
