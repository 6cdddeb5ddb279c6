"""Parts of a checkpoint: parameters or an average alone, other names, other meshes, and only the bytes that are needed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.training import CheckpointError, CheckpointStore, init_state
from diffjax.training.partial import match, outline


@pytest.fixture(scope="module")
def state():
    state, train_step = toy.make()
    return jax.jit(train_step)(state, toy.batch(0))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("checkpoints")
    with CheckpointStore(path) as store:
        for step in (1, 2):
            assert store.save(step, state, data={"next": step}) and store.wait()
    return path


@pytest.fixture
def store(folder):
    return CheckpointStore(folder, say=lambda text: None)


@pytest.mark.parametrize("part", ["params", "ema/fast", "ema/wide"])
def test_a_part_needs_no_optimiser(store, state, part):
    tree = state.params if part == "params" else state.ema[part[4:]]
    found = store.restore_part(toy.params(), part)
    toy.assert_equal(found.tree, tree)
    assert jax.tree.structure(found.tree) == jax.tree.structure(tree)
    assert (found.step, found.missing, found.unused, found.report) == (2, (), (), ())
    assert found.page["data"] == {"next": 2} and store.restore_part(toy.params(), part, 1).step == 1


def test_a_part_of_a_tree_with_tuples_and_lists(store, state):
    adam = optax.adam(1e-2).init(state.params)
    toy.assert_equal(store.restore_part(adam, "opt_state").tree, state.opt_state)


def test_a_part_goes_onto_another_mesh_and_into_another_float(store, state):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    cut = {"w": PartitionSpec(), "b": PartitionSpec(), "embed": PartitionSpec("b")}
    template = {
        name: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16 if name == "w" else a.dtype, sharding=NamedSharding(mesh, cut[name]))
        for name, a in state.params.items()
    }  # fmt: skip
    found = store.restore_part(template, "ema/fast").tree
    for name, a in found.items():
        assert a.sharding == template[name].sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(state.ema["fast"][name]).astype(a.dtype))
    assert {s.data.shape for s in found["embed"].addressable_shards} == {(1, 3)}


def test_renames_are_applied_in_turn_to_saved_paths(store, state):
    template = {
        "head": {"weight": np.zeros((3, 3), np.float32), "bias": np.zeros(3, np.float32)},
        "class": state.params["embed"],
    }
    renames = {"^w$": "head/weight", "^b$": "head/b", "^head/b$": "head/bias", "embed": "class"}
    found = store.restore_part(template, renames=renames).tree
    toy.assert_equal([found["head"]["weight"], found["head"]["bias"]], [state.params["w"], state.params["b"]])


def test_what_does_not_fit_is_listed_by_name(store):
    template = {**toy.params(), "w": np.zeros((3, 5), np.float32), "extra": np.full(2, 7.0, np.float32)}
    del template["b"]
    with pytest.raises(CheckpointError) as error:
        store.restore_part(template)
    lines = str(error.value).splitlines()
    assert lines[0] == f"params of checkpoint 2 in {store.directory} does not fit:"
    assert lines[1:] == [
        "  extra: not saved, expected float32[2]",
        "  w: saved as float32[3,3], expected float32[3,5]",
        "  b: saved as float32[3], not expected",
        "Give renames={pattern: replacement}, or strict=False to keep the values of the template",
    ]
    with pytest.raises(CheckpointError, match=r"w: saved as float32\[3,3\], expected float32\[3,5\]$"):
        store.restore_part(template, strict=False)


def test_not_strict_keeps_the_values_of_the_template_and_says_so(store, state):
    template = {"w": toy.params()["w"], "extra": np.full(2, 7.0, np.float32)}
    found = store.restore_part(template, strict=False)
    assert (found.missing, found.unused) == (("extra",), ("b", "embed"))
    toy.assert_equal(found.tree, {"w": state.params["w"], "extra": template["extra"]})
    with pytest.raises(CheckpointError, match=r"extra: not saved, expected float32\[2\]"):
        store.restore_part({"extra": jax.ShapeDtypeStruct((2,), jnp.float32)}, strict=False)


def test_a_part_that_is_not_there(store):
    with pytest.raises(
        CheckpointError, match="no ema/slow of checkpoint 2 .* it holds ema/fast, ema/wide, key, opt_st"
    ):
        store.restore_part(toy.params(), "ema/slow")


def test_two_names_may_not_become_one():
    with pytest.raises(CheckpointError, match="renames turn both a and b of the checkpoint into w"):
        match({"a": "float32[]", "b": "float32[]"}, {"w": np.float32(1)}, renames={"[ab]": "w"})


def test_kinds_of_numbers_are_not_mixed():
    saved = outline({"a": np.int32(1), "k": jax.random.key(0)})
    for name, target in (("a", np.float32(1)), ("k", np.zeros((), np.uint32))):
        with pytest.raises(CheckpointError, match=f"{name}: saved as {saved[name][:3]}.*expected "):
            match({name: saved[name]}, {name: target})


def test_a_damaged_step_is_passed_over(folder, state, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "2" / "state" / "_METADATA").unlink()
    messages = []
    found = CheckpointStore(copy, say=messages.append).restore_part(toy.params())
    assert (
        found.step == 1 and "_METADATA is missing" in found.report[0] and "continuing from checkpoint 1" in messages[0]
    )


def read_by_this_process():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_only_the_bytes_of_the_part_are_read(tmp_path):
    """Of 16 MB, an average of 4 MB, with the checksums of all files left out."""
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(512, 1024)).astype(np.float32),
        "b": rng.normal(size=(512, 1024)).astype(np.float32),
    }
    state = init_state(params, optax.adam(1e-3), 0, emas=toy.EMAS | {})
    state = jax.tree.map(lambda a: a if a.ndim < 2 else jnp.asarray(rng.normal(size=a.shape).astype(np.float32)), state)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state)
    total = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    store.restore_part({"a": params["a"]}, "ema/fast", strict=False)  # imports and caches
    before = read_by_this_process()
    found = store.restore_part(params, "ema/fast", verify=False)
    share = (read_by_this_process() - before) / total
    toy.assert_equal(found.tree, state.ema["fast"])
    assert total > 15e6 and 0.15 < share < 0.3, share  # 1 of 5 copies of the parameters
