"""Regular expressions of paths, wherever they are given: a wrong one is named with its argument."""

import re

import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from diffjax import adapters, interop, training
from diffjax.interop.lora import METADATA, scale_reader
from diffjax.training import partial
from diffjax.training.optimizer import by_path
from diffjax.training.patterns import checked, pattern

BAD = "attention/(qkv"
PARAMS = {"w": np.zeros(2, np.float32)}


def loss(key, denoiser, x0, cond, items=None): ...


CALLS = {
    "trainable": [
        lambda: training.split(PARAMS, BAD),
        lambda: training.make_train_step(lambda p: p, loss, optax.sgd(0.1), trainable=BAD),
        lambda: training.init_state(PARAMS, optax.sgd(0.1), 0, trainable=BAD),
    ],
    "targets": [
        lambda: adapters.lora(targets=BAD),
        lambda: adapters.difference(BAD),
        lambda: adapters.concatenation(targets=BAD),
        lambda: adapters.jointnet(BAD),
        lambda: adapters.unicon(targets=BAD),
        lambda: adapters.parallel_attention(targets=BAD),
        lambda: adapters.value_mixing(targets=BAD),
        lambda: adapters.grounding(targets=BAD),
        lambda: adapters.easy_control(targets=BAD),
    ],
    "rank": [lambda: adapters.lora(((BAD, 2),))],
    "branch": [lambda: adapters.unicon(branch=BAD)],
    "rules": [
        lambda: training.Layout(rules=((BAD, PartitionSpec()),)),
        lambda: by_path({BAD: optax.sgd(1.0)}, optax.sgd(0.1)),
    ],
    "renames": [
        lambda: partial.match({"w": "float32[2]"}, PARAMS, renames={BAD: ""}),
        lambda: interop.compare([], {"w": (2,)}, {}, renames=((BAD, ""),)),
    ],
    "ignored": [lambda: interop.compare([], {"w": (2,)}, {}, ignored=(BAD,))],
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_regular_expression_is_named(name):
    for call in CALLS[name]:
        with pytest.raises(
            ValueError, match=rf"^{name} must be a regular expression .*got '{re.escape(BAD)}': missing \)"
        ):
            call()


def test_other_faults():
    with pytest.raises(ValueError, match=r"renames has 'w' with the replacement '\\\\2': invalid group reference"):
        partial.match({"w": "float32[2]"}, PARAMS, renames={"w": r"\2"})
    with pytest.raises(ValueError, match="targets must be a regular expression, a string; got None"):
        checked("targets", None)
    with pytest.raises(training.CheckpointError, match="alpha_pattern must be a regular expression"):
        scale_reader({METADATA: '{"alpha_pattern": {"to_(q": 2}}'}, "unet")
    assert pattern("a+", "targets") is pattern("a+", "targets")


def test_good_ones_are_found_as_before():
    found = partial.match({"m.w": "float32[2]"}, PARAMS, renames={r"^m\.": "", "^(.)$": r"\1"}).found
    assert found == {"w": "m.w"}
    assert training.split({"a": 1.0, "b": 2.0}, "^a$") == ({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
