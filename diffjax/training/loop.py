"""The training loop: steps, logging, hooks, checkpoints and signals, without waiting for the device at every step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from diffjax.training import devices as devices_
from diffjax.training import hosts, memory
from diffjax.training.course import Course, Source
from diffjax.training.layouts import Layout
from diffjax.training.profile import Profile, Tracer
from diffjax.training.record import AHEAD, Recorder
from diffjax.training.signals import TEMPORARY, Abandoned, Signals
from diffjax.training.state import TrainState, abstract
from diffjax.training.store import CheckpointStore
from diffjax.training.watch import BY_RULE, Watch, Watchdog

ON_BAD = ("skip", "rewind", "stop")


class Hook(NamedTuple):
    """Something to do every `every` steps and at the end.   call(step, state) -> dict of numbers to log, or None

    The state is donated to the next step: a hook may use it while it runs, and must copy what it keeps.
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
    failures: tuple[str, ...] = ()  # checkpoints and lines of the log that could not be written
    rewinds: int = 0
    hung: bool = False  # the watchdog gave up waiting for data

    @property
    def exit_code(self) -> int:
        """0 after the last step, 130 after Ctrl-C, 143 after SIGTERM, 75 if the watchdog gave up."""
        if self.hung:
            return TEMPORARY
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
    on_bad: str = "skip",
    max_rewinds: int = 3,
    stream: Any = None,
    extra: dict | None = None,
    grace: float | int = 10.0,
    watchdog: Watchdog | None = BY_RULE,
    profile: Profile | None = None,
    flops: float | int | None = None,
    peak_flops: float | int | None = None,
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
        hooks: see `Hook`; every process calls them; they run before a checkpoint of the same step, which records their numbers.
        log_every: steps per line of the log, each the mean over them.
        metrics_file: JSONL file to append to; lines after the first step of this call are dropped first.
        max_skipped: updates refused in a row that are too many.
        on_bad: what then: 'skip' and 'stop' raise `Diverged`, 'stop' at the first refused update; 'rewind' goes back to
            the last good periodic checkpoint and on with the data after the refused updates, as if the batches between
            had never been. Nothing else differs from a run without them, so that a resumed run takes the same course.
        max_rewinds: of the whole run, before `Diverged`.
        stream: where progress goes, default stderr; a bar on a terminal, else lines.
        extra: further JSON saved with each checkpoint.
        grace: seconds after a signal in which data and a hook may end; then they are left, and what else holds up the
            stop is said. A stop takes the calls that the device has, at most three, and the save: they are not cut short.
        watchdog: reports that no step finishes; None for none.
        profile: steps to trace.
        flops: floating-point operations of one step, and
        peak_flops: those that all devices together can do in a second, to log the share that is used as `mfu`.

    Returns: a `FitResult`; after Ctrl-C or SIGTERM (saved, `exit_code` 130 or 143) as after the last step.

    Raises:
        ValueError: an argument out of range, a batch that the devices do not divide, or a layout that does not fit.
        CheckpointError: `resume` without a usable checkpoint.
        Diverged: too many refused updates in a row; the last good state is saved first.
        OutOfMemory: a device has too little memory.
        An error of the data or of a hook is passed on, after the state was saved; unsaved where there are several
            processes, since the others do not know of it.
    """
    counts = {"steps": steps, "log_every": log_every, "max_skipped": max_skipped, "max_rewinds": max_rewinds}
    if save_every is not None:
        counts["save_every"] = save_every
    for name, value in {**counts, **{f"{hook.name}.every": hook.every for hook in hooks}}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if not (grace > 0 and math.isfinite(grace)):
        raise ValueError(f"grace must be positive and finite, in seconds; got {grace}")
    if on_bad not in ON_BAD:
        raise ValueError(f"on_bad must be one of {', '.join(ON_BAD)}; got {on_bad!r}")
    if (resume or save_every) and store is None:
        raise ValueError("resume and save_every need store=CheckpointStore(directory)")
    if on_bad == "rewind" and not save_every:
        raise ValueError("on_bad='rewind' goes back to checkpoints: it needs store= and save_every=")
    examples, page = 0, {}
    laid_out = {} if layout is None else {"layout": layout}
    make = lambda k: devices_.driver(parallel, train_step, devices=devices, per_dispatch=k, **laid_out)
    born = callable(state)  # made for this driver, and for nobody else
    shapes = jax.eval_shape(lambda: state(make(1))) if born else state
    template = abstract(shapes, make(1).shardings(shapes)) if store is not None else None

    on_disk = lambda: max(store.steps(), default=None) if resume else None
    with memory.explained(lambda: ("start", shapes, None, make(1), on_disk())):
        if resume:
            restored, born = store.restore(template), False
            state, page, examples = restored.state, restored.page, restored.page["examples"]
            batches.set_state(page["data"])
        elif born:
            state = state(make(1))
    step, size = int(state.step), 0
    most = per_dispatch or devices_.MAX_PER_DISPATCH
    source = Source(batches, steps, keep=(AHEAD + 2) * most if on_bad == "rewind" else 0)
    if step < steps:
        first = source.peek(step)
        size = devices_.check_batch(first, make(1).devices, getattr(train_step, "accumulate", 1)) * jax.process_count()
        per_dispatch = per_dispatch or devices_.steps_per_dispatch(state.params, size)
    driver = make(per_dispatch or 1)

    course = Course(
        state, examples, driver, source, store, template=template, page=page, extra=extra or {},
        emas=getattr(train_step, "emas", ()), save_every=save_every, rewinds=on_bad == "rewind",
    )  # fmt: skip
    state = shapes = restored = None  # the course has them: a second copy would take the memory twice
    signals = Signals()
    watch = course.watch = Watch(watchdog, signals, step=step, grace=grace, saved=lambda: course.saved)
    limit = 1 if on_bad == "stop" else max_skipped
    recorder = course.recorder = Recorder(
        step, steps, log_every=log_every, file=metrics_file, stream=stream or sys.stderr, examples=examples, batch=size,
        carried=page.get("log"), limit=limit, events=len(course.rewinds), watch=watch, flops=flops,
        peak_flops=peak_flops,
    )  # fmt: skip
    tracer = Tracer(profile)
    alone = jax.process_count() == 1
    stop = hosts.Stop()
    due = lambda every: bool(every) and (course.step % every == 0 or course.step == steps)
    marks = [every for every in (save_every, *(hook.every for hook in hooks)) if every]

    def advance() -> None:
        """One call of the device."""
        n = min([driver.per_dispatch, steps - course.step, *(every - course.step % every for every in marks)])
        with watch.during("data"), course.saved_on_error(), signals.waiting():
            chunk = source.take(course.step, n)
        began = time.perf_counter()
        with watch.during("device" if watch.queued else "compile"), tracer.call(course.step):
            course.state, metrics = driver.step(course.state, chunk)
        if not watch.queued:
            recorder.compiled = time.perf_counter() - began
        source.used()
        course.step, course.examples = course.step + n, course.examples + n * size
        course.unhooked = any(due(hook.every) for hook in hooks)
        with watch.during("device"):
            recorder.add(course.step - n, n, metrics, watch.called(course.step, metrics))
            tracer.called(n, metrics)
            if due(save_every) or course.unhooked:
                # Whether the state is good must be known before it is saved or measured; and on every process at this
                # step, though a hook may give numbers on one process alone.
                recorder.drain()

    def run_hooks() -> None:
        """The hooks that are due; what they measure belongs to the checkpoint of this step alone."""
        for hook in (hook for hook in hooks if due(hook.every)):
            with watch.during(f"hook {hook.name}"), course.saved_on_error(), signals.waiting():
                found = hook.call(course.step, course.state)
            if found:
                recorder.note(course.step, hook.name, found)
                course.numbers.update({k: v for k, v in found.items() if isinstance(v, (int, float))})
        course.unhooked = False

    def train() -> None:
        """Steps, hooks and checkpoints until the end, a signal, or too many refused updates."""
        while (course.step < steps or course.unhooked) and stop.asked(signals.caught) is None:
            if not course.unhooked:
                course.numbers = {}
                advance()
            if recorder.bad_at is not None:
                if on_bad == "rewind" and course.rewind(recorder.bad_at, max_rewinds):
                    continue
                return
            if course.unhooked:
                if alone and signals.caught is not None:
                    return
                run_hooks()
            if due(save_every) and course.step < steps and (on_bad != "rewind" or recorder.consecutive == 0):
                course.save()

    abandoned = False
    situation = lambda: (watch.failed, course.state, size, driver, course.saved)
    with signals, watch, recorder, tracer, memory.explained(situation):
        with watch.during("start"):
            course.state = course.state if born else driver.place(course.state)
            if on_bad == "rewind" and course.saved is None:
                course.save(first=True)
        try:
            train()
        except Abandoned:
            abandoned = True
        interrupted = stop.settled(signals.caught)
        with watch.during("device"):
            recorder.drain(finish=course.step == steps)
        if recorder.bad_at is not None and on_bad == "rewind" and interrupted is not None:
            course.rewind(recorder.bad_at, max_rewinds)  # a resumed run does the same again, at the same step
        course.finish()
    if recorder.bad_at is not None:
        kept = f"The state before them is saved as checkpoint {course.saved}. " if course.saved is not None else ""
        raise Diverged(
            f"stopped at step {course.step}: the last {limit} updates up to step {recorder.bad_at} had a loss or gradient "
            f"that is not finite, and were skipped. {kept}{len(course.rewinds)} rewinds were made. Lower the learning "
            "rate, clip the gradient, or look for NaN in the data"
        )
    failures = (*(store.failures if store else ()), *recorder.failures)
    interrupted = signals.caught if alone else interrupted  # also one that came during the last save
    return FitResult(
        course.state, course.step, course.examples, interrupted, course.saved, failures, len(course.rewinds),
        abandoned and watch.hung,
    )  # fmt: skip
