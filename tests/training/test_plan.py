"""Plans against counts by hand, and against the states and programs that eight devices really hold. About 25 s."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
import toy
from collectives import collectives

from diffjax import networks, training
from diffjax.cli import build, config, model
from diffjax.cli import run as runs
from diffjax.training import devices, plan
from diffjax.training.layouts import Layout

BIG = pathlib.Path(__file__).parents[2] / "experiments" / "scale" / "dit_1b.json"
SHAPE, CLASSES = (32, 32, 4), 1000


def case(settings, shape, classes):
    """(train_step, shapes of the parameters, shapes of a batch, rules)"""
    t = settings.training
    net = model.network(settings.model, shape, classes)
    train_step = training.make_train_step(
        build.model(settings, shape, classes, training=True), build.loss(settings.objective, classes),
        build.optimiser(t)[0], emas=build.averages(t), accumulate=t.accumulate,
    )  # fmt: skip
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), *build.zeros(shape, classes, 0)))["params"]
    whole = {"x": jax.ShapeDtypeStruct((t.batch_size, *shape), np.float32)}
    whole |= {name: jax.ShapeDtypeStruct((t.batch_size,), np.int32) for name in ("label", "index")}
    return train_step, params, whole, networks.partition_rules(net)


def big(**training_options):
    settings = runs.read_config(BIG)
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, **training_options))


def sent(made, kind, what):
    """Bytes of the messages of a kind."""
    return {c.axes: c.bytes for c in made.collectives if c.kind == kind and c.what == what}


# ------------------------------------------------------------------------------------------- a DiT of 1.5B parameters

D, L, HEADS, T, P = 1536, 36, 24, 256, 2 * 2 * 4  # width, blocks, heads, tokens, numbers in a patch
BLOCK = 6 * D * D + 6 * D + 3 * D * D + 3 * D + D * D + D + 8 * D * D + 5 * D  # adaLN, q k v, out, MLP
OTHER = 2 * (D * D + D) + (CLASSES + 1) * D + (P * D + D) + (2 * D * D + 2 * D) + (D * P + P)
N = L * BLOCK + OTHER  # the code of time, labels, in, last adaLN, out


def matmuls(batch):
    """Operations of the products in the loss and the gradient of a batch."""
    n = batch * T
    forward = 2 * n * 12 * D * D * L + 4 * n * T * D * L + 2 * batch * (6 * D * D * L + 4 * D * D) + 4 * n * P * D
    return 3 * forward - 2 * n * P * D - 2 * batch * D * D  # no gradient of the noised data and of the sinusoids


@pytest.fixture(scope="module")
def on_256():
    train_step, params, whole, rules = case(big(batch_size=2048), SHAPE, CLASSES)
    return plan.plan(train_step, params, whole, Layout(data=32, fsdp=8, rules=rules), limit=80e9)


def test_parameters_and_state_of_the_large_model(on_256):
    assert on_256.parameters == N == 1_540_684_816
    memory = on_256.memory
    assert memory["parameters"] == memory["averages"] == memory["gradients"] == 4 * N // 8  # float32; all divide by 8
    assert 0 <= memory["optimiser"] - 2 * 4 * N // 8 <= 16  # two moments and counters
    assert memory["batch and counters"] == (8 * (32 * 32 * 4 + 2) * 4) + 5 * 4  # 8 items; step, key, two counters
    assert on_256.fits and on_256.total == sum(memory.values())


def test_operations_of_the_large_model(on_256):
    tokens = 2048 * T
    by_hand = matmuls(2048)
    assert by_hand < on_256.flops < 1.01 * by_hand  # and the elementwise ones
    # the rule of six operations for a parameter and a token, for the parameters that tokens meet
    six = 6 * (12 * D * D * L) * tokens
    assert six == pytest.approx(by_hand - 12 * tokens * T * D * L, rel=0.01)  # all but attention
    assert on_256.executed - on_256.flops == pytest.approx(matmuls(2048) / 3, rel=0.02)  # one more forward pass
    assert on_256.per_device == pytest.approx(on_256.executed / 256, rel=1e-9)
    assert on_256.seconds(197e12, 0.5) == on_256.flops / (256 * 197e12 * 0.5)


def test_activations_of_the_large_model(on_256):
    n = 2048 // 256 * T  # tokens on a device
    inputs = L * n * D * 2  # of every block, in bfloat16
    widest = 6 * n * 4 * D * 2 + n * HEADS * T * (4 + 2)  # in one block: the MLP's six arrays, weights of attention
    assert inputs + widest < on_256.memory["activations"] < inputs + 2 * widest


def test_messages_of_the_large_model(on_256):
    labels = (CLASSES + 1) * D  # looked up in float32, all else is cast to bfloat16 and gathered then
    assert sent(on_256, "all-gather", "parameters") == {("fsdp",): 2 * (2 * (N - labels) + 4 * labels)}
    assert sent(on_256, "reduce-scatter", "gradients") == {("fsdp",): 4 * N}
    assert sent(on_256, "all-reduce", "gradients") == {("data",): 4 * N // 8}
    assert sent(on_256, "all-reduce", "metrics") == {("data", "fsdp"): 4 * 4}  # loss, mse, t, log_snr
    assert len(on_256.collectives) == 4


def test_the_large_model_on_4096_devices():
    train_step, params, whole, rules = case(big(batch_size=8192), SHAPE, CLASSES)
    made = plan.plan(train_step, params, whole, Layout(data=128, fsdp=8, model=4, rules=rules), limit=16e9)
    n = 8192 // 1024 * T
    cut = L * 18 * D * D // 32  # every kernel of a block, 8 x 4 ways; all else is 1 % of the parameters
    assert made.memory["parameters"] == pytest.approx(4 * cut, rel=0.02)
    assert made.flops == pytest.approx(matmuls(8192), rel=0.01)
    assert made.per_device == pytest.approx(made.executed / 4096, rel=0.01)
    # Two sums of the residual stream in the forward pass of a block, two when it is recomputed, two in the backward pass.
    assert sent(made, "all-reduce", "activations")[("model",)] == pytest.approx(6 * L * n * D * 2, rel=0.01)
    assert made.fits


def test_a_cut_sequence_gathers_keys_and_values():
    train_step, params, whole, _ = case(big(batch_size=2048), SHAPE, CLASSES)
    made = plan.plan(train_step, params, whole, Layout(data=16, fsdp=8, sequence=2))
    full = 2048 // 128 * T * D * 2  # keys of all tokens, in bfloat16
    assert sent(made, "all-gather", "activations") == {("sequence",): 2 * L * full * 2}  # k and v, twice
    assert sent(made, "reduce-scatter", "activations") == {("sequence",): 2 * L * full}
    assert sent(made, "all-reduce", "gradients") == {("data", "sequence"): 4 * N // 8}


def test_a_state_that_does_not_fit_gets_a_layout_that_does():
    train_step, params, whole, _ = case(big(batch_size=2048), SHAPE, CLASSES)
    made = plan.plan(train_step, params, whole, Layout(data=256), limit=16e9)
    assert not made.fits and made.memory["parameters"] == 4 * N
    found = made.fitting
    assert found.size == 256 and plan.plan(train_step, params, whole, found, limit=16e9).fits
    less = dataclasses.replace(found, fsdp=found.fsdp // 2, data=found.data * 2)
    assert not plan.plan(train_step, params, whole, less, limit=16e9).fits
    text = plan.advice(made)
    assert f"fsdp={found.fsdp} with data={found.data} would fit" in text and "optimiser 11.48 GiB" in text
    tiny = dataclasses.replace(made, limit=2**28, fitting=None)
    assert re.search("Cut the state.*computes 8 examples at once: raise accumulate.*remat", plan.advice(tiny))


# ------------------------------------------------------------------------------------------------- what really happens


def small(accumulate=1, **model):
    settings = config.Train(
        model=config.Model("dit", **({"width": 64, "depth": 1, "heads": 4} | model)),
        training=config.Training(batch_size=64, accumulate=accumulate),
    )
    train_step, params, whole, rules = case(settings, (16, 16, 3), 10)
    zeros = lambda tree: jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), tree)
    state = training.init_state(zeros(params), train_step.optimizer, 0, emas=dict(train_step.emas))
    return train_step, params, whole, rules, state, zeros(whole)


def real(text):
    """Bytes of the results of a compiled program's messages, by kind."""
    return {kind: size for kind, (_, size) in collectives(text).items()}


def held(tree):
    """Bytes on the first device."""
    shards = [s for a in jax.tree.leaves(tree) for s in a.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == jax.devices()[0])


@pytest.mark.slow
def test_the_bytes_of_a_state_are_those_on_a_device():
    train_step, params, whole, rules, state, _ = small()
    for layout in (Layout(fsdp=8), Layout(data=2, fsdp=2, model=2, rules=rules)):
        placed = devices.mesh(train_step, layout=layout).place(state)
        memory = plan.plan(train_step, params, whole, layout).memory
        assert held(placed.params) == memory["parameters"]
        assert held(placed.ema) == memory["averages"] and held(placed.opt_state) == memory["optimiser"]


@pytest.mark.slow
def test_data_parallel_needs_what_its_program_needs():
    train_step, params, whole, _, state, batch = small()
    made = plan.plan(train_step, params, whole, Layout(data=8))
    driver = devices.mesh(train_step, layout=Layout(data=8))
    program = driver.lower(driver.place(state), batch).compile()
    assert real(program.as_text()) == {"all-reduce": sum(c.bytes for c in made.collectives)}
    assert made.per_device == pytest.approx(program.cost_analysis()["flops"], rel=0.05)
    need = made.memory["activations"] + made.memory["gradients"]
    assert need == pytest.approx(program.memory_analysis().temp_size_in_bytes, rel=0.5)


@pytest.mark.slow
def test_fsdp_sends_what_its_program_sends():
    train_step, params, whole, _, state, batch = small()
    made = plan.plan(train_step, params, whole, Layout(fsdp=8), parallel="shard_map")
    driver = devices.shard_map(train_step, layout=Layout(fsdp=8))
    found = real(driver.lower(driver.place(state), batch).compile().as_text())
    assert {("fsdp",): found["all-gather"]} == sent(made, "all-gather", "parameters")
    assert {("fsdp",): 8 * found["reduce-scatter"]} == sent(made, "reduce-scatter", "gradients")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, remat, rel", [({"fsdp": 8}, "none", 0.01), ({"data": 4, "sequence": 2}, "none", 0.001)]
)
def test_the_compiler_gathers_what_is_planned(sizes, remat, rel):
    """Parameters once without recomputation; keys and values of a cut sequence once."""
    train_step, params, whole, rules, state, batch = small(remat=remat)
    layout = Layout(rules=rules, **sizes)
    made = plan.plan(train_step, params, whole, layout)
    driver = devices.mesh(train_step, layout=layout)
    found = real(driver.lower(driver.place(state), batch).compile().as_text())
    assert found["all-gather"] == pytest.approx(
        sum(c.bytes for c in made.collectives if c.kind == "all-gather"), rel=rel
    )


@pytest.mark.slow
def test_a_cut_network_sends_about_what_its_program_sends():
    train_step, params, whole, rules, state, batch = small()
    layout = Layout(data=4, model=2, rules=rules)
    made = plan.plan(train_step, params, whole, layout)
    driver = devices.mesh(train_step, layout=layout)
    found = real(driver.lower(driver.place(state), batch).compile().as_text())
    expected = sum(c.bytes for c in made.collectives if c.kind == "all-reduce")
    assert found["all-reduce"] == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_recomputation_in_a_loop_keeps_what_the_program_keeps():
    train_step, params, whole, _, state, batch = small(depth=6, scan_layers=True, remat="full")
    made = plan.plan(train_step, params, whole, Layout(data=8))
    driver = devices.mesh(train_step, layout=Layout(data=8))
    program = driver.lower(driver.place(state), batch).compile()
    need = made.memory["activations"] + made.memory["gradients"]
    assert need == pytest.approx(program.memory_analysis().temp_size_in_bytes, rel=0.5)
    train_step, params, whole, *_ = small(depth=6, scan_layers=True)
    assert plan.plan(train_step, params, whole, Layout(data=8)).memory["activations"] > 3 * made.memory["activations"]


# ----------------------------------------------------------------------------------------------------- small and wrong


def toy_plan(layout, size=16, **options):
    train_step = training.make_train_step(toy.model, toy.loss, optax.adam(1e-2), **options)
    return plan.plan(train_step, toy.params(), toy.batch(0, size), layout)


def test_parts_of_a_batch_share_the_activations_and_reduce_each():
    one, two = toy_plan(Layout(data=4)), toy_plan(Layout(data=4), accumulate=2)
    assert two.memory["activations"] == one.memory["activations"] / 2
    assert two.memory["gradients"] == 2 * one.memory["gradients"]  # the sum, and that of a part
    assert sent(two, "all-reduce", "gradients")[("data",)] == 2 * sent(one, "all-reduce", "gradients")[("data",)]
    assert two.flops == pytest.approx(one.flops, rel=0.05)  # means over a part have a division each


@pytest.mark.parametrize("layout", [Layout(data=4), Layout(fsdp=3)])
def test_what_is_frozen_has_no_gradient(layout):
    whole, part = toy_plan(layout, 12), toy_plan(layout, 12, trainable="^b$")
    assert part.memory["parameters"] == whole.memory["parameters"]
    moments = part.memory["optimiser"] - 4  # beside Adam's count of steps
    assert part.memory["gradients"] == moments / 2 == 4 * toy.D / layout.fsdp
    total = lambda made: sum(c.bytes for c in made.collectives if c.what == "gradients")
    assert total(part) == 4 * toy.D and total(whole) == 4 * whole.parameters
    assert whole.flops - part.flops >= 2 * 12 * toy.D**2  # of the gradient of w


def test_one_device_sends_nothing():
    made = toy_plan(Layout())
    assert made.collectives == () and made.fits is None
    assert made.memory["parameters"] == 4 * made.parameters == 4 * (toy.D**2 + toy.D + 4 * toy.D)
    json.dumps([dataclasses.asdict(c) for c in made.collectives])


@pytest.mark.parametrize(
    "layout, match",
    [
        (Layout(data=3), "16 examples cannot be shared equally by data=3 x fsdp=1 .* multiple of 3 such as 15"),
        (Layout(model=2), "model=2, but no rule cuts a parameter"),
        (Layout(sequence=2), r"sequence=2, which must divide the first axis of an item.*\(3,\)"),
    ],
)
def test_layouts_that_do_not_fit(layout, match):
    with pytest.raises(ValueError, match=match):
        toy_plan(layout)


def test_other_wrong_arguments():
    train_step = training.make_train_step(toy.model, toy.loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match="data under 'x'"):
        plan.plan(train_step, toy.params(), {"y": np.ones(4)}, Layout())
    with pytest.raises(ValueError, match="parallel must be mesh or shard_map; got 'pmap'"):
        plan.plan(train_step, toy.params(), toy.batch(0), Layout(), parallel="pmap")
    with pytest.raises(ValueError, match=r"utilisation must be in \(0, 1\]"):
        toy_plan(Layout()).seconds(1e12, 0)
