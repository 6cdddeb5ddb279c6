"""`diffjax ema`: averages from a run's snapshots, and their use."""

import shutil

import jax
import numpy as np
import pytest
from cli_tools import TINY

import diffjax
from diffjax.cli import main
from diffjax.cli import run as runs
from diffjax.training import load_safetensors, snapshots
from diffjax.training.partial import named

OPTIONS = ["--training.ema-power", "0.05", "0.1", "--training.snapshot-every", "3", "--no-scores"]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run of 30 steps with ten snapshots of two averages."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    assert main(["train", "gaussians", "--run", str(folder), *TINY, *OPTIONS]) == 0
    return folder


@pytest.fixture
def run(averaged, tmp_path):
    return shutil.copytree(averaged, tmp_path / "run")


def params(folder, weights):
    return jax.tree.map(np.asarray, diffjax.load(folder, weights=weights).denoiser.leaves)


def test_an_average_is_made_described_and_used(run, call):
    assert [s.step for s in snapshots.load(run / "ema")] == list(range(3, 31, 3))
    code, out, err = call("ema", run, "--sigma-rel", 0.1, 0.07, 0.28)
    assert code == 0 and "at step 30 from 10 snapshots of sigma_rel [0.05, 0.1]" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(" posthoc_")}
    assert list(rows) == ["posthoc_0.1", "posthoc_0.07", "posthoc_0.28"]
    assert float(rows["posthoc_0.1"][0]) < 1e-6 and 1e-6 < float(rows["posthoc_0.07"][0]) < 0.1
    assert abs(float(rows["posthoc_0.07"][1]) - 1) < 0.01 and "posthoc_0.28 is far from the average" in err
    assert f"use      diffjax sample {run} --weights posthoc_0.1" in out
    for u, v in zip(*(jax.tree.leaves(params(run, w)) for w in ("posthoc_0.1", "power_0.1")), strict=True):
        np.testing.assert_allclose(u, v, atol=1e-6)
    code, out, _ = call("sample", run, "--weights", "posthoc_0.07", "--n", 8, "--steps", 2, "--out", "drawn")
    assert code == 0 and "posthoc_0.07 of step 30" in out
    code, out, err = call("sample", run, "--weights", "posthoc_0.2")
    assert code == 2 and "posthoc_0.07, posthoc_0.1, posthoc_0.28; got 'posthoc_0.2'" in err and "diffjax ema" in err


def test_an_average_is_exported_and_begun_with(run, call):
    assert call("ema", run, "--sigma-rel", 0.07).code == 0
    code, out, _ = call("export", run, "--weights", "posthoc_0.07", "-o", "file.safetensors")
    assert code == 0 and "(posthoc_0.07 of step 30, " in out
    found = load_safetensors("file.safetensors")
    assert found.metadata["sigma_rel"] == "0.07" and found.metadata["weights"] == "posthoc_0.07"
    made = params(run, "posthoc_0.07")
    begun = runs.start_from(f"{run}:posthoc_0.07", made)
    for (name, a), b in zip(named(made), jax.tree.leaves(begun), strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, found.params[name])


def test_an_earlier_step_and_another_folder(run, call):
    assert call("ema", run, "--sigma-rel", 0.05, "--step", 12).code == 0
    assert diffjax.load(run, weights="posthoc_0.05_step_12").step == 12
    with pytest.raises(ValueError, match="is of step 12; got --checkpoint 30"):
        diffjax.load(run, weights="posthoc_0.05_step_12", step=30)
    code, out, _ = call("ema", run, "--sigma-rel", 0.05, "--out", "elsewhere")
    assert (
        code == 0
        and "use" not in out
        and load_safetensors("elsewhere/posthoc_0.05.safetensors").metadata["step"] == "30"
    )
    path = run / "ema" / "posthoc_0.05_step_12.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"has changed since it was written.*make it again"):
        diffjax.load(run, weights="posthoc_0.05_step_12")


@pytest.mark.slow
def test_a_sweep_names_the_best_by_its_scores(run, call):
    code, out, _ = call("ema", run, "--sigma-rel", 0.05, 0.15, "--scores")
    rows = [line.split() for line in out.splitlines() if line.startswith(" posthoc_")]
    best = min(rows, key=lambda r: float(r[5]))[0]
    assert code == 0 and len(rows) == 2 and f"best     {best} by frechet_pixels" in out


def test_a_damaged_snapshot_is_left_out(run, call):
    path = run / "ema" / "00000015.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = call("ema", run, "--sigma-rel", 0.07)
    assert code == 0 and "from 9 snapshots" in out and "left out a damaged snapshot" in err


@pytest.mark.parametrize(
    "words, match",
    [
        (["--sigma-rel", "0.3"], "sigma_rel must be in"),
        (["--sigma-rel", "0.1", "--step", "13"], "got 13, the nearest is 12"),
        (["--sigma-rel", "0.1", "--scores", "--out", "x"], "leave out --out"),
        ([], "--sigma-rel"),
    ],
)
def test_what_is_refused(averaged, call, words, match):
    code, _, err = call("ema", averaged, *words)
    assert code == 2 and match in err.replace("\n", " ") and not list((averaged / "ema").glob("posthoc*"))


def test_runs_without_averages_are_refused(trained, call, run):
    code, _, err = call("ema", trained[0], "--sigma-rel", 0.1)
    assert code == 2 and "train with --training.ema-power 0.05 0.1" in err
    for path in (run / "ema").iterdir():
        path.unlink()
    code, _, err = call("ema", run, "--sigma-rel", 0.1)
    assert code == 2 and "no undamaged snapshot" in err
    code, _, err = call("train", "gaussians", "--training.ema-power", 0.4)
    assert code == 2 and "--training.ema-power must be different numbers in (0, 0.2886]" in err
