"""Adapters: parameters beside a frozen network that change what it computes, without a change of the network.

An adapter is a hashable value with two functions, `init` and `change`. What it does to a network is said by a `Change`:
what is added to its parameters, what is written to its taps, what is wrapped around its modules, and what it reads in the
place of its inputs. Changes of several adapters are put together, so that those that add commute.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffjax.adapters.told import form_of
from diffjax.networks.conditions import FIELDS
from diffjax.networks.functional import per_item
from diffjax.networks.taps import apart, per_layer, tapped
from diffjax.numerics import PyTree


class Site(NamedTuple):
    """Where an adapter works: a call of the network, as its caller made it."""

    net: Callable[..., Any]  # the network without adapters: (params, x, t, cond, key, mutable=)
    base: PyTree  # its parameters
    x: Any  # [B, ...]
    t: Any  # [] or [B]
    cond: Any  # of the network
    own: Any  # of the adapter: what stands in the condition under its name, or None
    key: Any = None  # of dropout, or None

    def read(self, *names: str, base: PyTree | None = None, **changes: Any) -> dict[str, Any]:
        """The values of taps in the network, with other parameters, or with `write` and `around` of `tapped`."""
        x, t, cond = (changes.pop(name, getattr(self, name)) for name in ("x", "t", "cond"))
        f = tapped(self.net, read=names, **changes)
        return f(self.base if base is None else base, x, t, cond, self.key)[1]

    def shapes(self, *names: str) -> dict[str, Any]:
        """Shapes and dtypes of taps, without computing anything."""
        found = jax.eval_shape(lambda: self.read(*names))
        return {name: found[name] for name in names}  # a dict that JAX returns is sorted


class Change(NamedTuple):
    """What adapters do to one call of a network."""

    add: Mapping[str, Any] = {}  # path of a parameter -> what is added to it
    write: Mapping[str, Any] = {}  # tap -> f(value), see `tapped`
    around: Mapping[str, Any] = {}  # module or method -> f(call, *args), see `tapped`
    inputs: Callable[[Any, Any, Any], tuple[Any, Any, Any]] | None = None  # (x, t, cond) -> (x, t, cond)
    output: Callable[[Any], Any] | None = None  # of the network's output


class Adapter(Protocol):
    """A hashable value (a frozen dataclass) whose fields are numbers, strings and tuples of these, so that a file holds it.

    It may also have `delta(params, site, weight)`, for `Adapted.merge`, `cache(params, site)`, for `Adapted.cache`, and
    `told = False` if it reads nothing in the condition, so that what is given to it is refused.
    """

    def init(self, key: Any, site: Site) -> PyTree:
        """Fresh parameters in nested dicts, with which `change` changes nothing.

        Of `site` its shapes matter alone, and the values of `base` to those that start as a copy of it.
        """

    def change(self, params: PyTree, site: Site, weight: Any) -> Change:
        """What it does with these parameters.   weight: float scalar array or None for one; zero changes nothing"""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What `adapt` returns: `fn(params, x, t, cond, key)`; equal by value to its equals."""

    net: Any
    adapters: tuple[tuple[str, Any], ...]

    def __call__(self, params: Any, x: Any, t: Any, cond: Any = None, key: Any = None, *, mutable: Any = False) -> Any:
        """The output of the changed network."""
        if key is not None and jnp.ndim(key) == 1 and not mutable:  # dropout: one key per item
            return per_item(lambda *args: self(params, *args), x, t, cond, key)
        cond, changes = self._changes(params, x, t, cond, key)
        base = params["base"]
        for change in changes:
            base = added(base, change.add)
        for change in changes:
            if change.inputs is not None:
                x, t, cond = change.inputs(x, t, cond)
        write, around = _together(changes, "write", _after), _together(changes, "around", _outside)
        net = tapped(self.net, write=write, around=around) if write or around else self.net
        out = net(base, x, t, cond, key, mutable=mutable) if mutable else net(base, x, t, cond, key)
        for change in reversed(changes):  # what was put around the inputs last is taken off first
            if change.output is not None:
                out = (change.output(out[0]), *out[1:]) if mutable else change.output(out)
        return out

    def init(self, key: Any, base: Any, x: Any, t: Any, cond: Any = None) -> dict[str, Any]:
        """`{"base": base, "adapters": {name: fresh parameters}}`.   cond: with what each adapter reads under its name

        Jit it for many adapters. Raises: ValueError: what an adapter refuses.
        """
        rest, own = self._parted(cond)
        sites = {name: Site(self.net, base, x, t, rest, own[name]) for name, _ in self.adapters}
        keys = jax.random.split(key, max(1, len(self.adapters)))
        fresh = {name: a.init(k, sites[name]) for (name, a), k in zip(self.adapters, keys, strict=False)}
        return {"base": base, "adapters": fresh}

    def cache(self, params: Any, x: Any, t: Any, cond: Any) -> Any:
        """The condition, with what adapters can compute once for all steps in the place of what they read.

        Args: as of a call; of x the shape matters alone, and of t nothing.   Returns: a condition for calls with the same batch.
        Raises: ValueError: no adapter that can.
        """
        able = {name: adapter for name, adapter in self.adapters if hasattr(adapter, "cache")}
        if not able:
            raise ValueError(
                f"none of the adapters {[name for name, _ in self.adapters]} can compute anything in advance"
            )
        rest, own = self._parted(cond)
        site = Site(self.net, params["base"], x, t, rest, None)
        made = {n: a.cache(params["adapters"][n], site._replace(own=own[n])) for n, a in able.items()}
        return {**cond, **made}

    def merge(self, params: Any) -> PyTree:
        """The network's parameters with all adapters merged that only add to them, such as LoRA.

        Raises: ValueError: an adapter that does more.
        """
        deltas, base = self._deltas(params), params["base"]
        for delta in deltas:
            base = added(base, delta)
        return base

    def unmerge(self, params: Any) -> PyTree:
        """The inverse of `merge`, up to rounding: the network's parameters where `params["base"]` are the merged ones.

        Raises: ValueError: an adapter that does more than add.
        """
        deltas, base = self._deltas(params), params["base"]
        for delta in reversed(deltas):
            base = added(base, {path: -a for path, a in delta.items()})
        return base

    def _deltas(self, params: Any) -> list[dict[str, Any]]:
        """What each adapter adds to the parameters."""
        weights = self._weights(params)
        site = Site(self.net, params["base"], None, None, None, None)
        for name, adapter in self.adapters:
            if not hasattr(adapter, "delta"):
                raise ValueError(
                    f"the adapter {name!r} ({type(adapter).__name__}) cannot be merged: it does more than add to parameters. "
                    "Keep it beside the network, or leave it out of adapt(...)"
                )
        return [adapter.delta(params["adapters"][name], site, weights[name]) for name, adapter in self.adapters]

    def _changes(self, params: Any, x: Any, t: Any, cond: Any, key: Any) -> tuple[Any, list[Change]]:
        weights = self._weights(params)
        rest, own = self._parted(cond)
        site = Site(self.net, params["base"], x, t, rest, None, key)
        with apart():  # what an adapter calls is no part of what is called
            return rest, [
                adapter.change(params["adapters"][name], site._replace(own=own[name]), weights[name])
                for name, adapter in self.adapters
            ]

    def _weights(self, params: Any) -> dict[str, Any]:
        """The weight of each adapter, or None.   Raises: ValueError: not parameters as `init` makes them, unknown weights."""
        missing = sorted({name for name, _ in self.adapters} - set(params.get("adapters", {})))
        if "base" not in params or missing:
            raise ValueError(
                f"params must be {{'base': ..., 'adapters': {{name: ...}}}}, as adapt(...).init makes them; got {sorted(params)}"
                + (f", without the adapters {missing}" if missing else "")
            )
        weights = params.get("weights", {})
        unknown = sorted(set(weights) - set(params["adapters"]))
        if unknown:
            raise ValueError(f"weights has {unknown}, but the adapters are {sorted(params['adapters'])}")
        for name, weight in weights.items():
            if weight is not None and jnp.ndim(weight):
                raise ValueError(f"weights[{name!r}] must be one number; got shape {jnp.shape(weight)}")
        return {name: weights.get(name) for name, _ in self.adapters}

    def _parted(self, cond: Any) -> tuple[Any, dict[str, Any]]:
        """The condition of the network, and that of each adapter."""
        names = [name for name, _ in self.adapters]
        if not isinstance(cond, dict):
            return cond, dict.fromkeys(names)
        for name, adapter in self.adapters:
            if cond.get(name) is not None and not getattr(adapter, "told", True):
                reading = [n for n, a in self.adapters if getattr(a, "told", True)]
                raise ValueError(
                    f"the adapter {name!r} ({type(adapter).__name__}) reads no condition, but cond has {name!r}: "
                    f"{form_of(cond[name])}. Leave it out, or name it as the adapter that it is for; those that read one "
                    f"are {reading or 'none'}"
                )
        rest = {name: value for name, value in cond.items() if name not in names}
        return rest or None, {name: cond.get(name) for name in names}


def adapt(net: Callable[..., Any], **adapters: Any) -> Adapted:
    """A network with adapters beside it.   fn({"base", "adapters", "weights"}, x, t, cond, key)

    `params["adapters"][name]` are those of an adapter, `params["weights"][name]` (default one, may be left out) is how
    strongly it works, without compiling again. What an adapter needs to be told stands in the condition under its name:
    `cond = {"label": label, "edge": picture}` for `adapt(net, edge=...)`. To train adapters alone give `make_train_step` and
    `init_state` `trainable="^adapters/"`.

    Args: net: a `from_linen` function.   adapters: name -> adapter; a name must not be a kind of condition.
    Returns: a function with `.init(key, base, x, t, cond)`, `.merge(params)` and `.unmerge(params)`; it may be tapped,
        as the network.
    Raises: ValueError: a jitted or adapted net; a name that conditions have.

    Example:
        >>> from diffjax.networks import MLP, from_linen, random_parameters
        >>> from diffjax.adapters import lora
        >>> net, x, t = from_linen(MLP(width=8)), jnp.ones((2, 3)), jnp.zeros(2)
        >>> fn = adapt(net, style=lora(rank=2))
        >>> params = fn.init(jax.random.key(0), random_parameters(net.module, x, t), x, t)
        >>> bool((fn(params, x, t) == net(params["base"], x, t)).all())
        True
    """
    if isinstance(net, (jax.stages.Wrapped, Adapted)) or not callable(net):
        got = "a jitted function" if isinstance(net, jax.stages.Wrapped) else type(net).__name__
        raise ValueError(
            f"adapt needs a raw function of a network such as from_linen(module); got {got}. Jit the result"
        )
    taken = sorted({*FIELDS, "mask", "present", "pairs"} & set(adapters))
    if taken:
        raise ValueError(f"adapters cannot be named {taken}: these are kinds of the network's own condition")
    for name, adapter in adapters.items():
        if not all(callable(getattr(adapter, method, None)) for method in ("init", "change")):
            raise ValueError(f"{name} must be an adapter such as lora(rank=4); got {adapter!r}")
    return Adapted(net, tuple(adapters.items()))


def added(params: PyTree, deltas: Mapping[str, Any]) -> PyTree:
    """`params` with `deltas` added to the arrays of these paths, in the dtypes that they had.

    Raises: ValueError: a path that is not there, or of another shape.

    Example:
        >>> added({"out": {"kernel": jnp.ones(2)}}, {"out/kernel": jnp.ones(2)})["out"]["kernel"].tolist()
        [2.0, 2.0]
    """
    if not deltas:
        return params
    left = dict(deltas)

    def leaf(path: Any, a: Any) -> Any:
        delta = left.pop(jax.tree_util.keystr(path, simple=True, separator="/"), None)
        if delta is None:
            return a
        if delta.shape != a.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} is {list(a.shape)}, what is added {list(delta.shape)}: made for another network")
        return a + delta.astype(a.dtype)

    params = jax.tree_util.tree_map_with_path(leaf, params)
    if left:
        raise ValueError(f"the network has no parameters {sorted(left)}: the adapter was made for another one")
    return params


def strength(value: Any, weight: Any) -> Any:
    """`weight * value`, and `value` itself without a weight."""
    return value if weight is None else jnp.asarray(weight, value.dtype) * value


def _together(changes: list[Change], field: str, join: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """The functions of all changes by name, several of one name after each other; those that are joined come first."""
    all_of: dict[str, list[Any]] = {}
    for change in changes:
        for name, f in getattr(change, field).items():
            all_of.setdefault(name, []).append(f)
    innermost = lambda f: not hasattr(f.f if isinstance(f, per_layer) else f, "joined")
    return {name: functools.reduce(join, sorted(some, key=innermost)) for name, some in all_of.items()}


def _after(f: Any, g: Any) -> Any:
    """g after f, as writers of one tap."""
    if isinstance(f, per_layer) or isinstance(g, per_layer):
        a, b = _layered(f), _layered(g)
        return per_layer(lambda value, layer: b(a(value, layer), layer))
    return lambda value: g(f(value))


def _layered(f: Any) -> Callable[[Any, Any], Any]:
    return f.f if isinstance(f, per_layer) else lambda value, layer: f(value)


def _outside(f: Any, g: Any) -> Any:
    """g around f around a module; two of a type that has `joined` are one.

    What is joined changes how the module weighs what it attends to, so it lies inside what is added to the result.
    """
    first, second = (h.f if isinstance(h, per_layer) else h for h in (f, g))
    if type(first) is type(second) and hasattr(first, "joined"):
        both = first.joined(second)
        return per_layer(both) if isinstance(f, per_layer) else both
    if isinstance(f, per_layer) or isinstance(g, per_layer):
        a, b = (h.f if isinstance(h, per_layer) else lambda layer, *args, h=h, **kw: h(*args, **kw) for h in (f, g))
        inner = lambda layer, call: dataclasses.replace(call, f=lambda *args, **kw: a(layer, call, *args, **kw))
        return per_layer(lambda layer, call, *args, **kw: b(layer, inner(layer, call), *args, **kw))
    return lambda call, *args, **kw: g(dataclasses.replace(call, f=lambda *a, **k: f(call, *a, **k)), *args, **kw)
