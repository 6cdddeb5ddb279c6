"""Flax modules, linen or nnx, as the pure function `fn(params, x, t, cond, key)` that a denoiser takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# ------------------------------------------------------------------------------------------------------------- linen


@dataclasses.dataclass(frozen=True)
class FromLinen:
    """What `from_linen` returns: `fn(params, x, t, cond, key)`, equal to another one of an equal module."""

    module: Any

    def __call__(self, params: Any, x: Any, t: Any, cond: Any = None, key: Any = None, *, mutable: Any = False) -> Any:
        """The network's output; dropout is used if and only if a `key` is given: one, or one per item [B]."""
        if key is not None and jnp.ndim(key) == 1:
            if mutable:
                raise ValueError(
                    "taps cannot be read where every item has a dropout key of its own; give one key for the batch, or "
                    "no dropout: denoiser(..., dropout=False)"
                )
            return per_item(lambda *args: self(params, *args), x, t, cond, key)
        options = {"train": key is not None} if _takes(self.module, "train") else {}
        rngs = {} if key is None else {"dropout": key}
        return self.module.apply({"params": params}, x, t, cond, **options, rngs=rngs, mutable=mutable)

    def init(self, key: Any, x: Any, t: Any, cond: Any = None) -> Any:
        """Fresh parameters, a nested dict of float32 arrays; see `initialise`."""
        # Compiler options are only accepted outermost; inside another transformation the init joins that.
        init = _init_module if isinstance(key, jax.core.Tracer) else _init
        variables = init(self.module, key, *zeros((x, t, cond)))
        extra = sorted(set(variables) - {"params", "taps"})
        if extra:
            raise ValueError(
                f"{type(self.module).__name__} keeps state in {extra}; from_linen takes modules whose only "
                "variables are 'params', because fn(params, x, t, cond) must be pure. Use a normalisation without running averages"
            )
        return variables.get("params", {})


def from_linen(module: Any) -> FromLinen:
    """A linen module as a pure function.   fn(params, x, t, cond=None, key=None) -> array

    The module is called as `module(x, t, cond)`, with `train=` too if it takes that. Two functions made from equal
    modules are equal and hash alike, so building the function again does not compile again.
    Args: module: unbound, with hashable fields (tuples, not lists).
    Returns: the function, with `.init(key, x, t, cond) -> params`.
    Raises: ValueError: not such a module; at `.init`, variables that are not parameters.

    Example:
        >>> import flax.linen as nn
        >>> from diffjax.networks import MLP
        >>> from_linen(MLP(width=8)) == from_linen(MLP(width=8))
        True
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"from_linen needs a flax.linen module, for example MLP(width=64); got {module!r}")
    if module.scope is not None:
        raise ValueError(
            f"from_linen needs an unbound module; got a bound {type(module).__name__}: pass module.unbind()[0]"
        )
    try:
        hash(module)
    except TypeError as error:
        raise ValueError(
            f"{type(module).__name__} cannot be hashed ({error}), so that every call would compile again; give its "
            "fields as tuples, numbers and functions"
        ) from error
    return FromLinen(module)


def _init_module(module: Any, key: Any, x: Any, t: Any, cond: Any) -> Any:
    return module.init(key, x, t, cond)


# Initialisation runs once, so it is compiled without optimisation: 2 s instead of 27 s for the U-Net of the digits.
_init = jax.jit(_init_module, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def zeros(tree: Any) -> Any:
    """Zeros of the shapes and dtypes of a pytree of arrays, `ShapeDtypeStruct` or numbers: parameters depend on no
    value.

    Example:
        >>> zeros(jax.ShapeDtypeStruct((2,), "int32")).tolist()
        [0, 0]
    """

    def leaf(a: Any) -> np.ndarray:
        a = a if hasattr(a, "dtype") else jnp.asarray(a)
        return np.zeros(a.shape, a.dtype)

    return jax.tree.map(leaf, tree)


def _takes(module: Any, name: str) -> bool:
    """Whether calling the module accepts the keyword `name`."""
    parameters = inspect.signature(type(module).__call__).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def per_item(f: Callable[..., Any], x: Any, t: Any, cond: Any, key: Any) -> Any:
    """`f` item by item, each with its own key, so that dropout does not depend on how a batch is cut up."""
    t = jax.tree.map(jnp.asarray, t)
    one = lambda tree: jax.tree.map(lambda a: jnp.asarray(a)[None], tree)
    split = jax.tree.map(lambda a: a.ndim > 0 and a.shape[0] != 1, t)
    times = lambda t: jax.tree.map(lambda each, a: a[None] if each else a, split, t)
    call = lambda x, t, c, k: jax.tree.map(lambda a: a[0], f(one(x), times(t), one(c), k))
    return jax.vmap(call, in_axes=(0, jax.tree.map(lambda each: 0 if each else None, split), 0, 0))(x, t, cond, key)


# --------------------------------------------------------------------------------------------------------------- nnx


class _Constants:
    """A pytree of arrays as a hashable value."""

    def __init__(self, tree: Any):
        leaves, self.tree = jax.tree.flatten(tree)
        self.leaves = tuple(np.asarray(leaf) for leaf in leaves)
        self.key = (self.tree, tuple((a.shape, a.dtype.str, a.tobytes()) for a in self.leaves))

    def value(self) -> Any:
        return jax.tree.unflatten(self.tree, self.leaves)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Constants) and self.key == other.key


@dataclasses.dataclass(frozen=True)
class FromNNX:
    """What `from_nnx` returns beside the parameters: `fn(params, x, t, cond, key)`, equal by value."""

    evaluating: Any  # graph definitions: dropout off, running averages used
    training: Any
    variables: tuple[tuple[tuple, type], ...]  # (path, type) of each variable
    constants: _Constants

    @property
    def state(self) -> Any:
        """The state that is neither parameter nor random: running averages, buffers; a nested dict, often empty."""
        return self.constants.value()

    def with_state(self, state: Any) -> FromNNX:
        """This function with other state, for example the running averages after training."""
        return dataclasses.replace(self, constants=_Constants(state))

    def __call__(self, params: Any, x: Any, t: Any, cond: Any = None, key: Any = None) -> Any:
        """The network's output; it trains (dropout, batch statistics) if and only if a `key` is given: one, or one per item."""
        if key is not None and jnp.ndim(key) == 1:
            return per_item(lambda *args: self(params, *args), x, t, cond, key)
        out, changed = self._call(params, self.state, x, t, cond, key)[::2]
        if changed:
            raise ValueError(
                f"the module changes its state {changed} when called, which fn(params, x, t, cond, key) would lose. "
                "Thread it: out, state = fn.threaded(params, state, x, t, cond, key), starting from fn.state; then "
                "fn.with_state(state)"
            )
        return out

    def threaded(self, params: Any, state: Any, x: Any, t: Any, cond: Any = None, key: Any = None) -> Any:
        """`(out, state)`: as a call, with the state that is neither parameter nor random passed in and out."""
        return self._call(params, state, x, t, cond, key)[:2]

    def _call(self, params: Any, state: Any, x: Any, t: Any, cond: Any, key: Any) -> tuple[Any, Any, list[str]]:
        values = {**_flatten(params), **_flatten(state)}
        missing = [_name(path) for path, kind in self.variables if path not in values and not _random(kind)]
        if missing:
            raise ValueError(f"params lack {missing}; give the nested dict that from_nnx returned")
        base = jax.random.key(0) if key is None else key  # without a key nothing is drawn
        for i, (path, kind) in enumerate(self.variables):
            if issubclass(kind, nnx.RngKey):
                values[path] = jax.random.fold_in(base, i)
            elif issubclass(kind, nnx.RngState):
                values[path] = jnp.zeros((), jnp.uint32)
        # JAX arrays, because a module may write into a NumPy array in place.
        before = nnx.from_flat_state({path: kind(jnp.asarray(values[path])) for path, kind in self.variables})
        module = nnx.merge(self.evaluating if key is None else self.training, before)
        given = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(module))}
        out = module(x, t, cond)
        after = {path: (type(v), v.get_value()) for path, v in nnx.to_flat_state(nnx.state(module))}
        changed = [_name(p) for p, (kind, v) in after.items() if not _random(kind) and v is not given.get(p)]
        return out, _nest({path: after[path][1] for path in _flatten(state)}), changed


def from_nnx(module: Any) -> tuple[FromNNX, Any]:
    """An nnx module as a pure function and its parameters.   fn(params, x, t, cond=None, key=None) -> array

    The module is called as `module(x, t, cond)`. Random streams are set from `key` at every call: without a key the
    module evaluates (no dropout, running averages), with one it trains. State that is neither parameter nor random is
    a constant of `fn`, because an optimiser must not touch it; where a call changes it, use `fn.threaded`.
    Returns: `(fn, params)`; params is a nested dict of arrays, without nnx types.
    Raises: ValueError: not an nnx module, or one that is being traced; when called, state that changes.

    Example:
        >>> from flax import nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.a = nnx.Param(jnp.ones(()))
        ...     __call__ = lambda self, x, t, cond: self.a[...] * x
        >>> fn, params = from_nnx(Scale())
        >>> float(fn(params, 2.0, 0.5))
        2.0
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(f"from_nnx needs a flax.nnx module object; got {module!r}")
    graph = []
    for mode in ("eval", "train"):
        copy = nnx.clone(module)
        getattr(copy, mode)()
        definition, state = nnx.split(copy)
        graph.append(definition)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state)):
        raise ValueError("from_nnx was called inside a transformation (jit, grad, vmap); call it outside, once")
    flat = dict(nnx.to_flat_state(state))
    params = {path: v.get_value() for path, v in flat.items() if isinstance(v, nnx.Param)}
    other = {path: v.get_value() for path, v in flat.items() if not isinstance(v, (nnx.Param, nnx.RngState))}
    variables = tuple((path, type(v)) for path, v in flat.items())
    return FromNNX(*graph, variables, _Constants(_nest(other))), _nest(params)


def _random(kind: type) -> bool:
    return issubclass(kind, nnx.RngState)


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _flatten(tree: Any, path: tuple = ()) -> dict[tuple, Any]:
    """A nested dict as `{path: leaf}`."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {p: leaf for name, branch in tree.items() for p, leaf in _flatten(branch, (*path, name)).items()}


def _nest(flat: dict[tuple, Any]) -> dict:
    """The inverse of `_flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree
