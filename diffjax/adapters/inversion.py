"""Learned vectors for new concepts, in the place of words or of a label; the network stays as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.adapters.core import Change, Site, strength
from diffjax.numerics import PyTree
from diffjax.training.partial import named


@dataclasses.dataclass(frozen=True)
class TextualInversion:
    """See `textual_inversion`."""

    vectors: int

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"vectors": zeros [n, d]}`."""
        return {"vectors": jnp.zeros((self.vectors, _tokens(site).shape[-1]), jnp.float32)}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The tokens of the condition, changed at their places."""
        if site.own is None:
            return Change()
        moved = strength(_rows(params["vectors"], site.own, _tokens(site).shape[:2]), weight)
        put = lambda cond: {**cond, "tokens": cond["tokens"] + moved.astype(cond["tokens"].dtype)}
        return Change(inputs=lambda x, t, cond: (x, t, put(cond)))


def textual_inversion(vectors: int = 1) -> TextualInversion:
    """New words for a network that reads tokens.   token' = token + w v_k where the k-th word stands, v_k from zero

    Its condition, under its name, is an integer array [B, L]: k in 0..n-1 where the k-th word stands among the tokens, -1
    elsewhere; left out, no word stands anywhere. The token that is already there is what the word starts from: in the
    paper a word of the class that the concept belongs to. Train with `trainable="^adapters/"`. For guidance the null
    condition has -1 everywhere: `null={"tokens": ..., NAME: -ones(L)}`.
    Args: vectors: n >= 1.
    Raises: ValueError: n < 1; at init or a call, no tokens in the condition; places of another shape, type or range.

    Example:
        >>> places = np.array([[-1, -1, 0]])  # `a digit *`
        >>> textual_inversion(1).vectors
        1

    Reference: Gal et al. 2023, arXiv:2208.01618, section 3.
    """
    if vectors < 1:
        raise ValueError(f"textual_inversion needs vectors >= 1; got {vectors}")
    return TextualInversion(vectors)


@dataclasses.dataclass(frozen=True)
class LabelInversion:
    """See `label_inversion`."""

    vectors: int
    at: str

    def init(self, key: Any, site: Site) -> PyTree:
        """`{"vectors": zeros [n, d]}`."""
        tables = {path: a for path, a in named(site.base) if path.endswith("/table")}
        if self.at + "/table" not in tables:
            raise ValueError(f"at={self.at!r} is no embedding of labels: the network has the tables {sorted(tables)}")
        return {"vectors": jnp.zeros((self.vectors, tables[self.at + "/table"].shape[-1]), jnp.float32)}

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """The embedding of labels, changed for the items that are of a new one."""
        if site.own is None:
            return Change()
        moved = strength(_rows(params["vectors"], site.own, np.shape(site.x)[:1]), weight)

        def embedded(call: Any, label: Any) -> Any:
            row = call(label)
            return row + moved.astype(row.dtype)

        return Change(around={self.at: embedded})


def label_inversion(vectors: int = 1, at: str = "code/label") -> LabelInversion:
    """New labels for a network that knows a fixed number.   E'[label] = E[label] + w v_k,  v_k from zero

    Its condition, under its name, is an integer array [B]: k in 0..n-1 for an item of the k-th new label, -1 for one of the
    old; left out, all are old. The label that the network is given is what the new one starts from: a class like it, or
    "no label". For guidance the null condition is of no new label either: `null={"label": num_classes, NAME: -1}`.
    Args: vectors: n >= 1.   at: path of the `LabelEmbedding` in the network.
    Raises: ValueError: n < 1; at init, no such module; at a call, another shape, type or range.

    Example:
        >>> cond = {"label": np.array([7, 7]), "toy": np.array([-1, 0])}  # a seven; the new one, like a seven
        >>> label_inversion(1).at
        'code/label'

    Reference: after Gal et al. 2023, arXiv:2208.01618, section 3, for labels.
    """
    if vectors < 1:
        raise ValueError(f"label_inversion needs vectors >= 1; got {vectors}")
    return LabelInversion(vectors, at)


def _tokens(site: Site) -> Any:
    if not isinstance(site.cond, dict) or np.ndim(site.cond.get("tokens")) != 3:
        raise ValueError("textual inversion needs cond['tokens'] [B, L, d]: a network that reads tokens")
    return site.cond["tokens"]


def _rows(table: Any, places: Any, shape: tuple[int, ...]) -> jax.Array:
    """The rows of a table that places name, zero for -1, NaN out of range.   [n, d], [*s] -> [*s, d]"""
    if not jnp.issubdtype(getattr(places, "dtype", float), jnp.integer) or places.shape != shape:
        raise ValueError(
            f"the condition of an inversion must be integers {list(shape)}, -1 where nothing is new; got "
            f"{getattr(places, 'dtype', type(places).__name__)} of shape {np.shape(places)}"
        )
    if not isinstance(places, jax.core.Tracer):
        bad = np.asarray(places)
        bad = bad[(bad < -1) | (bad >= len(table))]
        if bad.size:
            raise ValueError(f"there are {len(table)} learned vectors, 0..{len(table) - 1}; got {bad[:5].tolist()}")
    places = jnp.asarray(places)
    rows = jnp.take(table, jnp.where(places < -1, len(table), places), axis=0, mode="fill", fill_value=jnp.nan)
    return jnp.where((places == -1)[..., None], jnp.zeros((), table.dtype), rows)
