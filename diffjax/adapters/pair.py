"""Pairs of pictures: two branches of one network, side by side, that exchange what they have computed.

Both branches run in one call, one after the other along the batch: layers that have parameters work on each branch with the
branch's own, and where the branches meet both are at hand. The state is the pair {"x": ..., "y": ...} with a time for both or
{"x": ..., "y": ...} of times, and so is the output; or it is one part alone, and the other stands in the adapter's condition
with its own time: {"y": ..., "t": 0} asks for x given y, {"x": ..., "t": 0} for y given x, t = 1 with noise for one part
whatever the other is, and anything between for coarse control.

Other pairs go with a pair, and adapters that add to parameters (those of the branch of x); adapters that write to taps do not
know of the second branch.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.adapters.branches import PARTS, Pair, across, alone, of_layer, of_one, shared
from diffjax.adapters.core import Change, Site, added, strength
from diffjax.adapters.lora import LoRA, lora, stacked
from diffjax.networks.taps import Call, per_layer, tap_names
from diffjax.numerics import PyTree
from diffjax.training.partial import named, nested
from diffjax.training.patterns import checked, pattern


@dataclasses.dataclass(frozen=True)
class JointNet:
    """See `jointnet`."""

    targets: str

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"branch": the network's parameters without `branches.shared`, "to_x", "to_y": {tap: linear map from zero}}`."""
        site = alone(site)
        found = [
            n
            for n in tap_names(site.net, site.base, site.x, site.t, site.cond)
            if pattern(self.targets, "targets").search(n)
        ]
        if not found:
            raise ValueError(f"targets={self.targets!r} names no tap of the network, where the branches could exchange")
        zero = lambda *shape: jnp.zeros(shape, jnp.float32)
        maps = {}
        for name, a in site.shapes(*found).items():
            lead, c = a.shape[: stacked(name)], a.shape[-1]
            maps |= {f"{name}/kernel": zero(*lead, c, c), f"{name}/bias": zero(*lead, c)}
        both = shared(site)
        branch = nested({name: jnp.array(a) for name, a in named(site.base) if not of_one(name, both)})
        return {"branch": branch, "to_x": nested(maps), "to_y": nested(maps)}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The second branch, and what each adds to the other."""
        pair = Pair(site)
        maps = {to: dict(named(params[f"to_{to}"])) for to in PARTS}

        def exchange(name: str) -> Any:
            def add(h: Any, layer: Any = None) -> Any:
                def mapped(to: str, h: Any) -> Any:
                    kernel, bias = (of_layer(maps[to][f"{name}/{a}"], layer) for a in ("kernel", "bias"))
                    bias = bias.reshape((1,) * (h.ndim - 1) + (-1,))
                    return strength(h @ kernel.astype(h.dtype) + bias.astype(h.dtype), weight)

                x, y = pair.cut(h)
                return pair.add(h, mapped("x", y), mapped("y", x))

            return per_layer(add) if stacked(name) else add

        names = [path.removesuffix("/bias") for path in maps["x"] if path.endswith("/bias")]
        return pair.change(params["branch"], write={name: exchange(name) for name in names})


def jointnet(targets: str = r"(^|/)block$") -> JointNet:
    r"""A frozen branch for x and a trained copy of it for y, which add to each other.   h_x += w Z_x h_y,  h_y += w Z_y h_x

    Z are linear maps of the channels from zero, one for each direction and tap. Both parts have the shape that the network
    takes; learned positions and other arrays that no item is given to (`branches.shared`) are common to the branches. Trained
    with one time for both (see the module for the state); given one part, sample the pair with `guidance.known`, for which
    one time is enough.
    Args: targets: regular expression of the taps after which the branches exchange: by default after every block; the
        released networks exchange what goes from the encoder to the decoder, `^(skip_\d+|bottleneck)$` of a U-Net.
    Raises: ValueError: at init, targets that name no tap.

    Reference: Zhang et al. 2024, arXiv:2310.06347.

    Example:
        >>> from diffjax.adapters import adapt
        >>> from diffjax.networks import DiT, from_linen, random_parameters
        >>> net, x, t = from_linen(DiT(width=8, depth=1, heads=2)), jnp.ones((1, 2, 2, 1)), jnp.zeros(1)
        >>> fn = adapt(net, depth=jointnet())
        >>> params = fn.init(jax.random.key(0), random_parameters(net.module, x, t), x, t)
        >>> sorted(fn(params, {"x": x, "y": x}, t))
        ['x', 'y']
    """
    checked("targets", targets)
    return JointNet(targets)


@dataclasses.dataclass(frozen=True)
class UniCon:
    """See `unicon`."""

    rank: int
    joint_rank: int
    branch: str
    targets: str

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"branch": of LoRA, "to_x", "to_y": {"joint": of LoRA, "post": {attention: {"kernel"} from zero}}}`."""
        site = alone(site)
        both = shared(site)
        if common := [path for path in self._branch().kernels(site.base) if of_one(path, both)]:
            raise ValueError(
                f"branch={self.branch!r} names {common[:4]}, which both branches have in common: layers that are given no item, "
                "such as learned positions. Give a branch that leaves them out, such as r'(attention|hidden)/.*kernel$'"
            )
        keys = jax.random.split(key, 3)
        width = {path: dict(named(site.base))[f"{path}/out/kernel"] for path in self.places(site.base)}
        post = {f"{path}/kernel": jnp.zeros((*a.shape[:-2], a.shape[-1], a.shape[-1])) for path, a in width.items()}
        joint = {
            f"to_{to}": {"joint": self._joint(site).init(k, site), "post": nested(post)}
            for to, k in zip(PARTS, keys[1:], strict=True)
        }
        return {"branch": self._branch().init(keys[0], site), **joint}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The second branch, and the attention of each to the other."""
        pair = Pair(site)
        branch = added(site.base, self._branch().delta(params["branch"], site, None))
        delta = self._joint(site).delta
        joint = {to: dict(named(added(site.base, delta(params[f"to_{to}"]["joint"], site, None)))) for to in PARTS}
        post = {to: dict(named(params[f"to_{to}"]["post"])) for to in PARTS}

        def attend(path: str) -> Any:
            own = {to: _below(path, joint[to]) for to in PARTS}

            def f(layer: Any, call: Call, h: Any, *args: Any, **kwargs: Any) -> Any:
                def received(to: str, h: Any, of: Any) -> Any:
                    here = {name: of_layer(a, layer) for name, a in own[to].items()}
                    kernel = of_layer(post[to][f"{path}/kernel"], layer).astype(h.dtype)
                    read = call.using(across(here, call.module))(h, of, *args, **kwargs)
                    return strength(read @ kernel, weight)

                x, y = pair.cut(h)
                return pair.add(call(h, *args, **kwargs), received("x", x, y), received("y", y, x))

            return per_layer(f) if stacked(path) else lambda call, *args, **kwargs: f(None, call, *args, **kwargs)

        return pair.change(branch, around={path: attend(path) for path in self.places(site.base)})

    def places(self, base: PyTree) -> list[str]:
        """The paths of the self-attentions that targets names.   Raises: ValueError: none."""
        found = [path.removesuffix("/qkv/kernel") for path, _ in named(base) if path.endswith("/qkv/kernel")]
        found = [path for path in found if pattern(self.targets, "targets").search(path)]
        if not found:
            raise ValueError(
                f"targets={self.targets!r} names no self-attention of the network, where branches could meet"
            )
        return found

    def _branch(self) -> LoRA:
        return lora(self.rank, targets=self.branch)

    def _joint(self, site: Site) -> LoRA:
        chosen = "|".join(map(re.escape, self.places(site.base)))
        return lora(self.joint_rank, targets=f"^({chosen})/(qkv|out)/kernel$")


def unicon(
    rank: int = 4, *, joint_rank: int | None = None, branch: str = r"/kernel$|^kernel$", targets: str = "attention"
) -> UniCon:
    """Two branches of one network that attend to each other.   h_x += w Z_x A_x(h_x, h_y),  h_y += w Z_y A_y(h_y, h_x)

    A is the network's own self-attention with low-rank additions, with queries from one branch, keys and values from the
    other; Z is a linear map from zero. Each direction has its own, so that x may look elsewhere in y than y in x; so has
    each attention. The branch of y has low-rank additions of its own. The times
    of x and y are drawn apart in training (`times.laws.separate`), so that one model samples either given the other, both,
    or one with the other at any time between (see the module). Several such adapters, each with a y of its own, add what x
    receives from each, with their weights.
    Args: rank: of the additions to the branch of y.   joint_rank: of those to the attention, default rank.   branch: regular
        expression of the kernels of the branch of y that change.   targets: of the paths of the self-attentions that join.
    Raises: ValueError: a rank < 1; at init, targets or branch that name nothing, a branch that names what both have in common.

    Reference: Li et al. 2024, arXiv:2410.11439.

    Example:
        >>> unicon(8).joint_rank
        8
    """
    joint_rank = rank if joint_rank is None else joint_rank
    if min(rank, joint_rank) < 1:
        raise ValueError(f"unicon needs ranks >= 1; got rank={rank} and joint_rank={joint_rank}")
    checked("targets", targets)
    checked("branch", branch)
    return UniCon(rank, joint_rank, branch, targets)


def _below(path: str, flat: dict[str, Any]) -> dict[str, Any]:
    """The arrays of the module at a path, by their paths in it."""
    return {name.removeprefix(f"{path}/"): a for name, a in flat.items() if name.startswith(f"{path}/")}
