"""A plain change of some parameters, beside the network: what partial fine-tuning leaves, as a small file."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffjax.adapters.core import Change, Site, strength
from diffjax.adapters.lora import targeted
from diffjax.networks.layers import at_least_float32
from diffjax.numerics import PyTree
from diffjax.training.partial import named, nested
from diffjax.training.patterns import checked, pattern


@dataclasses.dataclass(frozen=True)
class Difference:
    """See `difference`."""

    targets: str
    told = False

    def init(self, key: Any, site: Site) -> PyTree:
        """Zeros in the place of each array that targets names."""
        zeros = {p: jnp.zeros(a.shape, at_least_float32(a.dtype)) for p, a in targeted(site.base, self.targets).items()}
        return nested(zeros)

    def delta(self, params: PyTree, site: Site, weight: Any) -> dict[str, Any]:
        """What is added to each array."""
        return {path: strength(a, weight) for path, a in named(params)}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The arrays of the base, changed."""
        return Change(add=self.delta(params, site, weight))

    def between(self, base: PyTree, tuned: PyTree) -> PyTree:
        """The parameters with which this adapter makes `tuned` of `base`, up to rounding.

        Raises: ValueError: the two differ elsewhere too, or are not parameters of one network.
        """
        old, new = dict(named(base)), dict(named(tuned))
        if {p: a.shape for p, a in old.items()} != {p: a.shape for p, a in new.items()}:
            raise ValueError("base and tuned must be parameters of one network: their names or shapes differ")
        others = [
            p for p in old if not pattern(self.targets, "targets").search(p) and not bool((old[p] == new[p]).all())
        ]
        if others:
            raise ValueError(
                f"base and tuned also differ in {others[:3]}, which targets={self.targets!r} does not name"
            )
        wide = lambda a: jnp.asarray(a).astype(at_least_float32(a.dtype))
        return nested({p: wide(new[p]) - wide(old[p]) for p in targeted(base, self.targets)})


def difference(targets: str) -> Difference:
    """Additions to some arrays of a network, from zero.   theta' = theta + w delta

    Trained beside a network it is partial fine-tuning that can be taken back, weighted and saved as a small file. For a
    network whose arrays were trained in place (`make_train_step(..., trainable=targets)`) `.between(base, tuned)` makes
    the parameters. They are nested as the arrays that they change.
    Args: targets: regular expression of the paths of these arrays.
    Raises: ValueError: at init, targets that name nothing.

    Example:
        >>> tuned = difference("^out/").between({"in": jnp.ones(1), "out": {"w": jnp.ones(1)}},
        ...                                     {"in": jnp.ones(1), "out": {"w": jnp.zeros(1)}})
        >>> tuned["out"]["w"].tolist()
        [-1.0]
    """
    checked("targets", targets)
    return Difference(targets)
