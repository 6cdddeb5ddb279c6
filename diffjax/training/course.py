"""What changes while a run goes on: its state, its place in the data, and how both get to disk and back."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from diffjax.training import hosts
from diffjax.training.devices import Driver
from diffjax.training.ema import describe
from diffjax.training.files import GOOD
from diffjax.training.manifest import CheckpointError
from diffjax.training.record import Recorder
from diffjax.training.state import TrainState
from diffjax.training.store import CheckpointStore
from diffjax.training.watch import Watch, say, trim


class Source:
    """The batches, with the position before those that were read but not used, and after each of the last `keep`."""

    def __init__(self, batches: Any, steps: int, keep: int) -> None:
        self._batches, self._steps, self._keep = batches, steps, keep
        self._iterator: Iterator[Any] = iter(batches)
        self._first: list = []  # a batch that was read to learn its size
        self._before: Any = None  # the position before what was read and not used, None if there is no such batch
        self._after: collections.OrderedDict[int, Any] = collections.OrderedDict()  # step -> position after its batch

    def peek(self, step: int) -> Any:
        """The batch after `step`, which `take` gives again."""
        self._before = self._batches.get_state()
        self._first = [self._next(step)]
        return self._first[0]

    def take(self, step: int, n: int) -> list:
        """The `n` batches after `step`; `used` tells that they went into the state."""
        chunk, self._first = self._first, []
        if not chunk:
            self._before = self._batches.get_state()
        return chunk + [self._next(step + i) for i in range(len(chunk), n)]

    def used(self) -> None:
        """What was taken has gone into the state."""
        self._before = None

    @property
    def position(self) -> Any:
        """Where the data of a run go on that has the present state."""
        return self._batches.get_state() if self._before is None else self._before

    def jump(self, step: int) -> None:
        """Go on after the batch that led to `step`."""
        self._batches.set_state(self._after[step])
        self._after.clear()
        self._first, self._before = [], None

    def _next(self, step: int) -> Any:
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"the batches ended after step {step} of {self._steps}; give an endless iterator or fewer steps"
            ) from None
        if self._keep:
            self._after[step + 1] = self._batches.get_state()
            if len(self._after) > self._keep:
                self._after.popitem(last=False)
        return batch


class Course:
    """The state of a run at a step, with the data and the checkpoints that belong to it."""

    recorder: Recorder
    watch: Watch

    def __init__(
        self,
        state: TrainState,
        examples: int,
        driver: Driver,
        source: Source,
        store: CheckpointStore | None,
        *,
        template: Any,
        page: dict,
        extra: dict,
        emas: tuple,
        save_every: int | None,
        rewinds: bool,
    ) -> None:
        self.state, self.step, self.examples = state, int(state.step), examples
        self.driver, self.source, self.store = driver, source, store
        self.saved = self.step if page else None  # the last step on disk
        self.numbers: dict = {}  # what the hooks measured at this step
        self.unhooked = bool(page.get("unhooked"))  # a signal came before the hooks of this step had run
        self.rewinds: list = list(page.get("rewinds", ()))
        self._save_every, self._rewinds = save_every, rewinds
        self._template, self._extra = template, {"ema": describe(dict(emas)), **extra}

    def save(self, *, first: bool = False) -> None:
        """Start a checkpoint. A run goes back to those of its `first` step and of every `save_every`, if they are good.

        It makes no difference whether a signal, the end, or the course of the run led to the save.
        """
        with self.watch.during("checkpoint"):
            self.recorder.drain()
            periodic = first or bool(self._save_every) and self.step % self._save_every == 0
            good = periodic and self.recorder.consecutive == 0
            page = {"log": self.recorder.carried(), "rewinds": self.rewinds, "unhooked": self.unhooked, "good": good}
            metrics = {**self.recorder.means, **self.numbers, **({GOOD: float(good)} if self._rewinds else {})}
            where = self.source.position
            page |= self._extra
            if self.store.save(self.step, self.state, data=where, examples=self.examples, metrics=metrics, extra=page):
                self.saved = self.step
            trim()

    def finish(self) -> None:
        """Save what is not saved, and wait until it is on disk."""
        with self.watch.during("checkpoint"):
            if self.store is not None and self.saved != self.step:
                self.save()
            if self.store is not None:
                self.store.wait()
                if self.store.failures:  # what was begun may not be on disk
                    self.saved = max(self.store.steps(), default=None)

    @contextlib.contextmanager
    def saved_on_error(self) -> Iterator[None]:
        """An error inside leaves the state as it is: save it, then pass the error on."""
        try:
            yield
        except Exception:
            # Other processes know nothing of this error, and would not take part in the save.
            if self.store is not None and self.saved != self.step and jax.process_count() == 1:
                try:
                    self.finish()
                    say(f"stopped by an error; step {self.step} is saved as a checkpoint")
                except Exception as error:
                    say(f"stopped by an error, and step {self.step} could not be saved: {error}")
            raise

    def rewind(self, bad: int, most: int) -> bool:
        """Go back to the last good checkpoint before step `bad`, and on with the data after `bad`.

        The state is then that of a run which never saw the batches between; False if there is no such checkpoint, or if
        this was done `most` times.
        """
        if len(self.rewinds) >= most:
            return False
        self.store.wait()
        restored = None
        for step in hosts.first(lambda: self._good_before(bad)):
            try:
                restored = self.store.restore(self._template, step)
                break
            except CheckpointError as error:  # on every process alike
                self._say(f"cannot go back to checkpoint {step}: {error}")
        if restored is None:
            return False
        self.rewinds = [*self.rewinds, {"from": bad, "to": restored.step}]
        self.source.jump(bad)
        self.state = self.driver.place(restored.state)
        self.step = self.saved = restored.step
        self.examples, self.numbers, self.unhooked = restored.page["examples"], {}, False
        event = {"rewind": len(self.rewinds), "from": bad}
        self.recorder.rewind(self.step, self.examples, restored.page["log"], event)
        self._say(
            f"too many updates up to step {bad} were not finite: back to checkpoint {self.step}, and on with the data "
            f"after step {bad} (rewind {len(self.rewinds)} of {most})"
        )
        return True

    def _good_before(self, bad: int) -> list[int]:
        """The checkpoints to go back to, newest first."""
        found = []
        for step in reversed([s for s in self.store.steps() if s < bad]):
            try:
                if self.store.page(step).get("good"):
                    found.append(step)
            except (ValueError, OSError) as error:
                say(f"cannot go back to checkpoint {step}: {error}")
        return found

    def _say(self, text: str) -> None:
        if hosts.leader():
            say(text)
