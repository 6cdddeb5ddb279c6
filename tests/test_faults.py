"""The faults command: few faults of each kind are injected, and everything holds; it fails if something does not."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # `experiments` is not installed with the package
from experiments.faults import Row  # noqa: E402
from experiments.faults import __main__ as command  # noqa: E402


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "faults")
    return tmp_path / "faults"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kill", "damage", "disk"])
def test_injected_faults_are_held(name, results, capsys):
    assert command.main([name, "--quick"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out.splitlines()
    assert len(out) >= 3 and "FAILS" not in "".join(out) and not results.exists()


class Fault:
    TITLE = "toy"

    def __init__(self, rows):
        self.rows = rows

    def run(self, folder, quick):
        assert folder.is_dir() and not list(folder.iterdir())
        yield from self.rows if not quick else self.rows[:1]
        if len(self.rows) == 3:
            raise OSError("broken | off")


def test_the_table_is_printed_and_stored(results, monkeypatch, capsys):
    rows = [Row("one", 2, 2, "a"), Row("two", 3, 1, "b")]
    faults = {"good": Fault(rows[:1]), "bad": Fault(rows), "broken": Fault([*rows[:1], *rows[:1], *rows[:1]])}
    monkeypatch.setattr(command, "modules", lambda: faults)
    assert command.main(["good"]) == 0
    assert command.main(["bad", "--quick"]) == 0 and "FAILS" not in capsys.readouterr().out
    assert command.main(["good", "bad"]) == 1
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.endswith("FAILS")]
    assert line.split() == ["two", "3", "1", "b", "FAILS"]
    assert command.main(["broken"]) == 1
    stored = json.loads((results / "table.json").read_text())["faults"]
    assert {name: stored[name]["rows"] for name in ("good", "bad")} == {
        "good": [["one", 2, 2, "a"]], "bad": [["one", 2, 2, "a"], ["two", 3, 1, "b"]],
    }  # fmt: skip
    assert stored["broken"]["rows"][-1] == ["toy", 1, 0, "broke off: OSError: broken | off"]
    text = (results / "table.md").read_text()
    assert "| two | 3 | 1 | b |" in text and "broken / off" in text
    assert (
        command.main(["nothing"]) == 2 and "there is no fault nothing; there are good, bad" in capsys.readouterr().err
    )


def test_every_module_with_a_title_is_a_fault():
    found = command.modules()
    assert list(found) == ["damage", "data", "disk", "kill", "nan", "peer", "signals", "soak"]
    assert all(callable(module.run) and isinstance(module.TITLE, str) for module in found.values())
