"""SIGINT and SIGTERM: a flag that the loop asks for, and a way out of waits that have nothing to do with the state."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

TEMPORARY = 75  # exit code of a failure that may pass when the job is started again (EX_TEMPFAIL)


class Abandoned(BaseException):
    """Raised in the main thread inside `Signals.waiting`, to leave it. No `Exception`: hooks must not swallow it."""


class Signals(contextlib.AbstractContextManager):
    """Turns the first SIGINT or SIGTERM into `caught`; a second SIGINT stops at once, a second SIGTERM changes nothing.

    Python runs handlers in the main thread between two instructions: a call of the device or of the compiler is never
    interrupted, a wait for data or a hook can be, by `abandon`.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self.at = 0.0  # when, on the clock of `time.perf_counter`
        self.active = False
        self._abandoning = self._waiting = False
        self._before: dict = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
            self.active = True
        return self

    def __exit__(self, *_: Any) -> None:
        self.active = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, `abandon` raises `Abandoned`; nothing that the state depends on may happen there."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def abandon(self) -> None:
        """Called by another thread: leave the wait that the main thread is in, if it is in one."""
        if self.active and self._waiting:
            self._abandoning = True
            # A signal wakes blocked calls, which a flag cannot.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    def _handle(self, number: int, frame: Any) -> None:
        if self._abandoning and number == signal.SIGTERM:
            self._abandoning = False
            if self._waiting:
                raise Abandoned
            return
        if self.caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught is None:
            self.caught, self.at = number, time.perf_counter()
            # os.write: print is not safe inside a handler.
            os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to stop at once\n")
