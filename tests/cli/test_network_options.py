"""`--network NAME` with `--model.options`: any network of the catalogue or of a published size, or a clear refusal."""

import dataclasses

import jax.numpy as jnp
import pytest

from diffjax import networks
from diffjax.cli import config, model, plan

PICTURE = (8, 8, 1)


def test_base_networks_take_their_options_and_ignore_those_of_others():
    old = config.Model("dit", width=16, multipliers=(1, 2), blocks=1, attention=(1,), depth=2, heads=2, patch=4)
    net = model.network(old, PICTURE, 10)
    want = networks.DiT(width=16, depth=2, heads=2, patch=4, num_classes=10, frequencies=model.FREQUENCIES)
    assert net == want.clone(dtype=jnp.dtype("float32"))
    unet = model.network(config.Model(width=8), PICTURE, None, vector=6)
    assert unet.widths == (8, 16) and unet.attention == (1,) and unet.vector_size == 6


@pytest.mark.parametrize("name", [n for n, card in networks.CATALOGUE.items() if "image" in card.flags])
def test_every_network_for_pictures_can_be_named(name):
    assert type(model.network(config.Model(name), (32, 32, 3), 10)) is networks.CATALOGUE[name].build


def test_a_published_size_with_other_fields():
    net = model.network(config.Model("dit-s", depth=2, options=("qk_norm=True", "expand=2")), (32, 32, 3), 10)
    assert (net.width, net.depth, net.heads, net.patch, net.qk_norm, net.expand) == (384, 2, 6, 2, True, 2)
    wide = model.network(config.Model("edm2-xs", options=("widths=[8, 16]", "attention=()")), PICTURE, 10)
    assert wide.widths == (8, 16) and wide.attention == ()


def test_options_of_another_network_of_the_preset_are_left():
    digits = config.preset("digits")
    given = dataclasses.replace(digits, model=dataclasses.replace(digits.model, network="dit"))
    assert config.settle(given, digits).model.width is None
    assert config.settle(digits, digits) == digits


def test_options_that_an_older_run_kept_are_left():
    """Runs of before kept the fields of all networks; one that is given again, and differs, is refused."""
    kept = config.Model("unet", width=8, depth=4, heads=4, patch=2)
    model.check_given(kept, kept)
    model.check_given(dataclasses.replace(kept, width=16), kept)
    with pytest.raises(ValueError, match=r"--model.depth; it reads"):
        model.check_given(dataclasses.replace(kept, depth=6), kept)


WRONG = {
    "digits --network unet --model.depth 6": r"'unet' does not read --model.depth; it reads --model.width, .*head_size",
    "digits --model.heads 2 --model.patch 4": r"does not read --model.heads, --model.patch; .*Leave them out",
    "moons --model.attention 1": r"'mlp' does not read --model.attention; it reads --model.width, --model.depth, and by",
    "digits --network dit --model.blocks 2": r"'dit' does not read --model.blocks; it reads --model.width, --model.depth, --m",
    "digits --network ditt": r"unknown network 'ditt'. Did you mean dit.*diffjax list networks",
    "digits --network dit-s --model.options depht=2": r"a field of 'dit-s'; got 'depht=2'. Did you mean depth",
    "digits --network dit --model.options depth": r"takes FIELD=VALUE",
    "digits --network dit --model.options depth=two": r"depth must be int; got 'two'",
    "digits --network dit --model.options dtype=1": r"a field of 'dit'; got 'dtype=1'",
    "digits --network edm2 --model.depth 3": r"network 'edm2' takes no --model.depth; .*--model.options",
    "digits --network edm2 --model.scan-layers": r"takes no --model.scan-layers",
    "moons --network dit-s": r"network 'dit-s' does not fit items of shape \(2,\); use --network mlp",
    "digits --network dit-s --model.patch 3": r"divisible by patch=3; got a state of shape \(1, 8, 8, 1\)",
    "digits --network dit-s --training.layout.sequence 8 --model.heads 6 --training.layout.model 4": r"must divide",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_refused_before_anything_is_written(call, line, tmp_path):
    got = call("train", *line.split(), "--training.steps", 2, "--run", tmp_path / "run")
    assert got.code == 2 and not (tmp_path / "run").exists(), got.err
    import re

    assert re.search(WRONG[line], got.err, re.DOTALL), got.err


def test_what_a_run_needs_is_said(call, tmp_path):
    small = "--network dit --model.width 8 --model.depth 1 --model.heads 2 --no-scores --training.steps 2".split()
    few = "--training.batch-size 8 --sampler.steps 2 --training.sample-every 2".split()
    got = call("train", "digits", *small, *few, "--run", tmp_path / "run")
    assert got.code == 0, got.err
    settings = config.from_json((tmp_path / "run" / "config.json").read_text())
    planned = plan.of(settings, PICTURE, 10, 8, None)
    assert f"{planned.parameters:,} parameters" in got.err + got.out
    assert f"{planned.flops / 8e6:,.2f} MFLOP an example" in (got.err + got.out).replace("\n", " ")
