"""The launcher with tiny programs: who died is named, nobody is left behind, signals pass through once."""

import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from cli_tools import TINY, same_leaves

from diffjax.cli import launch

FLAG = "--xla_backend_optimization_level=0"
ROOT = pathlib.Path(__file__).parents[2]

# Prints who it is, starts a child of its own, writes both numbers down, and waits for ever.
SLEEPER = """
import os, pathlib, signal, subprocess, sys, time
me = os.environ["DIFFJAX_PROCESS"]
def stop(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
path = pathlib.Path(sys.argv[1]) / me
path.with_suffix(".tmp").write_text(f"{os.getpid()} {child.pid}")
path.with_suffix(".tmp").rename(path)
time.sleep(600)
"""
# Ends by itself: process 1 fails after its words, process 0 ignores being asked to stop.
FAILER = """
import os, pathlib, signal, sys, time
ignores = pathlib.Path(__file__ + os.environ["DIFFJAX_COORDINATOR"])  # another one in every attempt
if os.environ["DIFFJAX_PROCESS"] == "1":
    while not ignores.exists():
        time.sleep(0.02)
    print("the last words", file=sys.stderr)
    sys.exit(5)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ignores.touch()
time.sleep(600)
"""
SHOWER = """
import os
print(*(os.environ.get(f"DIFFJAX_{name}") for name in ("COORDINATOR", "PROCESSES", "PROCESS", "DEVICES")))
print(os.environ["XLA_FLAGS"])
"""


def run(*words):
    """The launcher, in a process of its own."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {FLAG}"}
    environ["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-m", "diffjax", "launch", *map(str, words)], env=environ, **pipes)


def script(folder, text):
    (path := folder / "program.py").write_text(text)
    return path


def sleepers(folder, n):
    """Process numbers of `n` sleepers and their children, once all of them run."""
    end = time.monotonic() + 60
    while not all((folder / str(i)).exists() for i in range(n)):
        assert time.monotonic() < end
        time.sleep(0.02)
    return [[int(word) for word in (folder / str(i)).read_text().split()] for i in range(n)]


def gone(numbers, seconds=20):
    """Whether these processes end."""
    end = time.monotonic() + seconds
    while any(alive(number) for pair in numbers for number in pair):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(number):
    try:
        return pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_process_learns_its_place(tmp_path):
    child = run("-n", 2, "--devices-per-process", 3, "--nodes", 2, "--node-rank", 1, "--coordinator", "h:1", "--",
                script(tmp_path, SHOWER))  # fmt: skip
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    flags = f"{FLAG} --xla_force_host_platform_device_count=3"
    assert sorted(out.splitlines()) == [f"[2] {flags}", "[2] h:1 4 2 0,1,2", f"[3] {flags}", "[3] h:1 4 3 3,4,5"]


def test_who_fails_first_is_reported_and_the_rest_is_stopped(tmp_path):
    program = script(tmp_path, FAILER)
    child = run("-n", 2, "--grace", 0.5, "--restarts", 1, "--", program, "a b")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 5 and out == ""
    assert err.count("process 1 of 2 ended with exit code 5; stopping the others") == 2  # it was started again once
    assert err.count("\n    the last words\n") == 2 and err.count("process 0 of 2 was killed by SIGKILL") == 2
    command = shlex.join(
        ["diffjax", "launch", "-n", "2", "--restarts", "1", "--grace", "0.5", "--", str(program), "a b"]
    )
    assert f"resuming with: {command}\n" in err and err.splitlines()[-1] == f"resume with: {command}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once(tmp_path, number):
    child = run("-n", 3, "--", script(tmp_path, SLEEPER), tmp_path)
    numbers = sleepers(tmp_path, 3)
    os.kill(child.pid, number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number and "died" not in err
    assert sorted(out.splitlines()) == [f"[{i}] got {number.name}" for i in range(3)]
    assert gone(numbers)  # those that they started too


def test_nobody_outlives_a_killed_launcher(tmp_path):
    child = run("-n", 2, "--grace", 1, "--", script(tmp_path, SLEEPER), tmp_path)
    numbers = sleepers(tmp_path, 2)
    child.kill()
    child.communicate(timeout=60)
    assert gone(numbers)


def test_what_to_resume_with(tmp_path):
    note = tmp_path / "note"
    words = ["train", "digits", "--seed=3"]
    assert launch._go_on(words, note) == words  # it died before there was a run
    run_folder = tmp_path / "run"
    os.environ[launch.RUN_FILE] = str(note)
    try:
        launch.report(run_folder)
    finally:
        del os.environ[launch.RUN_FILE]
    assert launch._go_on(words, note) == ["train", "--config", str(run_folder)]  # before there was a checkpoint
    (run_folder / "checkpoints" / "20").mkdir(parents=True)
    assert launch._go_on(words, note) == ["train", "--resume", str(run_folder)]


def test_bad_input(call):
    for words, message in {
        ("-n", 2): "launch needs a command after --",
        ("-n", 0, "--", "train"): "--n must be at least 1; got 0",
        ("-n", 2, "--nodes", 2, "--", "train"): "--nodes above 1 needs --coordinator HOST:PORT",
        ("-n", 2, "--node-rank", 1, "--", "train"): r"--node-rank must be in \[0, 1\)",
        ("-n", 2, "--restarts", -1, "--", "train"): "--restarts and --grace must be at least 0; got -1",
    }.items():
        code, _, err = call("launch", *words)
        assert code == 2 and message.replace("\\", "") in err


@pytest.mark.slow
def test_train_with_two_processes_killed_and_resumed_ends_like_one(trained, tmp_path):
    """The main job on 2 processes: one is killed after a checkpoint; the printed command goes on to the same end."""
    child = run("-n", 2, "--", "train", "gaussians", "--run", tmp_path / "run", "--no-scores", *TINY)
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "10").exists():
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.01)
    (victim,) = children_named(child.pid, "DIFFJAX_PROCESS=1")
    os.kill(victim, signal.SIGKILL)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 137 and "process 1 of 2 was killed by SIGKILL" in err, err
    again = shlex.split(err.splitlines()[-1].removeprefix("resume with: diffjax launch "))
    assert again == ["-n", "2", "--", "train", "--resume", str(tmp_path / "run")]
    child = run(*again)
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    assert f"[0] run      {tmp_path / 'run'}" in out and "[1] run" not in out  # process 0 speaks for both
    same_leaves(trained[0], tmp_path / "run", "params", rtol=1e-5, atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == ["step_0000015.png", "step_0000030.png"]


def children_named(parent, variable):
    """The children of a process that have a variable in their environment."""
    task = pathlib.Path(f"/proc/{parent}/task")
    children = {int(n) for t in task.iterdir() for n in (t / "children").read_text().split()}
    return [n for n in children if variable.encode() in pathlib.Path(f"/proc/{n}/environ").read_bytes().split(b"\0")]


def test_processes_with_other_options_are_refused(tmp_path):
    """By hand, without the launcher: both end at once."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{s.getsockname()[1]}"
    words = [
        "train",
        "gaussians",
        "--run",
        str(tmp_path / "run"),
        "--hosts.processes=2",
        f"--hosts.coordinator={where}",
    ]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "diffjax", *words, f"--hosts.process={i}", f"--training.batch-size={16 + i * 16}"],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        errors = [child.communicate(timeout=60)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    reason = "started with the options of process 0, but process 1 has training.batch_size 32 instead of 16"
    assert any(child.returncode == 2 and reason in error for child, error in zip(children, errors, strict=True))
    assert all(child.returncode in (1, 2, -signal.SIGABRT) for child in children)
