"""Hints on the command line: adapters that are told something made of the data, of held-out items, or of files."""

import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.adapters import ControlNet, load_adapter, save_adapter
from diffjax.cli import config, hinted, main
from diffjax.data import hints

SIDE = 4
SMALL = (
    "--model.width=8 --model.multipliers=1 --model.attention --training.augment=affine --training.batch-size=8 "
    "--training.save-every=9 --training.sample-every=9 --sampler.seeds=1 --sampler.steps=2 --sampler.solver=ddim"
).split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The data, the folder of a run on them, and that of a control net beside it."""
    folder = tmp_path_factory.mktemp("hinted")
    rng = np.random.default_rng(0)
    label = np.arange(160, dtype=np.int32) % 2
    x = np.clip(rng.normal(size=(160, SIDE, SIDE, 1)) + 2 * label[:, None, None, None] - 1, -2, 2).astype(np.float32)
    np.savez(folder / "data.npz", x=x, label=label)
    data = f"arrays:{folder / 'data.npz'}"
    train = lambda run, *words: main(["train", data, "--run", str(folder / run), *SMALL, "--no-scores", *words])
    assert train("base", "--training.steps=1") == 0
    own = [
        "--init",
        str(folder / "base"),
        "--adapter",
        "controlnet",
        "--adapter-hint",
        "edges",
        "--adapter-widths",
        "4",
    ]
    assert train("edges", *own, "--training.steps=4", "--training.learning-rate=0.1") == 0
    return data, folder / "base", folder / "edges"


def test_hints_by_hand():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 2)).astype(np.float32)
    grey = (x.mean(-1) + 1) / 2
    wide = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    across = (wide[:, :, 2:] - wide[:, :, :-2]) / 2
    along = (wide[:, 2:] - wide[:, :-2]) / 2
    smooth = lambda a, b, c: (a + 2 * b + c) / 4
    dx = smooth(across[:, :-2], across[:, 1:-1], across[:, 2:])
    dy = smooth(along[:, :, :-2], along[:, :, 1:-1], along[:, :, 2:])
    np.testing.assert_allclose(hints.edges(x)[..., 0], np.hypot(dx, dy), atol=1e-5)
    np.testing.assert_array_equal(hints.mask(x)[..., 0], grey > 0.5)
    np.testing.assert_allclose(hints.low_resolution(x)[1, 2, 3], x[1].mean((0, 1)), atol=1e-6)
    assert all(config.fits(name, typing.get_type_hints(config.Adapter)["hint"]) for name in hints.HINTS)
    with pytest.raises(ValueError, match="multiples of 4; got 6 x 4"):
        hints.low_resolution(np.zeros((1, 6, 4, 1), np.float32))


@pytest.mark.slow
def test_the_control_net_alone_is_trained_on_hints(runs):
    _, base, edges = runs
    plain, found = diffjax.load(base).denoiser.leaves, diffjax.load(edges, weights="params")
    jax.tree.map(np.testing.assert_array_equal, found.denoiser.leaves["base"], plain)
    own = found.denoiser.leaves["adapters"]["adapter"]
    assert all(np.abs(a["kernel"]).max() > 1e-3 for a in own["zero"].values())
    assert found.told["adapter"].hint == hinted.Hint("edges") and found.config.adapter.widths == (4,)
    x = jnp.zeros((2, SIDE, SIDE, 1))
    cond = {"label": np.array([0, 1]), "adapter": jnp.zeros_like(x)}
    assert np.isfinite(found.denoiser.bind(cond)(x, np.float32(0.5)).x0).all()


def drawn(call, *words):
    got = call("sample", *words, "--n", 6, "--out", "out")
    assert got.code == 0, got.err
    return np.load(got.out.split()[1])["x"]


@pytest.mark.slow
def test_samples_are_told_held_out_hints_or_those_of_files(runs, call, tmp_path):
    _, base, edges = runs
    assert call("export", edges, "-o", tmp_path / "edges.safetensors").code == 0
    beside = ("--adapter", str(tmp_path / "edges.safetensors"))
    own = drawn(call, edges)
    np.testing.assert_allclose(drawn(call, base, *beside), own, rtol=1e-4, atol=1e-4)
    dataset = diffjax.data.load(runs[0])
    labels = np.arange(6) % 2
    asked = hinted.held_out(hinted.Hint("edges"), dataset, 6, labels)
    np.save("asked.npy", asked)
    np.testing.assert_allclose(drawn(call, base, *beside, "--hint", "asked.npy"), own, rtol=1e-4, atol=1e-4)
    np.save("one.npy", asked[0])
    one = drawn(call, edges, "--hint", "one.npy", "--guidance", 2.0)
    assert one.shape == own.shape and np.abs(one - own).max() > 1e-4
    grey = np.round(np.clip(asked[0, ..., 0], 0, 1) * 255).astype(np.uint8)
    Image.fromarray(grey).save("one.png")
    np.save("rounded.npy", (grey / 255).astype(np.float32)[..., None])
    np.testing.assert_allclose(
        drawn(call, edges, "--hint", "one.png"), drawn(call, edges, "--hint", "rounded.npy"), rtol=1e-4, atol=1e-4
    )
    items = dataset.read("test")
    where = [int(np.flatnonzero((np.asarray(hints.edges(items["x"])) == a).all((1, 2, 3)))[0]) for a in asked]
    assert (items["label"][where] == labels).all()


@pytest.mark.slow
def test_scores_tell_hints_of_the_test_items(runs, call):
    _, _, edges = runs
    got = call("eval", edges, "--n", 12)
    assert got.code == 0, got.err
    found = json.loads((edges / "metrics.json").read_text())["other"]
    assert found["hint_error"] > 0 and found["hint_error_of_others"] > 0
    asked = np.float32([0, 1, 3]).reshape(3, 1, 1, 1)
    assert hinted.errors(asked, asked) == {"hint_error": 0.0, "hint_error_of_others": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hint"), [("control_next", "blur"), ("skip_tuner", "low_resolution")])
def test_other_adapters_that_are_told_hints(runs, call, kind, hint):
    data, base, _ = runs
    own = ("--init", base, "--adapter", kind, "--adapter-hint", hint, "--adapter-widths", 4)
    got = call("train", data, "--run", "r", *SMALL, *own, "--training.steps", 2, "--no-scores")
    assert got.code == 0, got.err
    assert call("train", "--resume", "r", "--training.steps", 3, "--no-scores").code == 0
    assert drawn(call, "r").shape == (6, SIDE, SIDE, 1)
    assert call("export", "r", "-o", "own.safetensors").code == 0
    both = drawn(call, base, "--adapter", "own.safetensors:0.5", "own.safetensors:0.5")
    assert np.isfinite(both).all()


@pytest.mark.slow
def test_what_does_not_fit_is_refused(runs, call, tmp_path):
    data, base, edges = runs
    beside = ("--init", base, "--adapter")
    np.save("odd.npy", np.zeros((5, 4, 1), np.float32))
    np.save("nan.npy", np.full((4, 4, 1), np.nan, np.float32))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    own = load_adapter(*exported(call, edges, base))
    told = save_adapter("told.safetensors", own[0], own[1], diffjax.load(base).denoiser.leaves)
    for argv, text in (
        (("train", data, *beside, "controlnet", *SMALL), "add --adapter-hint edges or blur or low_resolution or mask"),
        (("train", data, *beside, "lora", "--adapter-hint", "edges", *SMALL), "lora takes no --adapter-hint; it takes"),
        (("train", data, *beside, "controlnet", "--adapter-hint", "mask", "--adapter-rank", 2), "no --adapter-rank"),
        (("train", data, "--adapter-hint", "mask", *SMALL), "add --adapter lora or another"),
        (
            ("train", data, *beside, "controlnet", "--adapter-hint", "mask", "--adapter-widths", 0),
            "widths must be one or",
        ),
        (("train", data, *beside, "controlnet", "--adapter-hint", "mask", "--latent", "kl4"), "not go with --latent"),
        (
            ("train", "moons", *beside, "controlnet", "--adapter-hint", "mask"),
            "made of pictures [H, W, C]; the items have",
        ),
        (("sample", base, "--hint", "odd.npy"), "--hint is for an adapter that reads one; add --adapter"),
        (("sample", edges, "--hint", "odd.npy", "odd.npy"), "a file for each of 1 adapters that read one; got 2"),
        (("sample", edges, "--hint", "odd.npy"), "odd.npy must be [4, 4, 1], or several of these; got [1, 5, 4, 1]"),
        (("sample", edges, "--hint", "nan.npy"), "must hold finite numbers"),
        (("sample", edges, "--hint", "none.npy"), "there is no file none.npy"),
        (("sample", edges, "--hint", "bad.png"), "no .npy of numbers, and no picture"),
        (("sample", base, "--adapter", told), "controlnet reads a picture in the condition"),
        (("sample", base, "--adapter", told, "--hint", "bad.png"), "give a .npy"),
    ):
        got = call(*argv)
        assert got.code == 2 and text in " ".join(got.err.split()), got.err


def exported(call, edges, base):
    """The file of the adapter, and the parameters of the network that it is for."""
    assert call("export", edges, "-o", "edges.safetensors").code == 0
    return "edges.safetensors", diffjax.load(base).denoiser.leaves


@pytest.mark.slow
def test_a_condition_of_the_library_is_that_of_the_command_line(runs, call):
    """The denoiser of a run with a file beside it, called by hand, is that of the adapted network."""
    _, base, edges = runs
    file, _ = exported(call, edges, base)
    run = diffjax.load(base, adapters=[(file, 1.0)])
    assert list(run.told) == ["file_0"] and isinstance(run.told["file_0"].adapter, ControlNet)
    x = jax.random.normal(jax.random.key(1), (2, SIDE, SIDE, 1))
    cond = {"label": np.array([0, 1]), "file_0": jnp.abs(x)}
    own = diffjax.load(edges).denoiser.bind({"label": cond["label"], "adapter": cond["file_0"]})
    np.testing.assert_allclose(run.denoiser.bind(cond)(x, np.float32(0.4)).x0, own(x, np.float32(0.4)).x0, atol=1e-5)
