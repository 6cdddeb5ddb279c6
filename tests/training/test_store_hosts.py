"""Two processes: a failure on one is known to both, nobody waits for a process that has failed, and both choose one step."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import toy


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_processes_agree_on_failures_and_steps(tmp_path):
    script, port = pathlib.Path(__file__).with_name("store_processes.py"), str(free_port())
    root = str(pathlib.Path(__file__).parents[2])
    env = toy.clean_environment(2) | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(i), port, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=env,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outs = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], outs
    reports = [json.loads(out.split("REPORT ")[1].splitlines()[0]) for out, _ in outs]
    assert [report.pop("said") for report in reports] == [True, False]  # process 0 speaks for all
    assert reports[0] == reports[1]
    assert reports[0] == {
        "part": [False, [1, 2]],
        "part_fast": True,
        "after_part": [True, [2, 4]],
        "manifest": [False, [2, 4]],
        "after_manifest": [True, [4, 6]],
        "read": True,
        "fallback": [4, [4.0], 1],
        "part_of": [4, [4.0]],
        "aside": [True, [4, 6]],
        "failures": [
            "process 0: process 1 could not write its part; process 1: [Errno 28] No space left on device; "
            "the checkpoints 1, 2 are intact",
            "process 0: [Errno 28] No space left on device; process 1: process 0 could not write its part; "
            "the checkpoints 2, 4 are intact",
        ],
    }
