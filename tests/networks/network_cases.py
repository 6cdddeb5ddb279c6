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


def inputs(shape, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    cond = {
        "label": np.array([0, 2, 3], np.int32),
        "vector": normal(B, 2),
        "tokens": normal(B, 5, 4),
        "mask": np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 0]], bool),
    }
    if len(shape) == 3:
        cond["image"] = normal(B, *shape[:2], 1)
    return normal(B, *shape), rng.uniform(size=B).astype(np.float32), cond


FIELDS = dict(num_classes=3, vector_size=2, token_size=4)
NETS = {
    "mlp": (nw.MLP(width=8, depth=2, heads=2, **FIELDS), (5,)),
    "unet": (nw.UNet(widths=(8, 12), head_size=4, code=8, image_channels=1, **FIELDS), (4, 6, 2)),
    "dit": (nw.DiT(width=8, depth=2, heads=2, expand=2, image_channels=1, qk_norm=True, **FIELDS), (4, 6, 2)),
}


def case_of(name, **changes):
    net, shape = NETS[name]
    net = net.clone(**changes)
    x, t, cond = inputs(shape)
    return Case(net, nw.random_parameters(net, x, t, cond), x, t, cond)


SMALL = {"unet": dict(widths=(4,), attention=(0,)), "dit": dict(depth=1), "mlp": dict(depth=1)}  # cheap to compile
