"""Weights that leave a run: as a safetensors file, and into the beginning of another run."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_tools import TINY, losses
from safetensors import safe_open
from safetensors.numpy import load_file

import diffjax
from diffjax.cli import config
from diffjax.cli import run as runs
from diffjax.training import CheckpointError, export_safetensors, load_safetensors, tensors, weights
from diffjax.training.partial import named


def parameters(folder, name):
    return dict(named(diffjax.load(folder, weights=name).denoiser.leaves))


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        u, v = np.asarray(a[name]), np.asarray(b[name])
        assert u.dtype == v.dtype and u.shape == v.shape and u.tobytes() == v.tobytes(), name


# ---------------------------------------------------------------------------------------------------------- export


def test_export_writes_a_file_that_the_package_reads(trained, call):
    folder, _ = trained
    for name, full in (("ema", "ema_0.999"), ("params", "params")):
        got = call("export", folder, "--weights", name, "-o", f"out/{name}.safetensors")
        assert got.code == 0 and got.out.startswith(f"weights  out/{name}.safetensors  ({full} of step 30, ")
        equal(load_file(f"out/{name}.safetensors"), parameters(folder, full))
    with safe_open("out/ema.safetensors", framework="np") as file:
        found = file.metadata()
    settings = config.from_json((folder / "config.json").read_text())
    assert config.from_json(found["config"]) == settings and json.loads(found["model"])["num_classes"] == 8
    assert (found["step"], found["weights"], found["format"]) == ("30", "ema_0.999", "1")
    assert json.loads(found["average"]) == {"kind": "decay", "beta": 0.999, "warmup": True}


def test_export_of_another_step_in_half_precision(copied, call):
    assert call("export", copied, "--checkpoint", 20, "--dtype", "bfloat16", "--weights", "params").code == 0
    found = load_safetensors(copied / "export" / "params-20.safetensors")
    exact = dict(named(diffjax.load(copied, weights="params", step=20).denoiser.leaves))
    for name, a in exact.items():
        np.testing.assert_array_equal(found.params[name], np.asarray(a).astype(jnp.bfloat16))
    assert found.metadata["step"] == "20"


def test_export_refuses_what_is_not_there(trained, call, tmp_path):
    folder, _ = trained
    bad = {
        ("--weights", "ema_0.5"): "weights must be one of ema_0.999, params; got 'ema_0.5'",
        ("--checkpoint", 7): "no checkpoint of step 7",
        ("--out", folder / "config.json" / "x"): "config.json",
    }
    for options, text in bad.items():
        got = call("export", folder, *options)
        assert got.code == 2 and text in got.err and "Traceback" not in got.err
    assert not list(tmp_path.rglob("*.safetensors*"))


# ------------------------------------------------------------------------------------------------------ the format


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "out": {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)},
        "blocks": [rng.normal(size=4).astype(np.float32), rng.normal(size=()).astype(np.float32)],
        "half": jnp.asarray(rng.normal(size=(2, 2)), jnp.bfloat16), "count": np.arange(3, dtype=np.int32),
        "empty": np.zeros((0, 4), np.float32), "across": rng.normal(size=(3, 4)).astype(np.float32).T,
    }  # fmt: skip


def test_round_trip_is_exact(tmp_path, params):
    path = export_safetensors(params, tmp_path / "a.safetensors", {"step": 3, "note": "x"})
    again = load_safetensors(path, params)
    equal(dict(named(again.params)), dict(named(params)))
    assert jax.tree.structure(again.params) == jax.tree.structure(params) and again.metadata["step"] == "3"
    equal(dict(load_file(path)), dict(named(params)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_dtype_of_floats_alone_is_changed(tmp_path, params):
    found = load_safetensors(export_safetensors(params, tmp_path / "a", dtype=jnp.bfloat16)).params
    assert found["out/kernel"].dtype == jnp.bfloat16 and found["count"].dtype == np.int32
    np.testing.assert_array_equal(found["out/kernel"], params["out"]["kernel"].astype(jnp.bfloat16))
    back = load_safetensors(tmp_path / "a", params).params
    assert back["out"]["kernel"].dtype == np.float32


def test_a_foreign_file_by_rename_rules_onto_a_mesh(tmp_path):
    from safetensors.numpy import save_file

    kernel = np.arange(32, dtype=np.float32).reshape(8, 4)
    save_file({"model.head.weight": kernel, "model.ema_steps": np.ones(1, np.float32)}, tmp_path / "a")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    template = {"head": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}}
    renames = {r"^model\.": "", r"\.": "/", "weight$": "kernel"}
    with pytest.raises(CheckpointError, match=r"model.ema_steps: saved as float32\[1\], not expected"):
        load_safetensors(tmp_path / "a", template, renames=renames)
    found = load_safetensors(tmp_path / "a", template, renames=renames, strict=False)
    assert found.unused == ("model.ema_steps",) and found.params["head"]["kernel"].sharding == sharding
    np.testing.assert_array_equal(found.params["head"]["kernel"], kernel)


def test_damage_is_noticed_and_nothing_half_written(tmp_path, params, monkeypatch):
    path = export_safetensors(params, tmp_path / "a.safetensors")
    good = path.read_bytes()
    for i in range(0, 8 * len(good), 41):
        data = bytearray(good)
        data[i // 8] ^= 1 << i % 8
        path.write_bytes(data)
        try:
            found = load_safetensors(path, params)
        except CheckpointError:
            continue
        equal(dict(named(found.params)), dict(named(params)))  # a flip in text that carries nothing
    for data in (good[:-1], good[:9], b""):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="a.safetensors is no safetensors file, or damaged"):
            load_safetensors(path)
    path.write_bytes(good)
    with monkeypatch.context() as patch:
        patch.setattr(
            tensors.os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space left"):
            export_safetensors({"w": np.ones(1)}, path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_bad_input(tmp_path, params, monkeypatch):
    with pytest.raises(ValueError, match="dtype must be of floating point, .* got int8"):
        export_safetensors(params, tmp_path / "a", dtype=np.int8)
    with pytest.raises(ValueError, match="at least one array"):
        export_safetensors({}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="there is no file .*nothing"):
        load_safetensors(tmp_path / "nothing")
    monkeypatch.setattr(weights, "FORMAT", 9)
    export_safetensors(params, tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 9, written by a newer diffjax; this one reads format 1"):
        load_safetensors(tmp_path / "a")


# ------------------------------------------------------------------------------------------------------------ init


def begin(call, source, *options):
    return call(
        "train", "gaussians", "--run", "new", *TINY, "--training.steps", 1, "--no-scores", "--init", source, *options
    )


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(trained, call):
    """With a learning rate too small to move a weight, the new parameters after one step are the old ones."""
    folder, _ = trained
    assert call("export", folder, "-o", "file.safetensors").code == 0
    template = diffjax.load(folder, weights="params").denoiser.leaves
    for source in (f"{folder}:ema", "file.safetensors"):
        equal(dict(named(runs.start_from(source, template))), parameters(folder, "ema_0.999"))
    for i, (source, name) in enumerate([(f"{folder}:params", "params"), (folder, "ema_0.999")]):
        options = ("--training.learning-rate", 1e-30, "--run", f"new{i}")
        assert begin(call, source, *options).code == 0
        equal(parameters(f"new{i}", "params"), parameters(folder, name))
        assert losses(f"new{i}")[-1]["step"] == 1  # and not the 31st
    resumed = call("train", "--resume", "new0", "--training.steps", 2)
    assert resumed.code == 0 and diffjax.load("new0").step == 2


def test_the_learned_uncertainty_begins_afresh(trained, call):
    """The network of a run with or without it is begun with, from a run or from a file; u starts at zero again."""
    assert call("export", trained[0], "-o", "file.safetensors").code == 0
    options = ("--objective.uncertainty", "--training.learning-rate", 1e-30)
    assert begin(call, "file.safetensors", *options).code == 0
    equal(parameters("new", "params"), parameters(trained[0], "ema_0.999"))
    settings, about = runs.read(pathlib.Path("new"))
    shapes = jax.eval_shape(runs.initialiser(settings, tuple(about["shape"]), 8), jax.random.key(0))
    found = runs.start_from("new:params", shapes["net"])
    equal(dict(named(found)), parameters(trained[0], "ema_0.999"))


def test_a_run_goes_on_with_less_memory(copied, call):
    """What the advice after lack of memory calls the same result may change when a run is continued."""
    words = ["--training.accumulate", 2, "--model.remat", "full", "--training.on-bad", "rewind", "--grace", 3]
    assert call("train", "--resume", copied, "--training.steps", 40, "--no-scores", *words).code == 0
    kept = runs.read_config(copied)
    assert (kept.training.accumulate, kept.model.remat, kept.training.on_bad) == (2, "full", "rewind")
    assert (kept.grace, kept.scores) == (10.0, True)  # may differ without a trace


def test_weights_of_another_model_are_refused_by_name(trained, call, tmp_path):
    folder, _ = trained
    got = begin(call, folder, "--model.width", 8)
    assert got.code == 2 and "Traceback" not in got.err
    assert f"--init {folder}: ema_0.999 of step 30 of {folder} does not fit:" in got.err
    assert "expected float32[" in got.err and "use the --model options" in got.err
    assert "there is no run folder nowhere" in begin(call, "nowhere:ema").err
    assert "weights must be one of ema_0.999, params; got 'x'" in begin(call, f"{folder}:x").err
    assert not (tmp_path / "new").exists()
