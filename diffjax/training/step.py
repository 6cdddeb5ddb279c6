"""The training step: a pure function of a state and a batch, the same on one device and on many.

A batch is a dict of arrays with one leading axis: `x` is the data, `index` (optional) the examples' places in the data
set, and every other field is a condition. A loss is always called `loss(key, denoiser, x0, cond, items=positions)`, where
`positions` [B] are the items' places in the **global** batch; a loss that draws its noise from
`fold_in(key, positions[b])` gives the same numbers on any number of devices and for any accumulation.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.training.dynamics import gradient_noise
from diffjax.training.ema import Ema, ema_update
from diffjax.training.patterns import checked
from diffjax.training.state import TrainState, plain_promotion, widen
from diffjax.training.trainable import Trainable, join, split
from diffjax.types import Denoiser

Batch = Mapping[str, Any]
DATA_FIELDS = ("x", "index")  # the fields of a batch that are not conditions


def condition(batch: Batch) -> PyTree:
    """The condition in a batch: None without further fields, the labels if there is only `label`, else a dict.

    Example:
        >>> condition({"x": 1, "index": 2}), condition({"x": 1, "label": 3}), condition({"x": 1, "label": 3, "mask": 4})
        (None, 3, {'label': 3, 'mask': 4})
    """
    rest = {name: field for name, field in batch.items() if name not in DATA_FIELDS}
    if not rest:
        return None
    return rest["label"] if set(rest) == {"label"} else rest


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a loss may hold arrays
class TrainStep:
    """`train_step(state, batch) -> (state, metrics)`, pure. Made by `make_train_step`."""

    model: Callable[[PyTree], Denoiser]
    loss: Callable[..., tuple[Any, dict]]
    optimizer: optax.GradientTransformation
    emas: tuple[tuple[str, Ema], ...] = ()
    accumulate: int = 1
    guard: bool = True
    learning_rate: Callable[[Any], Any] | None = None
    augment: Callable[[Any, Batch, Any], Batch] | None = None
    condition: Callable[[Batch], PyTree] = condition
    monitor: Callable[[PyTree, PyTree, PyTree], dict] | None = None
    noise_scale: bool = False
    trainable: Trainable | None = None

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        *,
        spread: Callable[[Callable], Callable] | None = None,
        shares: int = 1,
        total: int | None = None,
    ) -> tuple[TrainState, dict]:
        """One step. The keywords are for drivers.

        Args: spread: makes of `augmented_gradients` the function that gives the mean over all devices.   shares: devices
            that take a gradient each, and   total: examples of all of them, default this batch; for the gradient's noise.
        Returns: the next state and scalars: loss, grad_norm, learning_rate, skipped, consecutive, means of the aux.
        """
        size = nu.batch_size(batch)
        items = jnp.arange(size, dtype=jnp.int32)
        key = jax.random.fold_in(state.key, state.step)
        # Everything that is summed over devices goes through one call, so that it can be one message.
        gradients = self.augmented_gradients if spread is None else spread(self.augmented_gradients)
        grads, scalars = gradients(key, state.params, dict(batch), items)
        grad_norm = optax.tree.norm(grads)

        old = (state.params, state.ema, state.opt_state)
        if self.guard:
            fine = jnp.isfinite(grad_norm) & jnp.isfinite(scalars["loss"])
            # A branch, not `where` over the state: selecting every leaf doubled the time of a small network's step.
            new = jax.lax.cond(fine, self.updated, lambda *_: old, state, grads)
            bad = 1 - fine.astype(jnp.int32)
        else:
            new, bad = self.updated(state, grads), jnp.zeros((), jnp.int32)
        skipped = {
            "total": state.skipped["total"] + bad,
            "consecutive": (state.skipped["consecutive"] + 1) * bad,
        }
        metrics = {**scalars, "grad_norm": grad_norm, "skipped": skipped["total"]}
        metrics["consecutive"] = skipped["consecutive"]
        if self.learning_rate is not None:
            with plain_promotion():
                metrics["learning_rate"] = jnp.asarray(self.learning_rate(state.updates), jnp.result_type(float))
        if self.noise_scale:
            small = metrics.pop("part_norm_squared")
            total = total or size
            parts = gradient_noise(small, grad_norm**2, total // (shares * self.accumulate), total)
            metrics["gradient_trace"], metrics["gradient_signal"] = parts
        params, ema, opt_state = new
        if self.monitor is not None:
            metrics |= self.monitor(state.params, grads, params)
        return TrainState(state.step + 1, params, ema, opt_state, state.key, skipped), metrics

    def updated(self, state: TrainState, grads: PyTree) -> tuple[PyTree, dict, PyTree]:
        """`(params, ema, opt_state)` after one update, in the dtypes that they had."""
        trained, rest = split(state.params, self.trainable)
        with plain_promotion():
            updates, opt_state = self.optimizer.update(grads, state.opt_state, trained)
            trained = optax.apply_updates(trained, updates)
        ema = ema_update(state.updates + 1, state.ema, trained, dict(self.emas))
        params = join(trained, rest)
        old = (state.params, state.ema, state.opt_state)
        return jax.tree.map(lambda a, like: jnp.asarray(a).astype(like.dtype), (params, ema, opt_state), old)

    def augmented_gradients(self, key: Any, params: PyTree, batch: Batch, items: Any) -> tuple[PyTree, dict]:
        """`gradients` on the augmented batch; `key` is that of the step."""
        if self.augment is not None:
            batch = self.augment(jax.random.fold_in(key, 1), batch, items)
        return self.gradients(jax.random.fold_in(key, 0), params, batch, items)

    def gradients(self, key: Any, params: PyTree, batch: Batch, items: Any) -> tuple[PyTree, dict]:
        """Gradient of the mean loss over `batch` and the mean scalars, in `accumulate` parts of equal size.

        With `trainable` the gradient has None in the place of what is not trained.
        """
        trained, rest = split(params, self.trainable)
        plain = jax.grad(lambda trained, *args: self._mean_loss(join(trained, rest), *args), has_aux=True)

        def grad(*args: Any) -> tuple[PyTree, dict]:
            grads, scalars = plain(*args)
            if self.noise_scale:
                scalars["part_norm_squared"] = optax.tree.norm(grads, squared=True)
            return grads, scalars

        if self.accumulate == 1:
            return grad(trained, key, batch, items)
        parts = jax.tree.map(self._split, (dict(batch), items))

        def body(total: PyTree, part: PyTree) -> tuple[PyTree, dict]:
            # The same key on purpose: items tell the parts apart, as they do in the whole batch.
            grads, scalars = grad(trained, jax.random.clone(key), *part)
            return nu.add(total, grads), scalars

        total, scalars = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, trained), parts)
        return jax.tree.map(lambda g: g / self.accumulate, total), jax.tree.map(lambda s: s.mean(0), scalars)

    def _mean_loss(self, params: PyTree, key: Any, batch: Batch, items: Any) -> tuple[Any, dict]:
        """The mean loss, and the scalars to report."""
        per_example, aux = self.loss(key, self.model(params), batch["x"], self.condition(batch), items=items)
        if per_example.shape != items.shape:
            raise ValueError(
                f"a loss must return one value per example, shape {items.shape}; got {per_example.shape}. "
                "Leave the mean over the batch to the training step"
            )
        loss = widen(per_example).mean()
        means = {name: jnp.mean(nu.as_float(value)) for name, value in aux.items()}
        return loss, {**means, "loss": loss}

    def _split(self, a: Any) -> Any:
        """Every `accumulate`-th item, [accumulate, B / accumulate, ...]: contiguous parts would leave devices idle."""
        size, parts = a.shape[0], self.accumulate
        if size % parts:
            raise ValueError(f"a batch of {size} examples cannot be split into accumulate={parts} equal parts")
        return a.reshape(size // parts, parts, *a.shape[1:]).swapaxes(0, 1)


def make_train_step(
    model: Callable[[PyTree], Denoiser],
    loss: Callable[..., tuple[Any, dict]],
    optimizer: optax.GradientTransformation,
    *,
    emas: Mapping[str, Ema] | None = None,
    accumulate: int = 1,
    guard: bool = True,
    learning_rate: float | Callable[[Any], Any] | None = None,
    augment: Callable[[Any, Batch, Any], Batch] | None = None,
    condition: Callable[[Batch], PyTree] = condition,
    monitor: Callable[[PyTree, PyTree, PyTree], dict] | None = None,
    noise_scale: bool = False,
    trainable: Trainable | None = None,
) -> TrainStep:
    """The training step.   p <- optimizer(mean_b grad loss_b(p)),  ema <- ema + weight (p - ema)

    Args:
        model: `params -> Denoiser`.
        loss: `(key, denoiser, x0, cond, items=None) -> (per_example [B], aux)`, unreduced.
        optimizer: an optax transformation; clipping belongs to it.
        emas: name -> average; the same as given to `init_state`.
        accumulate: parts that the batch is cut into, to save memory; equal to the whole batch up to rounding.
        guard: refuse an update whose loss or gradient is not finite, and count it.
        learning_rate: the optimizer's rate or schedule, only to report it.
        augment: `(key, batch, items) -> batch` on the device; it may add condition fields.
        condition: `batch -> cond`.
        monitor: `(params, grads, new params) -> scalars` to report, such as `dynamics.magnitudes`.
        noise_scale: report the two parts of the gradient's noise scale (`dynamics.gradient_noise`), from the gradients of
            the parts of a batch: needs accumulate >= 2, or `shard_map` or `pmap` on several devices.
        trainable: which parameters are trained, see `trainable.split`; the others stay bit-equal and have no gradient, no
            moments and no average. Default all. The same as given to `init_state`.

    Returns: a pure `train_step(state, batch) -> (state, metrics)`.
    Raises: ValueError: accumulate < 1, a loss that takes no `items`, a `trainable` that is no regular expression.

    Example:
        >>> def loss(key, denoiser, x0, cond, items=None): ...
        >>> make_train_step(lambda p: p, loss, optax.sgd(0.1), accumulate=2).accumulate
        2
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, the number of parts of a batch; got {accumulate}")
    if isinstance(trainable, str):
        checked("trainable", trainable)
    parameters = inspect.signature(loss).parameters
    if "items" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            "loss must accept the keyword items, the [B] global positions that its noise is drawn from; "
            f"got the signature {inspect.signature(loss)}. Write loss(key, denoiser, x0, cond, items=None)"
        )
    if learning_rate is not None and not callable(learning_rate):
        learning_rate = optax.constant_schedule(learning_rate)
    return TrainStep(
        model, loss, optimizer, tuple((emas or {}).items()), accumulate, guard, learning_rate, augment, condition,
        monitor, noise_scale, trainable,
    )  # fmt: skip
