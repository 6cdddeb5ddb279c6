"""Several real processes over loopback: the same losses, parameters and examples as one, saved and restored across counts."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import hosts_program
import jax
import numpy as np
import pytest
import toy

from diffjax.training import hosts
from diffjax.training.cluster import Settings

PROGRAM = pathlib.Path(__file__).parent / "hosts_program.py"
ROOT = pathlib.Path(__file__).parents[2]
LAYOUTS = ("mesh", "fsdp64")

SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "gpu[007-009,012]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip
OURS = {"DIFFJAX_COORDINATOR": "a:1", "DIFFJAX_PROCESSES": "4", "DIFFJAX_PROCESS": "3"}
TORCH = {"MASTER_ADDR": "b", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}
SLURM_PORT = 61440 + 4102 % 4096


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        (OURS, Settings("a:1", 4, 3, None, "DIFFJAX variables")),
        (OURS | TORCH | SLURM | {"DIFFJAX_DEVICES": "2,3"}, Settings("a:1", 4, 3, (2, 3), "DIFFJAX variables")),
        (TORCH, Settings("b:29500", 2, 1, None, "MASTER_ADDR")),
        (TORCH | {"LOCAL_RANK": "1"}, Settings("b:29500", 2, 1, (1,), "MASTER_ADDR")),
        (TORCH | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Settings("b:29500", 2, 1, None, "MASTER_ADDR")),
        ({"MASTER_ADDR": "b", "RANK": "1"}, None),
        (SLURM | {"DIFFJAX_COORDINATOR": "auto"}, Settings(source="JAX")),
        (SLURM, Settings(f"gpu007:{SLURM_PORT}", 8, 5, (1,), "SLURM")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Settings(f"gpu007:{SLURM_PORT}", 8, 5, None, "SLURM")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Settings(f"gpu007:{SLURM_PORT}", 8, 5, (1,), "SLURM")),
        (SLURM | {"SLURM_STEP_NUM_NODES": "8"}, Settings(f"gpu007:{SLURM_PORT}", 8, 5, None, "SLURM")),
        (SLURM | {"JAX_COORDINATOR_PORT": "77"}, Settings("gpu007:77", 8, 5, (1,), "SLURM")),
        (SLURM | {"SLURM_STEP_NODELIST": "n1,n2"}, Settings(f"n1:{SLURM_PORT}", 8, 5, (1,), "SLURM")),
        (SLURM | {"SLURM_STEP_NODELIST": "a[3,7-9]b"}, Settings(f"a3:{SLURM_PORT}", 8, 5, (1,), "SLURM")),
        (SLURM | {"SLURM_STEP_NODELIST": "login"}, Settings(f"login:{SLURM_PORT}", 8, 5, (1,), "SLURM")),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # the script of sbatch
        (SLURM | {"SLURM_PTY_PORT": "40000"}, None),  # an interactive shell
        (MPI, Settings(None, 3, 2, None, "Open MPI")),
        ({"TPU_WORKER_HOSTNAMES": "h0,h1,h2"}, Settings(source="TPU")),
        ({"TPU_WORKER_HOSTNAMES": "h0", "MEGASCALE_NUM_SLICES": "2"}, Settings(source="TPU")),
        ({"TPU_WORKER_HOSTNAMES": "h0"}, None),
    ],
)
def test_detect(environ, found):
    assert hosts.detect(environ) == found


def test_slurm_processes_of_one_step_agree_with_jax_on_who_is_first():
    """JAX's own detection, in this process, on the same variables: the same host, count and number."""
    from jax._src.clusters import SlurmCluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SLURM.items():
            patch.setenv(name, value)
        assert SlurmCluster.is_env_present()
        theirs = SlurmCluster.get_coordinator_address(None, None)
        ours = hosts.detect(SLURM)
        assert theirs.split(":")[0] == ours.coordinator.split(":")[0]
        assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (ours.processes, ours.process)
        assert (SlurmCluster.get_local_process_id(),) == ours.devices


def test_bad_settings():
    with pytest.raises(ValueError, match="DIFFJAX_PROCESS is set, but not DIFFJAX_COORDINATOR and DIFFJAX_PROCESSES"):
        hosts.detect({"DIFFJAX_PROCESS": "1"})
    with pytest.raises(ValueError, match="DIFFJAX_PROCESSES must be a whole number; got 'two'"):
        hosts.detect(OURS | {"DIFFJAX_PROCESSES": "two"})
    with pytest.raises(ValueError, match=r"process must be in \[0, 4\); got 4"):
        hosts.detect(OURS | {"DIFFJAX_PROCESS": "4"})
    with pytest.raises(ValueError, match="coordinator must be host:port, as 10.0.0.1:1234; got 'node7'"):
        hosts.start("node7", 2, 0)
    with pytest.raises(ValueError, match="coordinator must be given with processes, process"):
        hosts.start(processes=2, process=0, environ={})
    with pytest.raises(ValueError, match="processes must be at least 1; got 0"):
        hosts.start("a:1", 0, 0)


def test_one_process_needs_nothing():
    assert hosts.start(environ={}) is None and hosts.start("a:1", 1, 0) is None and not jax.distributed.is_initialized()
    assert hosts.leader() and hosts.share({"a": 1}) == [{"a": 1}] and hosts.first(lambda: "b") == "b"
    np.testing.assert_array_equal(hosts.gather({"w": jax.numpy.arange(3)})["w"], [0, 1, 2])
    hosts.leave(7)  # does nothing
    stop = hosts.Stop()
    assert stop.asked(None) is None and stop.asked(15) == 15 and stop.settled(2) == 2 and stop.exchanges == 0


def test_too_late():
    jax.devices()
    with pytest.raises(RuntimeError, match="before the first JAX computation"):
        hosts.start("127.0.0.1:1", 2, 1, environ={})


def environment(devices=None):
    flags = toy.clean_environment(devices or 1)
    return flags | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(PROGRAM.parent)])}


START = "import sys; from diffjax.training import hosts; hosts.start('127.0.0.1:{}', 2, int(sys.argv[1]), patience=1)"


def test_who_cannot_be_reached_is_named():
    ports = [hosts_program.free_port(), hosts_program.free_port()]
    pipes = {"stderr": subprocess.PIPE, "text": True, "env": environment()}
    children = [
        subprocess.Popen([sys.executable, "-c", START.format(ports[i]), str(i)], **pipes) for i in range(2)
    ]  # fmt: skip
    err = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [1, 1]
    assert f"process 0 of 2 has waited 1 seconds at 127.0.0.1:{ports[0]} for the other processes" in err[0]
    assert f"1 of 2 could not reach the coordinator 127.0.0.1:{ports[1]} (from arguments) within 1 seconds" in err[1]


def launch(n, per, plan, *folders):
    """The launcher with `n` processes of the program."""
    for folder in folders:
        folder.mkdir(exist_ok=True)
    words = [str(PROGRAM), json.dumps(plan), *map(str, folders)]
    return start(["launch", "-n", str(n), "--devices-per-process", str(per), "--", *words])


def start(words):
    """A command of diffjax in a process of its own."""
    command = [sys.executable, "-m", "diffjax", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)


def finish(child, code=0):
    """Wait for a launcher."""
    try:
        out, _ = child.communicate(timeout=240)
    finally:
        child.kill()  # the guard of the launcher stops what is left
    assert child.returncode == code, out


def reports(folder, n):
    """What the `n` processes wrote."""
    return [json.loads((folder / f"REPORT-{i}.json").read_text()) for i in range(n)]


def losses(folder, name):
    rows = [json.loads(text) for text in (pathlib.Path(folder) / f"{name}.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def together(reports, name):
    """The examples of every global batch: the processes' parts side by side."""
    return [sum(parts, []) for parts in zip(*(r[name]["indices"] for r in reports), strict=True)]


@pytest.mark.slow
def test_two_and_four_processes_train_save_and_restore_on_one_and_two(tmp_path):
    """2 x 2 and 4 x 1 to step 4, then 1 x 8 to step 6, then 2 x 1 to step 8: one run, beside one process all the way."""
    folders, counts = [tmp_path / "2x2", tmp_path / "4x1"], [(2, 2), (4, 1)]
    plan = {"steps": 4, "layouts": LAYOUTS}
    children = [launch(*count, plan, folder) for count, folder in zip(counts, folders, strict=True)]
    alone = {name: hosts_program.train(name, tmp_path / "alone", 8)[1] for name in LAYOUTS}
    for child in children:
        finish(child)
    firsts = [reports(folder, n) for folder, (n, _) in zip(folders, counts, strict=True)]
    seconds = [{name: hosts_program.train(name, folder, 6)[1] for name in LAYOUTS} for folder in folders]
    finish(launch(2, 1, {"steps": 8, "layouts": LAYOUTS}, *folders))
    for folder, first, second in zip(folders, firsts, seconds, strict=True):
        third = reports(folder, 2)
        for name in LAYOUTS:
            assert first[0][name]["cut"] == third[0][name]["cut"] == (name == "fsdp64")  # across processes
            assert [r[name]["step"] for r in (first[0], second, third[0])] == [4, 6, 8]
            assert third[0][name]["examples"] == 8 * hosts_program.BATCH and third[0][name]["saved"][-2:] == [6, 8]
            seen = together(first, name) + second[name]["indices"] + together(third, name)
            assert seen == alone[name]["indices"]
            bound = 1e-9 if name.endswith("64") else 1e-6
            np.testing.assert_allclose(losses(folder, name), losses(tmp_path / "alone", name), rtol=bound)
            for part, expected in alone[name]["params"].items():
                np.testing.assert_allclose(third[0][name]["params"][part], expected, rtol=bound, atol=bound)
                assert third[1][name]["params"][part] == third[0][name]["params"][part]


def wait_for(condition, child, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None and time.monotonic() < end, child.communicate()[0] if child.poll() else "too slow"
        time.sleep(0.05)


def running(child, folder, steps):
    """Wait until a run has logged so many steps."""
    log = folder / "mesh.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= steps, child)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    child = launch(2, 1, {"steps": 100_000, "layouts": ["mesh"], "slow": 0.02}, tmp_path)
    try:
        running(child, tmp_path, 6)
        sent = time.monotonic()
        os.kill(int((tmp_path / "PID-1").read_text()), signal.SIGTERM)
        finish(child, code=143)
    finally:
        child.kill()
    assert time.monotonic() - sent < 30
    a, b = (r["mesh"] for r in reports(tmp_path, 2))
    assert a["step"] == b["step"] == a["saved"][-1] >= 6 and a["exit"] == b["exit"] == 143
    assert a["params"] == b["params"] and len(a["indices"]) == len(b["indices"]) == a["step"]


@pytest.mark.slow
def test_a_killed_process_is_noticed_and_the_job_resumes(tmp_path):
    """Without a word from JAX: the launcher says who died, and the same command goes on, to the very same parameters."""
    folder = tmp_path / "killed"
    plan = {"steps": 24, "layouts": ["mesh"], "save_every": 4, "slow": 0.3}
    child = launch(2, 1, plan, folder)
    try:
        running(child, folder, 9)
        sent = time.monotonic()
        os.kill(int((folder / "PID-1").read_text()), signal.SIGKILL)
        out, _ = child.communicate(timeout=60)
        assert time.monotonic() - sent < 30 and child.returncode == 137
    finally:
        child.kill()
    assert "process 1 of 2 was killed by SIGKILL; stopping the others" in out
    assert "process 1 of 2 (pid " in out and "died first, after " in out
    # By an error of a sum with the dead, or by the launcher while it waits for the dead to finish a save.
    assert "process 0 of 2 ended with" in out or "process 0 of 2 was killed by SIG" in out, out[-3000:]
    again = out.splitlines()[-1].removeprefix("resume with: diffjax ")
    assert again.startswith("launch -n 2 --devices-per-process 1 -- ")
    finish(start(shlex.split(again)))
    # Two devices of one process: the sum of two gradients does not depend on who adds them.
    _, plain = hosts_program.train("mesh", tmp_path / "plain", 24, save_every=4, devices=jax.devices()[:2])
    killed = reports(folder, 2)[0]["mesh"]
    assert killed["step"] == 24 and 24 - len(killed["indices"]) in (8, 12, 16, 20)  # it went on from a checkpoint
    assert killed["params"] == plain["params"]
    assert losses(folder, "mesh") == losses(tmp_path / "plain", "mesh")
