"""LoRA with arrays missing is refused by name: parameters, files of ours and files of others."""

import jax
import numpy as np
import pytest
from adapter_cases import made, network

from diffjax import adapters, interop, training
from diffjax.training import CheckpointError
from diffjax.training.partial import named, nested
from experiments.interop.goldens import FOLDER

FLUX = FOLDER / "FluxTransformer2DModel-tiny"
QKV = "block_1/attention/qkv/kernel"


def without(own, *names):
    """An adapter's parameters without some arrays."""
    leaves = dict(named(own))
    for name in names:
        del leaves[name]
    return nested(leaves)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"{QKV}/down"], rf"pair .* got 1 paths with other arrays: {QKV} \(has up\)"),
        ([f"{QKV}/up"], rf"pair .*{QKV} \(has down\)"),
        ([f"{QKV}/up", f"{QKV}/down"], rf"lack the factors of \['{QKV}'\], 1 of 2 kernels that targets='attention/qkv"),
    ],
)
def test_parameters_and_files_of_ours(names, message, tmp_path):
    fn, params, x, t, cond = made("lora, transformer")
    own = without(params["adapters"]["it"], *names)
    with pytest.raises(ValueError, match=message):
        fn({**params, "adapters": {"it": own}}, x, t, cond)
    with pytest.raises(ValueError, match=message):
        fn.merge({**params, "adapters": {"it": own}})
    file = adapters.save_adapter(tmp_path / "it.safetensors", fn.adapters[0][1], own, params["base"])
    with pytest.raises(CheckpointError, match=f"it.safetensors .*own description: .*{message}"):
        adapters.load_adapter(file, params["base"])
    assert adapters.load_adapter(file)[0] == fn.adapters[0][1]  # beside nothing there is nothing to compare


def test_a_part_that_a_projection_lacks_is_no_fault():
    """Files of others may change q in one layer and v in another."""
    net, base, x, t, cond = network("dit")
    fn = adapters.adapt(net, a=adapters.lora(2, targets="attention/qkv/kernel$", parts=("q", "v")))
    params = jax.eval_shape(fn.init, jax.random.key(0), base, x, t, cond)
    params = jax.tree.map(lambda a: np.ones(a.shape, np.float32), params)
    own = without(params["adapters"]["a"], *(f"{QKV}/q/{which}" for which in ("down", "up")))
    merged = fn.merge({"base": base, "adapters": {"a": own}})
    change = np.asarray(merged["block_1"]["attention"]["qkv"]["kernel"]) - base["block_1"]["attention"]["qkv"]["kernel"]
    q, k, v = np.moveaxis(change.reshape(8, 2, 3, 4), 2, 0)  # heads, then q, k, v
    assert np.abs(v).min() > 0.1 and np.abs(np.stack([q, k])).max() < 1e-6


DOWN, UP = np.ones((2, 8), np.float32), np.ones((16, 2), np.float32)
KEY = "transformer.x_embedder.lora_{}.weight"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"A.first": DOWN, "B.second": UP},
            r"one of two factors alone, of x_embedder \(.*lora_A.first.weight\), x_embedder \(.*lora_B.second",
        ),
        (
            {"A": DOWN, "B": UP, "A.more": DOWN},
            "one of two factors alone, of x_embedder .*lora_A.more.weight.*incomplete",
        ),
        ({"A.a": DOWN, "B.a": UP, "A.b": DOWN, "B.b": UP}, r"1 layers with factors of several adapters, .*'a', 'b'"),
        ({"B": UP}, "one of two factors alone, of x_embedder .*lora_B.weight"),
    ],
)
def test_files_of_others(arrays, message, tmp_path):
    path = tmp_path / "a.safetensors"
    interop.write(path, {KEY.format(name): a for name, a in arrays.items()})
    model = interop.load_pretrained(FLUX)
    with pytest.raises(CheckpointError, match=message):
        interop.load_lora(path, model)
    if len(arrays) == 4:
        _, low = interop.load_lora(path, model, ignored=(r"lora_.\.b\.",))
        assert len(jax.tree.leaves(low)) == 2


def test_the_same_factor_twice_and_a_scale_alone(tmp_path):
    path, model = tmp_path / "a.safetensors", interop.load_pretrained(FLUX)
    good = {KEY.format("A"): DOWN, KEY.format("B"): UP}
    interop.write(path, {**good, "x_embedder.lora_A.weight": DOWN})
    with pytest.raises(CheckpointError, match="same factor under two names: transformer.x_emb.* and x_embedder.lora_A"):
        interop.load_lora(path, model)
    interop.write(path, {**good, "transformer.proj_out.alpha": np.ones((), np.float32)})
    with pytest.raises(CheckpointError, match="one of two factors alone, of proj_out .*proj_out.alpha"):
        interop.load_lora(path, model)
    interop.write(path, good)
    assert training.partial.outline(interop.load_lora(path, model)[1]) == {
        "in/kernel/down": "float32[8,2]", "in/kernel/up": "float32[2,16]",
    }  # fmt: skip
