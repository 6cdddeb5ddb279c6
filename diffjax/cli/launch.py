"""`diffjax launch`: the processes of one machine, watched: when one dies the others are stopped, and none is left behind."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import queue
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Annotated, Any

import tyro

RUN_FILE = "DIFFJAX_RUN_FILE"  # where `diffjax train` writes the name of its run folder, for the command to resume with
SHOWN = 12  # last lines of a dead process that are repeated


@dataclasses.dataclass(frozen=True)
class Launch:
    """Start several processes of one program: `diffjax launch -n 4 -- train digits`, or a script: `-- script.py WORDS`.

    The program joins them with `hosts.start()`, as `diffjax train` does. On several machines, launch on each of them with
    the same --nodes and --coordinator, and its own --node-rank. When a process dies the others are stopped, and the exit
    code is its own, or 128 + the signal that killed it.
    """

    n: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """processes on this machine"""
    devices_per_process: int | None = None
    """devices of each process; default 1, or all of the machine where it has one process"""
    nodes: int = 1
    """machines"""
    node_rank: int = 0
    """which machine this is, from 0"""
    coordinator: str | None = None
    """host:port of process 0, on machine 0; default a free port of this machine"""
    restarts: int = 0
    """how often to go on by itself after a process died"""
    grace: float = 10.0
    """seconds between asking a process to stop and killing it"""


class Death(Exception):
    """A process ended badly; the text says which and how."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def report(folder: pathlib.Path) -> None:
    """Tell the launcher, if there is one, which run its processes work on."""
    if path := os.environ.get(RUN_FILE):
        own = pathlib.Path(f"{path}.{os.getpid()}")
        own.write_text(str(folder))
        own.replace(path)


def main(args: Launch, words: list[str]) -> int:
    """Run the command until all processes have ended.   Returns: 0, 128 + the signal that ended it, or the failure's code."""
    _check(args, words)
    # A process of its own ends the others when this one is killed, even by SIGKILL.
    guard = subprocess.Popen(
        [sys.executable, "-S", "-c", GUARD, str(args.grace)], stdin=subprocess.PIPE, bufsize=0, start_new_session=True
    )
    with tempfile.TemporaryDirectory() as scratch, _Signals() as signals, guard, guard.stdin:
        run_file = pathlib.Path(scratch) / "run"
        for attempt in range(args.restarts + 1):
            try:
                return _Group(args, words, run_file, guard.stdin, signals).run()
            except Death as death:
                words = _go_on(words, run_file)
                again = attempt < args.restarts and death.code != 2 and signals.caught is None
                way_out = f"\n{'resuming' if again else 'resume'} with: {_command(args, words)}"
                # Exit code 2 is wrong input: the same command would fail again.
                print(f"diffjax launch: {death}{way_out * (death.code != 2)}", file=sys.stderr, flush=True)
                if not again:
                    return death.code
    raise AssertionError("unreachable")


def _check(args: Launch, words: list[str]) -> None:
    """Refuse what cannot work, before anything is started."""
    if not words:
        raise ValueError("launch needs a command after --, as in `diffjax launch -n 4 -- train digits`")
    for name in ("n", "nodes", "devices_per_process"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if min(args.restarts, args.grace) < 0:
        raise ValueError(f"--restarts and --grace must be at least 0; got {args.restarts} and {args.grace}")
    if not 0 <= args.node_rank < args.nodes:
        raise ValueError(f"--node-rank must be in [0, {args.nodes}), the number of --nodes; got {args.node_rank}")
    if args.nodes > 1 and args.coordinator is None:
        raise ValueError("--nodes above 1 needs --coordinator HOST:PORT, an address of machine 0 that all can reach")


def _go_on(words: list[str], run_file: pathlib.Path) -> list[str]:
    """The command that continues what `words` began: from the last checkpoint, or again if there is none."""
    if words[0] != "train" or not run_file.exists():
        return words
    folder = run_file.read_text()
    saved = pathlib.Path(folder) / "checkpoints"
    if saved.is_dir() and any(p.name.isdecimal() for p in saved.iterdir()):
        return ["train", "--resume", folder]
    return ["train", "--config", folder]


def _command(args: Launch, words: list[str]) -> str:
    """The command line of a launch."""
    options = ["-n", str(args.n)]
    for field in dataclasses.fields(args)[1:]:
        value = getattr(args, field.name)
        if value != field.default:
            options += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(["diffjax", "launch", *options, "--", *words])


class _Signals(contextlib.AbstractContextManager):
    """Passes the first SIGINT or SIGTERM on to every process, which then save and stop; a second SIGINT kills them."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self.group: _Group | None = None
        self._before: dict = {}

    def __enter__(self) -> _Signals:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.caught is None:
            self.caught = number
            self.group and self.group.send(number)
        elif number == signal.SIGINT:
            self.group and self.group.send(signal.SIGKILL)


class _Group:
    """The processes of one attempt, each the leader of a process group of its own."""

    def __init__(self, args: Launch, words: list[str], run_file: pathlib.Path, guard: Any, signals: _Signals) -> None:
        self.args, self.guard, self.signals = args, guard, signals
        self.total, self.began = args.n * args.nodes, time.monotonic()
        self.ends: queue.Queue[int] = queue.Queue()
        self.codes: dict[int, int] = {}
        self.tails = [collections.deque(maxlen=SHOWN) for _ in range(args.n)]
        self.alive: set[int] = set()
        self.lock = threading.Lock()
        self.children: list[subprocess.Popen] = []
        where = args.coordinator or f"127.0.0.1:{_free_port()}"
        script = words[0].endswith(".py")
        command = [sys.executable, "-u", *([] if script else ["-m", "diffjax"]), *words]
        signals.group = self
        for i in range(args.n):
            environ = {**os.environ, **self._environment(i, where), RUN_FILE: str(run_file)}
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            child = subprocess.Popen(command, env=environ, start_new_session=True, **pipes)
            self._tell_guard(f"+{child.pid}")
            self.children.append(child)
            self.alive.add(i)
            threading.Thread(target=self._wait, args=(i, child), daemon=True).start()
        if signals.caught is not None:  # it came while they were started
            self.send(signals.caught)

    def _environment(self, i: int, where: str) -> dict[str, str]:
        """The variables that `hosts.detect` reads, and the devices of process i of this machine."""
        args, rank = self.args, self.args.node_rank * self.args.n + i
        found = {"DIFFJAX_COORDINATOR": where, "DIFFJAX_PROCESSES": str(self.total), "DIFFJAX_PROCESS": str(rank)}
        per = args.devices_per_process or (1 if args.n > 1 else None)
        if per is not None:
            found["DIFFJAX_DEVICES"] = ",".join(str(i * per + k) for k in range(per))
            flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
            found["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={per}"])
        return found

    def run(self) -> int:
        """Wait for all of them.   Raises: Death: one failed; the others are stopped."""
        death, deadline = None, None
        try:
            while len(self.codes) < self.args.n:
                try:
                    i = self.ends.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
                except queue.Empty:
                    self.send(signal.SIGKILL)
                    deadline = None
                    continue
                code = self.codes[i]
                if code == 0 or death is not None or (code == self._stopped() and self.signals.caught):
                    continue
                death = (i, code, time.monotonic())
                print(f"diffjax launch: {self._name(i)} {_how(code)}; stopping the others", file=sys.stderr, flush=True)
                self.send(signal.SIGTERM)
                deadline = time.monotonic() + self.args.grace
        finally:
            self.send(signal.SIGKILL)
        if death is None:
            return self._stopped() if any(self.codes.values()) else 0
        raise Death(self._story(*death), death[1] if death[1] > 0 else 128 - death[1])

    def _stopped(self) -> int:
        return 128 + (self.signals.caught or 0)

    def send(self, number: int) -> None:
        """A signal to every process that is left, and to what it has started."""
        for i in list(self.alive):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.children[i].pid, number)

    def _name(self, i: int) -> str:
        return f"process {self.args.node_rank * self.args.n + i} of {self.total}"

    def _story(self, i: int, code: int, when: float) -> str:
        """Which process died first, how, and what became of the others."""
        lines = [
            f"{self._name(i)} (pid {self.children[i].pid}) died first, after {when - self.began:.1f} s: {_how(code)}"
        ]
        if self.tails[i]:
            lines += ["its last lines:", *(f"    {text}" for text in self.tails[i])]
        others = [f"{self._name(j)} {_how(self.codes[j])}" for j in sorted(self.codes) if j != i]
        if others:
            lines.append(f"{time.monotonic() - when:.1f} s later all are stopped: {', '.join(others)}")
        return "\n".join(lines)

    def _wait(self, i: int, child: subprocess.Popen) -> None:
        """Copy the output of a process, and say when it has ended."""
        readers = [
            threading.Thread(target=self._copy, args=(i, pipe, out), daemon=True)
            for pipe, out in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
        ]
        for reader in readers:
            reader.start()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # not reaped yet: the group's number is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # what it has started
        self.alive.discard(i)
        self._tell_guard(f"-{child.pid}")
        code = child.wait()
        for reader in readers:
            reader.join(timeout=2)
        self.codes[i] = code
        self.ends.put(i)

    def _copy(self, i: int, pipe: Any, out: Any) -> None:
        for line in pipe:
            text = line.decode(errors="replace").rstrip("\n")
            if out is sys.stderr and not text.startswith("    @"):  # frames of a C++ stack say nothing to people
                self.tails[i].append(text)
            with self.lock, contextlib.suppress(BrokenPipeError):  # nobody reads: go on emptying the process's pipe
                print(f"[{self.args.node_rank * self.args.n + i}] {text}", file=out, flush=True)

    def _tell_guard(self, text: str) -> None:
        with self.lock, contextlib.suppress(BrokenPipeError):
            self.guard.write(f"{text}\n".encode())


# Reads "+group" and "-group" until the launcher has gone, then asks the groups that are left to stop, and kills them.
GUARD = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
def send(number):
    for group in list(groups):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            groups.discard(group)
send(signal.SIGTERM)
end = time.monotonic() + float(sys.argv[1])
while groups and time.monotonic() < end:
    time.sleep(0.1)
    send(0)
send(signal.SIGKILL)
"""


def _how(code: int) -> str:
    """What an exit code says.

    Example:
        >>> _how(-9), _how(1), _how(143)
        ('was killed by SIGKILL', 'ended with exit code 1', 'ended with exit code 143')
    """
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    more = " (JAX does so when another process, here or on another machine, is lost)" if -code == signal.SIGABRT else ""
    return f"was killed by {name}{more}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
