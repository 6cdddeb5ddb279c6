"""Conditions made from pictures, for the recipes of this family: what is drawn, at what coarseness, where, and how far from it.

Pictures are [B, H, W, C], about [-1, 1] (the standardised digits reach 1.85); hints are [B, H, W, c] in [0, 1], where zero is
nothing, unless said otherwise. All are plain JAX functions, so that a recipe makes hints of its samples as of its data, inside
`jit`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.data.hints import blur, edges, grey, low_resolution, mask, windows

__all__ = ["blur", "edges", "grey", "low_resolution", "mask", "windows"]  # those that the command line has too


def quadrant(shape, which):
    """One in a quadrant of pictures [B, H, W, C].   which: [B] in 0..3, row by row.   Returns: [B, H, W, 1]"""
    h, w = shape[1:3]
    number = 2 * (jnp.arange(h) >= h // 2)[:, None] + (jnp.arange(w) >= w // 2)[None]
    return (number[None] == jnp.asarray(which)[:, None, None]).astype(jnp.float32)[..., None]


def erased(x, where):
    """The picture without what is to be drawn anew, and where that is.   [B, H, W, C], [B, H, W, 1] -> [B, H, W, C + 1]"""
    return jnp.concatenate([jnp.where(where > 0, jnp.zeros((), x.dtype), x), where.astype(x.dtype)], axis=-1)


def distance(x, threshold=0.5):
    """How far the next bright pixel is, over the longer side; one where none is.   [B, H, W, C] -> [B, H, W, 1]"""
    _, h, w, _ = x.shape
    at = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 2)
    far = jnp.asarray(np.linalg.norm(at[:, None] - at[None], axis=-1) / max(h, w), x.dtype)
    lit = mask(x, threshold).reshape(len(x), 1, h * w) > 0
    return jnp.minimum(jnp.where(lit, far[None], 1.0).min(-1), 1.0).reshape(len(x), h, w, 1)


def boxes(x, threshold=0.5):
    """The smallest box around what is bright.   Returns: [B, 4] of top, left, bottom, right in [0, 1]; zeros without any"""
    lit = mask(x, threshold)[..., 0] > 0

    def ends(line):  # [B, n] bool -> first, one after last, over n
        n = line.shape[1]
        i = jnp.arange(n)[None]
        low, high = jnp.where(line, i, n).min(1), jnp.where(line, i + 1, 0).max(1)
        return [jnp.where(line.any(1), end, 0) / n for end in (low, high)]

    (top, bottom), (left, right) = ends(lit.any(2)), ends(lit.any(1))
    return jnp.stack([top, left, bottom, right], axis=1).astype(x.dtype)


def filled(box, h, w):
    """One inside a box.   [B, 4] -> [B, h, w, 1]"""
    middle = lambda n: ((jnp.arange(n) + 0.5) / n)[None]
    top, left, bottom, right = (side[:, None] for side in jnp.asarray(box).T)
    row, column = (middle(h) > top) & (middle(h) < bottom), (middle(w) > left) & (middle(w) < right)
    return (row[:, :, None] & column[:, None, :]).astype(jnp.float32)[..., None]


def overlap(a, b):
    """Intersection over union of two masks, one if both are empty.   [B, H, W, 1] twice -> [B]"""
    a, b = (v.reshape(len(v), -1) > 0.5 for v in (a, b))
    union = (a | b).sum(1)
    return jnp.where(union > 0, (a & b).sum(1) / jnp.maximum(union, 1), 1.0)


def far(a, b):
    """The root mean square difference of each item.   -> [B]"""
    return jnp.sqrt(jnp.square(a - b).reshape(len(a), -1).mean(1))


def shuffled(key, tree):
    """The same hints for other items: what a control error without control is measured by."""
    order = jax.random.permutation(key, len(jax.tree.leaves(tree)[0]))
    return jax.tree.map(lambda a: a[order], tree)
