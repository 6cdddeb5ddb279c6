"""Taps: named points of a network that can be read or rewritten from outside, without touching the network.

A tap is an identity module; its name is its path in the network, such as `block_0/attention/weights`. `tapped` finds
taps by Flax's method interception, so it works in jit, scan, remat and grad, and costs nothing where it is not used.
The same way any module can be wrapped by its path, such as the dense layer `block_0/attention/qkv`, and any method of it
by `PATH.method`, such as `block_0/attention.mix`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

COLLECTION = "taps"
_APART: contextvars.ContextVar[int] = contextvars.ContextVar("apart", default=0)  # how many `apart` we are in


class Tap(nn.Module):
    """The identity, with a name.   y = x

    Args: x: any array.
    Returns: `x`, or what `tapped(write=...)` puts in its place.

    Example:
        >>> Tap(name="hidden").apply({}, 3.0)
        3.0
    """

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Return x."""
        return x


class LayerIndex(nn.Module):
    """Marks the layer that a scanned block computes, for `per_layer` writers: scanned layers share one path."""

    @nn.compact
    def __call__(self, index: Any) -> Any:
        """Return the index."""
        return index


@dataclasses.dataclass(frozen=True)
class per_layer:  # noqa: N801  (reads as a function: write={name: per_layer(f)})
    """A writer inside scanned layers.   y = f(value, layer), with `layer` the traced index of the layer

    In `around` it is called as `f(layer, call, *args)`.

    Example:
        >>> import jax.numpy as jnp
        >>> write = {"blocks/out": per_layer(lambda h, i: jnp.where(i == 2, 0.0, h))}
    """

    f: Callable[[Any, Any], Any]


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, networks are called that are no part of those whose taps are read from outside.

    Example:
        >>> net = Tap(name="a")
        >>> def twice(x, **options):
        ...     with apart():
        ...         net.apply({}, x)
        ...     return net.apply({}, x, **options)
        >>> tapped(twice, read="")(3.0)[1]
        {'': 3.0}
    """
    before = _APART.set(_APART.get() + 1)
    try:
        yield
    finally:
        _APART.reset(before)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What a function of `around` is given: the module or method that it wraps, called as that is."""

    f: Callable[..., Any]
    module: Any
    method: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call of the network itself."""
        return self.f(*args, **kwargs)

    def using(self, params: Any) -> Callable[..., Any]:
        """The same module with other parameters, in which nothing is read, written or wrapped."""

        def f(*args: Any, **kwargs: Any) -> Any:
            with apart():
                module = self.module.clone(parent=None, name=None)
                return module.apply({"params": params}, *args, method=self.method, **kwargs)

        return f


@dataclasses.dataclass(frozen=True)
class Tapped:
    """What `tapped` returns: a pure function that takes the arguments of `apply`; equal by value to its equals."""

    apply: Any
    read: tuple[str, ...]
    write: tuple[tuple[str, Any], ...]
    around: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`apply(*args, **kwargs)`, or `(that, {name: value})` if taps are read."""
        write, around, seen, layers = dict(self.write), dict(self.around), {}, {}
        passed: dict[str, None] = {}
        own = _APART.get()

        def interceptor(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            if _APART.get() != own:
                return call(*args, **kwargs)
            module = context.module
            path = module.path
            if around and nn.Module in type(module).__bases__:  # not what scan and remat put around a module
                name = "/".join(path) + ("" if context.method_name == "__call__" else f".{context.method_name}")
                passed[name] = None
                if name in around:
                    called = Call(call, module, context.method_name)
                    call = _wrapped(around[name], name, called, _layer(layers, path, module, args))
            if context.method_name != "__call__" or not isinstance(module, (Tap, LayerIndex)):
                return call(*args, **kwargs)
            if isinstance(module, LayerIndex):
                layers[path[:-1]] = args[0]
                return call(*args, **kwargs)
            name = "/".join(path)
            seen[name] = None
            value = call(*args, **kwargs)
            if name in write:
                value = _rewrite(write[name], name, value, _layer(layers, path))
            if name in self.read:
                module.sow(COLLECTION, "value", value)
            return value

        with nn.intercept_methods(interceptor):
            if self.read:
                out, variables = self.apply(*args, **kwargs, mutable=[COLLECTION])
            else:
                out, variables = self.apply(*args, **kwargs), {}
        unknown = sorted({*self.read, *write} - set(seen))
        if unknown:
            raise ValueError(_unknown(unknown, list(seen)))
        unknown = sorted({*around} - set(passed))
        if unknown:
            raise ValueError(_not_called(unknown, list(passed)))
        if not self.read:
            return out
        flat = traverse_util.flatten_dict(variables[COLLECTION])
        values = {"/".join(path[:-1]): v[0] if len(v) == 1 else v for path, v in flat.items()}
        return out, {name: values[name] for name in self.read}


def tapped(
    apply: Any,
    read: str | Iterable[str] = (),
    write: Mapping[str, Any] | None = None,
    *,
    around: Mapping[str, Any] | None = None,
) -> Tapped:
    """`apply` with taps read or rewritten, and modules wrapped.   (out, {name: value}) = tapped(apply, read=names)(...)

    A value read is the value after `write`, from the same call. Under `nn.scan` the layers share one name: a value
    read is stacked `[layers, ...]`, and `per_layer(f)` writes by layer. A tap that is reached several times reads as
    a tuple.
    Args: apply: `module.apply`, a `from_linen` function, or any function that passes the keyword `mutable` on to
    `module.apply`; not jitted: jit what `tapped` returns.   read: names.   write: `{name: f}`, `f(value) -> value` of
    the same shape and dtype.   around: `{path: f}` or `{path.method: f}` of any module, `f(call, *args, **kwargs) -> out` in
    the place of `call(*args, **kwargs)`, see `Call`; inside scanned layers `per_layer(f)`.
    Returns: a function of the same arguments; it returns the output alone if nothing is read.
    Raises: ValueError: `apply` is jitted; a name is not a tap or module of the network (when called; they are listed); a
    written value has another shape or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> f = tapped(Tap(name="a").apply, write={"": lambda v: v + 1})
        >>> float(f({}, jnp.zeros(())))
        1.0
    """
    if isinstance(apply, jax.stages.Wrapped):
        raise ValueError(
            "tapped(apply) needs the raw apply; got a jitted function, in which taps cannot be reached once it is "
            "compiled. Write jax.jit(tapped(module.apply, ...)) instead"
        )
    if not callable(apply):
        raise ValueError(f"apply must be a function such as module.apply; got {apply!r}")
    read = (read,) if isinstance(read, str) else tuple(read)
    write, around = dict(write or {}), dict(around or {})
    for argument, given in (("write", write), ("around", around)):
        for name, f in given.items():
            if not callable(f) and not isinstance(f, per_layer):
                raise ValueError(f"{argument}[{name!r}] must be a function; got {f!r}")
    return Tapped(apply, read, tuple(write.items()), tuple(around.items()))


def tap_names(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """The names of all taps that `apply(*args, **kwargs)` passes, in order; traces without computing anything.

    Example:
        >>> import flax.linen as nn
        >>> tap_names(nn.Sequential([Tap(), Tap()]).apply, {}, 1.0)
        ('layers_0', 'layers_1')
    """
    seen: dict[str, None] = {}
    own = _APART.get()

    def interceptor(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if _APART.get() == own and isinstance(context.module, Tap) and context.method_name == "__call__":
            seen["/".join(context.module.path)] = None
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        jax.eval_shape(lambda: apply(*args, **kwargs))
    return tuple(seen)


def magnitudes(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
    """Root mean squares of the activations at every tap of `apply(*args, **kwargs)`.   {name: float []}

    Example:
        >>> import flax.linen as nn
        >>> {name: float(v) for name, v in magnitudes(nn.Sequential([Tap()]).apply, {}, 3.0).items()}
        {'layers_0': 3.0}
    """
    _, values = tapped(apply, read=tap_names(apply, *args, **kwargs))(*args, **kwargs)
    square = lambda v: jnp.mean(jnp.square(jnp.asarray(v, jnp.float32)))
    return {
        name: jnp.sqrt(sum(map(square, jax.tree.leaves(v))) / len(jax.tree.leaves(v))) for name, v in values.items()
    }


def _layer(layers: dict[tuple, Any], path: tuple, module: Any = None, args: tuple = ()) -> Any:
    """The index of the innermost scanned layer that contains `path`, or that of the block itself."""
    own = _own_layer(module, args) if args else None
    if own is not None:
        return own
    inside = [p for p in layers if path[: len(p)] == p]
    return layers[max(inside, key=len)] if inside else None


def _own_layer(module: Any, args: tuple) -> Any:
    """The index that a scanned block is given itself, in the argument `layer`."""
    names = list(inspect.signature(type(module).__call__).parameters)[1 : len(args) + 1]
    return args[names.index("layer")] if "layer" in names else None


def _rewrite(f: Any, name: str, value: Any, layer: Any) -> Any:
    if isinstance(f, per_layer):
        if layer is None:
            raise ValueError(f"write[{name!r}] is per_layer, but this tap is not inside scanned layers; give a plain f")
        new = f.f(value, layer)
    else:
        new = f(value)
    got, want = (jax.eval_shape(lambda v=v: v) for v in (new, value))
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        raise ValueError(
            f"write[{name!r}] returned {got.dtype}{list(got.shape)} for a tap of {want.dtype}{list(want.shape)}; "
            "it must keep shape and dtype"
        )
    return new


def _wrapped(f: Any, name: str, call: Callable, layer: Any) -> Callable:
    """`call`, as `f` wants it."""
    if not isinstance(f, per_layer):
        return lambda *args, **kwargs: f(call, *args, **kwargs)
    if layer is None:
        raise ValueError(f"around[{name!r}] is per_layer, but it is not inside scanned layers; give a plain f")
    return lambda *args, **kwargs: f.f(layer, call, *args, **kwargs)


def _not_called(unknown: list[str], passed: list[str]) -> str:
    near = {name: difflib.get_close_matches(name, passed, 3, 0.4) for name in unknown}
    hints = "; ".join(f"{name!r}, near {', '.join(map(repr, close)) or 'none'}" for name, close in near.items())
    return f"around names modules that were not called: {hints}. {len(passed)} were; a jit inside apply hides them"


def _unknown(unknown: list[str], seen: list[str]) -> str:
    if not seen:
        return (
            f"no tap was reached, so {unknown} cannot be: the network has no taps, or a jit inside apply hides them. "
            "Give the raw module.apply"
        )
    return f"unknown taps {unknown}; this network has {seen}"
