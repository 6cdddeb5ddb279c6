"""One finished tiny run with labels, trained once, and a way to call the command line."""

import contextlib
import io
import shutil
from typing import NamedTuple

import pytest
from cli_tools import TINY

from diffjax.cli import evaluate, hooks, main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys):
    """`call("train", ...) -> (code, stdout, stderr)`, in this process."""

    def run(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return Result(code, *capsys.readouterr())

    return run


def small(patch):
    """Fewer points in pictures and scores, all of one size, so that one compiled sampler serves them all."""
    patch.setattr(evaluate, "LARGEST", 64)
    patch.setattr(hooks, "POINTS", 64)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder, stdout) of a run of 30 steps on a mixture with 8 labels."""
    folder = tmp_path_factory.mktemp("runs") / "gaussians"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        small(patch)
        assert main(["train", "gaussians", "--run", str(folder), *TINY]) == 0
    return folder, out.getvalue()


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(trained[0], tmp_path / "copied")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    small(monkeypatch)
