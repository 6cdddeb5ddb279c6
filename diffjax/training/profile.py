"""A trace of a few steps of a run, by JAX's profiler."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax

from diffjax.training.watch import say

WARM = 2  # calls that pass first: the compilation, and one at speed


@dataclasses.dataclass(frozen=True)
class Profile:
    """Trace about `steps` steps into `folder`, after the first two calls of the device.

    Open it with `xprof --logdir FOLDER`, or its file `*.trace.json.gz` at ui.perfetto.dev.
    Raises: ValueError: steps below 1.
    """

    folder: Any
    steps: int = 5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"profile steps must be at least 1; got {self.steps}")


class Tracer(contextlib.AbstractContextManager):
    """Starts and ends the trace between calls; the calls themselves are what they are without it."""

    def __init__(self, profile: Profile | None) -> None:
        self._profile = profile
        self._calls, self._left, self._open = 0, profile.steps if profile else 0, False

    def call(self, step: int) -> contextlib.AbstractContextManager:
        """The context of one call of the device, which begins at `step`."""
        if self._profile is None or self._left <= 0:
            return contextlib.nullcontext()
        self._calls += 1
        if not self._open and self._calls > WARM:
            try:
                jax.profiler.start_trace(str(self._profile.folder))
                self._open = True
            except (OSError, RuntimeError) as error:  # another trace is running, or there is no room
                self._left = 0
                say(f"no profile: {error}")
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def called(self, n: int, metrics: dict) -> None:
        """`n` steps were called; end the trace, once they are done, if they were the last to be traced."""
        if self._open:
            self._left -= n
            if self._left <= 0:
                jax.block_until_ready(metrics)
                self._end()

    def _end(self) -> None:
        self._open = False
        try:
            jax.profiler.stop_trace()
            say(f"profile in {self._profile.folder}: xprof --logdir {self._profile.folder}")
        except (OSError, RuntimeError) as error:
            say(f"the profile could not be written: {error}")

    def __exit__(self, *_: Any) -> None:
        if self._open:
            self._end()
        elif self._profile is not None and self._left == self._profile.steps:
            say(f"no profile: the run ended within its first {WARM} calls of the device; use more steps")
