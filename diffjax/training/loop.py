"""The training loop: steps, logging, hooks, checkpoints and signals, without waiting for the device at every step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from diffjax.training import devices as devices_
from diffjax.training import hosts
from diffjax.training.ema import describe
from diffjax.training.layouts import Layout
from diffjax.training.record import Recorder
from diffjax.training.state import TrainState, abstract
from diffjax.training.store import CheckpointStore


class Hook(NamedTuple):
    """Something to do every `every` steps and at the end.   call(step, state) -> dict of numbers to log, or None

    The state is donated to the next step: a hook may use it while it runs, and must copy what it keeps. Every process
    calls it, and must get the same numbers.
    """

    every: int
    call: Callable[[int, TrainState], dict | None]
    name: str = "hook"


class FitResult(NamedTuple):
    """How training ended.   `interrupted`: the signal that stopped it, or None.   `saved`: the last step on disk."""

    state: TrainState
    step: int
    examples: int
    interrupted: int | None = None
    saved: int | None = None
    failures: tuple[str, ...] = ()  # checkpoints that could not be saved

    @property
    def exit_code(self) -> int:
        """0 after the last step, 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.interrupted is None else 128 + self.interrupted


class Diverged(RuntimeError):
    """Training stopped because too many updates in a row were not finite."""


def fit(
    state: TrainState | Callable[[devices_.Driver], TrainState],
    train_step: Callable[..., tuple[TrainState, dict]],
    batches: Any,
    *,
    steps: int,
    parallel: str | Callable[..., devices_.Driver] = "mesh",
    devices: Sequence[Any] | None = None,
    layout: Layout | None = None,
    per_dispatch: int | None = None,
    store: CheckpointStore | None = None,
    save_every: int | None = None,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    log_every: int = 50,
    metrics_file: Any = None,
    max_skipped: int = 50,
    stream: Any = None,
    extra: dict | None = None,
) -> FitResult:
    """Train until `state.step == steps`.

    Args:
        state: from `init_state`; it is copied, the caller's stays valid. Or a function of the driver, such as
            `functools.partial(init_sharded, init, optimizer, key)`, so that no device ever holds it whole.
        train_step: from `make_train_step`.
        batches: iterator of dicts of arrays (the rows of this process) with `get_state()` and `set_state(state)`, a
            JSON-able position that every process shares; the caller closes it.
        steps: step at which to end, counted from the beginning of the run, not from a restored step.
        parallel: 'mesh', 'shard_map', 'pmap', or a function that makes a driver.
        devices: default all.
        layout: how mesh and shard_map cut state and batch over them; default copies of the state.
        per_dispatch: most steps per call of the device; default by the size of the model.
        store: where to save every `save_every` steps and at the end.
        save_every: steps between checkpoints; default only at the end.
        resume: restore the newest undamaged checkpoint and the position of `batches` first.
        hooks: see `Hook`; they run before a checkpoint of the same step, which records their numbers.
        log_every: steps per line of the log, each the mean over them.
        metrics_file: JSONL file to append to; lines after the first step of this call are dropped first.
        max_skipped: updates refused in a row at which to stop.
        stream: where progress goes, default stderr; a bar on a terminal, else lines.
        extra: further JSON saved with each checkpoint.

    Returns: a `FitResult`; after Ctrl-C or SIGTERM (saved, `exit_code` 130 or 143) as after the last step.

    Raises:
        ValueError: an argument out of range, a batch that the devices do not divide, or a layout that does not fit.
        CheckpointError: `resume` without a usable checkpoint.
        Diverged: too many refused updates in a row; the last good state is saved first.
    """
    counts = {"steps": steps, "log_every": log_every, "max_skipped": max_skipped}
    if save_every is not None:
        counts["save_every"] = save_every
    for name, value in {**counts, **{f"{hook.name}.every": hook.every for hook in hooks}}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if (resume or save_every) and store is None:
        raise ValueError("resume and save_every need store=CheckpointStore(directory)")
    source = iter(batches)
    first = None  # a batch that was read to learn its size
    examples, page = 0, {}
    laid_out = {} if layout is None else {"layout": layout}
    make = lambda k: devices_.driver(parallel, train_step, devices=devices, per_dispatch=k, **laid_out)
    born = callable(state)  # made for this driver, and for nobody else

    if resume:
        shapes = jax.eval_shape(lambda: state(make(1))) if born else state
        born = False
        restored = store.restore(abstract(shapes, make(1).shardings(shapes)))
        state, page, examples = restored.state, restored.page, restored.page["examples"]
        batches.set_state(page["data"])
    elif born:
        state = state(make(1))
    start = step = int(state.step)
    if step < steps:
        position = batches.get_state()
        first = _next(source, step, steps)
        size = devices_.check_batch(first, make(1).devices, getattr(train_step, "accumulate", 1)) * jax.process_count()
        per_dispatch = per_dispatch or devices_.steps_per_dispatch(state.params, size)
    driver = make(per_dispatch or 1)
    state = state if born else driver.place(state)

    recorder = Recorder(
        start, steps, log_every=log_every, file=metrics_file, stream=stream or sys.stderr,
        examples=examples, batch=size if step < steps else 0, carried=page.get("log", {}),
    )  # fmt: skip
    saved = step if resume else None
    numbers: dict = {}

    def save() -> None:
        nonlocal saved
        recorder.drain()
        page = {"log": recorder.carried(), "ema": describe(dict(getattr(train_step, "emas", ()))), **(extra or {})}
        where = position if first is not None else batches.get_state()
        if store.save(step, state, data=where, examples=examples, metrics={**recorder.means, **numbers}, extra=page):
            saved = step

    def due(every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == steps)

    stop = hosts.Stop()
    with recorder, _Signals() as signals:
        while step < steps and stop.asked(signals.caught) is None:
            marks = [every for every in (save_every, *(hook.every for hook in hooks)) if every]
            n = min([driver.per_dispatch, steps - step, *(every - step % every for every in marks)])
            chunk = [first] if first is not None else []
            first = None
            chunk += [_next(source, step + i, steps) for i in range(len(chunk), n)]
            state, metrics = driver.step(state, chunk)
            step, examples = step + n, examples + n * size
            recorder.add(step - n, n, metrics)
            if recorder.consecutive >= max_skipped:
                break
            numbers = {}  # what hooks measure belongs to this step's checkpoint alone
            for hook in hooks:
                if due(hook.every) and (found := hook.call(step, state)):
                    recorder.note(step, hook.name, found)
                    numbers.update({k: v for k, v in found.items() if isinstance(v, (int, float))})
            if store is not None and save_every and due(save_every) and step < steps:
                save()
        interrupted = stop.settled(signals.caught)
        recorder.drain(finish=step == steps)
        diverged = recorder.consecutive >= max_skipped
        if store is not None and saved != step:
            save()
        if store is not None:
            store.wait()
            if store.failures:  # what was begun may not be on disk
                saved = max(store.steps(), default=None)
    if diverged:
        kept = f"The state before them is saved as checkpoint {saved}. " if saved is not None else ""
        raise Diverged(
            f"stopped at step {step}: the last {recorder.consecutive} updates had a loss or gradient that is not finite, "
            f"and were skipped. {kept}Lower the learning rate, clip the gradient, or look for NaN in the data"
        )
    return FitResult(state, step, examples, interrupted, saved, tuple(store.failures) if store else ())


def _next(source: Iterator[Any], step: int, steps: int) -> Any:
    """The batch of `step`, or an error that says that the data ended."""
    try:
        return next(source)
    except StopIteration:
        raise ValueError(
            f"the batches ended after step {step} of {steps}; give an endless iterator or fewer steps"
        ) from None


class _Signals(contextlib.AbstractContextManager):
    """Turns the first SIGINT or SIGTERM into a flag; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught is None:
            self.caught = number
            # os.write: print is not safe inside a handler.
            os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to stop at once\n")
