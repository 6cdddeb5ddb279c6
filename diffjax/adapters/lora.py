"""Low-rank changes of weights."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.adapters.core import Change, Site
from diffjax.networks.layers import fan_in_uniform
from diffjax.numerics import PyTree
from diffjax.training.partial import named, nested


@dataclasses.dataclass(frozen=True)
class LoRA:
    """See `lora`."""

    rank: int
    alpha: float
    targets: str

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"down": [n_in, r], "up": [r, n_out]}` in the place of each kernel, `up` from zero."""
        kernels = self.kernels(site.base)
        keys = jax.random.split(key, len(kernels))
        down = fan_in_uniform()
        fresh = {}
        for k, (path, a) in zip(keys, kernels.items(), strict=True):
            fresh[path + "/down"] = down(k, (math.prod(a.shape[:-1]), self.rank), jnp.float32)
            fresh[path + "/up"] = jnp.zeros((self.rank, a.shape[-1]), jnp.float32)
        return nested(fresh)

    def delta(self, params: PyTree, site: Site, weight: Any) -> dict[str, Any]:
        """What is added to each kernel."""
        scale = self.alpha / self.rank * (1.0 if weight is None else weight)
        low = dict(named(params))
        delta = lambda path: scale * (low[path + "/down"] @ low[path + "/up"])
        return {path: delta(path).reshape(a.shape) for path, a in self.kernels(site.base).items()}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The kernels of the base, changed."""
        return Change(add=self.delta(params, site, weight))

    def kernels(self, base: PyTree) -> dict[str, Any]:
        """The kernels of two axes and more that `targets` names.   Raises: ValueError: none."""
        leaves = dict(named(base))
        found = {name: a for name, a in leaves.items() if a.ndim >= 2 and re.search(self.targets, name)}
        if not found:
            raise ValueError(
                f"targets={self.targets!r} names no kernel of the network; it has {', '.join(sorted(leaves)[:8])} ..."
            )
        return found


def lora(rank: int = 4, *, alpha: float | None = None, targets: str = r"/kernel$|^kernel$") -> LoRA:
    """Low-rank additions to kernels.   W' = W + w (alpha / r) A B,  A [n_in, r], B [r, n_out] from zero

    A convolution is taken as the matrix from its patches to its channels.
    Args: rank: r >= 1.   alpha: > 0, default r.   targets: regular expression of the paths of the kernels that change.
    Raises: ValueError: out of range; at init, targets that name no kernel.

    Example:
        >>> lora(rank=8, targets=r"attention/(qkv|out)/kernel$").alpha
        8.0

    Reference: Hu et al. 2022, arXiv:2106.09685, Eq. 3.
    """
    if rank < 1 or (alpha is not None and not alpha > 0):
        raise ValueError(f"lora needs rank >= 1 and alpha > 0; got rank={rank} and alpha={alpha}")
    return LoRA(rank, float(rank if alpha is None else alpha), targets)
