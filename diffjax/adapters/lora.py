"""Low-rank changes of weights."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.adapters.core import Change, Site, strength
from diffjax.networks.layers import fan_in_uniform
from diffjax.networks.taps import tap_names
from diffjax.numerics import PyTree
from diffjax.training.partial import named, nested
from diffjax.training.patterns import checked, pattern

Rank = int | tuple[tuple[str, int], ...]

KINDS = {"qkv": "qkv", "kv": "kv", "q_in": "q"}  # projections of attention -> what their columns hold for each head
PROJECTION = re.compile(r"^(.*/)?(qkv|kv|q_in)(_\d+)?/kernel$")
EXPERTS = re.compile(r"(^|/)experts/(gate|up|down)/kernel$")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """See `lora`."""

    rank: Rank
    alpha: float | None
    targets: str
    parts: tuple[str, ...] = ()
    told = False

    def init(self, key: Any, site: Site) -> PyTree:
        """Fresh factors, `up` from zero; see `lora` for their places and shapes."""
        kernels = self.kernels(site.base)
        heads = self._heads(kernels, site) if self.parts else {}
        shapes = {}
        for path, a in kernels.items():
            n, r = stacked(path), self._rank(path)
            lead, inputs = a.shape[:n], math.prod(a.shape[n:-1])
            if path in heads:
                kinds = KINDS[PROJECTION.match(path)[2]]
                for kind in (kind for kind in self.parts if kind in kinds):
                    size = a.shape[-1] // (heads[path] * len(kinds))
                    shapes[f"{path}/{kind}"] = (*lead, inputs, r), (*lead, r, heads[path], size)
            else:
                shapes[path] = (*lead, inputs, r), (*lead, r, a.shape[-1])
        if not shapes:
            raise ValueError(
                f"none of the projections {sorted(kernels)[:4]} that targets={self.targets!r} names has one of the "
                f"parts {self.parts}"
            )
        fresh = {}
        for k, (path, (down, up)) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
            fresh[path + "/down"] = fan_in_uniform(down[-2])(k, down, jnp.float32)
            fresh[path + "/up"] = jnp.zeros(up, jnp.float32)
        return nested(fresh)

    def delta(self, params: PyTree, site: Site, weight: Any) -> dict[str, Any]:
        """What is added to each kernel."""
        low = dict(named(params))
        check_pairs(low)

        def product(path: str) -> Any:  # [..., n_in, n_out] or [..., n_in, heads, D]
            down, up = low[path + "/down"], low[path + "/up"]
            scale = 1.0 if self.alpha is None else self.alpha / down.shape[-1]
            flat = strength(scale * up.reshape(*down.shape[:-2], down.shape[-1], -1), weight)
            return (down @ flat).reshape(*down.shape[:-1], *up.shape[down.ndim - 1 :])

        def whole(path: str, a: Any) -> Any:
            if path + "/down" in low:
                more, n = product(path), stacked(path)
                if more.shape != (*a.shape[:n], math.prod(a.shape[n:-1]), a.shape[-1]):
                    raise ValueError(
                        f"the additions to {path} are {list(more.shape)} for an array {list(a.shape)}: the adapter was made for "
                        "another network"
                    )
                return more.reshape(a.shape)
            kinds = KINDS[PROJECTION.match(path)[2]]
            found = {kind: product(f"{path}/{kind}") for kind in kinds if f"{path}/{kind}/down" in low}
            zero = jnp.zeros_like(next(iter(found.values())))
            return jnp.stack([found.get(kind, zero) for kind in kinds], axis=-2).reshape(a.shape)

        held = {path.rpartition("/")[0] for path in low}
        held |= {path.rpartition("/")[0] for path in held}
        kernels = self.kernels(site.base)
        found = {path: whole(path, a) for path, a in kernels.items() if path in held}
        if strange := [path for path in low if not any(path.startswith(kernel + "/") for kernel in found)]:
            raise ValueError(
                f"the network has no parameters for {strange[:3]}: the adapter was made for another one, or with other targets"
            )
        if bare := [path for path in kernels if path not in held and self._changes(path)]:
            raise ValueError(
                f"the adapter's parameters lack the factors of {bare[:4]}{' ...' if len(bare) > 4 else ''}, {len(bare)} of "
                f"{len(kernels)} kernels that targets={self.targets!r} names: they are incomplete, or of another adapter"
            )
        return found

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The kernels of the base, changed."""
        return Change(add=self.delta(params, site, weight))

    def kernels(self, base: PyTree) -> dict[str, Any]:
        """The arrays of two axes and more that `targets` and `rank` name.   Raises: ValueError: none."""
        found = targeted(base, self.targets)
        found = {path: a for path, a in found.items() if a.ndim - stacked(path) >= 2 and self._rank(path)}
        if not found:
            raise ValueError(f"no array that targets={self.targets!r} names has two axes and a rank in {self.rank!r}")
        return found

    def _rank(self, path: str) -> int:
        if isinstance(self.rank, int):
            return self.rank
        return next((r for text, r in self.rank if pattern(text, "rank").search(path)), 0)

    def _changes(self, path: str) -> bool:
        """Whether a kernel has one of the parts, or is changed as a whole."""
        match = PROJECTION.match(path) if self.parts else None
        return match is None or bool(set(self.parts) & set(KINDS[match[2]]))

    def _heads(self, kernels: dict[str, Any], site: Site) -> dict[str, int]:
        """How many heads the projections of attention have: the taps of their queries tell."""
        taps = {path: f"{PROJECTION.match(path)[1] or ''}q" for path in kernels if PROJECTION.match(path)}
        there = tap_names(site.net, site.base, site.x, site.t, site.cond)
        unknown = sorted({path for path, tap in taps.items() if tap not in there})
        if unknown:
            raise ValueError(
                f"parts={self.parts} cannot be told apart in {unknown[:3]}: the network has no taps q beside them. Leave parts "
                "out, or leave these out of targets"
            )
        shapes = site.shapes(*sorted(set(taps.values())))
        return {path: jax.tree.leaves(shapes[tap])[0].shape[-2] for path, tap in taps.items()}


def lora(
    rank: Rank = 4,
    *,
    alpha: float | None = None,
    targets: str = r"/kernel$|^kernel$",
    parts: tuple[str, ...] = (),
) -> LoRA:
    r"""Low-rank additions to kernels.   W' = W + w (alpha / r) A B,  A [n_in, r], B [r, n_out] from zero

    Parameters: at the path of each kernel `{"down": A, "up": B}`. A convolution [*k, c, n_out] is the matrix from its
    patches to its channels, n_in = prod(k) c. Layers that are scanned, and experts, have factors of their own: a leading
    axis as their kernel has it. With `parts` there are, at PATH of a projection of attention, `PATH/q/{down,up}`,
    `PATH/k/...` or `PATH/v/...`, with `up` [r, heads, D]; in the kernel the columns are sorted by head, then by q, k, v.
    Args: rank: r >= 1, or pairs (regular expression of a path, r) of which the first that is found decides; what none is
        found in stays as it is.   alpha: > 0, default r.   targets: regular expression of the paths of what changes, of
        two axes or more: kernels, or tables of embeddings.   parts: which of "q", "k", "v" change in the projections of
        attention that targets names, each with factors of its own; default the fused kernel as one matrix.
    Raises: ValueError: out of range, no regular expression; at init, targets that name nothing, parts that it does not tell apart.

    Example:
        >>> lora(rank=8, targets=r"attention/(qkv|out)/kernel$").alpha
        8.0
        >>> values = lora(2, targets=r"attention/qkv/kernel$", parts=("v",))
        >>> twice = lora((("attention/", 8), ("conv_", 4)))

    Reference: Hu et al. 2022, arXiv:2106.09685, Eq. 3.
    """
    ranks = [rank] if isinstance(rank, int) else [r for _, r in rank]
    if not ranks or min(ranks) < 1 or (alpha is not None and not alpha > 0):
        raise ValueError(f"lora needs rank >= 1 and alpha > 0; got rank={rank} and alpha={alpha}")
    if not set(parts) <= set("qkv") or len(set(parts)) != len(parts):
        raise ValueError(f'parts must be some of "q", "k", "v"; got {parts!r}')
    checked("targets", targets)
    if not isinstance(rank, int):
        checked("rank", *(text for text, _ in rank))
    if alpha is None and isinstance(rank, int):
        alpha = float(rank)
    return LoRA(
        rank if isinstance(rank, int) else tuple(map(tuple, rank)),
        None if alpha is None else float(alpha),
        targets,
        tuple(parts),
    )


def check_pairs(low: dict[str, Any]) -> None:
    """Refuse factors without the other of their pair.   low: by path.   Raises: ValueError: by name."""
    held: dict[str, set[str]] = {}
    for name in low:
        path, _, which = name.rpartition("/")
        held.setdefault(path, set()).add(which)
    if half := [f"{path} (has {', '.join(sorted(own))})" for path, own in held.items() if own != {"down", "up"}]:
        raise ValueError(
            f"LoRA needs a pair `down` and `up` at each path; got {len(half)} paths with other arrays: {', '.join(half[:4])}. "
            "The parameters are incomplete; take all that `init` made"
        )


def targeted(base: PyTree, targets: str) -> dict[str, Any]:
    """The arrays of a network whose paths `targets` is found in.   Raises: ValueError: none."""
    leaves = dict(named(base))
    found = {path: a for path, a in leaves.items() if pattern(targets, "targets").search(path)}
    if not found:
        raise ValueError(
            f"targets={targets!r} names no array of the network; it has {', '.join(sorted(leaves)[:8])} ..."
        )
    return found


def stacked(path: str) -> int:
    """How many leading axes of an array count kernels: layers of a scanned stack, experts.

    Example:
        >>> stacked("blocks/attention/qkv/kernel"), stacked("block_0/experts/up/kernel"), stacked("in/kernel")
        (1, 1, 0)
    """
    return int("blocks" in path.split("/")) + int(EXPERTS.search(path) is not None)
