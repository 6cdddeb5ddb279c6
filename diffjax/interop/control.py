"""ControlNetModel of diffusers as parameters of the adapter `adapters.controlnet`.

base, control = load_pretrained("unet"), load_pretrained("controlnet")
fn = adapt(base.fn, edge=control.fn)
y = fn({"base": base.params, "adapters": {"edge": control.params}}, x, t, {"tokens": tokens, "edge": picture})
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from diffjax.adapters import Site, controlnet
from diffjax.interop import options, unets
from diffjax.interop.autoencoders import OLD
from diffjax.interop.kinds import conv, conv1x1
from diffjax.interop.peer import Config, Peer
from diffjax.interop.rules import Rule, layer
from diffjax.interop.text_unets import ENCODER, encoder, encoder_config, encoder_side
from diffjax.interop.unet_rules import check_same
from diffjax.networks import UNet, from_linen
from diffjax.networks.unet_parts import enlarged

KIND = "ControlNetModel"
DEFAULTS = ENCODER | dict(
    conditioning_channels=3, controlnet_conditioning_channel_order="rgb",
    conditioning_embedding_out_channels=(16, 32, 96, 256), global_pool_conditions=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Control:
    """A ControlNet beside the network whose way down it copies.

    `net`: that network, as far as the copy decides it.   `widths`: channels of the picture's encoder.
    """

    net: UNet
    widths: tuple[int, ...]

    @property
    def adapter(self) -> Any:
        """The adapter."""
        return controlnet(self.widths)

    def init(self, key: Any, x: Any, t: Any, cond: Any, picture: Any) -> dict[str, Any]:
        """Fresh parameters, as those of a module: `{"params": ...}`."""
        base = self.net.init(key, x, t, cond)["params"]
        return {"params": self.adapter.init(key, Site(from_linen(self.net), base, x, t, cond, picture))}


def network(config: Config) -> Control:
    """The network and adapter of a configuration."""
    c = options.read(KIND, config, DEFAULTS)
    order = "controlnet_conditioning_channel_order"
    options.accept(KIND, order, getattr(c, order), ("rgb",))
    options.accept(KIND, "global_pool_conditions", c.global_pool_conditions, (False,))
    return Control(
        UNet(**encoder(KIND, c), out_channels=c.in_channels, up=enlarged), c.conditioning_embedding_out_channels
    )


def config(module: Control) -> dict[str, Any]:
    """The configuration of a network and adapter.   Raises: ValueError: there is none."""
    page = encoder_config(module.net) | dict(
        in_channels=module.net.out_channels, conditioning_embedding_out_channels=list(module.widths)
    )
    check_same(KIND, network(page).net, module.net)
    return page


def rules(module: Control, config: Config) -> list[Rule]:
    """The rules of copy, picture's encoder and convolutions from zero."""
    copied = encoder_side(module.net, config)
    found = [rule._replace(ours=tuple(f"copy/{name}" for name in rule.paths)) for rule in copied]
    found = [rule._replace(ours=rule.paths[0]) if len(rule.paths) == 1 else rule for rule in found]
    theirs = "controlnet_cond_embedding"
    found += layer("hint/in", f"{theirs}.conv_in", conv) + layer("hint/out", f"{theirs}.conv_out", conv)
    for i in range(len(module.widths) - 1):
        found += layer(f"hint/same_{i}", f"{theirs}.blocks.{2 * i}", conv)
        found += layer(f"hint/down_{i}", f"{theirs}.blocks.{2 * i + 1}", conv)
    levels = len(module.net.widths)
    for k in range(levels * (module.net.blocks + 1)):  # the first convolution, the blocks, the ways between levels
        found += layer(f"zero/skip_{k}", f"controlnet_down_blocks.{k}", conv1x1)
    return found + layer("zero/bottleneck", "controlnet_mid_block", conv1x1)


def example(module: Control, config: Config) -> tuple:
    """One state of the smallest size, its time, its condition and picture."""
    x, t, cond = unets.example(module.net, config)
    times = 2 ** (len(module.widths) - 1)
    shape = (1, *(times * n for n in x.shape[1:-1]), config.get("conditioning_channels", 3))
    return x, t, cond, jax.ShapeDtypeStruct(shape, np.float32)


PEER = Peer(network, config, rules, example, fn=lambda module, config: module.adapter, renames=OLD, by_config=True)
