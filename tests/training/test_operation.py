"""Signals, hangs, memory, refused updates, full disks and measurements of a run; about 25 s from a cold cache."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffjax.training import (
    CheckpointStore,
    Diverged,
    Hook,
    OutOfMemory,
    Profile,
    Watchdog,
    devices,
    files,
    fit,
    record,
    store,
)
from diffjax.training.record import MEASURED, Recorder
from diffjax.training.signals import Signals
from diffjax.training.watch import Watch

ONE = {"devices": jax.devices()[:1], "per_dispatch": 4}


@pytest.fixture(scope="module", autouse=True)
def shared_toy():
    """Every run in this file shares one compiled program."""
    global TOY
    TOY = toy.make()
    yield
    del TOY


@pytest.fixture(scope="module")
def twelve(shared_toy):
    """The state after twelve steps that nothing disturbed."""
    return train(12).state


def train(steps, batches=None, model=None, **options):
    state, train_step = model or TOY
    batches = toy.Batches() if batches is None else batches
    return fit(state, train_step, batches, steps=steps, **{**ONE, "stream": io.StringIO(), **options})


def calling(before):
    """The layout of the toy, with `before(i)` inside the i-th call of the device: a step that is slow, or hangs."""

    def make(train_step, **options):
        made, count = devices.mesh(train_step, **options), iter(range(1000))
        return dataclasses.replace(made, call=lambda *args: (before(next(count)), made.call(*args))[1])

    return make


def open_store(path):
    return contextlib.closing(CheckpointStore(path, say=lambda text: None))


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def repeatable(path):
    """The lines of a log without what depends on the machine."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(path)]


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def once(call):
    """`call`, but only the first time."""
    left = [call]
    return lambda *_: left.pop()() if left else None


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("where", ["compile", "step", "save", "hook", "twice"])
def test_a_signal_at_any_moment_saves_and_resume_is_exact(tmp_path, monkeypatch, twelve, where):
    seen, stop = [], once(kill)
    options = {"hooks": [Hook(6, lambda step, state: seen.append(step), "look")], "save_every": 4}
    again = dict(options)
    if where == "compile":  # tracing runs the model's Python code
        state, train_step = TOY
        model = lambda params: (stop(), toy.model(params))[1]
        options["model"] = state, dataclasses.replace(train_step, model=model)
    if where in ("step", "twice"):
        calls = (1,) if where == "step" else (1, 1)
        options["parallel"] = calling(lambda i: [kill() for call in calls if call == i])
    if where == "save":
        write = store.CheckpointStore._write_manifest
        monkeypatch.setattr(store.CheckpointStore, "_write_manifest", lambda self: (stop(), write(self))[1])
    if where == "hook":
        options["hooks"] = [Hook(6, lambda step, state: (seen.append(step), stop())[0], "look")]
    with open_store(tmp_path / "c") as kept:
        result = train(12, **options, store=kept)
        step = {"compile": 4, "step": 6, "twice": 6, "hook": 6}.get(where, result.step)
        assert result.interrupted == signal.SIGTERM and result.exit_code == 143
        assert result.saved == result.step == step == kept.steps()[-1] and step < 12
        resumed = train(12, **again, store=kept, resume=True)
    toy.assert_equal(resumed.state, twelve)
    assert seen == [6, 12]  # every hook once: at the stop, or when the run goes on


CHILD = """
import sys, threading, time, toy
from diffjax.training import CheckpointStore, fit, store
where, folder = sys.argv[1:]
state, step = toy.make()
write = store.CheckpointStore._write_manifest
def slow(self):
    if self._saving >= 40:
        print("AT", file=sys.stderr, flush=True)
        time.sleep(0.5)
    write(self)
store.CheckpointStore._write_manifest = slow
result = fit(state, step, toy.Batches(), steps=10**7, store=CheckpointStore(folder), save_every=20, per_dispatch=4)
sys.exit(result.exit_code)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_from_outside_while_saving(tmp_path, number, code):
    env = toy.clean_environment(1) | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "save", str(tmp_path)], stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        while child.stderr.readline().strip() != "AT":
            assert child.poll() is None
        child.send_signal(number)
        if number == signal.SIGTERM:
            child.send_signal(number)  # a second one changes nothing
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == code and "Traceback" not in err
    with open_store(tmp_path) as kept:
        restored = kept.restore(TOY[0])
    assert restored.page["data"] == {"next": restored.step} and restored.step >= 40
    toy.assert_equal(restored.state, train(restored.step).state)


def test_data_that_do_not_come_are_left_after_the_grace(tmp_path, capfd, twelve):
    def hang(i):
        if i == 6:
            kill()
            time.sleep(60)

    began = time.monotonic()
    with open_store(tmp_path) as kept:
        result = train(12, toy.Batches(on_next=hang), store=kept, grace=0.2)
        assert (
            result.exit_code == 143 and result.step == result.saved == 4
        )  # steps 5 and 6 wait for the batch that hangs
        resumed = train(12, store=kept, resume=True)
    assert time.monotonic() - began < 30
    toy.assert_equal(resumed.state, twelve)
    err = capfd.readouterr().err
    assert "after the signal the run is still waiting for data" in err and "nothing is saved yet" in err


def test_a_hook_that_does_not_end_is_left_after_the_grace_and_runs_again(tmp_path):
    seen = []

    def endless(step, state):
        seen.append(step)
        if len(seen) == 1:
            kill()
            time.sleep(60)

    began = time.monotonic()
    with open_store(tmp_path) as kept:
        options = {"hooks": [Hook(4, endless, "endless")], "store": kept, "grace": 0.2}
        result = train(8, **options)
        assert (result.exit_code, result.saved, seen) == (143, 4, [4]) and time.monotonic() - began < 30
        train(8, **options, resume=True)
    assert seen == [4, 4, 8]


def test_what_holds_up_a_stop_is_said(capfd):
    with Signals() as signals, Watch(None, signals, step=3, grace=0.05, saved=lambda: 2) as watch:
        with watch.during("checkpoint"):
            kill()
            end = time.monotonic() + 20
            while "still" not in (err := capfd.readouterr().err) and time.monotonic() < end:
                time.sleep(0.02)
    assert "the run is still waiting for a checkpoint to be written; the last checkpoint is step 2" in err


# ----------------------------------------------------------------------------------------------------------- hangs


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("where", ["data", "device"])
def test_a_hang_is_reported_and_the_run_goes_on(tmp_path, capfd, where, twelve):
    file = tmp_path / "hang-8.txt"
    options = {"watchdog": Watchdog(0.3, tmp_path)}
    if where == "data":
        options["batches"] = toy.Batches(on_next=lambda i: wait_for(file.exists) if i == 9 else None)
    else:
        options["parallel"] = calling(lambda i: wait_for(file.exists) if i == 2 else None)
    result = train(12, **options)
    assert result.step == 12 and not result.hung
    text, err = file.read_text(), capfd.readouterr().err
    what = {"data": "waiting for data: the iterator of batches has not delivered", "device": "waiting for the device"}
    assert f"the run is {what[where]}" in text and what[where] in err
    assert "no step finished for 0 s" in text and f"step 8; process 0 of 1, pid {os.getpid()}" in text
    assert "2 finished, 0 unfinished" in text and "host memory" in text and "cpu" in text.lower()
    assert "thread MainThread:" in text and "wait_for" in text and "diffjax-clock" in text  # who hangs, and where
    toy.assert_equal(result.state, twelve)


def test_a_run_that_waits_for_data_is_saved_before_it_is_given_up(tmp_path, twelve):
    hang = lambda i: time.sleep(60) if i == 9 else None
    began = time.monotonic()
    with open_store(tmp_path / "c") as kept:
        options = {"store": kept, "watchdog": Watchdog(2, tmp_path, abort=True)}
        result = train(12, toy.Batches(on_next=hang), **options)
        assert result.hung and result.exit_code == 75 and result.saved == 8 and time.monotonic() - began < 40
        toy.assert_equal(train(12, store=kept, resume=True).state, twelve)


ABORT = """
import sys, time, toy
from jax.experimental import io_callback
from diffjax.training import CheckpointStore, Watchdog, fit
count = iter(range(1000))
def slow():
    if next(count) == 30:
        time.sleep(1000)
def augment(key, batch, items):
    io_callback(slow, None)
    return batch
state, step = toy.make(augment=augment)
fit(state, step, toy.Batches(), steps=100, store=CheckpointStore(sys.argv[1]), save_every=20, per_dispatch=4,
    watchdog=Watchdog(2, sys.argv[1], abort=True))
"""


def test_a_hung_device_ends_the_process(tmp_path):
    env = toy.clean_environment(1) | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    found = subprocess.run(
        [sys.executable, "-c", ABORT, str(tmp_path)], capture_output=True, text=True, env=env, timeout=120
    )
    assert found.returncode == 75 and "waiting for the device" in found.stderr
    assert (tmp_path / "hang-28.txt").exists()
    with open_store(tmp_path) as kept:
        assert kept.restore(TOY[0]).step == 20


def test_the_limit_follows_the_speed_of_the_run():
    watch = Watch(Watchdog(), Signals(), step=0)
    assert watch.limit() == 1200  # compiling, or before the first step
    watch._finished, watch.doing = 1, "device"
    assert watch.limit() == 120
    watch._seconds.extend([30.0, 31.0, 500.0])
    assert watch.limit() == 20 * 31
    watch.doing = "hook eval"
    assert watch.limit() == 200 * 31
    assert Watch(None, Signals(), step=0).limit() is None
    with pytest.raises(ValueError, match="watchdog seconds must be positive; got 0"):
        Watchdog(0)


def test_no_thread_is_left():
    before = set(threading.enumerate())
    train(4)
    with pytest.raises(ValueError, match="ended after step"):
        train(8, toy.Batches(stop=5))
    assert set(threading.enumerate()) <= before


# ---------------------------------------------------------------------------------------------------------- memory


def test_memory_that_is_not_enough_is_explained(tmp_path):
    def hungry(key, batch, items):
        row = jax.lax.iota(jnp.float32, 2**42)[None] * batch["x"][:, :1]  # 2^46 numbers: no machine has them
        return {**batch, "x": batch["x"] + jnp.sort(row, 0).sum() * 0}

    with open_store(tmp_path) as kept:
        train(4, store=kept)
        with pytest.raises(OutOfMemory) as caught:
            train(8, model=toy.make(augment=hungry), store=kept, resume=True)
        assert kept.restore(TOY[0]).step == 4
    text = str(caught.value)
    assert "RESOURCE_EXHAUSTED: Out of memory allocating 2814749767" in text
    assert "batches of 16, 16 on each of 1 device(s) in 1 part(s), 4 step(s) per call" in text
    assert ("while: running the step" in text or "while: compiling the step" in text) and "checkpoint 4 is on" in text
    assert all(
        way in text for way in ("smaller batch", "accumulate above 1", "per_dispatch", "remat", "bfloat16", "fsdp")
    )


def test_memory_that_the_state_alone_exceeds_is_explained_and_no_checkpoint_called_damaged(tmp_path, monkeypatch):
    state, train_step = TOY
    large = lambda driver: dataclasses.replace(state, params={"w": jnp.ones(2**46)})
    with pytest.raises(
        OutOfMemory, match="(?s)while: making.*tried: parameters 268435456.0 MiB.*fsdp.*nothing was saved"
    ):
        fit(large, train_step, toy.Batches(), steps=1, **ONE)

    def exhausted(folder, template):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    told = []
    with contextlib.closing(CheckpointStore(tmp_path, say=told.append)) as kept:
        train(4, store=kept)
        monkeypatch.setattr(files, "read", exhausted)
        with pytest.raises(OutOfMemory, match="(?s)RESOURCE_EXHAUSTED.*checkpoint 4 is on disk"):
            train(8, store=kept, resume=True)
        assert kept.steps() == [4] and not told


# ------------------------------------------------------------------------------------------------- refused updates


class Without(toy.Batches):
    """The same data without the batches `gone`."""

    def __init__(self, gone, **options):
        super().__init__(**options)
        self.gone = gone

    def __next__(self):
        while self.i in self.gone:
            self.i += 1
        return super().__next__()


def rewinding(path, steps=40, bad=range(13, 18), batches=None, open=open_store, **options):
    with open(path) as kept:
        batches = toy.Batches(bad=bad) if batches is None else batches
        return train(steps, batches, store=kept, save_every=5, on_bad="rewind", max_skipped=3, **options)


def test_rewind_equals_a_run_without_these_data(tmp_path, capfd):
    # Bad: 13 to 15. Known at step 16; back to 10, and on with batch 16: as if 10 to 15 had never been.
    result = rewinding(tmp_path / "a", bad=range(13, 16), metrics_file=tmp_path / "m", log_every=4)
    clean = train(40, Without(range(10, 16)), metrics_file=tmp_path / "clean", log_every=4)
    toy.assert_equal(result.state, clean.state)
    assert result.rewinds == 1 and int(result.state.skipped["total"]) == 0 and result.examples == 40 * 16
    found = repeatable(tmp_path / "m")
    assert [line for line in found if "rewind" in line] == [{"step": 10, "rewind": 1, "from": 16}]
    assert [line for line in found if "rewind" not in line] == repeatable(tmp_path / "clean")
    assert "too many updates up to step 16 were not finite: back to checkpoint 10" in capfd.readouterr().err


def test_a_long_burst_takes_several_rewinds_and_too_long_a_one_ends_the_run(tmp_path):
    # Batches 10 to 15 go, then 16 to 18, then the two that are left are skipped one by one.
    result = rewinding(tmp_path / "a", bad=range(13, 21))
    assert result.rewinds == 2 and int(result.state.skipped["total"]) == 2
    toy.assert_equal(result.state, train(40, Without(range(10, 19), bad=(19, 20))).state)
    with pytest.raises(Diverged, match=r"last 3 updates up to step 13 .*checkpoint \d+.*3 rewinds"):
        rewinding(tmp_path / "b", bad=range(13, 1000))


@pytest.mark.slow
def test_an_interrupted_run_rewinds_as_the_whole_one_does(tmp_path):
    whole = rewinding(tmp_path / "a", metrics_file=tmp_path / "ma")
    for stop in (11, 14, 17):  # before, in, and after the burst
        number, where = iter(range(1000)), tmp_path / str(stop)
        batches = toy.Batches(
            bad=range(13, 18), on_next=lambda i, n=number, stop=stop: kill() if next(n) == stop else None
        )
        first = rewinding(where, batches=batches, metrics_file=tmp_path / f"m{stop}")
        assert first.exit_code == 143 and first.step < 40
        second = rewinding(where, resume=True, metrics_file=tmp_path / f"m{stop}")
        toy.assert_equal(second.state, whole.state)
        assert whole.rewinds == second.rewinds == 1
        assert repeatable(tmp_path / "ma") == repeatable(tmp_path / f"m{stop}")


def test_signals_take_no_place_to_go_back_to(tmp_path):
    """One between a step and its hooks, and one after the last good checkpoint of a store that keeps the latest alone."""
    hooks = [Hook(5, lambda step, state: None)]
    whole = rewinding(tmp_path / "a", hooks=hooks)
    one = lambda path: contextlib.closing(CheckpointStore(path, keep_latest=1, keep_best=0, say=lambda text: None))
    for stop, step in ((9, 10), (11, 14)):
        batches = toy.Batches(bad=range(13, 18), on_next=lambda i, stop=stop: kill() if i == stop else None)
        first = rewinding(tmp_path / str(stop), batches=batches, hooks=hooks, open=one)
        assert first.exit_code == 143 and first.saved == first.step == step
        second = rewinding(tmp_path / str(stop), hooks=hooks, open=one, resume=True)
        assert whole.rewinds == second.rewinds == 1
        toy.assert_equal(second.state, whole.state)


def test_skipped_batches_leave_no_trace_but_the_count():
    bad, state = (3, 4, 9), TOY[0]
    for i in range(12):  # the same steps; where a batch is bad only the counts move
        if i in bad:
            one = {"total": state.skipped["total"] + 1, "consecutive": state.skipped["consecutive"]}
            state = dataclasses.replace(state, step=state.step + 1, skipped=one)
        elif i - 1 in (-1, *bad):
            data, end = toy.Batches(), min([b for b in bad if b > i], default=12)
            data.set_state({"next": i})
            state = train(end, data, model=(state, TOY[1])).state
    found = train(12, toy.Batches(bad=bad)).state
    toy.assert_equal(found, state)
    assert int(found.skipped["total"]) == 3


def test_stop_at_the_first_refused_update(tmp_path):
    with open_store(tmp_path) as kept, pytest.raises(Diverged, match="the last 1 updates up to step 6"):
        train(20, toy.Batches(bad=(5,)), store=kept, on_bad="stop")
    with pytest.raises(ValueError, match="on_bad must be one of skip, rewind, stop; got 'retry'"):
        train(1, on_bad="retry")
    with pytest.raises(ValueError, match="needs store= and save_every="):
        train(1, on_bad="rewind")
    with pytest.raises(ValueError, match="grace must be positive"):
        train(1, grace=0)


# ------------------------------------------------------------------------------------------------- errors and disks


def test_an_error_of_the_data_or_of_a_hook_loses_no_step(tmp_path, capfd, twelve):
    def broken(i):
        if i == 9:
            raise OSError("pictures/cat.png cannot be read")

    with open_store(tmp_path / "a") as kept:
        with pytest.raises(OSError, match="cat.png"):
            train(12, toy.Batches(on_next=broken), store=kept)
        assert kept.steps() == [8] and "step 8 is saved" in capfd.readouterr().err
        toy.assert_equal(train(12, store=kept, resume=True).state, twelve)
    fail = once(lambda: 1 / 0)
    with open_store(tmp_path / "b") as kept:
        options = {"store": kept, "hooks": [Hook(6, lambda step, state: fail(), "draw")]}
        with pytest.raises(ZeroDivisionError):
            train(12, **options)
        assert kept.steps() == [6]
        toy.assert_equal(train(12, **options, resume=True).state, twelve)


def test_the_log_waits_for_a_full_disk_and_loses_nothing(tmp_path):
    file, limits = tmp_path / "m", resource.getrlimit(resource.RLIMIT_FSIZE)
    write = lambda recorder, i: recorder._write({"step": i, "loss": 0.5})
    size = len(b'{"step": 1, "loss": 0.5}\n')
    try:
        with Recorder(0, 9, log_every=1, file=file, stream=io.StringIO()) as recorder:
            write(recorder, 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, limits[1]))  # the kernel refuses more than 7 bytes
            write(recorder, 2)
            write(recorder, 3)
            assert file.stat().st_size == size + 7
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            write(recorder, 4)
        assert [line["step"] for line in lines(file)] == [1, 2, 3, 4] and recorder.failures == []
        with Recorder(4, 9, log_every=1, file=file, stream=io.StringIO()) as recorder:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * size, limits[1]))
            write(recorder, 5)
            write(recorder, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (text,) = recorder.failures
    assert text.startswith(f"2 lines of {file} could not be written: [Errno {errno.EFBIG}]")


def test_a_full_disk_for_the_log_does_not_stop_training(tmp_path, monkeypatch, capfd):
    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(record.os, "write", full)
        result = train(8, metrics_file=tmp_path / "m", log_every=2)
    assert capfd.readouterr().err.count("cannot be written") == 1  # said once
    assert result.step == 8 and result.failures[0].startswith("4 lines of") and "No space left" in result.failures[0]
    toy.assert_equal(result.state, train(8).state)


# ---------------------------------------------------------------------------------------------------- measurements


class Late:
    """A metric of a device that takes `seconds` for a call, one call after the other."""

    free = 0.0

    def __init__(self, seconds):
        Late.free = self.at = max(Late.free, time.perf_counter()) + seconds

    def block_until_ready(self):
        time.sleep(max(0.0, self.at - time.perf_counter()))
        return self

    def is_ready(self):
        return time.perf_counter() >= self.at

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.ones(1)


@pytest.mark.parametrize("wait, busy, share", [(0.06, 0.03, 0.5), (0.01, 0.03, 0.0), (0.08, 0.02, 0.75)])
def test_the_stalled_share_and_the_speed_are_right(tmp_path, wait, busy, share):
    late = busy * 5  # the first call holds the compilation, and must not count
    with Signals() as signals, Watch(None, signals, step=0) as watch:
        options = {"stream": io.StringIO(), "batch": 10, "watch": watch, "flops": 2e9, "peak_flops": 4e12}
        with Recorder(0, 30, log_every=10, file=tmp_path / "m", **options) as recorder:
            recorder.compiled = late
            for i in range(30):
                with watch.during("data"):
                    time.sleep(wait)
                metrics = {"loss": Late(late if i == 0 else busy)}
                recorder.add(i, 1, metrics, watch.called(i + 1, metrics))
            recorder.drain()
    first, *rest = lines(tmp_path / "m")
    assert first["compile_seconds"] == pytest.approx(late) and all("compile_seconds" not in line for line in rest)
    for line in (first, *rest):
        rate = 1 / max(wait, busy)
        assert line["steps_per_second"] == pytest.approx(rate, rel=0.4)
        assert line["examples_per_second"] == pytest.approx(10 * line["steps_per_second"], rel=1e-3)
        assert line["mfu"] == pytest.approx(2e9 * line["steps_per_second"] / 4e12, abs=1e-4)
        assert line["input_stall"] == pytest.approx(share, abs=0.2)  # sleeps last longer on a busy machine
        assert line["host_bytes"] > 2**20


def test_a_slow_iterator_is_seen_in_a_real_run(tmp_path):
    stream = io.StringIO()
    slow = toy.Batches(on_next=lambda i: time.sleep(0.02))
    train(24, slow, log_every=12, metrics_file=tmp_path / "m", stream=stream)
    first, second = lines(tmp_path / "m")
    assert min(first["input_stall"], second["input_stall"]) > 0.6 and "waiting for data" in stream.getvalue()
    assert "mfu" not in first and second["steps_per_second"] < 55 and first["compile_seconds"] > 0


def test_a_profile_is_written_and_changes_nothing(tmp_path, capfd):
    traced = train(24, profile=Profile(tmp_path / "p", steps=6))
    files = {p.suffix: p.stat().st_size for p in (tmp_path / "p").rglob("*") if p.is_file()}
    assert files[".pb"] > 1000 and files[".gz"] > 1000
    toy.assert_equal(traced.state, train(24).state)
    train(8, profile=Profile(tmp_path / "q"))
    err = capfd.readouterr().err
    assert f"xprof --logdir {tmp_path / 'p'}" in err and "use more steps" in err and not (tmp_path / "q").exists()
    with pytest.raises(ValueError, match="profile steps must be at least 1"):
        Profile(tmp_path, 0)
