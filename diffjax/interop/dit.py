"""DiTTransformer2DModel of diffusers as `networks.DiT`.

Each of its blocks has a code of time and label of its own. Where all of them are equal, as in files made from the original
weights, the network has one (`own_codes=False`), and they are written as copies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.interop import options
from diffjax.interop.kinds import copies, dense, same
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule, blocks, layer
from diffjax.interop.transformers import (
    ACTIVATIONS,
    SINUSOIDS,
    THOUSANDS,
    attention_rules,
    base_of,
    mlp_rules,
    pixels,
    positions_of,
    rising,
)
from diffjax.networks import DiT
from diffjax.networks.attention import full
from diffjax.networks.feed_forward import mlp

KIND = "DiTTransformer2DModel"
DEFAULTS = dict(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=None, num_layers=28, dropout=0.0,
    norm_num_groups=32, attention_bias=True, sample_size=32, patch_size=2, activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000, upcast_attention=False, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    norm_eps=1e-5,
)  # fmt: skip
# of files written when the class was part of Transformer2DModel: fields that it then had besides
EARLIER = dict(
    cross_attention_dim=None, num_vector_embeds=None, only_cross_attention=False, use_linear_projection=False,
    double_self_attention=False, attention_type="default", caption_channels=None, interpolation_scale=None,
    use_additional_conditions=None,
)  # fmt: skip
CODE = {
    "time/hidden/kernel": ("timestep_embedder.linear_1.weight", rising),
    "time/hidden/bias": ("timestep_embedder.linear_1.bias", same),
    "time/out/kernel": ("timestep_embedder.linear_2.weight", dense),
    "time/out/bias": ("timestep_embedder.linear_2.bias", same),
    "label/table": ("class_embedder.embedding_table.weight", same),
}


def network(config: Config, kind: str = KIND) -> DiT:
    """The module of a configuration, with codes for each block."""
    c = options.read(kind, config, DEFAULTS if kind == KIND else DEFAULTS | EARLIER)
    for field in EARLIER if kind != KIND else ():
        options.accept(kind, field, getattr(c, field), (EARLIER[field],))
    options.accept(kind, "norm_type", c.norm_type, ("ada_norm_zero",))
    options.accept(kind, "norm_elementwise_affine", c.norm_elementwise_affine, (False,))
    options.accept(kind, "dropout", c.dropout, (0.0,))
    if not c.num_embeds_ada_norm:
        raise ValueError(f"{kind}: num_embeds_ada_norm must be the number of classes; got {c.num_embeds_ada_norm!r}")
    # upcast_attention: logits and softmax are float32 always; norm_num_groups: this class has no group normalisation
    return DiT(
        width=c.num_attention_heads * c.attention_head_dim,
        depth=c.num_layers,
        heads=c.num_attention_heads,
        patch=c.patch_size,
        num_classes=c.num_embeds_ada_norm,
        out_channels=c.out_channels,
        positions=positions_of(c.sample_size // c.patch_size),
        frequencies=THOUSANDS,
        sinusoids=SINUSOIDS,
        act=options.accept(kind, "activation_fn", c.activation_fn, ACTIVATIONS),
        qkv_bias=c.attention_bias,
        mlp_eps=c.norm_eps,
        own_codes=True,
    )


def config(module: DiT) -> dict[str, Any]:
    """The configuration of a module."""
    options.only(module, frequencies=(THOUSANDS,), sinusoids=(SINUSOIDS,), expand=(4,))
    check_plain(module)
    return dict(
        num_attention_heads=module.heads,
        attention_head_dim=module.width // module.heads,
        out_channels=module.out_channels,
        num_layers=module.depth,
        attention_bias=module.qkv_bias,
        sample_size=base_of(module.positions)[0] * module.patch,
        patch_size=module.patch,
        activation_fn=options.name_of(ACTIVATIONS, module.act, "act"),
        num_embeds_ada_norm=module.num_classes,
        norm_type="ada_norm_zero",
        norm_eps=module.mlp_eps,
    )


def check_plain(module: DiT) -> None:
    """Refuse what published transformers of labels do not have."""
    options.only(module, vector_size=(0,), token_size=(0,), image_channels=(0,), rope=(None,), dropout=(0.0,))
    options.only(module, feed_forward=(mlp,), route=(None,), qk_norm=(False,), mixing=(full,))
    if not module.num_classes:
        raise ValueError("DiT without labels (num_classes=0) has no counterpart in the other library")


def rules(module: DiT) -> list[Rule]:
    """The rules of a module."""
    theirs = [f"transformer_blocks.{i}" for i in range(module.depth)]

    def block(i: int) -> list[Rule]:
        found = layer("film", f"{theirs[i]}.norm1.linear") + mlp_rules("", f"{theirs[i]}.ff")
        return found + attention_rules("attention", f"{theirs[i]}.attn1", module.heads, bias=module.qkv_bias)

    found = layer("in", "pos_embed.proj", pixels(module.patch)) + layer("out", "proj_out_2")
    found += layer("film", "proj_out_1")
    for ours, (name, kind) in CODE.items():
        names = tuple(f"{block}.norm1.emb.{name}" for block in theirs)
        if module.own_codes:
            found += [Rule(f"code_{i}/{ours}", (name,), kind) for i, name in enumerate(names)]
        else:
            found.append(Rule(f"code/{ours}", names, copies(kind, module.depth)))
    return found + blocks("", module.depth, block, scan=module.scan_layers)


def fit(module: DiT, config: Config, tensors: Any) -> DiT:
    """One code for all blocks, where theirs are equal."""
    for name, _ in CODE.values():
        found = [f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(module.depth)]
        if not all(name in tensors for name in found):
            return module
        first = tensors[found[0]]
        if not all(np.array_equal(first, tensors[name]) for name in found[1:]):
            return module
    return module.clone(own_codes=False)


def example(module: DiT, config: Config) -> tuple:
    """One picture of the size of training."""
    n = module.patch * (getattr(module.positions, "fit", None) or (1, 1))[0]
    x = jax.ShapeDtypeStruct((1, n, n, config.get("in_channels", DEFAULTS["in_channels"])), np.float32)
    return x, jax.ShapeDtypeStruct((1,), np.float32), jax.ShapeDtypeStruct((1,), jnp.int32)


PEER = Peer(network, config, rules, example, fit=fit)
TRANSFORMER = PEER._replace(network=lambda config: network(config, "Transformer2DModel"))
