import json
import math

import numpy as np
import pytest

from experiments import __main__ as command
from experiments import recipe
from experiments.recipe import Recipe, at_least, at_most, between

TOY = '''"""A toy: two numbers."""
import numpy as np
from experiments.recipe import Recipe, at_least, at_most
RECIPE = Recipe(ledger=7, paper="none", claim="a | b", expect={"a": at_least(1.0), "b": at_most(2.0)}, minutes=1)
def run(preset):
    return {"a": VALUE, "b": 2.0, "free": 5.0, "points_grid": np.eye(2), "curve": np.arange(3.0)}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Recipes of a temporary folder: `write(value)` makes toy/a.py."""
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recipe.importlib, "import_module", lambda name: modules[name])
    modules = {}

    def write(value, name="a", text=TOY):
        path = tmp_path / "toy" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("VALUE", f"float('{value}')"))
        module = type(recipe)(name)
        exec(compile(path.read_text(), path, "exec"), module.__dict__)
        modules[f"experiments.toy.{name}"] = module

    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "helper.py").write_text("x = 1  # a module without RECIPE is no recipe\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old.py").write_text("RECIPE = 1\n")
    write(1.5)
    return write


@pytest.mark.parametrize(
    ("bound", "inside", "outside", "text"),
    [
        (at_least(2), [2, 9.0], [1.999, -5], ">= 2"),
        (at_most(1e-5), [1e-5, -1], [1.1e-5], "<= 1e-05"),
        (between(-1, 1), [-1, 0, 1], [-1.01, 1.01], "-1 .. 1"),
    ],
)
def test_bounds(bound, inside, outside, text):
    assert all(map(bound.holds, inside)) and not any(map(bound.holds, outside)) and str(bound) == text
    assert not any(map(bound.holds, [math.nan, math.inf, -math.inf]))


def test_bad_recipes():
    with pytest.raises(ValueError, match="low <= high; got 2 and 1"):
        between(2, 1)
    with pytest.raises(ValueError, match="expect must map figures"):
        Recipe(1, "p", "c", {"a": 3.0}, 1)
    with pytest.raises(ValueError, match="expect must map figures"):
        Recipe(1, "p", "c", {}, 1)


def test_every_module_with_a_recipe_is_found_and_is_one():
    assert {"survey/principles", "guidance/ddim_cfg"} <= set(recipe.slugs())
    for slug in recipe.slugs():
        module = recipe.load(slug)
        assert module.RECIPE.claim and module.RECIPE.paper and module.RECIPE.minutes > 0 and recipe.title(module)


def test_discovery_reads_folders(toy):
    toy(1.0, "b")
    assert recipe.slugs() == ["toy/a", "toy/b"]


def test_an_unknown_slug_names_close_matches(capsys):
    assert command.main(["run", "survey/principle"]) == 2
    assert "unknown recipe 'survey/principle'; did you mean survey/principles?" in capsys.readouterr().err
    assert command.main(["run", "ddim_cgf"]) == 2
    assert "did you mean guidance/ddim_cfg" in capsys.readouterr().err
    assert command.main(["run", "zzzz"]) == 2
    assert "lists them all" in capsys.readouterr().err


def test_a_run_prints_and_writes_its_figures(toy, tmp_path, capsys):
    assert command.main(["run", "toy/a"]) == 0
    out = capsys.readouterr().out
    assert ">= 1" in out and "<= 2" in out and "FAILS" not in out and "free" in out
    page = json.loads((tmp_path / "results/toy/a.json").read_text())
    assert page["holds"] and page["figures"] == {"a": 1.5, "b": 2.0, "free": 5.0} and page["expected"]["a"] == ">= 1"
    assert (tmp_path / "results/toy/a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_a_claim_that_fails_is_reported_with_its_figures(toy, tmp_path, capsys, value):
    toy(value)
    assert command.main(["run", "toy/a"]) == 1
    assert "FAILS" in capsys.readouterr().out
    page = json.loads((tmp_path / "results/toy/a.json").read_text())
    assert not page["holds"] and page["figures"]["a"] == (None if math.isnan(value) else 0.5)
    assert "**fails**" in recipe.table()


def test_tiny_runs_write_nothing(toy, tmp_path, capsys):
    toy(0.0)  # a tiny run judges no claim
    assert command.main(["run", "toy/a", "--preset", "tiny"]) == 0
    assert command.main(["tiny"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"
    assert not (tmp_path / "results" / "toy").exists()


def test_one_broken_recipe_does_not_hide_the_others(toy, capsys):
    toy(math.nan, "b")
    toy(1.0, "c", TOY.replace('"a": VALUE, ', ""))
    assert command.main(["tiny"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("passed toy/a") and "FAILED toy/b" in lines[1] and "not finite: a" in lines[1]
    assert "toy/c expects a" in lines[2] and lines[3] == "1 passed, 2 failed"


def test_shares_cover_every_recipe_once(toy, capsys):
    for name in "bcde":
        toy(1.0, name)
    parts = [command.share(f"{k}/3") for k in (7, 8, 9)]
    assert sorted(sum(parts, [])) == recipe.slugs() and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert command.main(["tiny", "--share", "1/0"]) == 2
    assert "--share must be K/N" in capsys.readouterr().err


def test_changed_recipes(toy, tmp_path, capsys):
    import subprocess

    git = lambda *args: subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t", *args], cwd=tmp_path, check=True,
                                       capture_output=True)  # fmt: skip
    toy(1.0, "b")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    assert command.changed("HEAD") == []
    toy(2.0, "b")
    toy(3.0, "new")
    assert command.changed("HEAD") == ["toy/b", "toy/new"]
    (tmp_path / "toy" / "helper.py").write_text("x = 2\n")
    assert command.changed("HEAD") == ["toy/a", "toy/b", "toy/new"]
    assert command.main(["tiny", "--changed", "nowhere"]) == 2
    assert "--changed nowhere" in capsys.readouterr().err


def test_pictures_stand_side_by_side():
    parts = {"a_grid": np.zeros((4, 8, 8, 1)), "b_grid": np.ones((5, 2)), "c_image": np.zeros((10, 12, 3), np.uint8)}
    assert recipe.picture(parts).shape == (192, 66 + 8 + 192 + 8 + 12, 3)
    assert recipe.picture({"curve": np.zeros(3)}) is None


def test_the_committed_table_is_the_generated_one():
    assert (recipe.ROOT / "README.md").read_text(encoding="utf-8") == recipe.table()


def test_committed_results_are_of_the_committed_claims():
    for slug in recipe.slugs():
        path, expect = recipe.RESULTS / f"{slug}.json", recipe.load(slug).RECIPE.expect
        page = json.loads(path.read_text(encoding="utf-8"))
        assert page["expected"] == {name: str(bound) for name, bound in expect.items()}, slug
        value = lambda name, page=page: math.nan if page["figures"][name] is None else page["figures"][name]
        assert page["holds"] == all(bound.holds(value(name)) for name, bound in expect.items()), slug
        assert path.stat().st_size < 10_000 and path.with_suffix(".png").stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["survey/principles", "guidance/ddim_cfg"])
def test_tiny_presets_run(slug):
    figures, arrays, _ = recipe.measure(slug, "tiny")
    assert all(map(math.isfinite, figures.values()))
    assert recipe.picture(arrays).dtype == np.uint8
