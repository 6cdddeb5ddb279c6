"""`diffjax plan`: what it reads, prints and refuses. About 5 s."""

import json
import pathlib
import re

import pytest

from diffjax import data
from diffjax.cli import config

BIG = pathlib.Path(__file__).parents[2] / "experiments" / "scale" / "dit_1b.json"
ITEM = ["--shape", "32", "32", "4", "--classes", "1000"]


@pytest.fixture
def no_data(monkeypatch):
    """No data set may be read."""
    monkeypatch.setattr(data, "load", lambda *a, **k: pytest.fail("the data were read"))


def test_a_table_without_the_data(call, no_data):
    got = call(
        "plan", BIG, "--devices", 256, "--training.layout.fsdp", 8, "--kind", "TPU v5e", "--utilisation", 0.4, *ITEM
    )
    assert got.code == 0 and got.err == ""
    assert "dit with 1,540,684,816 parameters, batches of 2048" in got.out
    assert "256 devices: data 32 x fsdp 8 x model 1 x sequence 1" in got.out
    rows = [line.split() for line in got.out.splitlines()]
    assert ["parameters", "734.66", "MiB"] in rows and ["optimiser", "1.43", "GiB"] in rows
    assert ["all-reduce", "data", "gradients", "21", "734.66", "MiB"] in rows
    assert "with what is recomputed" in got.out and "fits in 14.90 GiB" in got.out
    assert "estimate, without communication: 0.164 s a step at 40% of TPU v5e's peak" in got.out


def test_json_and_options_of_train(call, no_data):
    options = ["--training.batch-size", 4096, "--training.parallel", "shard_map", "--model.depth", 2, "--memory", 16]
    options += ["--training.layout.fsdp", 4, "--training.layout.model", 2]
    got = call("plan", BIG, "--devices", 4096, "--json", *options, *ITEM)
    found = json.loads(got.out)
    assert found["layout"] == {"data": 512, "fsdp": 4, "model": 2, "sequence": 1}
    assert found["batch"] == 4096 and found["memory"] == 16 * 2**30 and found["fits"] is True
    sizes = found["bytes_per_device"]
    assert sizes.pop("total") == sum(sizes.values()) and sizes["gathered parameters"] > 3 * sizes["parameters"]
    assert {c["kind"] for c in found["collectives"]} == {"all-gather", "reduce-scatter", "all-reduce"}


def test_what_does_not_fit_comes_with_a_layout_that_does(call, no_data):
    got = call("plan", BIG, "--devices", 256, "--memory", 16, "--model.depth", 24, *ITEM)
    assert "does not fit in 16.00 GiB" in got.out and "fsdp=2 with data=128 would fit." in got.out


def test_a_run_folder_knows_its_shape(call, tmp_path, no_data):
    settings = config.preset("moons")
    (tmp_path / "config.json").write_text(config.to_json(settings))
    about = {"format": 1, "shape": [2], "num_classes": 8, "labels": None, "transform": {}}
    (tmp_path / "model.json").write_text(json.dumps(about))
    got = call("plan", tmp_path, "--devices", 2)
    assert got.code == 0 and "mlp with" in got.out and "batches of 256" in got.out
    assert "GFLOP" in got.out


def test_a_preset_reads_its_data_for_the_shape(call):
    got = call("plan", "digits", "--devices", 8, "--model.width", 8)
    assert got.code == 0 and "unet with" in got.out and "8 devices: data 8" in got.out


WRONG = {
    "nothing.json --devices 8": r"there is no file nothing.json",
    "nodata --devices 8": r"no data set is called 'nodata'.*give the shape of an item: --shape 32 32 3",
    "arrays:x.npz --devices 8": r"no such file: x.npz.*--shape",
    "moons --devices 8 --classes 3": r"--classes goes with --shape",
    "moons --devices 8 --shape 2 2 2 2 2": r"--shape must be one to four numbers",
    "moons --devices 8 --training.layout.fsdp 3 --shape 2": r"fsdp 3 x model 1 x sequence 1 = 3 must divide the 8 devices",
    "moons --devices 0 --shape 2": r"--devices must be at least 1; got 0",
    "moons --devices 7 --shape 2": r"--training.batch-size 256 is not divisible by the 7 devices",
    "moons --devices 8 --training.accumulate 64 --shape 2": r"does not divide into 8 devices x --training.accumulate 64",
    "moons --devices 8 --training.layout.sequence 2 --shape 2": r"sequence 2 needs --network dit",
    "moons --devices 8 --kind T800 --shape 2": r"--kind 'T800' is not known; there are TPU v2",
    "moons --devices 8 --utilisation 0.5 --shape 2": r"--utilisation needs the peak of a device; give --kind",
    "moons --devices 8 --utilisation 2 --kind H100 --shape 2": r"--utilisation must be in \(0, 1\]; got 2",
    "moons --devices 8 --training.layout.fsdp 2 --training.parallel pmap --shape 2": r"pmap keeps the whole state on every device",
    "moons --devices 8 --model.network dit --shape 2": r"network 'dit' does not fit items of shape \(2,\)",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_refused(call, line):
    got = call("plan", *line.split())
    assert got.code == 2 and re.search(WRONG[line], got.err), got.err


@pytest.mark.parametrize("line", ["moons --shape 2", "moons --devices 8 --training.nothing 3 --shape 2"])
def test_what_the_parser_refuses(call, line):
    assert call("plan", *line.split()).code == 2
