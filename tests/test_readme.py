"""The README is true: its method table is the catalogues', its quickstart runs. Run this file to rewrite the table."""

import pathlib
import re
import sys

import jax
import pytest

from diffjax import references
from diffjax.references import PAPERS, catalogues, cite

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # `experiments` is not installed with the package
from experiments.benchmarks import choose, digits  # noqa: E402

README = pathlib.Path(__file__).parents[1] / "README.md"
TABLE = re.compile(r"(<!-- methods -->\n)(.*)(<!-- end of methods -->)", re.DOTALL)
SOLVERS = re.compile(r"(<!-- solvers -->\n)(.*)(<!-- end of solvers -->)", re.DOTALL)
DIGITS = re.compile(r"(<!-- digits -->\n)(.*)(<!-- end of digits -->)", re.DOTALL)


def test_method_table_is_generated():
    block = TABLE.search(README.read_text())
    assert block and block[2] == references.markdown(), "run `python tests/test_readme.py`"


def test_solver_page_shows_what_was_measured():
    block = SOLVERS.search(README.read_text())
    assert block and block[2] == choose.markdown(), "run `python tests/test_readme.py`"


def test_the_main_job_s_scores_are_those_recorded():
    block = DIGITS.search(README.read_text())
    assert block and block[2] == digits.markdown(), "run `python tests/test_readme.py`"


def test_quickstart_runs():
    code = re.search(r"<!-- quickstart -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    scope = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "quickstart", "exec"), scope)
    x = scope["x"]
    assert x.shape == (256, 2)
    assert 0.7 < float(abs(x).max(-1).mean()) < 2.0  # near the ring that it was trained on


def test_the_example_of_adapters_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<!-- adapters -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    scope = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "adapters", "exec"), scope)
    fn, base = scope["fn"], scope["base"]
    _, trained, _ = scope["adapters"].load_adapter(tmp_path / "edge.safetensors", base)
    fresh = jax.jit(fn.init)(jax.random.key(1), base, scope["x"], scope["t"], scope["cond"])["adapters"]["edge"]
    same = lambda a, b: jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), a, b))
    assert not all(same(trained, fresh)) and all(same(scope["params"]["base"], base))


def test_every_card_has_a_reference():
    cards = {name: card for catalogue in catalogues().values() for name, card in catalogue.items()}
    missing = sorted({c.paper.split("#")[0] for c in cards.values() if c.paper} - set(PAPERS))
    assert missing == []
    assert all(card.summary for card in cards.values())


def test_cite():
    text = cite("dpmpp_2m", "arXiv:2006.11239")
    assert "2211.01095" in text and "Denoising Diffusion Probabilistic Models" in text
    with pytest.raises(ValueError, match="unknown method 'dpm'"):
        cite("dpm")


if __name__ == "__main__":
    page = README.read_text()
    for block, table in ((TABLE, references.markdown), (SOLVERS, choose.markdown), (DIGITS, digits.markdown)):
        page = block.sub(lambda m, table=table: m[1] + table() + m[3], page)
    README.write_text(page)
