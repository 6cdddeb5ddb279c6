"""Floating-point operations of a function, counted from its traced program, and what devices can do in a second.

A multiplication and an addition are two operations. A matrix product of [m, k] and [k, n] has 2 m k n, a convolution two
for every product with a value that is no padding, a triangular system of n unknowns n^2, a Fourier transform of n complex
values 5 n log2 n, a reduction one for every value, and whatever else makes floating-point
values one for each. Moving, casting and comparing values, integers and random bits are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from diffjax.numerics import PyTree
from diffjax.training.state import widen
from diffjax.training.trainable import join, split

FREE = frozenset(
    "broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice dynamic_update_slice eq expand_dims "
    "gather ge gt iota is_finite le lt ne opt_barrier optimization_barrier pad pcast pvary real imag reshape rev "
    "select_n sharding_constraint slice split squeeze stop_gradient transpose reduce_precision".split()
)
HIDDEN = ("pallas_call", "ffi_call", "pure_callback", "tpu_custom_call")  # what they do is not in the program


class Flops(NamedTuple):
    """Operations by kind."""

    matmul: int = 0
    conv: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.matmul + self.conv + self.other

    def plus(self, more: Flops, times: int = 1) -> Flops:
        """The sum with `times` runs of `more`."""
        return Flops(*(a + times * b for a, b in zip(self, more, strict=True)))


def count(fn: Callable[..., Any], *args: Any, trips: int | None = None) -> Flops:
    """Operations of `fn(*args)`.   A scan counts its length times, a branch as the costliest one.

    Args: args: arrays or `ShapeDtypeStruct`s; nothing is computed.   trips: rounds of every loop whose number is not
        known before it runs.
    Raises: ValueError: such a loop without `trips`; a kernel whose work is not in the traced program.

    Example:
        >>> count(lambda a, b: a @ b + 1.0, np.ones((2, 3), "float32"), np.ones((3, 5), "float32"))
        Flops(matmul=60, conv=0, other=10)
    """
    return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr, trips)


def of_jaxpr(jaxpr: core.Jaxpr, trips: int | None = None) -> Flops:
    """Operations of a traced program; see `count`."""
    total = Flops()
    for eqn in jaxpr.eqns:
        total = total.plus(_of_equation(eqn, trips))
    return total


def count_product(eqn: core.JaxprEqn) -> int:
    """Operations of the matrix products in one operation of a program; loops of unknown length count once."""
    return _of_equation(eqn, 1).matmul


def saving(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with every `jax.checkpoint` inside keeping all it computes, so that its gradient recomputes nothing.

    For functions of arrays that return arrays; branches of custom derivatives stay as they are.

    Example:
        >>> f = lambda w, x: jax.checkpoint(lambda x: jnp.sin(jnp.dot(x, w)))(x).sum()
        >>> w = np.ones((4, 4), "float32")
        >>> [count(jax.grad(g), w, w).matmul // 128 for g in (f, saving(f))]
        [3, 2]
    """

    def kept(*args: Any) -> Any:
        program, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(
            jax.tree.structure(shape), core.jaxpr_as_fun(keep_all(program))(*jax.tree.leaves(args))
        )

    return kept


def model_flops(train_step: Any, params: PyTree, batch: PyTree) -> Flops:
    """Operations that the model's loss and gradient need for a batch, without recomputed ones: those of utilisation.

    Args: train_step: from `make_train_step`.   params, batch: arrays or `ShapeDtypeStruct`s, the batch over all devices.
    Reference: Chowdhery et al. 2022, arXiv:2204.02311, Appendix B (model FLOPs utilisation).
    """
    trained, rest = split(params, train_step.trainable)
    loss = mean_loss(train_step)
    grad = jax.grad(saving(lambda trained, *args: loss(join(trained, args[0]), *args[1:])), has_aux=True)
    return count(grad, trained, rest, *inputs(train_step, batch))


def mean_loss(train_step: Any) -> Callable[..., Any]:
    """The step's objective `(params, key, batch, items) -> ([], aux)` of one part of the batch, already augmented."""

    def loss(params: PyTree, key: Any, batch: PyTree, items: Any) -> Any:
        cond = train_step.condition(batch)
        per_example, aux = train_step.loss(key, train_step.model(params), batch["x"], cond, items=items)
        return widen(per_example).mean(), aux

    return loss


def inputs(train_step: Any, batch: PyTree, size: int | None = None) -> tuple[Any, PyTree, Any]:
    """The shapes `(key, batch, items)` that `mean_loss` takes, for `size` of the examples; default all."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size or a.shape[0], *a.shape[1:]), a.dtype), dict(batch))
    items = jax.ShapeDtypeStruct((jax.tree.leaves(shapes)[0].shape[0],), np.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if train_step.augment is not None:
        shapes = jax.eval_shape(train_step.augment, key, shapes, items)
    return key, shapes, items


# --------------------------------------------------------------------------------------------------------- devices

# bfloat16 FLOP/s without sparsity, and bytes of memory, for each JAX device; longer names before shorter.
# TPU: cloud.google.com/tpu/docs/{v2, v3, v4, v5e, v5p, v6e, tpu7x}; a chip of v2, v3 and 7x is two devices.
# GPU: the data sheets of NVIDIA; figures "with sparsity" halved.
GIB = 2.0**30
DEVICES: dict[str, tuple[float, float]] = {
    "TPU v2": (46e12 / 2, 8 * GIB),
    "TPU v3": (123e12 / 2, 16 * GIB),
    "TPU v4": (275e12, 32 * GIB),
    "TPU v5 lite": (197e12, 16e9),
    "TPU v5e": (197e12, 16e9),
    "TPU v5p": (459e12, 95e9),
    "TPU v5": (459e12, 95e9),
    "TPU v6 lite": (918e12, 32 * GIB),
    "TPU v6e": (918e12, 32 * GIB),
    "TPU7x": (2307e12 / 2, 96 * GIB),
    "A100-SXM4-80GB": (312e12, 80e9),
    "A100 80GB": (312e12, 80e9),
    "A100": (312e12, 40e9),
    "H100 PCIe": (756e12, 80e9),
    "H100 NVL": (835e12, 94e9),
    "H100": (989e12, 80e9),
    "H200 NVL": (835e12, 141e9),
    "H200": (989e12, 141e9),
    "B200": (2250e12, 180e9),
    "L4": (121e12, 24e9),
}


def device(kind: Any) -> tuple[float, float] | None:
    """`(peak bfloat16 FLOP/s, bytes of memory)` as published; None where nothing is known, as of a CPU.

    Args: kind: a JAX device, or its `device_kind`.

    Example:
        >>> device("NVIDIA H100 80GB HBM3"), device("TPU v5 lite")[0], device("cpu")
        ((989000000000000.0, 80000000000.0), 197000000000000.0, None)
    """
    name = _words(getattr(kind, "device_kind", kind).replace("NVIDIA ", ""))
    return next((known for key, known in DEVICES.items() if name[: len(_words(key))] == _words(key)), None)


def peak(kind: Any) -> float | None:
    """The published bfloat16 FLOP/s of a JAX device (or `device_kind`); None where nothing is known, as of a CPU.

    Example:
        >>> peak("TPU v4"), peak("cpu")
        (275000000000000.0, None)
    """
    known = device(kind)
    return known and known[0]


def utilisation(flops: int | float, seconds: int | float, devices: Any) -> float | None:
    """The share of the devices' peak that a step of so many operations and seconds used; None where that is unknown.

    flops / (seconds sum_d peak_d)

    Args: flops: of one step over all devices, from `model_flops`.   seconds: of one step, > 0.   devices: list of devices.
    Raises: ValueError: seconds not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, the time of one step; got {seconds}")
    peaks = [peak(d) for d in devices]
    return None if None in peaks or not peaks else flops / (seconds * sum(peaks))


# -------------------------------------------------------------------------------------------------------- equations


def _of_equation(eqn: core.JaxprEqn, trips: int | None) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return Flops().plus(of_jaxpr(params["jaxpr"].jaxpr, trips), params["length"])
    if name == "while":
        if trips is None:
            raise ValueError(
                "the program has a loop whose number of rounds is not known before it runs (while_loop, or fori_loop "
                "with a traced bound); give trips=, or count what one round calls"
            )
        return Flops().plus(
            of_jaxpr(params["cond_jaxpr"].jaxpr, trips).plus(of_jaxpr(params["body_jaxpr"].jaxpr, trips)), trips
        )
    if name == "cond":
        return max((of_jaxpr(branch.jaxpr, trips) for branch in params["branches"]), key=lambda f: f.total)
    if name in HIDDEN:
        raise ValueError(f"the operations of {name} cannot be counted from the traced program; count a plain version")
    inner = [getattr(p, "jaxpr", p) for p in params.values() if isinstance(p, (core.Jaxpr, core.ClosedJaxpr))]
    if inner and not name.startswith(("reduce", "scatter", "sort")):
        parts = 1
        if name == "shard_map":  # the program of one device
            mesh = params["mesh"].shape
            parts = math.prod(mesh[axis] for axis in params.get("newly_manual_axes", mesh))
        return Flops().plus(of_jaxpr(inner[0], trips), parts)
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        k = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return Flops(matmul=2 * k * math.prod(eqn.outvars[0].aval.shape))
    if name == "ragged_dot_general":
        return Flops(matmul=_ragged(eqn))
    if name == "conv_general_dilated":
        return Flops(conv=_convolution(eqn))
    if name == "triangular_solve":  # half of the square of the matrix for each column, or row, of the other side
        return Flops(matmul=eqn.invars[0].aval.shape[-1] * math.prod(eqn.outvars[0].aval.shape))
    if name == "fft":  # 5 n log2 n of complex values, half of it for real ones
        n, real = math.prod(params["fft_lengths"]), any(jnp.isrealobj(v.aval) for v in (*eqn.invars, *eqn.outvars))
        whole = max(math.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars))
        return Flops(other=round(5 * whole * math.log2(max(n, 2)) / (2 if real else 1)))
    if name in FREE or name.startswith("random_"):
        return Flops()
    over = eqn.invars if name.startswith(("reduce_", "arg", "scatter")) else eqn.outvars
    return Flops(other=max((_floats(v.aval) for v in over), default=0))


def _floats(aval: Any) -> int:
    """How many floating-point values an array has."""
    return math.prod(aval.shape) if jnp.issubdtype(getattr(aval, "dtype", np.int32), jnp.inexact) else 0


def _ragged(eqn: core.JaxprEqn) -> int:
    """Products of groups of rows, each row with the kernel of its group alone."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    used = (*contracted, *batch, *numbers.rhs_group_dimensions)
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    return 2 * math.prod(lhs) * math.prod(n for i, n in enumerate(rhs) if i not in used)


def _convolution(eqn: core.JaxprEqn) -> int:
    """Two for each product of a kernel entry with a value that is neither padding nor dilation."""
    lhs, rhs, out = (eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape)
    numbers, p = eqn.params["dimension_numbers"], eqn.params
    products = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
    for i, (l, r, o) in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)):
        dilation = p["lhs_dilation"][i]
        at = np.arange(out[o])[:, None] * p["window_strides"][i] + np.arange(rhs[r]) * p["rhs_dilation"][i]
        at = at - p["padding"][i][0]
        products *= int(((at >= 0) & (at <= (lhs[l] - 1) * dilation) & (at % dilation == 0)).sum())
    return 2 * products


def keep_all(program: Any) -> Any:
    """A traced program with the policy "keep everything" wherever something is recomputed."""
    if isinstance(program, core.ClosedJaxpr):
        return program.replace(jaxpr=keep_all(program.jaxpr))

    def changed(value: Any) -> Any:
        if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
            return keep_all(value)
        return tuple(map(changed, value)) if type(value) is tuple else value  # the branches of a condition

    def equation(eqn: core.JaxprEqn) -> core.JaxprEqn:
        if eqn.primitive.name.startswith("custom_"):  # the derivative belongs to the function as it is
            return eqn
        params = {name: changed(value) for name, value in eqn.params.items()}
        if "policy" in params and "differentiated" in params:
            params["policy"] = jax.checkpoint_policies.everything_saveable
        return eqn.replace(params=params)

    return program.replace(eqns=[equation(eqn) for eqn in program.eqns])


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()
