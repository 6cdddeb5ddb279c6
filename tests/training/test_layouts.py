"""Layouts of a state and of networks, the birth of a state in its layout, and equal numbers along every axis of the mesh."""

import functools
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from collectives import AVERAGE, dit_parts, dit_step
from jax.sharding import PartitionSpec as P

from diffjax import networks
from diffjax.networks import layers
from diffjax.training import CheckpointStore, Layout, devices, fit, init_sharded, init_state, layouts, optimizer, state


def shapes(net, x, **cond):
    """The shapes of a network's parameters."""
    cond = {name: np.zeros(shape, np.float32) for name, shape in cond.items()} or None
    args = (np.zeros(x, np.float32), np.zeros(1, np.float32), cond)
    return jax.eval_shape(lambda: net.init(jax.random.key(0), *args))["params"]


def specs(net, x, layout, **cond):
    """`path -> spec` of a network's parameters."""
    named = jax.tree_util.tree_flatten_with_path(shapes(net, x, **cond))[0]
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    return {path(p): layout.spec(path(p), a.shape) for p, a in named}


NETWORKS = {
    "dit": (networks.DiT(width=16, depth=2, heads=2, token_size=4), (1, 4, 4, 1), {"tokens": (1, 3, 4)}),
    "scanned": (networks.DiT(width=16, depth=2, heads=2, scan_layers=True), (1, 4, 4, 1), {}),
    "mlp": (networks.MLP(width=16, depth=2), (1, 2), {}),
    "unet": (networks.UNet(widths=(16, 32), head_size=8), (1, 4, 4, 1), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_cut_in_pairs_column_then_row(name):
    net, x, cond = NETWORKS[name]
    found = specs(net, x, Layout(model=2, rules=networks.partition_rules(net)), **cond)
    first = "conv_in" if name == "unet" else "hidden"
    second = "conv_out" if name == "unet" else "out"
    columns = {p for p in found if p.endswith(f"/{first}/kernel")}
    assert len(columns) == {"dit": 3, "scanned": 2, "mlp": 3, "unet": 8}[name]
    for path in columns:
        row = path.replace(f"{first}/kernel", f"{second}/kernel")
        assert found[path][-1] == "model" and found[row][-1] == "model", (path, found[path], found[row])
        rank = {"conv_in": 4}.get(first, 3 if path.startswith("blocks/") else 2)
        assert len(found[path]) == rank and len(found[row]) == rank - 1
        assert found[row.replace("kernel", "bias")] == P(), row  # added once, after the sum over devices
    for path, spec in found.items():
        if path.endswith(("qkv/kernel", "kv/kernel", "q_in/kernel", "film/kernel")):
            assert spec[-1] == "model" and len(spec) == (3 if path.startswith("blocks/") else 2)
    assert found["in/kernel"] == P() and found["out/kernel"] == P()


def test_rules_of_ones_own_come_first_and_unknown_networks_have_none():
    net, x, _ = NETWORKS["mlp"]
    rules = ((r"hidden/kernel$", P(None, None)), *networks.partition_rules(net))
    found = specs(net, x, Layout(model=2, rules=rules))
    assert found["block_0/hidden/kernel"] == P() and found["block_0/hidden/bias"] == P("model")
    assert networks.partition_rules(networks.Conv(4)) == ()


def test_any_network_is_cut_along_fsdp_on_its_longest_axis():
    net, x, _ = NETWORKS["unet"]
    for path, spec in specs(net, x, Layout(fsdp=4)).items():
        if path.endswith("kernel"):
            assert "fsdp" in spec, path
    assert Layout(fsdp=4).spec("a", (8, 8)) == P(None, "fsdp") and Layout(fsdp=4).spec("a", (2, 3)) == P()


class Unsorted(nn.Module):
    """The projection alone, under the same name, so that a key draws the same numbers."""

    features: int

    @nn.compact
    def __call__(self, x):
        return layers.Dense(self.features, name="qkv")(x)


def test_heads_are_sorted_for_the_cut_and_a_key_gives_what_it_gave_unsorted():
    """Against attention written out, with q, k and v from one draw of a kernel [d, 3 d] in this order."""
    heads, d, x = 2, 6, np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    net = networks.Attention(heads)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    plain = np.asarray(params["qkv"]["kernel"]).reshape(d, heads, 3, -1).swapaxes(1, 2).reshape(d, 3 * d)
    np.testing.assert_array_equal(plain, jax.jit(Unsorted(3 * d).init)(jax.random.key(0), x)["params"]["qkv"]["kernel"])
    q, k, v = (a.reshape(2, 5, heads, -1) for a in np.split(x @ plain, 3, axis=-1))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(d // heads)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ np.asarray(params["out"]["kernel"])
    np.testing.assert_allclose(net.apply({"params": params}, x), y, rtol=1e-4, atol=1e-5)


def test_constrain_does_nothing_without_a_mesh_or_on_one_device():
    net, params, batch = dit_parts(depth=1)
    call = lambda p, x: networks.from_linen(net)(p, x, jnp.zeros(16), batch["label"])
    program = lambda f: jax.jit(f).lower(params, batch["x"]).as_text()
    plain = program(call)
    assert "sharding_constraint" not in plain

    def on_one(p, x):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), layouts.AXES)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return call(p, x)

    assert "sharding_constraint" not in program(on_one)


def test_constrain_names_what_does_not_fit():
    def trace(shape, *names, **sizes):
        layout = Layout(**sizes)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: layout.size]).reshape(layout.shape), layouts.AXES)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.eval_shape(lambda: networks.constrain(jnp.zeros(shape), *names))

    with pytest.raises(ValueError, match=r"3 heads cannot be cut into 2 parts \(model=2\)"):
        trace((4, 3), "batch", "heads", model=2)
    with pytest.raises(ValueError, match="a name or None for each of the 2 axes"):
        trace((4, 3), "batch", model=2)
    assert trace((1, 4), "batch", "heads", data=4, model=2).shape == (1, 4)


def test_bad_layouts():
    with pytest.raises(ValueError, match="fsdp must be at least 1; got 0"):
        Layout(fsdp=0)
    with pytest.raises(ValueError, match="fsdp=3 x model=1 x sequence=1 needs a multiple of 3 devices; got 8"):
        Layout(fsdp=3).over(8)
    rules = networks.partition_rules(networks.DiT())
    with pytest.raises(ValueError, match="cannot be cut into 5 parts"):
        layouts.check(Layout(model=5, rules=rules), lambda: shapes(*NETWORKS["dit"][:2], tokens=(1, 3, 4)))
    init = lambda key: networks.DiT(width=16, heads=2).init(key, np.zeros((1, 4, 6, 1), np.float32), np.zeros(1))[
        "params"
    ]
    with pytest.raises(ValueError, match=r"6 tokens cannot be cut into 4 parts \(sequence=4\)"):
        layouts.check(Layout(sequence=4), init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"2 heads cannot be cut into 4 parts \(model=4\); choose a layout"):
        layouts.check(Layout(model=4, rules=rules), init, jax.random.key(0))
    assert layouts.check(Layout(data=64, model=2, sequence=3), init, jax.random.key(0))["in"]["kernel"].shape == (4, 16)
    with pytest.raises(ValueError, match="names 'width'"):
        Layout(model=2, rules=(("a", P("width")),)).spec("a", (2,))


OPTIMIZER = optimizer.adamw(1e-2, clip=1.0)


def test_a_state_is_born_in_its_layout_and_no_device_ever_holds_it_whole():
    net = networks.DiT(width=128, depth=1, heads=2)
    init = lambda key: networks.from_linen(net).init(key, np.zeros((1, 4, 4, 1), np.float32), np.zeros(1, np.float32))
    driver = devices.mesh(
        dit_step(net, OPTIMIZER), layout=Layout(data=2, fsdp=2, model=2, rules=networks.partition_rules(net))
    )
    born = init_sharded(init, OPTIMIZER, 5, driver, emas=AVERAGE)
    for path, a in jax.tree_util.tree_flatten_with_path((born.params, born.ema, born.opt_state))[0]:
        own = {s.data.size for s in a.addressable_shards}
        assert len(own) == 1
        if a.size > 512:
            assert own.pop() <= a.size // 2, path
        if a.ndim == 2 and a.size > 2**14 and "time" not in str(path):
            assert a.addressable_shards[0].data.size == a.size // 4, path
    same = [born.params, born.ema["average"], born.opt_state[1][0].mu, born.opt_state[1][0].nu]
    for leaves in zip(*map(jax.tree.leaves, same), strict=True):
        assert len({a.sharding for a in leaves}) == 1

    # The whole state is never there: what a device gets, and what it needs meanwhile, are less than the parameters alone.
    build, data = state.birth(init, OPTIMIZER, 5, AVERAGE)
    program = state.birth_program(build, data, driver).lower(data).compile()
    memory, whole = program.memory_analysis(), sum(a.nbytes for a in jax.tree.leaves(born.params))
    part = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(born) if a.dtype == jnp.float32)
    assert part < 0.27 * 4 * whole
    assert memory.output_size_in_bytes < 1.01 * part + 4096
    assert memory.temp_size_in_bytes < 0.5 * whole
    assert "all-gather" not in program.as_text() and "all-reduce" not in program.as_text()

    one = init_state(init(jax.random.key(5)), OPTIMIZER, 5, emas=AVERAGE)
    toy.assert_close(born, one, rtol=0, atol=1.5e-8)  # the last bit of a product


def test_fit_makes_its_state_and_resumes_on_another_layout(tmp_path):
    """Against the same run with a state that was made whole."""

    start, train_step = toy.make()
    init = lambda key: jax.tree.map(jnp.asarray, toy.params())
    make = functools.partial(init_sharded, init, optax.adam(1e-2), 3, emas=toy.EMAS)

    options = {"stream": io.StringIO(), "per_dispatch": 2}
    whole = fit(start, train_step, toy.Batches(), steps=6, **options).state
    with CheckpointStore(tmp_path) as store:
        first = fit(make, train_step, toy.Batches(), steps=4, store=store, layout=Layout(data=2, fsdp=4), **options)
        assert first.state.params["embed"].addressable_shards[0].data.shape == (1, toy.D)
        second = fit(
            make, train_step, toy.Batches(), steps=6, store=store, resume=True, parallel="shard_map",
            layout=Layout(data=4, fsdp=2), **options,
        )  # fmt: skip
    assert second.state.params["embed"].addressable_shards[0].data.shape == (2, toy.D)
    toy.assert_close(second.state, whole, rtol=1e-4, atol=1e-6)


def train_dit(name, layout, optimizer, steps=50):
    """`(parameters and averages, losses)` of the transformer of two blocks in float64."""
    net, params, batch = dit_parts(np.float64, depth=2, width=16, heads=4)
    batches = [{"x": np.roll(batch["x"], i, axis=1), "label": (batch["label"] + i) % 5} for i in range(steps)]
    layout = Layout(*layout, rules=networks.partition_rules(net))
    driver = devices.driver(
        name, dit_step(net, optimizer), layout=layout, devices=jax.devices()[: layout.size], per_dispatch=steps
    )
    start = driver.place(init_state(params, optimizer, 0, emas=AVERAGE))
    with jax.numpy_dtype_promotion("standard"):  # time codes are float32 whatever the state
        end, metrics = driver.step(start, batches)
    return (jax.device_get((end.params, end.ema)), np.asarray(metrics["loss"])), end


@pytest.mark.slow
def test_float64_is_the_same_along_model_and_sequence(x64):
    """A transformer over 50 steps with Adam and clipping: a cut of tokens, heads, wide layers, batch and state."""
    reference, _ = train_dit("mesh", (1, 1, 1, 1), OPTIMIZER)
    assert reference[1][-10:].mean() < reference[1][:10].mean()
    for name, sizes in (("shard_map", (1, 2, 2, 2)), ("mesh", (2, 1, 2, 2))):
        found, end = train_dit(name, sizes, OPTIMIZER)
        toy.assert_close(found, reference, rtol=1e-9, atol=1e-9)
    assert end.ema["average"]["block_0"]["hidden"]["kernel"].sharding.spec == P(None, "model")
