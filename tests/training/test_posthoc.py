"""Averages of any length from stored ones: the formula against integrals, files that are cut or changed, resumed runs."""

import io
import pathlib
import resource
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import toy
from scipy import integrate

from diffjax.training import CheckpointError, devices, ema, fit, posthoc, snapshots, state, step, store, weights
from diffjax.training.layouts import Layout

STORED = {"power_0.05": ema.power(0.05), "power_0.1": ema.power(0.1)}
TARGETS = (0.03, 0.07, 0.15, 0.2)


@pytest.mark.parametrize("a, b", [((100, 16.97), (80, 6.94)), ((50, 0.0), (60, 3.0)), ((7, 2.5), (7, 2.5))])
def test_inner_products_are_the_integrals_of_the_profiles(a, b):
    profile = lambda tau, t, gamma: (gamma + 1) * tau**gamma / t ** (gamma + 1) if tau <= t else 0.0
    product, _ = integrate.quad(lambda tau: profile(tau, *a) * profile(tau, *b), 0, min(a[0], b[0]), epsabs=1e-14)
    assert float(posthoc.inner_products(*a, *b)) == pytest.approx(product, rel=1e-9)
    assert float(posthoc.inner_products(*b, *a)) == pytest.approx(product, rel=1e-9)


def test_coefficients_minimise_the_distance_of_the_profiles():
    """Against least squares on a fine grid of the profiles themselves, which knows nothing of inner products."""
    stored = [(t, ema.std_to_exp(s)) for t in (25, 50, 75, 100) for s in (0.05, 0.1)]
    target = (100, ema.std_to_exp(0.07))
    tau = (np.arange(40000) + 0.5) / 400
    profile = lambda t, g: np.where(tau <= t, (g + 1) * tau**g / t ** (g + 1), 0)
    columns, want = np.stack([profile(*s) for s in stored], 1), profile(*target)
    c, *_ = np.linalg.lstsq(columns, want, rcond=None)
    found = posthoc.coefficients(stored, target)
    np.testing.assert_allclose(found.weights, c, atol=2e-3 * np.abs(c).max())
    assert found.residual == pytest.approx(np.linalg.norm(columns @ c - want) / np.linalg.norm(want), rel=1e-2)
    twice = posthoc.coefficients(
        [*stored, stored[0], (100, target[1])], target
    )  # repeated and exact columns do no harm
    assert twice.residual < 1e-6 and np.isfinite(twice.weights).all()


@pytest.mark.parametrize(
    "stored, target", [([], (1, 2)), ([(0, 3)], (1, 2)), ([(1, 2)], (1, -1)), ([(1, np.nan)], (1, 2))]
)
def test_coefficients_refuse_what_is_no_profile(stored, target):
    with pytest.raises(ValueError, match="stored must hold|t > 0 and gamma >= 0"):
        posthoc.coefficients(stored, target)


# ------------------------------------------------------------------------------------------------------------- runs


def train(
    folder, steps, *, every=5, checkpoints=None, resume=False, dtype="float32", directly=(), bad=(), say=None, **more
):
    """A toy run with snapshots of two averages, that tracks others directly."""
    emas = STORED | {f"direct_{s}": ema.power(s) for s in directly}
    start, train_step = toy.make(optax.adam(3e-2), emas=emas)
    hook = snapshots.hook(folder, every, STORED, dtype=dtype, say=say)
    return fit(
        start, train_step, toy.Batches(bad=bad), steps=steps, hooks=[hook], resume=resume, stream=io.StringIO(),
        store=None if checkpoints is None else store.CheckpointStore(checkpoints, keep_latest=9, say=lambda _: None),
        save_every=None if checkpoints is None else 20, per_dispatch=5, devices=jax.devices()[:1], **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, result) of 320 steps, 64 snapshots and four averages tracked directly; one update was refused."""
    folder = tmp_path_factory.mktemp("posthoc") / "ema"
    return folder, train(folder, 320, directly=TARGETS, bad=(3,))


def error(got, want):
    flat = lambda tree: np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(tree)])
    return np.linalg.norm(flat(got) - flat(want)) / np.linalg.norm(flat(want))


@pytest.mark.parametrize("sigma_rel", TARGETS)
def test_reconstruction_equals_the_average_tracked_directly(run, sigma_rel):
    folder, result = run
    made = snapshots.reconstruct(folder, sigma_rel)
    assert (made.step, made.updates, made.snapshots) == (320, 319, 64)  # time is counted in updates, not in steps
    want = result.state.ema[f"direct_{sigma_rel}"]
    assert error(made.params, want) < 1e-3  # the claim is 1e-2
    assert error(result.state.ema["power_0.05"], want) > 3e-3  # and it is not that all averages are alike
    assert made.fit.residual < 0.01


def test_a_stored_average_is_reconstructed_exactly_and_earlier_steps_too(run):
    folder, result = run
    made = snapshots.reconstruct(folder, 0.1)
    assert error(made.params, result.state.ema["power_0.1"]) < 1e-6
    early = snapshots.reconstruct(folder, 0.1, step=100)
    kept = next(s for s in snapshots.load(folder) if s.step == 100)
    assert early.snapshots == 20 and error(early.params["w"], kept.file.read("power_0.1/w")) < 1e-6
    assert snapshots.widths([kept]) == [0.05, 0.1]
    with pytest.raises(ValueError, match="got 101, the nearest is 100"):
        snapshots.reconstruct(folder, 0.1, step=101)
    with pytest.raises(ValueError, match="sigma_rel must be in"):
        snapshots.reconstruct(folder, 0.3)


def test_reconstruction_is_laid_out_as_the_parameters(run):
    folder, _ = run
    start, train_step = toy.make(emas=STORED)
    driver = devices.mesh(train_step, layout=Layout(fsdp=3), devices=jax.devices()[:3])  # 3 cuts the 3 x 3 matrix
    like = state.abstract(start, driver.shardings(start)).params
    made = snapshots.reconstruct(folder, 0.07, like=like).params
    assert made["w"].sharding == like["w"].sharding and made["w"].addressable_shards[0].data.size == 3
    np.testing.assert_array_equal(made["w"], snapshots.reconstruct(folder, 0.07).params["w"])
    with pytest.raises(ValueError, match="hold w with shape"):
        snapshots.reconstruct(folder, 0.07, like={"w": np.zeros((2, 2))})


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_half_precision_files_are_half_as_large(run, tmp_path, dtype, bound):
    train(tmp_path, 40, dtype=dtype)
    train(tmp_path / "wide", 40)
    size = lambda folder: sum(int(np.prod(s)) for s in snapshots.load(folder)[0].file.shapes.values())
    data = lambda folder: snapshots.load(folder)[0].file.path.stat().st_size
    assert data(tmp_path / "wide") - data(tmp_path) >= 2 * size(tmp_path) - 64
    a, b = (snapshots.reconstruct(folder, 0.08).params for folder in (tmp_path, tmp_path / "wide"))
    assert a["w"].dtype == np.float32 and 0 < error(a, b) < bound


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def values(folder):
    """name of a file -> (metadata, array name -> bytes): the order of metadata in a file is no one's choice."""
    return {
        s.file.path.name: (s.file.metadata, {name: s.file.read(name).tobytes() for name in s.file.shapes})
        for s in snapshots.load(folder)
    }


def test_a_resumed_run_writes_the_same_values_and_drops_an_abandoned_future(tmp_path):
    train(tmp_path / "a", 60, checkpoints=tmp_path / "a_checkpoints", every=10)
    whole = values(tmp_path / "a")
    assert list(whole) == [f"{i:08d}.safetensors" for i in range(10, 61, 10)]
    for s in (60, 40):  # the run goes back to step 20
        (tmp_path / "a_checkpoints" / str(s)).rename(tmp_path / str(s))
    (tmp_path / "a" / "00000040.safetensors").write_bytes(b"cut off")
    train(tmp_path / "a", 30, checkpoints=tmp_path / "a_checkpoints", every=10, resume=True)
    assert list(contents(tmp_path / "a")) == [f"{i:08d}.safetensors" for i in (10, 20, 30)]
    train(tmp_path / "a", 60, checkpoints=tmp_path / "a_checkpoints", every=10, resume=True)
    assert values(tmp_path / "a") == whole


def test_damaged_snapshots_are_found_named_and_left_out(tmp_path, monkeypatch):
    train(tmp_path, 40, every=10)
    good = contents(tmp_path)
    path = tmp_path / "00000020.safetensors"
    rng, data = np.random.default_rng(0), good[path.name]
    places = [*range(0, 16), *rng.integers(16, len(data), 60)]  # the length, and anywhere in header and data
    for place in map(int, places):
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(changed))
        said = []
        assert [s.step for s in snapshots.load(tmp_path, say=said.append)] == [10, 30, 40], place
        assert len(said) == 1 and path.name in said[0]
    for cut in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=path.name):
            weights.WeightsFile(path, verify=False)
    path.unlink()
    assert snapshots.reconstruct(tmp_path, 0.1).snapshots == 3
    monkeypatch.setattr(weights, "FORMAT", 9)
    newer = weights.export_safetensors({"w": np.zeros(2)}, tmp_path / "00000030.safetensors")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 9"):
        weights.WeightsFile(newer)
    for p in tmp_path.glob("*"):
        p.unlink()
    with pytest.raises(ValueError, match="no undamaged snapshots"):
        snapshots.reconstruct(tmp_path, 0.1)


@pytest.mark.parametrize("room", [0, 300])
def test_a_full_disk_is_reported_and_training_goes_on(tmp_path, monkeypatch, room):
    """The system itself refuses to write more than `room` bytes to a file."""
    train(tmp_path, 10, every=10)
    before, said = contents(tmp_path), []

    def full(*args, **options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            return weights.export_safetensors(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(snapshots, "export_safetensors", full)
    result = train(tmp_path, 30, every=15, say=said.append, metrics_file=tmp_path / "log.jsonl")
    assert result.step == 30 and len(said) == 2 and "step 15 could not be written" in said[0]
    assert "File too large" in said[0] and "are intact" in said[0]
    assert not list(tmp_path.glob(".*")) and '"failed": 1' in (tmp_path / "log.jsonl").read_text()
    assert contents(tmp_path) == before


def test_the_files_are_safetensors(run):
    from safetensors.numpy import load_file

    folder, result = run
    found = load_file(folder / "00000320.safetensors")
    for name in STORED:
        np.testing.assert_array_equal(found[f"{name}/w"], result.state.ema[name]["w"])


@pytest.mark.parametrize(
    "options, word",
    [(dict(emas={"a": ema.decay(0.9)}), "none among"), (dict(emas=STORED, dtype="int8"), "float32, bfloat16")],
)
def test_hooks_that_could_keep_nothing(tmp_path, options, word):
    with pytest.raises(ValueError, match=word):
        snapshots.hook(tmp_path, 1, **options)


def test_sharded_averages_and_counters_are_written_whole(tmp_path):
    emas = {"p": ema.power(0.1)}
    params = {"w": np.arange(24, dtype=np.float32).reshape(8, 3), "n": np.int32(7)}
    model, loss, tx = (lambda p: p), (lambda key, d, x0, cond, items=None: None), optax.set_to_zero()
    start = state.init_state(params, tx, 0, emas=emas)
    driver = devices.mesh(step.make_train_step(model, loss, tx, emas=emas), layout=Layout(fsdp=8))
    placed = driver.place(start)
    placed = placed.__class__(**{**placed.__dict__, "step": placed.step + 1})
    assert snapshots.hook(tmp_path, 1, emas).call(1, placed) is None
    made = snapshots.reconstruct(tmp_path, 0.1).params
    np.testing.assert_array_equal(made["w"], params["w"])
    assert made["n"] == 7 and made["n"].dtype == np.int32


@pytest.mark.slow
def test_two_processes_write_one_file_and_each_reads_its_part(tmp_path):
    """Each process holds half of a table: snapshots are gathered, reconstructions cut again."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = str(pathlib.Path(__file__).parent / "two_snapshots.py")
    environment = toy.clean_environment(devices=1)
    parts = [
        subprocess.Popen(
            [sys.executable, script, str(i), str(port), str(tmp_path)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        ends = [p.communicate(timeout=240) for p in parts]
    finally:
        for p in parts:
            p.kill()
    for p, (out, err) in zip(parts, ends, strict=True):
        assert p.returncode == 0 and "REPORT" in out, err[-2000:]
    assert len({out.rpartition("REPORT")[2] for out, _ in ends}) == 2  # different halves
    found = snapshots.load(tmp_path)
    assert [s.step for s in found] == list(range(5, 61, 5)) and found[-1].file.shapes["power_0.1/embed"] == (4, 3)
    assert not list(tmp_path.glob(".*"))
