"""Brownian paths of diffrax, one for every item of a batch. Imported by `integrate` alone, because it imports diffrax."""

from __future__ import annotations

from typing import Any

import diffrax
import equinox
import jax


class ItemPaths(diffrax.AbstractBrownianPath):
    """`[B, ...]` increments (and Levy areas) of independent paths; an item's path depends on its key alone."""

    t0: Any
    t1: Any
    tolerance: Any
    shape: Any = equinox.field(static=True)  # of one item
    keys: Any  # [B, ...] raw words: a path folds one key into many, which the reuse checker of typed keys refuses
    levy_area: Any = equinox.field(static=True)

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment over [t0, t1] of every item."""

        def one(key: Any) -> Any:
            tree = diffrax.VirtualBrownianTree(self.t0, self.t1, self.tolerance, self.shape, key, self.levy_area)
            return tree.evaluate(t0, t1, left, use_levy)

        out = jax.vmap(one)(self.keys)
        return equinox.tree_at(lambda levy: levy.dt, out, t1 - t0) if use_levy else out
