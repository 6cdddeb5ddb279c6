"""Adapters from the command line: trained beside a frozen run, exported, and put beside it again."""

import json

import jax
import numpy as np
import pytest
from cli_tools import TINY

import diffjax
from diffjax.adapters import load_adapter
from diffjax.cli import config


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory):
    """The folder of a run with a LoRA beside the trained run."""
    from diffjax.cli import main

    folder = tmp_path_factory.mktemp("adapted") / "run"
    base, _ = trained
    assert main(["train", "gaussians", "--run", str(folder), "--init", str(base), "--adapter", "lora", "--adapter-rank", "2",
                 *TINY, "--training.learning-rate", "0.05", "--no-scores"]) == 0  # fmt: skip
    return folder


def test_only_the_adapter_moves_and_is_averaged(trained, adapted):
    base = diffjax.load(trained[0]).denoiser.leaves
    for weights in ("params", "ema_0.999"):
        found = diffjax.load(adapted, weights=weights)
        assert found.step == 30
        jax.tree.map(np.testing.assert_array_equal, found.denoiser.leaves["base"], base)
        ups = [
            a for path, a in jax.tree_util.tree_leaves_with_path(found.denoiser.leaves["adapters"]) if "up" in str(path)
        ]
        assert ups and all(np.abs(a).max() > 0 for a in ups)
    page = json.loads(next((adapted / "checkpoints").glob("30/page/metadata")).read_text())
    kept = [name for name in page["leaves"] if name.startswith(("ema/", "opt_state/")) and "base/" in name]
    assert kept == []  # the frozen network is there once


def test_an_exported_adapter_beside_the_run_is_the_run_with_the_adapter(trained, adapted, call, tmp_path):
    base, _ = trained
    got = call("export", adapted, "-o", "out/style.safetensors")
    assert got.code == 0 and got.out.startswith("adapter  out/style.safetensors  (lora, ema_0.999 of step 30, ")
    adapter, _, about = load_adapter("out/style.safetensors", diffjax.load(base).denoiser.leaves)
    assert adapter.rank == 2 and config.from_json(about["config"]).adapter.kind == "lora"

    def drawn(*options):
        got = call("sample", *options, "--n", 16, "--out", "out")
        assert got.code == 0, got.err
        return np.load(got.out.split()[1])["x"]

    plain, own = drawn(base), drawn(adapted)
    beside = drawn(base, "--adapter", "out/style.safetensors")
    np.testing.assert_allclose(beside, own, rtol=1e-5, atol=1e-5)
    assert np.abs(own - plain).max() > 1e-3
    np.testing.assert_array_equal(drawn(base, "--adapter", "out/style.safetensors:0"), plain)
    twice = drawn(base, "--adapter", "out/style.safetensors:0.5", "out/style.safetensors:0.5")
    np.testing.assert_allclose(twice, own, rtol=1e-4, atol=1e-4)


def test_an_adapter_continues(trained, adapted, call, tmp_path):
    import shutil

    shutil.copytree(adapted, tmp_path / "more")
    got = call("train", "--resume", tmp_path / "more", "--training.steps", 40, "--no-scores")
    assert got.code == 0, got.err
    assert diffjax.load(tmp_path / "more").step == 40


def test_bad_input(trained, adapted, call, tmp_path):
    base, _ = trained
    for argv, text in (
        (("train", "gaussians", "--adapter", "lora", *TINY), "add --init RUN"),
        (("train", "gaussians", "--adapter-rank", 2, *TINY), "add --adapter lora"),
        (("train", "gaussians", "--init", base, "--adapter", "lora", "--adapter-targets", "(", *TINY), "regular expr"),
        (
            ("train", "gaussians", "--init", base, "--adapter", "lora", "--adapter-rank", 0, *TINY),
            "--adapter.rank must be",
        ),
        (
            ("train", "gaussians", "--init", base, "--adapter", "lora", "--training.ema-power", 0.1, *TINY),
            "does not go with",
        ),
        (
            ("train", "gaussians", "--init", base, "--adapter", "lora", "--adapter-targets", "nothing", *TINY),
            "names no",
        ),
        (("sample", base, "--adapter", "none.safetensors"), "there is no file none.safetensors"),
        (("sample", base, "--adapter", "none.safetensors:much"), "finite number"),
    ):
        got = call(*argv)
        assert got.code == 2 and text in got.err, got.err
    call("export", adapted, "-o", tmp_path / "style.safetensors")
    got = call("sample", adapted, "--adapter", tmp_path / "style.safetensors")
    assert got.code == 2 and "has an adapter of its own" in got.err
    got = call("export", adapted, "--dtype", "bfloat16")
    assert got.code == 2 and "leave out --dtype" in got.err
    call("export", base, "-o", tmp_path / "whole.safetensors")
    got = call("sample", base, "--adapter", tmp_path / "whole.safetensors")
    assert got.code != 0 and "no adapter" in got.err
