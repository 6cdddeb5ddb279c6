"""DiT and SiT in the format of their authors, as `networks.DiT`.

Their files have tensors alone. A folder with such a file, as safetensors, and a `config.json` of the arguments of their
class is read by `load_pretrained`; a file alone by `load_dit`, which reads all sizes but the number of heads from shapes.
DiT takes t = 0 ... 999 and gives noise, and behind it the variance if `learn_sigma`. SiT takes t from 0 (noise) to 1 (data)
and gives the velocity dx/dt; what `learn_sigma` puts behind it is not used, and `fn` leaves it away.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.interop import options
from diffjax.interop.dit import check_plain
from diffjax.interop.kinds import by_head_fused, same, shaped
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule, blocks, layer
from diffjax.interop.transformers import SINUSOIDS, base_of, both, fitted, pixels, positions_of, rising, table_of
from diffjax.networks import DiT, Learned, from_linen
from diffjax.networks.dit import SIZES
from diffjax.networks.mmdit import THOUSAND
from diffjax.training import CheckpointError

DEFAULTS = dict(
    input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
    class_dropout_prob=0.1, num_classes=1000, learn_sigma=True,
)  # fmt: skip
TABLE = "pos_embed"
HEADS = {width: heads for width, _, heads in SIZES.values()}  # of the published sizes, by width


def network(config: Config, kind: str = "DiT") -> DiT:
    """The module of a configuration."""
    c = options.read(kind, config, DEFAULTS)
    if c.mlp_ratio != int(c.mlp_ratio):
        raise ValueError(f"{kind}: mlp_ratio={c.mlp_ratio!r} has no counterpart here; accepted are whole numbers")
    if not 0 < c.class_dropout_prob <= 1:
        raise ValueError(
            f"{kind}: class_dropout_prob={c.class_dropout_prob!r} means that there is no row for no label; accepted is > 0"
        )
    return DiT(
        width=c.hidden_size,
        depth=c.depth,
        heads=c.num_heads,
        patch=c.patch_size,
        expand=int(c.mlp_ratio),
        num_classes=c.num_classes,
        out_channels=c.in_channels * (2 if c.learn_sigma else 1),
        positions=positions_of(c.input_size // c.patch_size),
        frequencies=THOUSAND,
        sinusoids=SINUSOIDS,
        act=nn.gelu,
    )


def config(module: DiT) -> dict[str, Any]:
    """The configuration of a module."""
    check_plain(module)
    options.only(module, frequencies=(THOUSAND,), sinusoids=(SINUSOIDS,), act=(nn.gelu,), own_codes=(False,))
    options.only(module, qkv_bias=(True,), mlp_eps=(1e-6,))
    side = module.positions.height if isinstance(module.positions, Learned) else base_of(module.positions)[0]
    return dict(
        input_size=side * module.patch,
        patch_size=module.patch,
        hidden_size=module.width,
        depth=module.depth,
        num_heads=module.heads,
        mlp_ratio=float(module.expand),
        num_classes=module.num_classes,
    )


def rules(module: DiT) -> list[Rule]:
    """The rules of a module."""

    def block(i: int) -> list[Rule]:
        found = both("attention/qkv", f"blocks.{i}.attn.qkv", by_head_fused(module.heads, 3))
        for ours, theirs in (("attention/out", "attn.proj"), ("hidden", "mlp.fc1"), ("out", "mlp.fc2")):
            found += layer(ours, f"blocks.{i}.{theirs}")
        return found + layer("film", f"blocks.{i}.adaLN_modulation.1")

    found = layer("in", "x_embedder.proj", pixels(module.patch)) + layer("code/time/hidden", "t_embedder.mlp.0", rising)
    found += layer("code/time/out", "t_embedder.mlp.2") + layer("film", "final_layer.adaLN_modulation.1")
    found += layer("out", "final_layer.linear")
    found.append(Rule("code/label/table", ("y_embedder.embedding_table.weight",), same))
    if isinstance(module.positions, Learned):
        n = module.positions.height * module.positions.width
        found.append(Rule("positions/table", (TABLE,), shaped((n, module.width), (1, n, module.width))))
    return found + blocks("", module.depth, block, scan=module.scan_layers)


def fit(module: DiT, config: Config, tensors: Any) -> DiT:
    """Learned positions, where the table is not that of the formula."""
    side = base_of(module.positions)[0]
    table = tensors[TABLE] if TABLE in tensors else None
    return module.clone(positions=fitted(module.positions, table, side, side))


def buffers(module: DiT, config: Config) -> Mapping[str, Any]:
    """Their table of positions, unless it is learned here."""
    if isinstance(module.positions, Learned):
        return {}
    side = base_of(module.positions)[0]
    return {TABLE: table_of(side, side, module.width)}


def example(module: DiT, config: Config) -> tuple:
    """One picture of the size of training."""
    c = options.read("DiT", config, DEFAULTS)
    x = jax.ShapeDtypeStruct((1, c.input_size, c.input_size, c.in_channels), np.float32)
    return x, jax.ShapeDtypeStruct((1,), np.float32), jax.ShapeDtypeStruct((1,), jnp.int32)


@dataclasses.dataclass(frozen=True)
class First:
    """The first channels of what a network gives."""

    net: Any
    channels: int

    def __call__(self, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """The network's output, cut."""
        out = self.net(*args, mutable=mutable, **kwargs)
        cut = lambda a: a[..., : self.channels]
        return (cut(out[0]), *out[1:]) if mutable else cut(out)


def velocity(module: DiT, config: Config) -> Any:
    """SiT as a function: the velocity alone."""
    return First(from_linen(module), options.read("SiT", config, DEFAULTS).in_channels)


DIT = Peer(network, config, rules, example, fit=fit, buffers=buffers)
SIT = DIT._replace(network=lambda config: network(config, "SiT"), fn=velocity)


def config_of(tensors: Any, *, num_heads: int | None = None, **fields: Any) -> dict[str, Any]:
    """The arguments of their class for a file of tensors, from shapes.

    Args: num_heads: default that of the published network of this width.   fields: to be taken as given.
    Raises: CheckpointError: not such a file.   ValueError: a width without a published network, and no `num_heads`.
    """
    names = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", TABLE)
    missing = [name for name in names if name not in tensors]
    depth = len({m[1] for m in map(re.compile(r"blocks\.(\d+)\.attn\.qkv\.weight").fullmatch, tensors) if m})
    if missing or not depth:
        raise CheckpointError(
            f"{getattr(tensors, 'source', 'the mapping')} is no DiT or SiT in the format of its authors: it has no "
            f"{', '.join(missing) or 'blocks.0.attn.qkv.weight'}; it has {', '.join(sorted(tensors)[:6])} ..."
        )
    (width, channels, patch, _), rows, out, table = (np.shape(tensors[name]) for name in names)
    if num_heads is None and width not in HEADS:
        raise ValueError(
            f"the number of heads is in no shape, and no published network has the width {width}; give num_heads. Known are "
            f"{', '.join(f'{heads} for {width}' for width, heads in HEADS.items())}"
        )
    hidden = np.shape(tensors["blocks.0.mlp.fc1.weight"])[0]
    found = dict(
        input_size=round(table[1] ** 0.5) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=num_heads or HEADS[width],
        mlp_ratio=hidden / width,
        num_classes=rows[0] - 1,
        learn_sigma=out[0] == 2 * channels * patch * patch,
    )
    return {**found, **fields}
