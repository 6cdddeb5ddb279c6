"""One tiny configuration of each network that takes every condition, with random parameters that no compiler saw."""

from typing import Any, NamedTuple

import numpy as np

from diffjax import networks as nw

B = 3


class Case(NamedTuple):
    net: Any
    params: Any
    x: Any
    t: Any
    cond: Any

    @property
    def fn(self):
        return nw.from_linen(self.net)


KINDS = {"num_classes": "label", "vector_size": "vector", "token_size": "tokens", "image_channels": "image"}


def inputs(net, shape, seed=0):
    """A state of that shape, times, and the kinds of condition for which the network is configured."""
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    size = {kind: getattr(net, field, 0) for field, kind in KINDS.items()}
    cond = {
        "label": np.array([0, 2, 3], np.int32),
        "vector": normal(B, size["vector"]),
        "tokens": normal(B, 5, size["tokens"]),
        "image": normal(B, *shape[:-1], size["image"]),
    }
    cond = {kind: value for kind, value in cond.items() if size[kind]}
    if size["tokens"]:
        cond["mask"] = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 0]], bool)
    return normal(B, *shape), rng.uniform(size=B).astype(np.float32), cond


# Each catalogue entry once: a tiny network that takes every kind of condition it can, and the shape of an item.
FIELDS = dict(num_classes=3, vector_size=2, token_size=4)
NETS = {
    "mlp": (nw.MLP(width=8, depth=2, heads=2, **FIELDS), (5,)),
    "unet": (nw.UNet(widths=(8, 16), head_size=4, code=8, image_channels=1, **FIELDS), (4, 6, 2)),
    "dit": (nw.DiT(width=8, depth=2, heads=2, expand=2, image_channels=1, qk_norm=True, **FIELDS), (4, 6, 2)),
    "uvit": (
        nw.UViT(width=8, depth=3, heads=2, expand=2, token_length=6, positions=nw.Learned(2, 3), **FIELDS),
        (4, 6, 2),
    ),
    "hdit": (
        nw.HDiT(
            levels=(nw.Level(16, 1, nw.Neighborhood(3)), nw.Level(32, 1)),
            mapping=nw.Mapping(8, 1),
            head=8,
            patch=1,
            num_classes=3,
            vector_size=2,
            image_channels=1,
        ),
        (4, 6, 2),
    ),
    "mmdit": (
        nw.MMDiT(
            width=8,
            depth=1,
            heads=2,
            expand=2,
            alone=1,
            single=1,
            qk_norm=True,
            rope=nw.Rope(),
            image_channels=1,
            **FIELDS,
        ),
        (4, 6, 2),
    ),
    "switch_dit": (nw.DiT(width=8, depth=1, heads=2, expand=2, num_classes=3, route=nw.switch(3, 2)), (4, 6, 2)),
    "edm2": (
        nw.EDM2UNet(
            widths=(8, 16), blocks=1, attention=(1,), head_size=4, num_classes=3, vector_size=2, image_channels=1
        ),
        (4, 6, 2),
    ),
    "state_dit": (nw.StateDiT(width=32, depth=2, heads=2, expand=2, **FIELDS), (4, 6, 2)),
    "token_dit": (nw.TokenDiT(width=8, depth=2, heads=2, expand=2, qk_norm=True, **FIELDS), (6, 3)),
    "edm2_mlp": (nw.EDM2MLP(width=8, depth=2, num_classes=3, vector_size=2), (5,)),
    "dit_moe": (
        nw.DiT(width=8, depth=1, heads=2, expand=2, num_classes=3, feed_forward=nw.sparse(4, 2, 1)),
        (4, 6, 2),
    ),
    "dimr": (
        nw.DiMR(
            branches=(nw.Branch(8, 3, 2, heads=2), nw.Branch(4, 1, 1)),
            kernel=3,
            num_classes=3,
            vector_size=2,
            image_channels=1,
        ),
        (4, 6, 2),
    ),
    "masked_dit": (
        nw.MaskedDiT(width=8, depth=2, heads=2, expand=2, decode=1, image_channels=2, token_parts=(1, 3), **FIELDS),
        (4, 6, 2),
    ),
    "continuous": (
        nw.ContinuousUNet(widths=(4, 8), head_size=4, code=8, solve=nw.Steps(1), image_channels=1, **FIELDS),
        (4, 6, 2),
    ),
}
FULL = ("mlp", "unet", "dit")  # tested in more detail, as they take all kinds


def case_of(name, **changes):
    net, shape = NETS[name]
    net = net.clone(**changes)
    x, t, cond = inputs(net, shape)
    return Case(net, nw.random_parameters(net, x, t, cond), x, t, cond)


SMALL = {"unet": dict(widths=(4,), attention=(0,)), "dit": dict(depth=1), "mlp": dict(depth=1)}  # cheap to compile
