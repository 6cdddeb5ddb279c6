"""Low-rank and plain differences: where they change the network, and that they can be taken back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import moved, network

from diffjax import adapters, networks, training
from diffjax.adapters.lora import stacked
from diffjax.networks.taps import tapped
from diffjax.training.partial import named, nested


def adapted(name, **given):
    """`(fn, params, base, x, t, cond)` with the adapters moved away from zero."""
    net, base, x, t, cond = network(name)
    fn = adapters.adapt(net, **given)
    return fn, moved(jax.jit(fn.init)(jax.random.key(0), base, x, t, cond)), base, x, t, cond


def test_scanned_layers_have_factors_of_their_own():
    fn, params, base, *_ = adapted("scanned", a=adapters.lora(2, targets="attention/"))
    low = params["adapters"]["a"]["blocks"]["attention"]["qkv"]["kernel"]
    assert low["down"].shape == (2, 8, 2) and low["up"].shape == (2, 2, 24)
    merged = networks.unstack_blocks(fn.merge(params))
    start = networks.unstack_blocks(base)
    for i in range(2):
        want = start[f"block_{i}"]["attention"]["qkv"]["kernel"] + low["down"][i] @ low["up"][i]
        np.testing.assert_allclose(merged[f"block_{i}"]["attention"]["qkv"]["kernel"], want, rtol=1e-5, atol=1e-6)
    assert np.linalg.matrix_rank(low["down"][0] @ low["up"][0] - low["down"][1] @ low["up"][1], tol=1e-4) == 4


@pytest.mark.parametrize("name", ["dit", "text"])
def test_a_part_of_a_projection_changes_its_tap_alone(name):
    path = {"dit": "block_1/attention", "text": "middle_0/cross"}[name]
    fn, params, base, x, t, cond = adapted(name, a=adapters.lora(2, targets=path, parts=("v",)))
    taps = [f"{path}/{kind}" for kind in "qkv"]
    _, before = jax.jit(tapped(fn.net, read=taps))(base, x, t, cond)
    _, after = jax.jit(tapped(fn, read=taps))(params, x, t, cond)
    for tap in taps[:2]:
        np.testing.assert_array_equal(after[tap], before[tap])
    assert np.abs(after[taps[2]] - before[taps[2]]).max() > 1e-2
    # by hand: the columns of head h are [q, k, v] (or [k, v]), D each
    name = "kv" if "cross" in path else "qkv"
    key = f"{path}/{name}/kernel"
    low = dict(named(params["adapters"]["a"]))
    down, up = low[f"{key}/v/down"], low[f"{key}/v/up"]
    change = dict(named(fn.merge(params)))[key] - dict(named(base))[key]
    heads, size = up.shape[1:]
    for h in range(heads):
        ends = np.arange(len(name) + 1) * size + h * len(name) * size
        np.testing.assert_allclose(change[:, ends[-2] : ends[-1]], down @ up[:, h], rtol=1e-4, atol=1e-5)
        assert not np.any(change[:, ends[0] : ends[-2]])


def test_all_parts_together_are_a_low_rank_change_of_the_whole():
    """Three pairs of rank r are one pair of rank 3 r, as files that hold them apart need."""
    fn, params, base, *_ = adapted("dit", a=adapters.lora(1, targets="block_0/attention/qkv", parts=("q", "k", "v")))
    low = params["adapters"]["a"]["block_0"]["attention"]["qkv"]["kernel"]
    heads, size = low["v"]["up"].shape[1:]
    ups = np.zeros((3, heads, 3, size), np.float32)
    for i, kind in enumerate("qkv"):
        ups[i, :, i] = low[kind]["up"][0]
    fused = np.concatenate([low[kind]["down"] for kind in "qkv"], axis=1) @ ups.reshape(3, -1)
    got = fn.merge(params)["block_0"]["attention"]["qkv"]["kernel"] - base["block_0"]["attention"]["qkv"]["kernel"]
    np.testing.assert_allclose(got, fused, rtol=1e-4, atol=1e-5)


def test_convolutions_and_tables_are_matrices():
    fn, params, base, *_ = adapted("unet", a=adapters.lora((("table", 1), ("conv_in/kernel", 3)), targets=""))
    assert {path.rpartition("/")[0] for path, _ in named(params["adapters"]["a"])} == {
        path for path, _ in named(base) if path.endswith(("table", "conv_in/kernel"))
    }
    old, new = dict(named(base)), dict(named(fn.merge(params)))
    path = "down_0_0/conv_in/kernel"
    assert np.linalg.matrix_rank((new[path] - old[path]).reshape(-1, 8), tol=1e-4) == 3
    table = new["code/label/table"] - old["code/label/table"]
    assert table.shape == (4, 64) and np.linalg.matrix_rank(table, tol=1e-4) == 1
    for other in set(old) - {p for p in old if p.endswith(("table", "conv_in/kernel"))}:
        np.testing.assert_array_equal(new[other], old[other])


def test_unmerging_is_the_inverse_of_merging():
    many = dict(a=adapters.lora(2), b=adapters.difference("film/"), c=adapters.lora(1, targets="attention"))
    fn, params, base, *_ = adapted("dit", **many)
    params["weights"] = {"a": jnp.float32(0.7), "c": jnp.float32(-1.5)}
    back = fn.unmerge({**params, "base": fn.merge(params)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), back, base)
    assert np.abs(fn.merge(params)["film"]["kernel"] - base["film"]["kernel"]).max() > 0.1


def test_experts_have_factors_of_their_own():
    assert [stacked(f"{path}/kernel") for path in ("blocks/experts/up", "block_1/experts/gate", "experts/router")] == [
        2, 1, 0,
    ]  # fmt: skip
    net = networks.from_linen(networks.DiT(width=8, depth=1, heads=2, feed_forward=networks.sparse(3, 1)))
    x, t = np.zeros((1, 4, 4, 1), np.float32), np.zeros(1, np.float32)
    base = jax.eval_shape(net.module.init, jax.random.key(0), x, t)["params"]
    fn = adapters.adapt(net, a=adapters.lora(2, targets="experts/up"))
    made = jax.eval_shape(lambda base: fn.init(jax.random.key(0), base, x, t), base)["adapters"]["a"]
    assert made["block_0"]["experts"]["up"]["kernel"]["down"].shape == (3, 8, 2)


def test_a_gradient_needs_less_memory_than_that_of_all_parameters():
    """The change is made once for a call: no array has an axis of tokens beside one of the rank."""
    net = networks.from_linen(networks.DiT(width=64, depth=2, heads=2, scan_layers=True))
    x, t = np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.float32)
    base = networks.random_parameters(net.module, x, t)
    fn = adapters.adapt(net, a=adapters.lora(2))
    params = jax.eval_shape(fn.init, jax.random.key(0), base, x, t)

    def peak(trainable):
        trained, rest = training.split(params, trainable)
        loss = lambda p, rest: jnp.square(fn(training.join(p, rest), x, t)).mean()
        memory = jax.jit(jax.grad(loss)).lower(trained, rest).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert peak("^adapters/") < 1.05 * peak("^base/")


def test_a_difference_holds_what_was_trained_in_place():
    net, base, x, t, cond = network("dit")
    rng = np.random.default_rng(0)
    tuned = nested(
        {p: a + rng.normal(size=a.shape).astype(a.dtype) if p.startswith("out/") else a for p, a in named(base)}
    )
    found = adapters.difference("^out/")
    fn = adapters.adapt(net, a=found)
    params = {"base": base, "adapters": {"a": found.between(base, tuned)}}
    assert training.state.count_params(params["adapters"]) == training.state.count_params(base["out"])
    np.testing.assert_allclose(jax.jit(fn)(params, x, t, cond), jax.jit(net)(tuned, x, t, cond), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="also differ in .*out/bias"):
        adapters.difference("^in/").between(base, tuned)
    with pytest.raises(ValueError, match="one network"):
        found.between(base, {})


def test_bad_input():
    net, base, x, t, cond = network("dit")
    start = lambda adapter: adapters.adapt(net, a=adapter).init(jax.random.key(0), base, x, t, cond)
    with pytest.raises(ValueError, match='some of "q", "k", "v"'):
        adapters.lora(2, parts=("value",))
    with pytest.raises(ValueError, match="rank >= 1"):
        adapters.lora((("attention", 0),))
    with pytest.raises(ValueError, match="names no array"):
        start(adapters.difference("nothing"))
    with pytest.raises(ValueError, match="two axes and a rank"):
        start(adapters.lora((("nothing", 2),)))
    with pytest.raises(ValueError, match="two axes and a rank"):
        start(adapters.lora(2, targets="bias"))
    plain = networks.from_linen(networks.DiT(width=8, depth=1, heads=2, token_size=5))
    tokens = {"tokens": np.ones((3, 2, 5), np.float32)}
    params = networks.random_parameters(plain.module, x, t, tokens)
    fn = adapters.adapt(plain, a=adapters.lora(2, targets="cross/q_in", parts=("v",)))
    with pytest.raises(ValueError, match="has one of the parts"):
        fn.init(jax.random.key(0), params, x, t, tokens)
    fn = adapters.adapt(net, a=adapters.lora(2, targets="out/kernel$"))
    other, wide = ({"down": np.ones((n, 2), np.float32), "up": np.ones((2, n), np.float32)} for n in (4, 16))
    with pytest.raises(ValueError, match="no parameters for .*elsewhere"):
        fn.merge({"base": base, "adapters": {"a": {"elsewhere": {"out": {"kernel": other}}}}})
    with pytest.raises(ValueError, match=r"out/kernel are \[16, 16\] for an array"):
        fn.merge({"base": base, "adapters": {"a": {"out": {"kernel": wide}}}})
    fn = adapters.adapt(net, a=adapters.difference("out/bias"))
    with pytest.raises(ValueError, match=r"what is added \[3\]"):
        fn.merge({"base": base, "adapters": {"a": {"out": {"bias": np.ones(3, np.float32)}}}})
