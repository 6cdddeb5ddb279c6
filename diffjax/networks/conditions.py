"""The one convention for conditions, shared by all networks.

`cond` is None, an integer array `[B]` (short for `{"label": that}`), or a dict with any of
- `label`  [B] integers in [0, num_classes]; `num_classes` is the learned "no label";
- `vector` [B, k] floats, embedded and added to the time code (zero is "no vector");
- `tokens` [B, L, d] floats, read by cross-attention, with an optional `mask` [B, L] of booleans (False is padding);
- `image`  [B, *n, c] floats with the spatial axes of the state, joined to the state along channels.
Networks of sequences and sets also take, about the elements of the state themselves (`read_elements`),
- `present` [B, L] booleans, False where the state is padding; all present if left out;
- `pairs`   [B, L, L, k] floats, features of pairs of elements.
A network is configured for the kinds that it takes (`num_classes`, `vector_size`, `token_size`, `image_channels`, zero
for none) and is given exactly these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.networks.embeddings import UNIT, Features, LabelEmbedding, TimeCode
from diffjax.networks.layers import Dense
from diffjax.networks.partition import constrain

FIELDS = {"label": "num_classes", "vector": "vector_size", "tokens": "token_size", "image": "image_channels"}


class Condition(NamedTuple):
    """A condition that has been checked; what a network is not configured for is None."""

    label: Any = None
    vector: Any = None
    tokens: Any = None  # padding is zero
    mask: Any = None  # [B, L] wherever tokens are
    image: Any = None

    def joined(self, x: Any, dtype: Any) -> jax.Array:
        """The state with the image behind it, if there is one.   [B, *n, C], [B, *n, c] -> [B, *n, C + c]"""
        x = x.astype(dtype)
        return x if self.image is None else jnp.concatenate([x, jnp.asarray(self.image).astype(dtype)], axis=-1)


def read_condition(
    cond: Any,
    x: Any,
    *,
    num_classes: int = 0,
    vector_size: int = 0,
    token_size: int = 0,
    image_channels: int = 0,
    null_label: bool = True,
) -> Condition:
    """Check `cond` against what a network takes and sort it into its kinds.

    Args: cond: see the module.   x: [B, ...] state; an image must have its spatial axes.   null_label: whether there is a
    "no label".   The others: sizes of the kinds that the network takes, 0 for none.
    Raises: ValueError: a kind is missing or not taken; wrong type, shape or batch; a label out of range (if it is
    concrete).

    Example:
        >>> c = read_condition(np.array([3, 10]), jnp.zeros((2, 4)), num_classes=10)
        >>> c.label.tolist(), c.tokens is None
        ([3, 10], True)
    """
    sizes = dict(zip(FIELDS, (num_classes, vector_size, token_size, image_channels), strict=True))
    if cond is None:
        cond = {}
    elif not isinstance(cond, dict):
        if not hasattr(cond, "dtype") or not jnp.issubdtype(cond.dtype, jnp.integer):
            got = f"{cond.dtype} array" if hasattr(cond, "dtype") else type(cond).__name__
            raise ValueError(
                f"cond must be None, an integer array of labels [B], or a dict with any of {list(FIELDS)} and "
                f"mask; got {got}"
            )
        cond = {"label": cond}
    for name in cond:
        if name != "mask" and name not in FIELDS:
            raise ValueError(f"cond[{name!r}] is not a kind of condition; known are {list(FIELDS)} and mask")
        if name in FIELDS and not sizes[name]:
            raise ValueError(
                f"cond has {name!r}, but this network takes no {name}; configure it with "
                f"{FIELDS[name]} > 0 or leave it out"
            )
    for name, size in sizes.items():
        if size and name not in cond:
            raise ValueError(
                f"this network needs cond[{name!r}] ({FIELDS[name]}={size}); got {sorted(cond) or None}. "
                "For no condition give what null_condition returns"
            )
    if "mask" in cond and "tokens" not in cond:
        raise ValueError("cond has 'mask' but no 'tokens'; the mask tells which tokens are padding")
    b = x.shape[0]
    if "label" in cond:
        _check_label(cond["label"], b, num_classes, null_label)
    if "vector" in cond:
        _check_shape("vector", cond["vector"], (b, vector_size))
    if "image" in cond:
        _check_shape("image", cond["image"], (*x.shape[:-1], image_channels))
    tokens = mask = None
    if "tokens" in cond:
        length = np.shape(cond["tokens"])[1] if np.ndim(cond["tokens"]) == 3 else -1
        _check_shape("tokens", cond["tokens"], (b, length, token_size))
        mask = cond.get("mask")
        mask = np.ones((b, length), bool) if mask is None else mask
        _check_mask("mask", mask, (b, length))
        mask = jnp.asarray(mask)
        # Zero, so that not even a NaN in the padding can reach the result.
        tokens = jnp.where(mask[:, :, None], cond["tokens"], jnp.zeros((), jnp.asarray(cond["tokens"]).dtype))
    label = jnp.asarray(cond["label"]) if "label" in cond else None
    return Condition(label, cond.get("vector"), tokens, mask, cond.get("image"))


def read_elements(cond: Any, x: Any, pair_size: int = 0) -> tuple[Any, Any, Any]:
    """Take what is told about the elements of a sequence or set out of `cond`.

    Args: cond: see the module.   x: [B, L, C].   pair_size: of `pairs`, 0 for none.
    Returns: the rest of cond, for `read_condition`; present [B, L] or None; pairs [B, L, L, pair_size] or
        None, zero where one of the two is padding.
    Raises: ValueError: pairs missing, or given where none are taken; wrong type or shape.

    Example:
        >>> rest, present, _ = read_elements({"present": np.ones((1, 2), bool)}, jnp.zeros((1, 2, 3)))
        >>> rest, present.shape
        ({}, (1, 2))
    """
    rest = dict(cond) if isinstance(cond, dict) else cond
    taken = {k: rest.pop(k) for k in ("present", "pairs") if isinstance(rest, dict) and k in rest}
    present, pairs = taken.get("present"), taken.get("pairs")
    b, length = x.shape[:2]
    if present is not None:
        _check_mask("present", present, (b, length))
    if (pairs is not None) != bool(pair_size):
        raise ValueError(
            f"this network has pair_size={pair_size} and cond {'no ' if pairs is None else ''}'pairs'; "
            "give features of pairs where pair_size > 0, and nowhere else"
        )
    if pairs is not None:
        _check_shape("pairs", pairs, (b, length, length, pair_size))
        pairs = jnp.asarray(pairs)
    if present is not None:
        present = jnp.asarray(present)
    if present is not None and pairs is not None:  # zero, as tokens that are padding
        both = present[:, :, None, None] & present[:, None, :, None]
        pairs = jnp.where(both, pairs, jnp.zeros((), pairs.dtype))
    return rest, present, pairs


def null_condition(
    *,
    num_classes: int = 0,
    vector_size: int = 0,
    token_size: int = 0,
    token_length: int = 1,
    image_shape: tuple[int, ...] | None = None,
) -> Any:
    """The condition that means "no condition", without batch axis, for the kinds that a network takes.

    The label `num_classes`, a zero vector, `token_length` zero tokens that are all padding, a zero image. With a label
    alone the result is bare, as a label condition may be; a dict user writes
    `{"label": null_condition(num_classes=n)}`.
    Returns: None, an int32 scalar, or a dict of NumPy arrays.

    Example:
        >>> int(null_condition(num_classes=10))
        10
        >>> null_condition(num_classes=10, token_size=4, token_length=2)["mask"].tolist()
        [False, False]
    """
    null: dict[str, Any] = {}
    if num_classes:
        null["label"] = np.asarray(num_classes, np.int32)
    if vector_size:
        null["vector"] = np.zeros(vector_size, np.float32)
    if token_size:
        null["tokens"] = np.zeros((token_length, token_size), np.float32)
        null["mask"] = np.zeros(token_length, bool)
    if image_shape is not None:
        null["image"] = np.zeros(image_shape, np.float32)
    if not null:
        return None
    return null["label"] if list(null) == ["label"] else null


def read_time(t: Any, x: Any, axes: int = 1) -> jax.Array:
    """The time code as an array whose axes are the leading ones of `x`: [B], or up to `axes` of them.

    Args: t: scalar, or [B, ...] (unit axes broadcast).   axes: how many leading axes of x may have their own time.
    Raises: ValueError: not floating; more axes than that; lengths that do not broadcast against those of x.

    Example:
        >>> read_time(0.5, jnp.zeros((3, 2))).shape
        (3,)
    """
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        raise ValueError(f"the time code t must be floating; got {t.dtype}. Cast it: t.astype(float32)")
    lead = x.shape[: max(t.ndim, 1)]
    if t.ndim > axes or any(n not in (1, m) for n, m in zip(t.shape, lead, strict=False)):
        raise ValueError(
            f"the time code t of shape {t.shape} does not fit a state of shape {x.shape}: it must be a scalar or have "
            f"at most {axes} leading axes of the state"
        )
    return jnp.broadcast_to(t, lead)


def read_state(x: Any, form: str) -> jax.Array:
    """The state as a JAX array, if it is floating and has the axes that `form` names, such as '[B, H, W, C]'.

    `...` stands for any number of axes, `*n` for one to three.

    Raises: ValueError: as said.
    """
    x = jnp.asarray(x)
    rank = form.count(",") + 1
    fits = x.ndim >= 2 if "..." in form else 3 <= x.ndim <= 5 if "*n" in form else x.ndim == rank
    if not fits or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"the state x must be a floating array {form}; got {x.dtype} of shape {x.shape}")
    return x


def condition_of(net: Any, cond: Any, x: Any) -> Condition:
    """`cond`, read as a network is configured for: by its fields `num_classes`, `vector_size`, `token_size`, `image_channels`.

    Args: net: a module with any of these fields; those that it lacks are kinds it cannot take.   cond, x: see `read_condition`.
    Raises: ValueError: see `read_condition`.
    """
    sizes = {field: getattr(net, field, 0) for field in FIELDS.values()}
    return read_condition(cond, x, **sizes, null_label=getattr(net, "null_label", True))


class Code(nn.Module):
    """Time, label and vector as one code.   c = act(time(t) + label[l] + W v)

    Args: t: [B, ...] from `read_time`.   condition: from `read_condition`.   with_time: also return act(time(t)).
    Returns: [B, ..., features], or two of these.

    Example:
        >>> v = jax.eval_shape(Code(8).init, jax.random.key(0), jnp.zeros(3), Condition())
        >>> sorted(v["params"])
        ['time']
    """

    features: int
    num_classes: int = 0
    vector_size: int = 0
    frequencies: Features = UNIT
    act: Callable[[Any], Any] = nn.silu
    dtype: Any = jnp.float32
    sinusoids: int | None = None  # sinusoidal features of the time; default as `features`
    deep_vector: bool = False  # the vector by Dense(act(Dense(v))), as the time, and not by one linear map
    null_label: bool = True  # see `LabelEmbedding`
    label: Any = None  # (num_classes, features, dtype=, name=) -> the label's embedding, default `LabelEmbedding`
    early: tuple[str, ...] = ()  # of label and vector, what is added to the features of the time, before its embedding

    @nn.compact
    def __call__(self, t: Any, condition: Condition, *more: Any, with_time: bool = False) -> Any:
        """The code of time and condition; `more` [B, features] is added before the activation."""
        time = TimeCode(self.features, self.sinusoids, self.frequencies, self.act, self.dtype, name="time")
        size = self.sinusoids or self.features
        items, first = list(more), []
        place = lambda name: (first, size) if name in self.early else (items, self.features)
        if self.num_classes:
            to, n = place("label")
            if self.label is None:
                label = LabelEmbedding(self.num_classes, n, self.dtype, self.null_label, name="label")
            else:
                label = self.label(self.num_classes, n, dtype=self.dtype, name="label")
            to.append(label(condition.label))
        if self.vector_size:
            to, n = place("vector")
            v = jnp.asarray(condition.vector).astype(self.dtype)
            if self.deep_vector:
                v = self.act(Dense(self.features, dtype=self.dtype, name="vector_hidden")(v))
            to.append(Dense(n, bias=self.deep_vector, dtype=self.dtype, name="vector")(v))
        lifted = lambda item: item.reshape(item.shape[:1] + (1,) * (jnp.ndim(t) - 1) + item.shape[1:])
        c = alone = time(t, *map(lifted, first))
        c = sum(map(lifted, items), c)
        c = constrain(self.act(c), "batch", ...)
        return (c, constrain(self.act(alone), "batch", ...)) if with_time else c


def _check_label(label: Any, b: int, num_classes: int, null: bool) -> None:
    dtype = getattr(label, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or np.shape(label) != (b,):
        got = type(label).__name__ if dtype is None else dtype
        raise ValueError(f"cond['label'] must be an array of integers [{b}]; got {got} of shape {np.shape(label)}")
    if isinstance(label, jax.core.Tracer):
        return
    bad = np.asarray(label)
    bad = bad[(bad < 0) | (bad >= num_classes + null)]
    if bad.size:
        accepted = (
            f"{num_classes}] ({num_classes} is no label)" if null else f"{num_classes - 1}] (there is no 'no label')"
        )
        raise ValueError(f"cond['label'] must lie in [0, {accepted}; got {bad[:5].tolist()}")


def _check_mask(name: str, mask: Any, want: tuple[int, int]) -> None:
    dtype = getattr(mask, "dtype", type(mask).__name__)
    if np.shape(mask) != want or str(dtype) != "bool":
        raise ValueError(f"cond[{name!r}] must be bool {list(want)} (False is padding); got {dtype} {np.shape(mask)}")


def _check_shape(name: str, value: Any, want: tuple[int, ...]) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or np.shape(value) != want:
        shown = ["any" if n < 0 else n for n in want]
        raise ValueError(f"cond[{name!r}] must be floats {shown}; got {dtype} of shape {np.shape(value)}")
