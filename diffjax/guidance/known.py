"""Samples of which a part is known: one part of a pair, or some places of a picture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax import numerics as nu
from diffjax.guidance.threshold import with_x0
from diffjax.numerics import PyTree, pytree_dataclass
from diffjax.types import Cond, Denoiser, Evaluation


@pytree_dataclass
class Known:
    """See `known`; truth and mask are leaves."""

    truth: Any
    mask: Any

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser that knows this part."""
        return denoiser.wrap(_known, self)


def known(truth: PyTree, mask: PyTree) -> Known:
    """The prediction where the clean data are known, eps re-derived.   x0' = mask truth + (1 - mask) x0

    A deterministic solver then keeps the known part at its noised truth alpha(t) truth + sigma(t) z at every step, with the noise
    z that it started from, and ends at the truth; a stochastic one noises it anew. This asks a joint model for one part given
    the other: `known({"x": x, "y": y}, {"x": False, "y": True})` holds y, whatever x is.
    Args: truth: as the state, [B, ...].   mask: bool, or numbers in [0, 1] for a blend: one array, or a pytree prefix of the
        state; each broadcasts against the state from the left.
    Raises: ValueError: at the call, a mask with more axes than the state.
    Reference: arXiv:2310.06347 (one modality given the other, by inpainting).

    Example:
        >>> from diffjax import denoiser, from_x0, processes
        >>> d = denoiser(lambda x, t: 0 * x, processes.rectified(), from_x0)
        >>> p = known(jnp.ones((1, 2)), jnp.array([[True, False]]))(d)(jnp.ones((1, 2)), 0.5)
        >>> p.x0.tolist(), p.eps.tolist()
        ([[1.0, 0.0]], [[1.0, 2.0]])
    """
    return Known(truth, mask)


def _known(own: Known, inner: Denoiser, state: PyTree, x: PyTree, t: PyTree, cond: Cond, key: Any) -> Evaluation:
    e = inner.evaluate(x, t, cond, state=state, key=key)

    def blend(mask: Any, x0: Any, truth: Any) -> Any:
        def leaf(a: Any, b: Any) -> Any:
            m = jnp.asarray(mask, a.dtype)
            m = nu.expand(m, a) if m.ndim else m
            return m * jnp.asarray(b, a.dtype) + (1 - m) * a

        return jax.tree.map(leaf, x0, truth)

    x0 = jax.tree.map(blend, own.mask, e.prediction.x0, own.truth)
    return e._replace(prediction=with_x0(e.prediction, x0, inner.process, t))
