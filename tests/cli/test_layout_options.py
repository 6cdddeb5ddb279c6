"""Layouts from the command line: the same numbers, a change when a run is continued, and clear refusals."""

import json
import pathlib
import re

import numpy as np
import pytest
from cli_tools import TINY, losses

import diffjax
from diffjax.training import placement


@pytest.mark.slow
def test_a_run_may_cut_its_state_and_go_on_with_another_layout(trained, call):
    code, _, err = call(
        "train", "gaussians", "--run", "cut", "--no-scores", *TINY, "--training.layout.fsdp", "4", "--training.offload"
    )
    assert code == 0, err
    found, wanted = ([r["loss"] for r in losses(folder)] for folder in ("cut", trained[0]))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    code, _, err = call(
        *["train", "--resume", "cut", "--no-scores", "--training.steps", "35"],
        *[
            "--training.layout.fsdp",
            "2",
            "--training.layout.model",
            "2",
            "--training.parallel",
            "shard_map",
            "--training.no-offload",
        ],
    )
    assert code == 0, err
    stored = json.loads(pathlib.Path("cut/config.json").read_text())["training"]
    assert stored["layout"] == {"fsdp": 2, "model": 2, "sequence": 1} and stored["parallel"] == "shard_map"
    assert diffjax.load("cut").step == 35


BAD = {
    "moons --training.layout.fsdp 3": r"fsdp 3 x model 1 x sequence 1 = 3 must divide the 8 devices",
    "moons --training.layout.fsdp 0": r"--training.layout.fsdp must be at least 1; got 0",
    "moons --training.layout.fsdp 2 --training.parallel pmap": r"pmap keeps the whole state .* use mesh or shard_map",
    "moons --training.offload --training.parallel pmap": r"offload is done by --training.parallel mesh; got pmap",
    "moons --training.layout.sequence 2": r"sequence 2 needs --network dit, whose tokens can be cut; got mlp",
    "digits --model.network dit --model.heads 2 --training.layout.model 4": r"must divide the 2 heads of dit",
    "digits --model.network dit --model.patch 4 --training.layout.sequence 8": r"4 tokens cannot be cut into 8 parts",
    "digits --model.options heads=None --training.layout.model 8": r"heads cannot be cut into 8 parts",
    "digits --training.layout.model 8": r"heads cannot be cut into 8 parts",
    "moons --model.width 18 --training.layout.model 8": r"cannot be cut into 8 parts",
}


@pytest.mark.parametrize("words", BAD)
def test_layouts_that_do_not_fit_are_refused_before_anything_is_written(call, words):
    code, _, err = call("train", *words.split())
    (line,) = [text for text in err.splitlines() if text.startswith("diffjax: error: ")]
    assert code == 2 and re.search(BAD[words], line), line
    assert not list(pathlib.Path().iterdir())


def test_a_backend_without_memory_of_the_host_is_refused_before_anything_is_written(call, monkeypatch):
    monkeypatch.setattr(placement, "HOST", "nowhere")
    code, _, err = call("train", "moons", "--training.offload")
    assert code == 2 and "offload needs memory of the kind nowhere" in err
    assert not list(pathlib.Path().iterdir())
