"""What `diffjax train` does about profiles, memory, divergence and full disks."""

import errno
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_tools import TINY, losses, same_leaves

import diffjax
from diffjax.cli import _profile, build, check, config, train
from diffjax.cli import run as runs
from diffjax.training import CheckpointStore, record


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_profile_changes_no_number(trained, call):
    code, _, err = call("train", "gaussians", "--run", "r", "--profile", *TINY, "--no-scores", "--peak-flops", 1e12)
    assert code == 0 and "xprof --logdir r/profile" in err
    files = [os.path.join(a, f) for a, _, names in os.walk("r/profile") for f in names]
    assert {os.path.splitext(f)[1] for f in files} >= {".pb", ".gz"} and min(map(os.path.getsize, files)) > 100
    for weights in ("params", "ema_0.999"):
        same_leaves(trained[0], "r", weights)
    keep = lambda folder: [{k: v for k, v in row.items() if k not in record.MEASURED} for row in losses(folder)]
    assert keep("r") == keep(trained[0])
    assert all(row["host_bytes"] > 2**20 for row in losses("r")) and losses("r")[0]["compile_seconds"] > 0
    assert "profile" not in json.loads(pathlib.Path("r/config.json").read_text())


def test_profile_may_stand_without_a_number():
    assert _profile(["digits", "--profile"]) == ["digits", "--profile", "5"]
    assert _profile(["--profile", "--run", "r"]) == ["--profile", "5", "--run", "r"]
    assert _profile(["--profile", "7", "x"]) == ["--profile", "7", "x"] and _profile(["x"]) == ["x"]


def test_each_of_several_processes_traces_into_a_folder_of_its_own(monkeypatch):
    asked = config.Train(profile=3)
    assert str(train.profile(asked, pathlib.Path("r")).folder) == "r/profile"
    monkeypatch.setattr(train.jax, "process_count", lambda: 2)
    monkeypatch.setattr(train.jax, "process_index", lambda: 1)
    found = train.profile(asked, pathlib.Path("r"))
    assert (str(found.folder), found.steps) == ("r/profile/process-1", 3)
    assert train.profile(config.Train(), pathlib.Path("r")) is None


def test_options_of_the_operation(call):
    settings = config.Train(watchdog=0.0)
    assert train.watchdog(settings, runs.pathlib.Path("r")) is None
    found = train.watchdog(config.Train(watchdog=30.0, abort_on_hang=True), runs.pathlib.Path("r"))
    assert (found.seconds, found.abort, str(found.folder)) == (30.0, True, "r")
    assert train.watchdog(config.Train(), runs.pathlib.Path("r")).seconds is None
    changed = config.Train(watchdog=1.0, grace=3.0, abort_on_hang=True, profile=4, peak_flops=1.0)
    assert config.differences(config.Train(), changed) == {}  # a run may be continued with others
    for words in (["--grace", "0"], ["--watchdog", "-1"], ["--profile", "0"], ["--training.max-rewinds", "0"]):
        code, _, err = call("train", "gaussians", *words)
        assert code == 2 and f"{words[0]} must be" in err
    check.numbers(config.Train())


def test_a_run_that_is_too_large_says_what_to_do(call, monkeypatch):
    loss = build.loss

    def hungry(*args):
        made = loss(*args)

        def call(key, denoiser, x0, cond, items=None):
            each, aux = made(key, denoiser, x0, cond, items=items)
            row = jax.lax.iota(jnp.float32, 2**42)[None] * x0[:, :1]  # 2^46 numbers: no machine has them
            return each + jax.lax.stop_gradient(jnp.sort(row, 0).sum()) * 0, aux

        return call

    monkeypatch.setattr(build, "loss", hungry)
    code, _, err = call("train", "gaussians", "--run", "r", *TINY, "--no-scores")
    assert code == 1 and "RESOURCE_EXHAUSTED" in err and "Traceback" not in err
    assert "tried: batches of 16, 2 on each of 8 device(s)" in err and "state: nothing was saved" in err
    assert "--training.batch-size 8, --training.accumulate 2" in err and "--model.remat" in err and "bfloat16" in err


def test_rewinds_are_limited_and_told(call):
    np.savez("x.npz", x=np.random.default_rng(0).normal(size=(320, 2)).astype(np.float32))
    words = ["--training.learning-rate", "1e30", "--training.max-skipped", "3", "--training.warmup", "0"]
    words += ["--training.on-bad", "rewind", "--training.max-rewinds", "2", "--training.per-dispatch", "1"]
    code, _, err = call("train", "arrays:x.npz", "--model.network", "mlp", *TINY, *words, "--run", "r")
    assert code == 1 and "rewind 2 of 2" in err and "2 rewinds were made" in err and "Traceback" not in err
    assert [row["rewind"] for row in losses("r") if "rewind" in row] == [1, 2]


def test_a_full_disk_for_the_log_is_told_and_training_goes_on(trained, call, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(record.os, "write", full)
        code, out, err = call("train", "gaussians", "--run", "r", *TINY, "--no-scores")
    assert (
        code == 1 and err.count("cannot be written") == 1 and "6 lines of r/metrics.jsonl could not be written" in err
    )
    same_leaves(trained[0], "r", "params")


def test_a_full_disk_for_scores_and_pictures_does_not_lose_the_rest(call, monkeypatch):
    write = runs.write_whole

    def fail(path, *rest):
        return full() if path.name in ("metrics.json", "loss.png") else write(path, *rest)

    monkeypatch.setattr(runs, "write_whole", fail)
    code, out, err = call("train", "gaussians", "--run", "r", *TINY)
    assert code == 1 and "frechet" in out and "metrics.json could not be written" in err
    assert "loss.png could not be written" in err and diffjax.load("r").step == 30


def test_a_full_disk_at_the_start_leaves_no_folder(call, monkeypatch):
    write = runs.write_whole
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_whole", lambda path, f: full() if path.name == "config.json" else write(path, f))
        code, _, err = call("train", "gaussians", "--run", "r", *TINY, "--no-scores")
    assert code == 1 and "No space left" in err and not os.path.exists("r")


def test_a_cut_line_of_the_log_does_not_hide_the_plot(copied):
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    (copied / "loss.png").unlink()
    pytest.importorskip("matplotlib")
    from diffjax.cli import plot

    assert plot.loss(copied) == copied / "loss.png"


def test_reading_a_run_leaves_the_save_in_flight_alone(copied):
    flying = copied / "checkpoints" / "40.orbax-checkpoint-tmp"
    flying.mkdir()
    diffjax.load(copied)
    assert flying.exists() and CheckpointStore(copied / "checkpoints").steps()[-1] == 30
