"""What bad input gets: one clear line, the right exit code, no traceback, nothing half-written, and early."""

import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from cli_tools import TINY

import diffjax
from diffjax import networks, training
from diffjax.cli import hooks, sample, train
from diffjax.cli import run as runs
from diffjax.training import store


def files():
    return sorted(str(p) for p in pathlib.Path().rglob("*"))


def refused(call, argv, match, code=2):
    """The command ends with `code` and one line that matches, and leaves no file."""
    before = files()
    got = call(*argv)
    (line,) = [text for text in got.err.splitlines() if text.startswith("diffjax: error: ")]
    assert got.code == code and re.search(match, line), line
    assert files() == before and "Traceback" not in got.err
    return got


@pytest.fixture
def nothing_expensive(monkeypatch):
    """Training, parameters and checkpoints may not be touched."""
    touched = lambda *a, **k: pytest.fail("expensive work before the input was checked")
    monkeypatch.setattr(training, "fit", touched)
    monkeypatch.setattr(networks, "initialise", touched)
    monkeypatch.setattr(store.CheckpointStore, "restore", touched)


BAD_TRAINING = {
    "moon": r"no data set is called 'moon'.*Did you mean moons",
    "tfds:no_such_set": r"no_such_set",
    "images:nowhere": r"nowhere",
    "arrays:nowhere.npz": r"no such file: nowhere.npz",
    "moons --sampler.solver ddimm": r"unknown solver 'ddimm'.*Did you mean ddim",
    "moons --sampler.grid karas": r"unknown grid 'karas'.*Did you mean karras",
    "moons --process.name vpp": r"unknown process 'vpp'.*Did you mean vp",
    "moons --objective.law lognormale": r"unknown law 'lognormale'.*Did you mean lognormal",
    "moons --objective.weighting minsnr": r"unknown weighting 'minsnr'.*Did you mean min_snr",
    "moons --objective.law uniform --objective.law-std 2": r"law 'uniform' takes no std",
    "moons --process.name rectified --process.beta-max 2": r"process 'rectified' takes no beta_max",
    "moons --model.network unet": r"network 'unet' does not fit items of shape \(2,\).*mlp",
    "digits --model.network mlp": r"network 'mlp' does not fit items of shape \(8, 8, 1\)",
    "digits --image-size 16": r"takes no image_size",
    "moons --training.batch-size 12": r"--training.batch-size 12 is not divisible by the 8 devices; use for example 16",
    "moons --training.batch-size 24 --training.accumulate 2": r"8 devices x --training.accumulate 2; use a multiple of 16",
    "moons --training.learning-rate nan": r"--training.learning-rate must be positive and finite; got nan",
    "moons --training.steps 0": r"--training.steps must be at least 1; got 0",
    "moons --training.ema 1.5": r"--training.ema must be different numbers in \[0, 1\)",
    "moons --training.per-dispatch 0": r"--training.per-dispatch must be at least 1",
    "moons --model.width 0": r"--model.width must be at least 1; got 0",
    "moons --process.sigma-min 5 --process.sigma-max 1": r"sigma-min must be below --process.sigma-max; got 5.0 and 1.0",
    "moons --seed -1": r"--seed must be in 0",
    "moons --sampler.seeds 0": r"--sampler.seeds must be at least 1",
    "moons --objective.label-drop 0 --sampler.guidance 2": r"--objective.label-drop is 0",
    "--config nowhere.json": r"there is no file nowhere.json",
    "--resume nowhere": r"there is no run folder nowhere",
}


@pytest.mark.parametrize("words", BAD_TRAINING)
def test_train_refuses(call, nothing_expensive, words):
    refused(call, ["train", *words.split()], BAD_TRAINING[words])


@pytest.mark.parametrize(
    "words, match",
    [
        ("trian moons", r"no command 'trian'. Did you mean train\?"),
        ("data", r"the data command is"),
        ("data prepare moonz", r"moonz"),
        ("data prepare images:", r"give what follows the colon"),
        ("list solver", r"unknown catalogue 'solver'.*Did you mean solvers"),
        ("cite ddimm", r"unknown method 'ddimm'"),
        ("sample nowhere", r"no run folder nowhere"),
        ("eval nowhere", r"no run folder nowhere"),
    ],
)
def test_commands_refuse(call, words, match):
    refused(call, words.split(), match)


BAD_SAMPLING = {
    "--label 8": r"--label must be in 0..7; got 8",
    "--label 3 -1": r"--label must be in 0..7; got -1",
    "--n 0": r"--n must be at least 1; got 0",
    "--chunk 0": r"--chunk must be at least 1; got 0",
    "--steps 0": r"--steps must be at least 1; got 0",
    "--seed -1": r"--seed must be in 0",
    "--solver ddimm": r"unknown solver 'ddimm'",
    "--grid karas": r"unknown grid 'karas'",
    "--guidance nan": r"--guidance must be finite; got nan",
    "--guidance 2 --interval 3 1": r"--interval must be two noise levels 0 <= low < high; got 3.0 1.0",
    "--interval 1 3": r"--interval .* needs a --guidance",
    "--clip 0": r"--clip must be positive",
    "--weights ema_9": r"weights must be one of ema_0.999, params; got 'ema_9'",
}


@pytest.mark.parametrize("words", BAD_SAMPLING)
def test_sample_refuses(call, trained, monkeypatch, words):
    monkeypatch.setattr(store.CheckpointStore, "restore", lambda *a, **k: pytest.fail("loaded before the check"))
    refused(call, ["sample", trained[0], *words.split()], BAD_SAMPLING[words])


@pytest.mark.parametrize(
    "words, match",
    [
        ("--n 1", r"--n must be in 2..1000, the size of the test split; got 1"),
        ("--n 5000", r"--n must be in 2..1000"),
        ("--seeds 0", r"--seeds must be at least 1"),
        ("--solver ddimm", r"unknown solver"),
        ("--checkpoint 7", r"no checkpoint of step 7 .* there are"),
    ],
)
def test_eval_refuses(call, trained, words, match):
    refused(call, ["eval", trained[0], *words.split()], match)


@pytest.mark.parametrize(
    "words", ["train --no-such-option 3", "train moons --training.steps many", "sample", "train --model.network gan"]
)
def test_the_parser_exits_with_2(call, words):
    code, out, err = call(*words.split())
    assert code == 2 and "Traceback" not in err and err + out and not files()


# ---------------------------------------------------------------------------------------------------------- run folders


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_folder_that_exists_is_not_overwritten(call, trained):
    refused(call, ["train", "moons", "--run", trained[0]], r"exists and is not empty; continue it with --resume")


def test_resume_refuses_another_configuration(call, trained, nothing_expensive):
    words = ["train", "moons", "--resume", trained[0], "--model.width", "32"]
    refused(call, words, r"data is 'gaussians' there, 'moons' here, model.width is 16 there, 32 here")
    refused(call, ["train", "--resume", trained[0], "--run", "x"], r"takes no --run")


def test_damaged_and_newer_folders(call, copied, nothing_expensive):
    about, settings = copied / "model.json", copied / "config.json"
    both = [["sample", copied], ["train", "--resume", copied], ["eval", copied]]
    originals = about.read_text(), settings.read_text()

    def each(match):
        for argv in both:
            refused(call, argv, match)
        about.write_text(originals[0]), settings.write_text(originals[1])

    settings.write_text(originals[1][:100])
    each(r"config.json: the configuration is damaged, it is not JSON")
    edit(settings, format=9)
    each(r"config.json: the configuration has format 9; this diffjax reads up to 1. Upgrade")
    edit(settings, format="new")
    each(r"config.json: the configuration is damaged: its format")
    edit(settings, seed="zero")
    each(r"config.json: seed must be int; the configuration has 'zero'")
    edit(settings, model=3)
    each(r"config.json: model must be Model; the configuration has 3")
    edit(settings, colour="red")
    each(r"config.json: the configuration has unknown fields \['colour'\]")
    about.write_text("{")
    each(r"model.json is damaged")
    edit(about, format=7)
    each(r"has run format 7; this diffjax reads up to 2. Upgrade")
    about.write_text('{"format": 1}')
    each(r"model.json is damaged: it lacks shape, num_classes, labels, transform")
    about.unlink()
    for argv in both:
        refused(call, argv, r"is no run folder: it lacks model.json")


def test_a_run_without_a_checkpoint(call, copied, nothing_expensive):
    for step in (copied / "checkpoints").iterdir():
        step.rename(copied / f"was_{step.name}")
    for argv in (["sample", copied], ["eval", copied], ["train", "--resume", copied]):
        refused(call, argv, r"has no checkpoint: training stopped before the first was written. .* --config")


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(call, copied, damage):
    for step in (30, 20):
        path = largest(copied / "checkpoints" / str(step) / "state")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-10]) if damage != "remove" else path.unlink()
        if step == 30:
            code, out, err = call("sample", copied, "--n", 64)
            assert code == 0 and "of step 20" in out
            assert re.search(r"checkpoint 30 in .* is damaged: .*\ncontinuing from checkpoint 20", err)
            refused(call, ["sample", copied, "--checkpoint", 30], r"checkpoint 30 .* is damaged: .*the other steps are")
    left = [p.name for p in (copied / "checkpoints").iterdir() if p.name.isdecimal() and int(p.name) < 20]
    for name in left:
        (copied / "checkpoints" / name).rename(copied / name)
    assert call("sample", copied).code == 2
    settings = (copied / "config.json").read_text()
    code, _, err = call("train", "--resume", copied, "--training.steps", 60)
    assert code == 2 and "no undamaged checkpoint is left" in err
    assert (copied / "config.json").read_text() == settings


# ------------------------------------------------------------------------------------------------------------- data


def test_pictures_that_cannot_be_read(call, nothing_expensive):
    os.mkdir("empty")
    refused(call, ["train", "images:empty", "--image-size", "8"], r"empty")
    os.mkdir("bad")
    pathlib.Path("bad/broken.png").write_bytes(b"no picture")
    refused(call, ["train", "images:bad", "--image-size", "8"], r"broken.png")


def test_arrays_that_cannot_be_used(call, nothing_expensive):
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    bad = x.copy()
    bad[5, 1] = np.nan
    np.savez("nan.npz", x=bad)
    np.savez("objects.npz", x=np.array([{}, []], object))
    np.savez("few.npz", x=x[:3])
    pathlib.Path("text.npz").write_text("text")
    mlp = ["--model.network", "mlp"]
    refused(call, ["train", "arrays:nan.npz", *mlp], r"NaN or an infinity, first at index 5")
    refused(call, ["train", "arrays:objects.npz", *mlp], r"pickle.*refused")
    refused(call, ["train", "arrays:text.npz", *mlp], r"text.npz cannot be read")
    refused(call, ["train", "arrays:few.npz", *mlp], r"too few")
    np.savez("plain.npz", x=x)
    refused(call, ["train", "arrays:plain.npz", *mlp, "--sampler.guidance", "2"], r"needs a model with labels")


def test_a_run_without_labels(call):
    np.savez("plain.npz", x=np.random.default_rng(0).normal(size=(640, 3)).astype(np.float32))
    few = ["--model.network", "mlp", *TINY, "--training.steps", "2", "--no-scores"]
    code, out, _ = call("train", "arrays:plain.npz", *few, "--run", "r")
    assert code == 0 and "grid" not in out  # three coordinates are not drawn
    refused(call, ["sample", "r", "--label", 1], r"--label 1 was given, but the run has no labels")
    refused(call, ["sample", "r", "--guidance", 2], r"needs a model with labels")
    assert call("sample", "r", "--n", 64, "--out", "s").code == 0 and len(os.listdir("s")) == 1
    np.savez("plain.npz", x=np.zeros((640, 4), np.float32) + np.arange(640.0, dtype=np.float32)[:, None])
    refused(call, ["eval", "r"], r"now has items of shape \(4,\) .* trained on \(3,\)")
    os.remove("plain.npz")
    assert call("sample", "r", "--n", 64).code == 0  # a run folder is self-contained


# ------------------------------------------------------------------------------------------------- disks and signals


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_for_pictures_and_checkpoints_keeps_the_last_good_state(call, monkeypatch):
    write = store.CheckpointStore._write_manifest
    monkeypatch.setattr(store.CheckpointStore, "_write_manifest", lambda s: full() if s._saving > 10 else write(s))
    monkeypatch.setattr(hooks, "save_grid", full)
    code, out, err = call("train", "gaussians", "--run", "r", *TINY, "--no-scores")
    assert "the samples of step 15 could not be written" in err  # and training goes on
    assert code == 1 and "the last checkpoint on disk is step 10" in err and "No space left" in err
    assert diffjax.load("r").step == 10


def test_a_full_disk_for_samples(call, trained, monkeypatch):
    monkeypatch.setattr(np, "savez", full)
    refused(call, ["sample", trained[0], "--n", 64, "--out", "."], r"No space left on device", code=1)


def test_training_that_diverges(call):
    x = np.random.default_rng(0).normal(size=(320, 2)).astype(np.float32)
    np.savez("x.npz", x=x)
    words = ["--training.learning-rate", "1e30", "--training.max-skipped", "3", "--training.warmup", "0"]
    code, _, err = call("train", "arrays:x.npz", "--model.network", "mlp", *TINY, *words, "--run", "r")
    assert code == 1 and "Lower the learning rate" in err and "Traceback" not in err


def test_memory_that_is_not_enough(call, trained, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nand much more")

    monkeypatch.setattr(sample.sampling, "sample_chunks", exhausted)
    refused(call, ["sample", trained[0]], r"out of memory; use a smaller .*--chunk", code=1)


def test_ctrl_c_while_sampling(call, trained, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.sampling, "sample_chunks", interrupted)
    code, out, err = call("sample", trained[0], "--out", "s")
    assert code == 130 and err.splitlines()[-1] == "interrupted" and not files()


def test_samples_that_are_not_finite(call, trained, monkeypatch):
    monkeypatch.setattr(sample.sampling, "sample_chunks", lambda *a, **k: np.full((4, 2), np.nan))
    refused(call, ["sample", trained[0], "--n", 4], r"4 of 4 samples are not finite", code=1)


def test_files_appear_whole_or_not_at_all():
    path = pathlib.Path("a.json")
    runs.write_text(path, "old")
    with pytest.raises(OSError):
        runs.write_whole(path, lambda file: (file.write(b"new"), full()))
    assert path.read_text() == "old" and files() == ["a.json"]


def test_an_error_of_ours_keeps_its_traceback(call, monkeypatch):
    monkeypatch.setattr(train, "main", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        call("train", "moons")
    monkeypatch.setattr(train, "main", full)
    monkeypatch.setenv("DIFFJAX_TRACEBACK", "1")
    with pytest.raises(OSError):
        call("train", "moons")


@pytest.mark.slow
def test_a_process_that_gets_sigterm_saves_and_exits_with_143():
    words = ["gaussians", "--run", "r", *TINY, "--training.steps", "1000000", "--training.sample-every", "1000000"]
    process = subprocess.Popen([sys.executable, "-m", "diffjax", "train", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("step ") for line in process.stderr)  # reads until training has begun
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143 and "continue with: diffjax train --resume r" in err and "Traceback" not in err
    assert diffjax.load("r").step >= 5
