"""Two branches of one network in one call, along the batch: where each lies, and layers on the parameters of each.

Layers that are given no item work for both branches at once, so that these have one of them in common: learned positions,
kernels of experts, gains.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.adapters.core import Change, Site
from diffjax.adapters.lora import stacked
from diffjax.adapters.told import form_of
from diffjax.networks.attention import Attention
from diffjax.networks.taps import Call, per_layer, tapped
from diffjax.numerics import PyTree
from diffjax.training.partial import nested

PARTS = ("x", "y")


class Pair:
    """Where the two branches of an adapter lie in the batch of one call: x first, then one y for each such adapter."""

    def __init__(self, site: Site):
        self.site, self.n = site, jax.tree.leaves(site.x)[0].shape[0]
        self.at = self.n  # where y begins, known when the inputs are put together
        self.given = None  # what the condition holds: "x", "y", or None

    def inputs(self, x: Any, t: Any, cond: Any) -> tuple[Any, Any, Any]:
        """Both parts along the batch."""
        own, n = self.site.own, self.n
        if isinstance(x, dict):
            if set(x) != set(PARTS) or own is not None:
                raise ValueError(
                    'a pair must be {"x", "y"}, without a part in the condition; got parts '
                    f"{sorted(x)} and {'no' if own is None else 'a'} condition. Put the adapter that takes the pair first"
                )
            t = t if isinstance(t, dict) else dict.fromkeys(PARTS, t)
            first, second, times = x["x"], x["y"], [t["x"], t["y"]]
        else:
            self.given = next((part for part in PARTS if isinstance(own, dict) and set(own) == {part, "t"}), None)
            if self.given is None or (self.given == "x" and x.shape[0] != n):
                raise ValueError(
                    'give the pair {"x", "y"} as the state, or one part as the state and the other in the condition of the '
                    'adapter, as {"y": ..., "t": ...} or (of one adapter alone) {"x": ..., "t": ...}; got '
                    + (f"{sorted(own)}" if isinstance(own, dict) else type(own).__name__)
                )
            part, time = own[self.given], own["t"]
            if not hasattr(part, "shape") or np.shape(time) not in ((), (1,), part.shape[:1]):
                raise ValueError(
                    f"the other part of a pair is an array like the state, {list(x.shape)}, with one time or one for each "
                    f"item; got {form_of(own)}"
                )
            first, second, times = x, jnp.asarray(part, x.dtype), [t, time]
            if self.given == "x":
                first, second, times = second, first, times[::-1]
        if first.shape[1:] != second.shape[1:] or second.shape[0] != n:
            raise ValueError(f"both parts of a pair need one shape; got {first.shape} and {second.shape}")
        self.at = first.shape[0]
        time = [
            jnp.broadcast_to(jnp.asarray(s, first.dtype), (len(a),))
            for s, a in zip(times, (first, second), strict=True)
        ]
        more = lambda a: jnp.concatenate([jnp.asarray(a), jnp.asarray(a)[:n]])
        return jnp.concatenate([first, second]), jnp.concatenate(time), jax.tree.map(more, cond)

    def output(self, y: Any) -> Any:
        """The parts of the output that were asked for."""
        if isinstance(self.site.x, dict) and self.given is None:
            return dict(zip(PARTS, self.cut(y), strict=True))
        return self.cut(y)[1] if self.given == "x" else y[: self.at]

    def change(self, branch: PyTree, **more: Any) -> Change:
        """The change of a call with the second branch on these parameters."""
        around: dict[str, Any] = {}
        for path, own in _layers(branch).items():
            around[path] = self._parted(own, stacked(path) > 0)
        around = {**around, **{p: _join(around.get(p), f) for p, f in more.pop("around", {}).items()}}
        return Change(inputs=self.inputs, output=self.output, around=around, **more)

    def cut(self, h: Any) -> tuple[Any, Any]:
        """The two branches of an array."""
        return h[: self.n], h[self.at : self.at + self.n]

    def add(self, h: Any, to_x: Any, to_y: Any) -> Any:
        """An array with something added to each branch."""
        n, at = self.n, self.at
        return jnp.concatenate([h[:n] + to_x, h[n:at], h[at : at + n] + to_y, h[at + n :]])

    def _parted(self, own: PyTree, scanned: bool) -> Any:
        """A layer on its own parameters for the second branch, which is the last of those that this call sees."""

        def f(layer: Any, call: Call, *args: Any, **kwargs: Any) -> Any:
            whole = self.at + self.n
            batched = [a for a in jax.tree.leaves((args, kwargs)) if _rows(a) == whole]
            if not batched:
                return call(*args, **kwargs)
            cut = lambda rows: jax.tree.map(lambda a: a[rows] if _rows(a) == whole else a, (args, kwargs))
            (args1, kwargs1), (args2, kwargs2) = cut(slice(None, self.at)), cut(slice(self.at, None))
            here = jax.tree.map(lambda a: of_layer(a, layer), own)
            return jax.tree.map(
                lambda a, b: jnp.concatenate([a, b]), call(*args1, **kwargs1), call.using(here)(*args2, **kwargs2)
            )

        return per_layer(f) if scanned else lambda call, *args, **kwargs: f(None, call, *args, **kwargs)


def shared(site: Site) -> tuple[str, ...]:
    """The paths of layers that are given no item, such as learned positions: what they give is one for both branches."""
    many = 9973  # items, as many as no other axis has
    wide = lambda a: jax.ShapeDtypeStruct((many, *np.shape(a)[1:]), a.dtype) if np.ndim(a) else a
    x, t, cond = jax.tree.map(wide, (site.x, site.t, site.cond))
    alone = dict.fromkeys(_layers(site.base))

    def marked(path: str) -> Any:
        def f(call: Call, *args: Any, **kwargs: Any) -> Any:
            if any(_rows(a) == many for a in jax.tree.leaves((args, kwargs))):
                alone.pop(path, None)
            return call(*args, **kwargs)

        return f

    net = tapped(site.net, around={path: marked(path) for path in alone})
    jax.eval_shape(net, site.base, x, t, cond)
    return tuple(alone)


def of_one(name: str, paths: tuple[str, ...]) -> bool:
    """Whether an array belongs to one of these layers."""
    return any(name.startswith(f"{path}/") for path in paths)


def _layers(params: PyTree, path: str = "") -> dict[str, PyTree]:
    """The outermost modules that hold arrays of their own, by path.   Raises: ValueError: the network itself does."""
    if any(not isinstance(a, dict) for a in params.values()):
        if not path:
            raise ValueError(
                f"the network holds arrays itself ({sorted(params)}), so its branches cannot be told apart"
            )
        return {path: params}
    found: dict[str, PyTree] = {}
    for name, inner in params.items():
        found |= _layers(inner, f"{path}/{name}" if path else name)
    return found


def alone(site: Site) -> Site:
    """A site with the part x of a pair as the state."""
    x = site.x["x"] if isinstance(site.x, dict) else site.x
    return site._replace(x=x, t=site.t["x"] if isinstance(site.t, dict) else site.t)


def across(params: dict[str, Any], module: Any) -> PyTree:
    """Self-attention's parameters as those of attention to tokens."""
    if not isinstance(module, Attention):
        raise ValueError(
            f"branches meet in attentions of type Attention; got {type(module).__name__}. Choose other targets"
        )
    cut = {}
    for name in [n for n in params if n.startswith("qkv/")]:
        a = params.pop(name)
        each = a.reshape(*a.shape[:-1], module.heads, 3, -1)  # columns are sorted by head, then by q, k, v
        kind = name.removeprefix("qkv")
        cut[f"q_in{kind}"] = each[..., :1, :].reshape(*a.shape[:-1], -1)
        cut[f"kv{kind}"] = each[..., 1:, :].reshape(*a.shape[:-1], -1)
    return nested({**params, **cut})


def of_layer(a: Any, layer: Any) -> Any:
    """What belongs to one of the scanned layers."""
    return a if layer is None else jax.lax.dynamic_index_in_dim(jnp.asarray(a), layer, keepdims=False)


def _rows(a: Any) -> int | None:
    return a.shape[0] if getattr(a, "ndim", 0) else None


def _join(f: Any, g: Any) -> Any:
    """g, where no f is."""
    if f is not None:
        raise ValueError("the branches meet in a module that holds arrays itself")
    return g
