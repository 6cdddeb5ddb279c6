import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffjax.training import CheckpointError, CheckpointStore, abstract, devices, manifest
from diffjax.training.partial import outline


def make_store(path, **options):
    messages = []
    return CheckpointStore(path, say=messages.append, **options), messages


@pytest.fixture(scope="module")
def states():
    """Three states one step apart."""
    state, train_step = toy.make()
    out = [state]
    for i in range(2):
        out.append(jax.jit(train_step)(out[-1], toy.batch(i))[0])
    return out


@pytest.fixture
def saved(tmp_path, states):
    """A folder with the checkpoints 1 and 2."""
    store, _ = make_store(tmp_path)
    with store:
        for n in (1, 2):
            assert store.save(n, states[n], data={"next": n}, examples=16 * n, metrics={"loss": 1.0})
    return tmp_path


def data_files(folder):
    return [p for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file() and "/d/" in p.as_posix()]


def test_round_trip(saved, states):
    store, messages = make_store(saved)
    with store:
        restored = store.restore(states[0])
    toy.assert_equal(restored.state, states[2])
    assert restored.step == 2 and restored.page["data"] == {"next": 2} and restored.page["examples"] == 32
    assert jax.tree.structure(restored.state) == jax.tree.structure(states[2]) and not messages
    with store:
        toy.assert_equal(store.restore(abstract(states[0]), 1).state, states[1])


def test_latest_and_best_are_kept_also_by_a_reopened_store(tmp_path, states):
    for start, kept in ((0, [1, 4, 5]), (6, [1, 10, 11])):
        store, _ = make_store(tmp_path)
        with store:
            for i, loss in enumerate([0.5, 0.1, 0.9, 0.2, np.nan, 0.8]):
                store.save(start + i, states[0], metrics={"loss": loss + 0.01 * start})
        assert store.steps() == kept


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    flip: "has changed since it was written",
    truncate: "bytes instead of",
    pathlib.Path.unlink: "is missing",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_file_is_named_and_the_previous_step_used(saved, states, damage):
    files = data_files(saved / "2")
    assert len(files) >= 2
    victim = max(files, key=lambda p: p.stat().st_size)
    damage(victim)
    store, messages = make_store(saved)
    with store:
        with pytest.raises(CheckpointError, match=DAMAGE[damage] + "(.|\n)*the other steps are 1"):
            store.restore(states[0], 2)
        restored = store.restore(states[0])
        toy.assert_equal(restored.state, states[1])
        assert restored.step == 1 and restored.page["data"] == {"next": 1}
        name = victim.relative_to(saved / "2").as_posix()
        assert name in restored.report[0] and DAMAGE[damage] in restored.report[0]
        assert name in messages[-1] and "continuing from checkpoint 1" in messages[-1]
        # Training goes on and saves step 2 again; the damaged one is kept aside.
        assert store.save(2, states[2]) and store.wait()
        assert store.steps() == [1, 2] and (saved / "set_aside" / "2").is_dir()
        toy.assert_equal(store.restore(states[0]).state, states[2])


def test_every_single_file_is_protected(saved, states):
    """Any flipped bit in any file of a step is noticed, or is in a file that holds nothing of the state."""
    store, _ = make_store(saved)
    for path in sorted(p for p in (saved / "2").rglob("*") if p.is_file()):
        name, before = path.relative_to(saved / "2").as_posix(), path.read_bytes()
        flip(path)
        assert (store.check(2) is not None) == (name not in manifest.LATER), name
        path.write_bytes(before)
    assert store.check(2) is None


@pytest.mark.parametrize("text", [None, "", "{}", '{"files": 3, "format": 1}'])
def test_a_step_without_a_readable_manifest_is_passed_over(saved, states, text):
    path = saved / "2" / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    store, _ = make_store(saved)
    with store:
        restored = store.restore(states[0])
    assert restored.step == 1 and "manifest.json" in restored.report[0]


def test_nothing_undamaged_is_an_error_that_lists_the_steps(saved, states):
    for n in (1, 2):
        flip(data_files(saved / str(n))[0])
    store, _ = make_store(saved)
    with pytest.raises(CheckpointError, match="(?s)checkpoint 2.*checkpoint 1.*no undamaged checkpoint is left"):
        store.restore(states[0])


def test_missing_checkpoints(tmp_path, saved, states):
    with pytest.raises(CheckpointError, match="no checkpoint in .*nowhere"):
        CheckpointStore(tmp_path / "nowhere").restore(states[0])
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(CheckpointError, match="no checkpoint of step 7 .* there are 1, 2"):
        CheckpointStore(saved).restore(states[0], 7)
    with pytest.raises(ValueError, match="keep_latest must be at least 1"):
        CheckpointStore(saved, keep_latest=0)


def test_another_models_state_is_refused_before_loading(saved, states, capfd):
    store, _ = make_store(saved)
    target = abstract(states[0])
    target.params["w"] = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    target.params["b"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    target.params["extra"] = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(CheckpointError) as error:
        store.restore(target)
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "  params/extra: not saved, expected float32[]",
        "  params/b: saved as float32[3], expected bfloat16[3]",
        "  params/w: saved as float32[3,3], expected float32[3,4]",
    ]
    assert capfd.readouterr().err == ""


def test_an_abandoned_future_is_moved_aside_not_deleted(saved, states):
    store, messages = make_store(saved)
    with store:
        store.restore(states[0], 1)
        for _ in range(2):
            assert store.save(2, states[0]) and store.wait()
    assert "checkpoints 2 belong to another course of the run" in messages[0] and len(messages) == 1
    assert json.loads((saved / "set_aside" / "2" / "page" / "metadata").read_text())["data"] == {"next": 2}


def test_a_state_restores_onto_another_number_of_devices(saved, states):
    for n in (2, 8):
        driver = devices.mesh(toy.make()[1], devices=jax.devices()[:n])
        store, _ = make_store(saved)
        with store:
            restored = store.restore(abstract(states[0], driver.shardings(states[0]))).state
        toy.assert_equal(restored, states[2])
        assert all(len(leaf.sharding.device_set) == n for leaf in jax.tree.leaves(restored))
        driver.step(restored, [toy.batch(2)])


@pytest.mark.parametrize("step", [1, 2])
def test_damaged_metrics_of_a_kept_step_do_not_stop_later_saves(saved, states, step):
    """Orbax reads the metrics of every step when it opens a folder, and refuses all saves if one is damaged."""
    (saved / str(step) / "metrics" / "metrics").write_bytes(b"\xff")
    store, messages = make_store(saved)
    with store:
        assert store.restore(states[0]).step == 3 - step
        assert store.save(3, states[0], metrics={"loss": 2.0}) and store.wait() and not store.failures
    assert f"checkpoints {step} are damaged: moved to" in messages[-1] and store.steps() == [3 - step, 3]


def test_a_save_holds_the_values_of_its_moment_although_the_state_is_donated(tmp_path):
    state = jax.tree.map(lambda i: jnp.full((256, 1024), i, jnp.float32), {str(i): i for i in range(8)})
    bump = jax.jit(lambda s: jax.tree.map(lambda a: a + 100, s), donate_argnums=0)
    store, _ = make_store(tmp_path)
    with store:
        store.save(1, state)
        for _ in range(20):
            state = bump(state)
        jax.block_until_ready(state)
        restored = store.restore(state).state
    for i in range(8):
        np.testing.assert_array_equal(restored[str(i)], i)


def test_a_save_that_fails_leaves_the_last_good_step(saved, states, monkeypatch, capfd):
    store, messages = make_store(saved)
    with store:
        with monkeypatch.context() as patch:
            patch.setattr(
                manifest, "sha256", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
            )
            assert store.save(3, states[0]) and not store.wait()
        assert len(messages) == 1 and "checkpoint 3 could not be saved" in messages[0]
        assert "No space left on device; the checkpoints 1, 2 are intact" in messages[0]
        assert sorted(p.name for p in saved.iterdir()) == ["1", "2"]
        assert store.save(4, states[0]) and store.wait() and store.steps()[-1] == 4
    assert store.failures == messages and "Traceback" not in capfd.readouterr().err


FILL = """
import resource, sys, jax, numpy as np
from diffjax.training import CheckpointStore
state = {str(i): jax.numpy.asarray(np.random.default_rng(i).normal(size=(128, 256))) for i in range(24)}
store = CheckpointStore(sys.argv[1])
assert store.save(1, state) and store.wait()
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
assert not (store.save(2, state) and store.wait())
resource.setrlimit(resource.RLIMIT_FSIZE, before)
assert store.steps() == [1], store.steps()
assert store.save(3, state) and store.wait()
assert store.restore(state).step == 3 and store.restore(state, 1).step == 1
store.close()
"""


def test_a_file_system_that_refuses_to_write(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, timeout=120,
        env=toy.clean_environment(1),
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stderr.count("\n") == 1 and "checkpoint 2 could not be saved" in out.stderr, out.stderr
    assert "File too large; the checkpoints 1 are intact" in out.stderr


KILL = """
import sys, jax.numpy as jnp
from diffjax.training import CheckpointStore
store = CheckpointStore(sys.argv[1])
for step in range(1, 1000):
    store.save(step, {"w": jnp.full((1024, 2048), step, jnp.float32) + jnp.arange(2048.0)})
    print(step, flush=True)
"""


def test_kill_9_while_saving_leaves_a_listed_good_step(tmp_path):
    """Each `print` follows the start of a save, and means that the one before is committed."""
    target = {"w": jnp.zeros((1024, 2048))}
    for n, delay in enumerate((0.0, 0.03)):
        folder = tmp_path / str(n)
        child = subprocess.Popen(
            [sys.executable, "-c", KILL, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=toy.clean_environment(1),
        )  # fmt: skip
        line = ""
        for line in child.stdout:
            if int(line) == 3:
                break
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        store, messages = make_store(folder)
        with store:
            restored = store.restore(target)
            assert restored.step >= 2 and not messages
            np.testing.assert_array_equal(
                restored.state["w"], restored.step + np.arange(2048.0)[None] + 0 * target["w"]
            )
            assert restored.step == store.steps()[-1]  # (an older step may be half deleted)
            assert store.save(10, target) and store.wait()
        assert not list(folder.glob("*tmp*"))


def test_outline_names_paths_dtypes_and_shapes(states):
    lines = outline(states[0])
    assert lines["params/w"] == "float32[3,3]" and lines["key"] == "key<fry>[]" and lines["skipped/total"] == "int32[]"


def test_steps_that_a_run_removes_while_they_are_read_are_not_damaged(saved, states, monkeypatch):
    """The reader has listed 1 and 2; before it looks at them, the run that is being trained has kept 3 alone."""
    reader, messages = make_store(saved)
    check = reader.check

    def slow(step, **options):
        if (saved / "2").exists():
            shutil.copytree(saved / "2", saved / "3")
            for old in "12":
                shutil.rmtree(saved / old)
        return check(step, **options)

    monkeypatch.setattr(reader, "check", slow)
    with reader:
        found = reader.restore(states[0])
    toy.assert_equal(found.state, states[2])
    assert found.step == 3 and not found.report and not messages
