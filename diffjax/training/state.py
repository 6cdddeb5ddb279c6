"""The state of a training run: one frozen pytree of arrays, every leaf created with an explicit sharding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.numerics import PyTree, pytree_dataclass
from diffjax.training.ema import Ema
from diffjax.training.trainable import Trainable, join, split


@pytree_dataclass
class TrainState:
    """Everything that a training step reads and writes.

    `step` counts the batches consumed, skipped ones included; `ema` maps a name to averaged parameters; `key` never
    changes, each step folds its own index into it; `skipped` holds `total` and `consecutive` refused updates.
    """

    step: Any  # int32 []
    params: PyTree
    ema: Any  # dict[str, PyTree]
    opt_state: PyTree
    key: Any  # typed PRNG key []
    skipped: Any  # {"total": int32 [], "consecutive": int32 []}

    @property
    def updates(self) -> Any:
        """The number of updates that were applied: `step` without the skipped ones."""
        return self.step - self.skipped["total"]

    def averaged(self, name: str) -> PyTree:
        """The parameters with those that are trained averaged, the others as they are."""
        return join(self.ema[name], self.params)


def init_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: Any,
    *,
    emas: Mapping[str, Ema] | None = None,
    sharding: Any = None,
    trainable: Trainable | None = None,
) -> TrainState:
    """The state before the first step; nothing in it shares memory with `params`, so that it may be donated.

    Args: params: pytree of arrays.   key: typed key or int seed.   emas: name -> average, as for `make_train_step`.
        sharding: one `Sharding` for every leaf; default: the first device.   trainable: as for `make_train_step`.
    Raises: ValueError: no parameters, or a leaf that is no array.

    Example:
        >>> state = init_state({"w": np.ones(3, np.float32)}, optax.sgd(0.1), 0)
        >>> int(state.step), list(state.ema), state.params["w"].shape
        (0, [], (3,))
    """
    leaves = jax.tree.leaves(params)
    if not leaves or not all(hasattr(leaf, "dtype") for leaf in leaves):
        raise ValueError(f"params must be a pytree of arrays with at least one leaf; got {jax.tree.map(type, params)}")
    key = jax.random.key(key) if isinstance(key, int) else key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be an int seed or a typed key from jax.random.key; got an array of {key.dtype}")
    # Explicit output shardings: without them optax's step count lands on device 0, and is restored there.
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    build = jax.jit(lambda params, key: _state(params, optimizer, key, emas or (), trainable), out_shardings=sharding)
    return build(*jax.device_put((params, key), sharding))


def init_sharded(
    init: Callable[[Any], PyTree],
    optimizer: optax.GradientTransformation,
    key: Any,
    driver: Any,
    *,
    emas: Mapping[str, Ema] | None = None,
    trainable: Trainable | None = None,
) -> TrainState:
    """The state before the first step, born in the layout of `driver`: no device ever holds more than its part.

    One program draws the parameters and makes averages and moments from them; the numbers are those of
    `init_state(init(key), optimizer, key, emas=emas)` on one device. `fit` takes this function with all but the driver
    given, and calls it unless it resumes: `functools.partial(init_sharded, init, optimizer, key)`.

    Args: init: `key -> params`, a pure function such as `lambda k: net.init(k, x, t)["params"]`.   key: typed key or int
        seed, of the parameters and of the run.   driver: from `devices.driver`.   emas, trainable: as for `init_state`.

    Example:
        >>> from diffjax.training import devices
        >>> driver = devices.mesh(lambda state, batch: (state, {}), devices=jax.devices()[:1])
        >>> state = init_sharded(lambda k: {"w": jax.random.normal(k, (3,))}, optax.sgd(0.1), 0, driver)
        >>> state.params["w"].shape
        (3,)
    """
    build, data = birth(init, optimizer, key, emas or (), trainable)
    if isinstance(jnp.zeros(()), jax.core.Tracer):  # under `eval_shape`: only shapes are asked for
        return build(data)
    return birth_program(build, data, driver)(data)


def birth_program(build: Callable[[Any], TrainState], data: Any, driver: Any) -> Any:
    """`build`, compiled so that what it returns is laid out by `driver`."""
    shardings = driver.shardings(jax.eval_shape(build, data))
    return jax.jit(build, out_shardings=shardings, compiler_options=QUICK)


QUICK = {"xla_backend_optimization_level": 0}  # runs once: compiled without optimisation, many times faster


def birth(
    init: Any, optimizer: Any, key: Any, names: Any, trainable: Trainable | None = None
) -> tuple[Callable[[Any], TrainState], np.ndarray]:
    """`(function of the raw key, raw key)`: NumPy, which every process may give to one program."""
    with jax.ensure_compile_time_eval():  # `fit` asks for the shapes alone, under `eval_shape`
        key = jax.random.key(key) if isinstance(key, int) else key
        implementation, raw = jax.random.key_impl(key), np.asarray(jax.random.key_data(key))

    def build(data: Any) -> TrainState:
        key = jax.random.wrap_key_data(data, impl=implementation)
        return _state(init(jax.random.clone(key)), optimizer, key, names, trainable)

    return build, raw


def _state(
    params: PyTree, optimizer: optax.GradientTransformation, key: Any, names: Any, trainable: Trainable | None
) -> TrainState:
    """The state before the first step; the copies are there because no two leaves may share memory."""
    zero, (trained, _) = jnp.zeros((), jnp.int32), split(params, trainable)
    with plain_promotion():
        opt_state = optimizer.init(trained)
    return TrainState(
        step=zero,
        params=jax.tree.map(jnp.copy, params),
        ema={name: jax.tree.map(lambda p: jnp.copy(widen(p)), trained) for name in names},
        opt_state=jax.tree.map(jnp.copy, opt_state),
        key=jnp.copy(key),
        skipped={"total": jnp.copy(zero), "consecutive": jnp.copy(zero)},
    )


@contextlib.contextmanager
def plain_promotion() -> Iterator[None]:
    """JAX's default promotion, for optax, which relies on it whatever the caller has set."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def place(state: TrainState, shardings: PyTree) -> TrainState:
    """A copy of `state` laid out by `shardings` (one, or a tree of them).

    `jax.device_put` alone would alias buffers that are already in place, and donating the result would delete the
    caller's arrays; hence the copy.
    """
    if jax.process_count() == 1:
        return jax.jit(lambda s: jax.tree.map(jnp.copy, s), out_shardings=shardings)(jax.device_put(state, shardings))
    # Arrays of one process cannot be put on devices of another, but jit takes NumPy inputs as equal on every process.
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    raw = jax.tree.map(lambda a: jax.random.key_data(a) if is_key(a) else a, state)
    raw = jax.tree.map(lambda a: np.asarray(a) if a.is_fully_addressable else a, raw)
    wrap = lambda r, a: jax.random.wrap_key_data(r, impl=jax.random.key_impl(a)) if is_key(a) else jnp.copy(r)
    return jax.jit(lambda r: jax.tree.map(wrap, r, state), out_shardings=shardings)(raw)


def abstract(state: PyTree, shardings: PyTree = None) -> PyTree:
    """The shapes, dtypes and shardings of `state`, without values: the target that a checkpoint is restored into."""
    if shardings is None:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, state)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def count_params(params: PyTree) -> int:
    """The number of numbers in a tree of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def widen(a: Any) -> Any:
    """`a` in at least float32: half precision can neither hold small steps of an average nor a mean over many examples."""
    if jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits < 32:
        return a.astype(jnp.float32)
    return a
