"""Conditioning without new modules: state and reference side by side on one canvas."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffjax.adapters.core import Change, Site
from diffjax.adapters.difference import difference
from diffjax.numerics import PyTree
from diffjax.training.patterns import checked

PARTS = ("x", "reference")


@dataclasses.dataclass(frozen=True)
class Concatenation:
    """See `concatenation`."""

    axis: int
    targets: str

    def init(self, key: Any, site: Site) -> PyTree:
        """Differences from zero of the arrays that targets names."""
        return difference(self.targets).init(key, site)

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The arrays of the base, changed, and the canvas."""
        change = difference(self.targets).change(params, site, weight)
        whole, own = isinstance(site.x, dict), site.own
        if own is None and not whole:
            return change
        named = own is None or (isinstance(own, dict) and set(own) == {PARTS[1]})
        if (whole and set(site.x) != set(PARTS)) or not named:
            got = sorted(own) if isinstance(own, dict) else type(own).__name__
            raise ValueError(
                'concatenation takes {"reference": ...} as its condition, and the state alone or {"x", "reference"}; '
                f"got the condition {got} and the state {sorted(site.x) if whole else 'alone'}"
            )
        return change._replace(inputs=self._canvas(own, whole), output=self._halves(whole))

    def _canvas(self, own: Any, whole: bool) -> Any:
        beside = lambda a, b: jnp.concatenate([a, b], self.axis)

        def inputs(x: Any, t: Any, cond: Any) -> tuple[Any, Any, Any]:
            first = x["x"] if whole else x
            clean = None if own is None else jnp.asarray(own["reference"], first.dtype)
            second = x["reference"] if whole else clean
            shapes = {a.shape for a in (first, second, *([] if clean is None else [clean]))}
            if len(shapes) > 1 or not 1 <= self.axis < first.ndim - 1:
                raise ValueError(
                    f"state and reference must have one shape, and axis={self.axis} must be one of its places; got {sorted(shapes)}"
                )
            if isinstance(cond, dict) and "image" in cond:
                cond = {**cond, "image": beside(cond["image"], self._image(clean, jnp.asarray(cond["image"])))}
            return beside(first, second), t, cond

        return inputs

    def _image(self, clean: Any, image: Any) -> Any:
        """What the network is shown beside the reference's half: the reference, and zero as its mask."""
        if clean is None:
            raise ValueError(
                'a network that takes an image needs the clean reference in the condition: {"reference": ...}'
            )
        rest = image.shape[-1] - clean.shape[-1]
        if rest < 0:
            raise ValueError(
                f"cond['image'] has {image.shape[-1]} channels, fewer than the reference's {clean.shape[-1]}"
            )
        return jnp.pad(clean.astype(image.dtype), [(0, 0)] * (clean.ndim - 1) + [(0, rest)])

    def _halves(self, whole: bool) -> Any:
        def output(y: Any) -> Any:
            first, second = jnp.split(y, 2, self.axis)
            return {"x": first, "reference": second} if whole else first

        return output


def concatenation(axis: int = 1, targets: str = r"(^|/)attention/") -> Concatenation:
    r"""State and reference side by side as one state, of which the network's own self-attention makes use.   z = [x, r]

    The reference [B, *n, C] stands in the adapter's condition, `{"reference": r}`, clean; the output is the half of the state.
    Or the state is the whole canvas, `{"x": x_t, "reference": r_t}` with one time, and so is the output: trained with it the loss
    counts the whole canvas. A network that takes an image (what is known, with its mask as last channel) is shown
    [image, (r, 0)]. Only the differences of what `targets` names are trained. A zero reference means none, for guidance:
    `null={NAME: {"reference": zeros}}`. Where no reference is given there is no canvas; the weight is of the differences.
    Args: axis: of the state along which they lie, 1 for height.   targets: regular expression of the arrays that change, by
        default those of all self-attentions.
    Raises: ValueError: when called, another condition; shapes that differ; an axis that is not one of places.

    Reference: Chong et al. 2025, arXiv:2407.15886.

    Example:
        >>> import jax
        >>> from diffjax.adapters import adapt
        >>> from diffjax.networks import DiT, from_linen, random_parameters
        >>> net, x, t = from_linen(DiT(width=8, depth=1, heads=2)), jnp.ones((1, 2, 2, 1)), jnp.zeros(1)
        >>> fn = adapt(net, wear=concatenation())
        >>> params = fn.init(jax.random.key(0), random_parameters(net.module, x, t), x, t)
        >>> fn(params, x, t, {"wear": {"reference": x}}).shape
        (1, 2, 2, 1)
    """
    checked("targets", targets)
    return Concatenation(axis, targets)
