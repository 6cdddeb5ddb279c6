import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from diffjax.training import CheckpointError, CheckpointStore, Diverged, Hook, devices, fit, manifest
from diffjax.training.record import AHEAD, MEASURED, Recorder

QUIET = {"stream": io.StringIO(), "per_dispatch": 4}


def train(steps, n=1, batches=None, **options):
    """A run on `n` devices; every run in this file shares one compiled program per layout."""
    state, train_step = TOY
    batches = toy.Batches() if batches is None else batches
    return fit(state, train_step, batches, steps=steps, devices=jax.devices()[:n], **{**QUIET, **options})


@pytest.fixture(scope="module", autouse=True)
def shared_toy():
    global TOY
    TOY = toy.make()
    yield
    del TOY


def open_store(path):
    return contextlib.closing(CheckpointStore(path, say=lambda text: None))


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("parallel, n", [("mesh", 1), ("mesh", 8), ("shard_map", 8), ("pmap", 8)])
def test_save_restore_two_steps_equals_two_more_steps(tmp_path, parallel, n):
    whole = train(7, n, parallel=parallel)
    with open_store(tmp_path) as store:
        train(5, n, parallel=parallel, store=store)
    with open_store(tmp_path) as store:
        batches = toy.Batches()
        resumed = train(7, n, parallel=parallel, store=store, resume=True, batches=batches)
    toy.assert_equal(resumed.state, whole.state)
    assert batches.i == 7 and resumed.examples == 7 * 16 and resumed.saved == 7 and resumed.exit_code == 0


def test_a_run_continues_on_another_number_of_devices(tmp_path):
    whole = train(7, 1)
    with open_store(tmp_path) as store:
        train(5, 1, store=store)
        resumed = train(7, 8, store=store, resume=True)
    toy.assert_close(resumed.state, whole.state, rtol=1e-5, atol=1e-6)
    assert len(resumed.state.params["w"].sharding.device_set) == 8


def test_periodic_saves_do_not_change_the_run_and_resume_passes_over_damage(tmp_path):
    whole = train(10)
    with open_store(tmp_path) as store:
        result = train(10, store=store, save_every=3)
        assert store.steps() == [9, 10] and result.saved == 10
    toy.assert_equal(result.state, whole.state)
    victim = next(p for p in (tmp_path / "10").rglob("*") if p.is_file() and "/d/" in p.as_posix())
    victim.write_bytes(victim.read_bytes()[:-3])
    with open_store(tmp_path) as store:
        batches = toy.Batches()
        again = train(10, store=store, resume=True, batches=batches)
        assert store.steps() == [9, 10]
    toy.assert_equal(again.state, whole.state)


def test_resume_of_a_finished_run_returns_its_state(tmp_path):
    with open_store(tmp_path) as store:
        done = train(3, store=store)
        again = train(3, store=store, resume=True)
    toy.assert_equal(again.state, done.state)
    assert again.step == again.saved == 3


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops_and_resume_is_exact(tmp_path, number, code):
    whole = train(12)
    before = signal.getsignal(number)
    stop = lambda i: os.kill(os.getpid(), number) if i == 5 else None
    with open_store(tmp_path) as store:
        result = train(12, store=store, batches=toy.Batches(on_next=stop))
        assert result.interrupted == number and result.exit_code == code
        assert result.saved == result.step == store.steps()[-1] == 8  # the call in progress is finished
        resumed = train(12, store=store, resume=True)
    toy.assert_equal(resumed.state, whole.state)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once():
    stop = lambda i: os.kill(os.getpid(), signal.SIGINT) if i in (1, 2) else None
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(100, batches=toy.Batches(on_next=stop))
    assert signal.getsignal(signal.SIGINT) is before


RUN = """
import sys, toy
from diffjax.training import CheckpointStore, fit
state, step = toy.make()
result = fit(state, step, toy.Batches(), steps=10**7, store=CheckpointStore(sys.argv[1]), log_every=100, per_dispatch=4)
sys.exit(result.exit_code)
"""


def test_sigterm_from_outside(tmp_path):
    env = toy.clean_environment(2) | {"PYTHONPATH": os.path.dirname(__file__)}
    child = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stderr=subprocess.PIPE, text=True, env=env)
    assert "step 100/10000000  loss " in child.stderr.readline()
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143 and "stopping after this step and saving" in err and "Traceback" not in err
    with open_store(tmp_path) as store:
        restored = store.restore(TOY[0])
    assert restored.step >= 100 and restored.page["data"] == {"next": restored.step}


# ------------------------------------------------------------------------------------------------ logs and hooks


def test_the_metrics_file_has_every_window_once_across_a_crash(tmp_path):
    clean, file = tmp_path / "clean.jsonl", tmp_path / "m.jsonl"
    train(20, log_every=3, metrics_file=clean)
    with open_store(tmp_path / "c") as store:
        # Stops at 13, in the middle of a window; the last checkpoint is 10, in the middle of another.
        with pytest.raises(ValueError, match="the batches ended after step 13 of 20"):
            train(20, log_every=3, metrics_file=file, store=store, save_every=5, batches=toy.Batches(stop=13))
        assert [line["step"] for line in lines(file)][:3] == [3, 6, 9]
        with file.open("a") as f:
            f.write('{"step": 15, "lo')  # a line that a kill left unfinished
        train(20, log_every=3, metrics_file=file, store=store, resume=True)
    a, b = lines(clean), lines(file)
    assert [line["step"] for line in b] == [3, 6, 9, 12, 15, 18, 20]
    drop = lambda line: {k: v for k, v in line.items() if k not in MEASURED}
    assert [drop(line) for line in a] == [drop(line) for line in b]
    assert all(line["examples"] == 16 * line["step"] and line["seconds"] > 0 for line in b)


def test_windows_are_means_of_the_steps(tmp_path):
    train(6, log_every=1, metrics_file=tmp_path / "1")
    train(6, log_every=4, metrics_file=tmp_path / "4")
    one, four = lines(tmp_path / "1"), lines(tmp_path / "4")
    assert [line["step"] for line in four] == [4, 6]
    np.testing.assert_allclose(four[0]["loss"], np.mean([line["loss"] for line in one[:4]]), rtol=1e-6)
    np.testing.assert_allclose(four[1]["loss"], np.mean([line["loss"] for line in one[4:]]), rtol=1e-6)
    assert {"loss", "grad_norm", "skipped", "time", "examples"} <= set(one[0])


def test_hooks_run_when_due_and_their_numbers_choose_the_best(tmp_path):
    seen = []

    def measure(step, state):
        assert int(state.step) == step and np.isfinite(np.asarray(state.params["w"])).all()
        seen.append(step)
        return {"score": abs(step - 4.0), "file": "grid.png"}

    with contextlib.closing(CheckpointStore(tmp_path / "c", best="score", keep_latest=1)) as store:
        hook = Hook(4, measure, "eval")
        train(10, store=store, save_every=2, hooks=[hook], metrics_file=tmp_path / "m", log_every=5)
        assert store.steps() == [4, 10]
    assert seen == [4, 8, 10]
    assert [line for line in lines(tmp_path / "m") if "hook" in line][0] == {
        "step": 4, "hook": "eval", "score": 0.0, "file": "grid.png",
    }  # fmt: skip


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    train(12, stream=stream, log_every=3)
    first, second, *_, last = stream.getvalue().splitlines()
    assert first.startswith("step 3/12  loss ") and "it/s" not in first  # the first call holds the compilation
    assert second.startswith("step 6/12  loss ") and "it/s" in second and "examples/s  ETA 0:00:0" in second
    assert last.startswith("step 12/12") and "ETA 0:00:00" in last


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    stream.isatty = lambda: True
    train(6, stream=stream, log_every=3)
    text = stream.getvalue()
    assert "6/6" in text and "loss " in text and "it/s" in text and "ETA" in text and "step 3/6" not in text


class Slow:
    """A metric that the device has not finished, and that counts who waits for it."""

    waited = 0

    def is_ready(self):
        return False

    def __array__(self, dtype=None, copy=None):
        Slow.waited += 1
        return np.ones(4)


def test_logging_waits_only_for_calls_that_are_old(tmp_path):
    with Recorder(0, 100, log_every=1, file=tmp_path / "m", stream=io.StringIO()) as recorder:
        for i in range(5):
            recorder.add(4 * i, 4, {"loss": Slow()})
            assert Slow.waited == max(i + 1 - AHEAD, 0)
        recorder.drain()
    assert len(lines(tmp_path / "m")) == 20


# --------------------------------------------------------------------------------------------------------- trouble


def test_nan_batches_are_skipped_counted_and_reported(tmp_path):
    stream = io.StringIO()
    result = train(8, batches=toy.Batches(bad=(2, 3, 6)), log_every=4, metrics_file=tmp_path / "m", stream=stream)
    assert int(result.state.skipped["total"]) == 3
    assert [line["skipped"] for line in lines(tmp_path / "m")] == [2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "m")) and "skipped 2" in stream.getvalue()


def test_too_many_bad_updates_stop_with_the_last_good_state_saved(tmp_path):
    good = train(4)
    with open_store(tmp_path) as store:
        with pytest.raises(Diverged, match="last .* updates .* not finite.* saved as checkpoint .* learning rate"):
            train(100, batches=toy.Batches(bad=range(4, 100)), max_skipped=5, store=store)
        restored = store.restore(TOY[0])
    assert 9 <= restored.step <= 9 + 4 * (AHEAD + 1)
    toy.assert_equal(restored.state.params, good.state.params)
    toy.assert_equal(restored.state.opt_state, good.state.opt_state)


def test_a_full_disk_does_not_stop_training(tmp_path, monkeypatch):
    whole, real, calls = train(8), manifest.sha256, []

    def full(path):
        if "4.orbax" in str(path):
            calls.append(path)
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(manifest, "sha256", full)
    messages = []
    with contextlib.closing(CheckpointStore(tmp_path, say=messages.append)) as store:
        result = train(8, store=store, save_every=2)
        assert store.steps() == [6, 8]
    assert calls and result.saved == 8 and result.failures == tuple(messages)
    assert "checkpoint 4 could not be saved" in messages[0] and "the checkpoints 2 are intact" in messages[0]
    toy.assert_equal(result.state, whole.state)


def test_a_disk_that_is_full_at_the_end(tmp_path, monkeypatch):
    with contextlib.closing(CheckpointStore(tmp_path, say=lambda text: None)) as store:
        train(2, store=store)
        real = manifest.sha256

        def full(path):
            if ".orbax" in str(path):
                raise OSError(28, "No space left on device")
            return real(path)

        monkeypatch.setattr(manifest, "sha256", full)
        result = train(4, store=store, resume=True)
        assert result.step == 4 and result.saved == 2 and len(result.failures) == 1
        monkeypatch.undo()
        assert store.restore(TOY[0]).step == 2


def test_saved_is_what_is_on_disk_also_when_the_last_save_could_not_begin(tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)
    counted = []

    def usage(path):
        counted.append(path)
        return room if len(counted) == 1 else room._replace(free=0)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    messages = []
    with contextlib.closing(CheckpointStore(tmp_path, say=messages.append)) as store:
        result = train(8, store=store, save_every=2)
        assert store.steps() == [2] and result.saved == 2 and result.step == 8
    assert len(messages) == 3 and result.failures == tuple(messages)
    assert "checkpoint 8 could not be saved" in messages[-1] and "0 MB are free, the state has " in messages[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]


def test_bad_input(tmp_path):
    for name in ("steps", "log_every", "max_skipped", "save_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            train(**{"steps": 1, name: 0})
    with pytest.raises(ValueError, match="sample.every must be at least 1; got 0"):
        train(1, hooks=[Hook(0, lambda step, state: None, "sample")])
    with pytest.raises(ValueError, match="need store="):
        train(1, resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        train(1, resume=True, store=CheckpointStore(tmp_path))
    with pytest.raises(ValueError, match="batch of 10 examples .* 8 devices"):
        train(1, 8, batches=toy.Batches(size=10))


def test_the_number_of_steps_per_call_is_chosen_by_size():
    state, train_step = TOY
    made = []

    def spy(*args, **options):
        made.append(options["per_dispatch"])
        return devices.mesh(*args, **options)

    fit(state, train_step, toy.Batches(), steps=2, parallel=spy, devices=jax.devices()[:1], stream=io.StringIO())
    assert made[-1] == 16


def test_training_learns():
    state, train_step = toy.make(optax.adam(5e-2))
    file = io.StringIO()
    result = fit(state, train_step, toy.Batches(64), steps=300, devices=jax.devices()[:1], stream=file, log_every=50)
    losses = [float(line.split("loss ")[1].split()[0]) for line in file.getvalue().splitlines()]
    assert losses[-1] < 0.6 * losses[0]
    gap = lambda name: float(jnp.abs(result.state.ema[name]["w"] - result.state.params["w"]).max())
    assert 0 < gap("fast") < 0.2
