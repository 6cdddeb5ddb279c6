"""What adapters are told in the condition: what nobody reads, or what does not fit, is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import BOXES, CASES, CLEAN, LARGE, MASK, OBJECTS, PART, PICTURE, TOKENS, made, network

from diffjax import adapters

wide = lambda a: np.concatenate([a, a[..., :1]], -1)


def called(name, own):
    """A case with another condition, as shapes alone."""
    fn, params, x, t, cond = made(name)
    cond = {**(cond or {}), "it": own}
    return jax.eval_shape(lambda: fn(params, x, t, cond))


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("lora", PICTURE, r"'it' \(LoRA\) reads no condition, but cond has 'it': float32 \[3, 4, 4, 2\].* none"),
        ("difference", {"image": PICTURE}, r"'it' \(Difference\) reads no condition.*image"),
        ("controlnet", wide(LARGE), r"controlnet was made for pictures of 2 channels.*\[3, 8, 8, 3\]"),
        ("control_next", wide(LARGE), r"control_next was made for pictures of 2 channels.*got \[3, 8, 8, 3\]"),
        ("skip_tuner", {"a": wide(LARGE)}, r"skip_tuner, a, was made for pictures of 2 channels"),
        ("control_norm", {"b": PICTURE}, r"control_norm, b, was made for pictures of 1 channels"),
        ("control_transformer", wide(LARGE), r"32 numbers beside each patch.*got float32 \[3, 8, 8, 3\]"),
        ("control_transformer", LARGE.astype(int), r"picture of floats.*got int64 \[3, 8, 8, 2\]"),
        ("diversion", {"image": PICTURE, "instruction": TOKENS[:, 0], "kind": 1}, r"\['image', 'instruction'\].*kind"),
        (
            "diversion",
            {"image": PICTURE, "instruction": wide(TOKENS[:, 0])},
            r"e = 4; got instruction float32 \[3, 5\]",
        ),
        ("diversion", {"image": PICTURE, "instruction": [1.0]}, "got instruction list"),
        ("diversion", {"image": LARGE, "instruction": TOKENS[:, 0]}, "8 numbers beside each patch"),
        ("parallel attention", {"tokens": TOKENS, "maks": MASK}, r"\['tokens'\], and may have \['mask'\].*maks"),
        ("parallel attention", wide(TOKENS), r"tokens \[3, S, 4\] of floats.*got float32 \[3, 2, 5\]"),
        ("parallel attention, scanned", wide(TOKENS), r"tokens \[3, S, 4\] of floats.*got float32 \[3, 2, 5\]"),
        ("parallel attention", {"tokens": TOKENS, "mask": MASK.tolist()}, r"mask of tokens must be bool.*list"),
        ("value mixing", TOKENS[:, :1], r"tokens \[3, 2, 4\] of floats.*got float32 \[3, 1, 4\]"),
        ("grounding", {**OBJECTS, "box": BOXES}, r"\['tokens', 'boxes'\], and may have \['mask'\].*'box'"),
        ("grounding", {**OBJECTS, "tokens": wide(TOKENS)}, r"tokens \[3, S, 4\]"),
        ("grounded control", {**OBJECTS, "boxes": BOXES.tolist()}, r"boxes must be floats \[3, 2, 4\]; got list"),
        ("easy control", CLEAN.astype(int), r"easy_control reads a picture .* of floats .*got int64"),
        (
            "jointnet",
            {"y": "edge", "t": 0.0},
            r"other part of a pair .*\[3, 4, 4, 1\].*'y': str",
        ),
        ("unicon", {**PART, "t": np.zeros(2, np.float32)}, r"one time or one for each item; got .*'t': float32 \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(name, own, message):
    with pytest.raises(ValueError, match=message):
        called(name, own)


def test_every_adapter_that_is_told_nothing_says_so():
    silent = {name for name, case in CASES.items() if not getattr(case.adapter, "told", True)}
    assert silent == {"lora", "lora, transformer", "lora, scanned", "difference"}
    assert not adapters.skip_tuner(2).told and adapters.skip_tuner(2, conditions=("edge",)).told


def test_a_name_given_to_the_wrong_adapter_says_which_one_reads():
    net, base, x, t, cond = network("unet")
    fn = adapters.adapt(net, style=adapters.lora(1), edge=adapters.controlnet((4,)))
    given = {**cond, "style": PICTURE}
    for call in (
        lambda: fn.init(jax.random.key(0), base, x, t, given),
        lambda: fn({"base": base, "adapters": {"style": {}, "edge": {}}}, x, t, given),
        lambda: fn.cache({"base": base, "adapters": {}}, x, t, given),
    ):
        with pytest.raises(ValueError, match=r"'style' \(LoRA\) reads no condition|none of the adapters"):
            call()
    with pytest.raises(ValueError, match=r"those that read one are \['edge'\]"):
        fn.init(jax.random.key(0), base, x, t, given)
    none = {**cond, "style": None, "edge": PICTURE}  # as if it were left out
    assert set(jax.eval_shape(lambda: fn.init(jax.random.key(0), base, x, t, none))["adapters"]) == {"style", "edge"}
    with pytest.raises(ValueError, match=r"cond\['egde'\] is not a kind of condition"):
        net(base, x, t, {**cond, "egde": jnp.asarray(PICTURE)})
