"""What the commands do and write when the input is right."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from cli_tools import TINY, losses, png_size, same_leaves

import diffjax
from diffjax import references
from diffjax.cli import COMMANDS, config, hooks, plot
from diffjax.cli import run as runs


def test_a_run_folder_is_complete_and_readable(trained):
    folder, _ = trained
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.json", "loss.png", "metrics.json", "metrics.jsonl", "model.json", "samples",
    ]  # fmt: skip
    settings = config.from_json((folder / "config.json").read_text())
    assert (settings.data, settings.training.steps, settings.model.network) == ("gaussians", 30, "mlp")
    about = json.loads((folder / "model.json").read_text())
    assert about["num_classes"] == 8 and about["shape"] == [2] and about["format"] == 2
    assert [p.name for p in sorted((folder / "samples").iterdir())] == ["step_0000015.png", "step_0000030.png"]
    assert min(png_size(folder / "samples" / "step_0000030.png")) > 50
    assert png_size(folder / "loss.png") == (720, 420)
    assert [row["step"] for row in losses(folder)] == [5, 10, 15, 20, 25, 30]
    assert {int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()} >= {20, 30}


def test_training_ends_with_scores_and_the_last_grid(trained):
    folder, out = trained
    found = json.loads((folder / "metrics.json").read_text())
    lines = out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith(" frechet pixels")]
    entry = found["scores"]["frechet_pixels"]
    assert row[2:] == [f"{entry[k]:.4g}" for k in ("score", "std", "floor", "ratio")]
    assert any(f"grid     {folder / 'samples' / 'step_0000030.png'}" == line for line in lines)
    assert lines[-1].startswith(f"run      {folder}  (") and lines[-1].endswith(" s)")
    assert len(lines) < 15 and found["step"] == 30 and found["weights"] == "ema_0.999"


def test_samples_do_not_depend_on_the_chunk(trained, call):
    folder, _ = trained
    options = ("sample", folder, "--n", 20, "--label", 3, 5, "--guidance", 2, "--solver", "ancestral", "--steps", 4)
    found = []
    for chunk in (20, 7):
        code, out, _ = call(*options, "--seed", 3, "--chunk", chunk, "--out", f"chunk{chunk}")
        assert code == 0 and "ema_0.999 of step 30, ancestral on karras, 4 evaluations a sample, guidance 2" in out
        name = f"chunk{chunk}/ancestral-4-w2-seed3-n20-label3_5"
        assert min(png_size(f"{name}.png")) > 50
        with np.load(f"{name}.npz", allow_pickle=False) as file:
            found.append({k: file[k] for k in file.files})
    assert found[0]["x"].shape == (20, 2) and found[0]["label"].tolist() == [3, 5] * 10 and found[0]["format"] == 1
    np.testing.assert_allclose(found[0]["x"], found[1]["x"], rtol=1e-5, atol=1e-5)  # compiled for another size
    assert found[0]["x"].std() > 0.1


def test_options_of_sample_change_the_samples(trained, call):
    folder, _ = trained
    variants = {
        "plain": [], "seed": ["--seed", 1], "label": ["--label", 2], "guidance": ["--guidance", 3],
        "inside": ["--guidance", 3, "--interval", 0.1, 2], "weights": ["--weights", "params"], "clip": ["--clip", 0.2],
        "grid": ["--grid", "uniform"], "step": ["--checkpoint", 20], "again": ["--seed", 0],
    }  # fmt: skip
    x = {}
    for name, options in variants.items():
        assert call("sample", folder, "--n", 64, "--steps", 6, "--out", name, *options).code == 0
        (file,) = [p for p in os.listdir(name) if p.endswith(".npz")]
        with np.load(os.path.join(name, file)) as opened:
            x[name] = opened["x"]
    assert np.array_equal(x["plain"], x.pop("again"))
    names = list(x)
    for i, a in enumerate(names):
        assert all(not np.allclose(x[a], x[b], atol=1e-4) for b in names[:i]), a


def test_eval_prints_what_it_writes(trained, call, copied):
    code, out, _ = call("eval", copied, "--n", 40, "--seeds", 2, "--all")
    found = json.loads((copied / "metrics.json").read_text())
    assert code == 0 and found["n"] == 40 and found["seeds"] == 2 and found["sampler"]["steps"] == 3
    for name, entry in found["scores"].items():
        (row,) = [line.split() for line in out.splitlines() if line.split()[:1] == [name]]
        assert row[1] == f"{entry['score']:.4g}" and row[3] == f"{entry['floor']:.4g}"
    for name, value in found["other"].items():
        assert f"{name:28s} {value:.4g}" in out
    assert out.splitlines()[-1] == f"scores   {copied / 'metrics.json'}"


def test_load_gives_what_sampling_needs(trained):
    run = diffjax.load(trained[0])
    raw = diffjax.load(trained[0], weights="params", step=20)
    assert (run.weights, run.step, run.num_classes, run.shape, run.labels) == ("ema_0.999", 30, 8, (2,), None)
    assert (raw.weights, raw.step) == ("params", 20)
    assert not np.array_equal(*(jax.tree.leaves(r.denoiser.leaves)[0] for r in (run, raw)))
    assert float(run.process.sigma(1.0)) == pytest.approx(80.0) and run.denoiser.null == 8
    solver = diffjax.solvers.ddim(run.process, diffjax.times.karras(run.process, 3))
    x = run.process.prior(jax.random.key(0), (4, 2))
    one, many = (diffjax.sample(jax.random.key(1), run.denoiser.bind(c), solver, x) for c in (3, np.full(4, 3)))
    assert np.array_equal(one, many) and run.decode(one).shape == (4, 2)


def test_the_configuration_is_enough_to_train_the_same_again(trained, call):
    code, *_ = call("train", "--config", trained[0], "--run", "again", "--no-scores")
    assert code == 0
    for weights in ("params", "ema_0.999"):
        same_leaves(trained[0], "again", weights)
    assert not os.path.exists("again/metrics.json")  # scores were not asked for


def stop_at(monkeypatch, number, step):
    """Send this process a signal in the middle of training, while the samples of a step are drawn."""
    draw = hooks.save_grid

    def save_grid(path, *rest):
        if path.name == f"step_{step:07d}.png":
            os.kill(os.getpid(), number)
        return draw(path, *rest)

    monkeypatch.setattr(hooks, "save_grid", save_grid)


def test_ctrl_c_while_training_saves_and_exits_with_130(call, monkeypatch):
    stop_at(monkeypatch, signal.SIGINT, 15)
    code, _, err = call("train", "gaussians", "--run", "b", "--no-scores", *TINY)
    assert code == 130 and "stopping" not in err.splitlines()[-1] and diffjax.load("b").step == 15


def test_an_interrupted_run_continues_bit_for_bit(trained, call, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, 15)
        code, out, err = call("train", "gaussians", "--run", "b", "--no-scores", *TINY)
    assert code == 143 and "interrupted at step 15; continue with: diffjax train --resume b" in err
    before = pathlib.Path("b/config.json").read_text()
    code, out, _ = call("train", "--resume", "b")
    assert code == 0 and f"grid     {os.path.join('b', 'samples', 'step_0000030.png')}" in out
    for weights in ("params", "ema_0.999"):
        same_leaves(trained[0], "b", weights)
    columns = ("step", "loss", "grad_norm", "examples", "learning_rate")
    assert [[r[c] for c in columns] for r in losses("b")] == [[r[c] for c in columns] for r in losses(trained[0])]
    assert pathlib.Path("b/config.json").read_text() == before


def test_a_finished_run_can_be_extended(call, copied):
    code, _, err = call("train", "--resume", copied, "--training.steps", 40, "--no-scores")
    assert code == 0 and "steps go from 30 to 40" in err
    assert config.from_json((copied / "config.json").read_text()).training.steps == 40
    assert diffjax.load(copied).step == 40 and [r["step"] for r in losses(copied)] == list(range(5, 41, 5))
    code, _, err = call("train", "--resume", copied, "--training.steps", 35)
    assert code == 2 and "has reached step 40 already" in err


@pytest.mark.slow
def test_pictures(call):
    small = "--model.width=8 --model.multipliers=1 --model.attention --training.augment=affine --no-scores"
    few = "--training.steps=4 --training.batch-size=8 --training.sample-every=4 --sampler.steps=2"
    code, out, err = call("train", "digits", "--run", "d", *small.split(), *few.split())
    assert code == 0 and "samples/step_0000004.png" in out and err.startswith("d: unet with ")
    code, out, _ = call("sample", "d", "--n", 100, "--out", ".")
    with np.load("dpmpp_2m-2-w1-seed0-n100.npz") as opened:
        x = opened["x"]
    assert code == 0 and x.shape == (100, 8, 8, 1) and x.std() > 0.05 and 0 <= x.min() and x.max() <= 16


# ------------------------------------------------------------------------------------------------ catalogues and help


@pytest.mark.parametrize("name", [n for n in references.catalogues() if n != "times"])
def test_list_shows_every_catalogue(call, name):
    code, out, _ = call("list", name)
    rows = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert code == 0 and {key.split()[0] for key in references.catalogues()[name]} <= rows


def test_list_names_all(call):
    code, out, _ = call("list")
    assert code == 0 and "dpmpp_2m" in out and "karras" in out and "digits" in out and "lognormal" in out


def test_cite(call):
    code, out, _ = call("cite", "ddim", "heun")
    assert code == 0 and out.count("@misc") == 2 and "2206.00364" in out


@pytest.mark.parametrize("name", sorted({k for c in references.catalogues().values() for k in c}))
def test_every_method_can_be_cited(call, name):
    code, out, err = call("cite", name)
    assert code == 0 and ("@misc" in out or "has no paper" in err)


@pytest.mark.parametrize(
    "argv", [["--help"], ["data", "--help"], ["data", "prepare", "--help"], *([c, "-h"] for c in COMMANDS)]
)
def test_help(call, argv):
    code, out, err = call(*argv)
    assert code == 0 and "usage: diffjax" in out and not err
    if argv in (["--help"], ["train", "-h"]):
        assert "130 Ctrl-C" in out


def test_train_help_shows_the_defaults_of_the_data_set(call):
    assert "--training.steps INT" in call("train", "--help").out
    assert "default: 9500" in call("train", "digits", "--help").out
    assert "default: 9500" not in call("train", "moons", "--help").out


def test_version_and_module(call):
    assert call("--version").out.strip() == diffjax.__version__
    done = subprocess.run([sys.executable, "-m", "diffjax", "list", "solvers"], capture_output=True, text=True)
    assert done.returncode == 0 and "dpmpp_2m" in done.stdout and not done.stderr


def test_the_loss_is_drawn_where_matplotlib_is(copied, monkeypatch):
    (copied / "loss.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(plot.importlib.util, "find_spec", lambda _: None)
        assert plot.loss(copied) is None
    assert plot.loss(copied) == copied / "loss.png" and png_size(copied / "loss.png") == (720, 420)


def test_presets_do_not_leak_into_other_processes_and_laws():
    default = config.preset("digits")
    given = dataclasses.replace(
        default,
        process=dataclasses.replace(default.process, name="vp", beta_max=12.0),
        objective=dataclasses.replace(default.objective, law="uniform"),
    )
    settled = config.settle(given, default)
    assert settled.process == config.Path("vp", beta_max=12.0)
    assert (settled.objective.law_mean, settled.objective.law_std) == (None, None)
    assert config.settle(default, default) == default


def test_the_configuration_survives_its_text():
    for data in ("digits", "moons", "images:x"):
        assert config.from_json(config.to_json(config.preset(data))) == config.preset(data)


def test_values_of_earlier_versions_are_read():
    for old, new in ((True, "full"), (False, "none")):
        text = config.to_json(config.preset("moons")).replace('"remat": "none"', f'"remat": {str(old).lower()}')
        assert config.from_json(text).model.remat == new


def test_attention_of_another_order_of_columns_is_refused(tmp_path):
    (tmp_path / "model.json").write_text(
        json.dumps({"format": 1, "shape": [8, 8, 1], "num_classes": 10, "labels": None, "transform": {}})
    )
    (tmp_path / "config.json").write_text(config.to_json(config.preset("digits")))
    with pytest.raises(ValueError, match="q, k and v had another order.*train --config"):
        runs.read(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json(config.preset("moons")))  # an MLP without attention
    assert runs.read(tmp_path)[1]["format"] == 1
