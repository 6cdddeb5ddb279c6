"""Many processes as one computation: how they find each other, share small values, and stop at the same step.

`start()` comes first, before any JAX computation; afterwards `jax.devices()` are those of all processes. Each process runs
the same program on its own rows of the batch, and every function below but `detect` must be called by all of them. A process
that has more to do than the others may keep them waiting; on CPUs for 30 minutes at most, after which gloo gives up.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.numerics import PyTree
from diffjax.training.cluster import AUTO, VARIABLES, Settings, detect

HEARTBEAT = 15  # seconds without a sign of life after which a process counts as lost; JAX's own 100 look like a hang
PATIENCE = 300.0  # seconds that processes wait for each other at the start
ASK_EVERY = 0.25  # seconds between two exchanges about stopping: one costs about a millisecond
LATER = 2  # calls of the device between asking and reading the answer, so that nothing waits for it


_joined: Settings | None = None  # what this process was started with


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    heartbeat: int = HEARTBEAT,
    patience: float = PATIENCE,
) -> Settings | None:
    """Join the other processes of the job. Before any JAX computation; a second call changes nothing.

    A process that ends by an exception afterwards leaves without waiting for the others, who notice; otherwise each would
    wait for the rest, for ever. On CPUs the processes exchange arrays over TCP (gloo).

    Args: coordinator: "host:port" at which process 0 listens, or "auto" (see `detect`).   processes: how many.
        process: which one, from 0.
        environ: where the values not given come from (see `detect`), default `os.environ`.
        heartbeat: seconds after which a silent process counts as lost; the others are then ended with SIGABRT.
        patience: seconds to wait for the other processes.

    Returns: the settings, or None for one process, where nothing is done.

    Raises:
        ValueError: arguments that are incomplete or out of range.
        ConnectionError: nobody listens at the coordinator's address within `patience`, or something else does already.
        RuntimeError: JAX has run something already.
    """
    global _joined
    if _joined is not None or jax.distributed.is_initialized():
        return _joined
    if coordinator == AUTO:
        environ, coordinator = {VARIABLES[0]: AUTO}, None
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {name: value for name, value in given.items() if value is not None}
    settings = None if len(given) == 3 else detect(os.environ if environ is None else environ)
    if given:
        settings = dataclasses.replace(settings or Settings(), **given)
    if settings is None or settings.processes == 1:
        return None
    lacking = [name for name in ("coordinator", "processes", "process") if getattr(settings, name) is None]
    if lacking and settings.source == "arguments":
        raise ValueError(f"{' and '.join(lacking)} must be given with {', '.join(given)}, or by the environment")
    _check_early()
    _join(settings, heartbeat, patience)
    _joined = settings
    before = sys.excepthook

    def leave_at_once(*error: Any) -> None:
        before(*error)
        leave(1)

    sys.excepthook = leave_at_once
    return settings


def _join(settings: Settings, heartbeat: int, patience: float) -> None:
    """`jax.distributed.initialize`, which ends the process where it should raise an error."""
    # Its service would swallow a SIGTERM before training starts, and knows no Ctrl-C; `Stop` below does both.
    jax.config.update("jax_enable_preemption_service", False)
    began = time.monotonic()
    options: dict[str, Any] = {}
    if settings.coordinator is not None:
        host, _, port = settings.coordinator.rpartition(":")
        options = {"cluster_detection_method": "deactivate"}
        alone = host in ("127.0.0.1", "localhost")
        if alone:  # JAX would listen on every interface
            options["coordinator_bind_address"] = f"127.0.0.1:{port}"
        if settings.process == 0:
            _claim("127.0.0.1" if alone else "", int(port))
        else:
            _reach(settings, host.strip("[]"), int(port), patience)

    def give_up() -> None:
        place = f"process {settings.process} of {settings.processes}" if settings.processes else "this process"
        print(
            f"{place} has waited {patience:g} seconds at {settings.coordinator or 'the coordinator'} for the other "
            "processes; start all of them, each with its own number and the same coordinator",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)

    timer = threading.Timer(max(patience - (time.monotonic() - began), 1.0), give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            settings.coordinator, settings.processes, settings.process,
            local_device_ids=settings.devices, heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=int(patience) + 60, **options,
        )  # fmt: skip
    finally:
        timer.cancel()


def _check_early() -> None:
    """Refuse to start after the first computation, before anybody is waited for."""
    try:
        jax.distributed.initialize(cluster_detection_method="deactivate")  # starts nothing: it lacks all it needs
    except ValueError:
        return
    except RuntimeError:
        raise RuntimeError("hosts.start() must come before the first JAX computation of the program") from None


def _claim(host: str, port: int) -> None:
    """Refuse a port that is taken: JAX would crash."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConnectionError(
                f"process 0 cannot listen at port {port} of this machine: {error}. Choose another port for the coordinator, "
                "the same for all processes"
            ) from None


def _reach(settings: Settings, host: str, port: int, patience: float) -> None:
    """Wait until someone listens at the coordinator's address: JAX would end this process instead of raising an error."""
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=max(min(5.0, end - time.monotonic()), 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(
                    f"process {settings.process} of {settings.processes} could not reach the coordinator "
                    f"{settings.coordinator} (from {settings.source}) within {patience:g} seconds: {error}. Check that "
                    "process 0 runs there and that the port is open"
                ) from None
        time.sleep(0.2)


def leader() -> bool:
    """Whether this is process 0, which alone prints and writes; it starts no device."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def leave(code: int) -> None:
    """End this process at once if it is one of several; the usual end would wait for the others. Else do nothing."""
    if _joined is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def share(value: Any) -> list[Any]:
    """The JSON-able `value` of every process, in their order; also a point that all of them must reach."""
    if jax.process_count() == 1:
        return [value]
    text = _bytes(value)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    rows = multihost_utils.process_allgather(_padded(text, sizes.max()))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def agreed(problem: str | None) -> str | None:
    """The problems of all processes in one line, on every process; None if there is none.

    Example:
        >>> agreed("disk full"), agreed(None)
        ('disk full', None)
    """
    if jax.process_count() == 1:
        return problem
    return "; ".join(f"process {i}: {text}" for i, text in enumerate(share(problem)) if text) or None


def first(call: Callable[[], Any]) -> Any:
    """What `call()` gives on process 0, JSON-able, on every process; it is called there alone.

    Raises: ValueError or OSError: on every process, when the call raised one on process 0.

    Example:
        >>> first(lambda: [1, 2])
        [1, 2]
    """
    if jax.process_count() == 1:
        return call()
    answer, failed = {}, None
    if jax.process_index() == 0:
        try:
            answer["value"] = call()
        except (ValueError, OSError) as error:
            answer = {"error": str(error), "system": isinstance(error, OSError) and [error.errno]}
            failed = error
    text = _bytes(answer)  # only that of process 0 counts: it may be long, and is sent once
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = multihost_utils.broadcast_one_to_all(_padded(text[:size], size))
    answer = json.loads(bytes(np.asarray(padded)[:size]))
    if "error" in answer:
        if failed is None:
            failed = (OSError if answer["system"] else ValueError)(answer["error"])
            if answer["system"]:
                (failed.errno,) = answer["system"]
        raise failed
    return answer["value"]


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _padded(text: np.ndarray, size: int) -> np.ndarray:
    """`text` in one of few sizes, for few compilations."""
    out = np.zeros(int(2 ** np.ceil(np.log2(max(size, 64)))), np.uint8)
    out[: len(text)] = text
    return out


def gather(tree: PyTree) -> PyTree:
    """Every leaf whole, as NumPy, on every process, however it was cut."""
    whole = lambda a: not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated
    return jax.tree.map(lambda a: np.asarray(a if whole(a) else multihost_utils.process_allgather(a, tiled=True)), tree)


class Stop:
    """Whether any process was told to stop, known to all before the same call of the device.

    The numbers of the signals go through a small all-reduce, sent before a call of the device and read `LATER` calls
    afterwards, when it has long arrived. The slowest process's time per call, which travels with them, sets how many calls
    pass before the next one, so that it happens about every `seconds`; at first more often, at most half as often each time.
    """

    def __init__(self, seconds: float = ASK_EVERY) -> None:
        self.exchanges = 0
        self._seconds, self._several = seconds, jax.process_count() > 1
        self._calls = self._next = 0
        self._sent: tuple[int, int, Any] | None = None  # call, calls that were timed, answer
        self._mark = (time.perf_counter(), 0)
        if self._several:
            # All devices take part, as in a step: not every backend runs programs on an arbitrary part of them.
            devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
            grid = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
            self._rows = NamedSharding(grid, PartitionSpec("process"))
            self._largest = jax.jit(lambda a: a.max(0), out_shardings=NamedSharding(grid, PartitionSpec()))

    def asked(self, caught: int | None) -> int | None:
        """The signal to obey, or None.   caught: the signal that this process got. Once before each call of the device."""
        if not self._several:
            return caught
        found = None
        if self._sent is not None and self._calls >= self._sent[0] + LATER:
            _, timed, answer = self._sent
            found, seconds = np.asarray(answer)
            self._sent, self._next = None, self._calls + min(int(self._seconds / max(seconds, 1e-6)), 2 * timed)
        if self._sent is None and self._calls >= self._next and not found:
            now, (then, calls) = time.perf_counter(), self._mark
            self._mark, timed = (now, self._calls), self._calls - calls
            self._sent = (self._calls, timed, self._send(caught, (now - then) / max(timed, 1)))
        self._calls += 1
        return int(found) if found else None

    def settled(self, caught: int | None) -> int | None:
        """The signal on which all processes agree at the end, also one that came during the last calls."""
        if not self._several:
            return caught
        return int(np.asarray(self._send(caught, 0.0))[0]) or None

    def _send(self, caught: int | None, seconds: float) -> Any:
        self.exchanges += 1
        mine = np.array([[caught or 0, seconds]], np.float32)
        return self._largest(jax.make_array_from_process_local_data(self._rows, mine))
