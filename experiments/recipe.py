"""The interface of a recipe: a module with `RECIPE = Recipe(...)` and `run(preset) -> {name: number or array}`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax.data.images import grid, save_png, scatter

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results"
NOT_RECIPES = ("benchmarks", "results")
PRESETS = ("full", "tiny")


class RecipeError(ValueError):
    """A recipe was asked for wrongly, or does not keep to the interface."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a figure is expected to be: in [low, high], and finite."""

    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether the figure meets the expectation; one that is not finite never does."""
        return math.isfinite(value) and self.low <= value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f">= {self.low:g}"
        return f"<= {self.high:g}" if math.isinf(self.low) else f"{self.low:g} .. {self.high:g}"


def at_least(low: float) -> Bound:
    """The figure is `low` or more."""
    return Bound(low=low)


def at_most(high: float) -> Bound:
    """The figure is `high` or less."""
    return Bound(high=high)


def between(low: float, high: float) -> Bound:
    """The figure is in [low, high].   Raises: ValueError: an empty range."""
    if not low <= high:
        raise ValueError(f"between(low, high) needs low <= high; got {low} and {high}")
    return Bound(low, high)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is claimed, and by whom.

    Args: ledger: number of the method in the list that this project covers, None for one beside it.   paper: `arXiv:...`, or
    a title.   claim:
    one sentence.   expect: name of a figure that `run` returns -> its bound.   minutes: of the full run, on 2 cores.
    """

    ledger: int | None
    paper: str
    claim: str
    expect: Mapping[str, Bound]
    minutes: float

    def __post_init__(self) -> None:
        if not self.expect or not all(isinstance(b, Bound) for b in self.expect.values()):
            raise ValueError(f"expect must map figures to at_least, at_most or between; got {self.expect!r}")


def slugs() -> list[str]:
    """Every recipe as `family/method`, sorted; modules are not imported for it."""
    files = [p for p in ROOT.glob("*/*.py") if p.parent.name not in NOT_RECIPES]
    found = [p for p in files if re.search(r"^RECIPE\b.*=", p.read_text(encoding="utf-8"), re.MULTILINE)]
    return sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in found)


def load(slug: str) -> Any:
    """The module of a recipe.   Raises: RecipeError: unknown, naming close matches; no Recipe or no `run` in it."""
    known = slugs()
    if slug not in known:
        names = {s: s for s in known} | {s.rpartition("/")[2]: s for s in known}
        close = dict.fromkeys(names[m] for m in difflib.get_close_matches(slug, names, n=3, cutoff=0.5))
        hint = f"did you mean {' or '.join(close)}?" if close else "`python -m experiments table` lists them all"
        raise RecipeError(f"unknown recipe {slug!r}; {hint}")
    module = importlib.import_module(f"{__package__}.{slug.replace('/', '.')}")
    if not isinstance(module.RECIPE, Recipe) or not callable(getattr(module, "run", None)):
        raise RecipeError(f"experiments/{slug}.py needs RECIPE = Recipe(...) and a function run(preset)")
    return module


def title(module: Any) -> str:
    """The method's name: the first line of the module's docstring, up to a colon."""
    return (module.__doc__ or "").strip().splitlines()[0].split(":")[0].rstrip(".")


def measure(slug: str, preset: str) -> tuple[dict[str, float], dict[str, np.ndarray], float]:
    """Run a recipe.   Returns: its numbers, its arrays, the seconds it took.

    Raises: RecipeError: unknown slug or preset; an expected figure that `run` did not return.
    """
    if preset not in PRESETS:
        raise RecipeError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    module = load(slug)
    start = time.perf_counter()
    out = {name: np.asarray(jax.device_get(value)) for name, value in module.run(preset).items()}
    seconds = time.perf_counter() - start
    figures = {name: float(a) for name, a in out.items() if a.ndim == 0}
    missing = [name for name in module.RECIPE.expect if name not in figures]
    if missing:
        raise RecipeError(f"{slug} expects {', '.join(missing)}, but its run returned the figures {sorted(figures)}")
    return figures, {name: a for name, a in out.items() if a.ndim}, seconds


def picture(arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The arrays named `*_grid` ([N, H, W, C] pictures, [N, 2] points) and `*_image` (uint8 [H, W, 3]) side by side."""
    extent = max(
        (float(np.abs(a).max()) for n, a in arrays.items() if n.endswith("_grid") and a.ndim == 2), default=1.0
    )
    parts = [scatter(a, 192, extent) if a.ndim == 2 else grid(a) for n, a in arrays.items() if n.endswith("_grid")]
    parts += [a for n, a in arrays.items() if n.endswith("_image")]
    if not parts:
        return None
    height = max(p.shape[0] for p in parts)
    framed = [np.pad(p, ((0, height - p.shape[0]), (0, 8), (0, 0)), constant_values=255) for p in parts]
    return np.concatenate(framed, axis=1)[:, :-8]


def write(slug: str, figures: Mapping[str, float], arrays: Mapping[str, np.ndarray], seconds: float) -> pathlib.Path:
    """Write `results/<slug>.json`, and `.png` if there is a picture.   Returns: the path of the JSON file."""
    recipe = load(slug).RECIPE
    path = RESULTS / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = picture(arrays)
    path.with_suffix(".png").unlink(missing_ok=True)
    if seen is not None:
        save_png(path.with_suffix(".png"), seen[None], low=0, high=255, scale=1)
    page = {
        "ledger": recipe.ledger,
        "figures": {k: v if math.isfinite(v) else None for k, v in figures.items()},
        "expected": {k: str(b) for k, b in recipe.expect.items()},
        "holds": all(b.holds(figures[k]) for k, b in recipe.expect.items()),
        "minutes": round(seconds / 60, 2),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }
    path.write_text(json.dumps(page, indent=2) + "\n", encoding="utf-8")
    return path


def table() -> str:
    """The page `experiments/README.md`: one line per recipe, from the results that are committed."""
    lines = [
        "# Recipes",
        "",
        "One page of code per published system. `python -m experiments run SLUG` runs one and compares its figures with",
        "what is expected; `--preset tiny` takes seconds and judges nothing. This page is written by",
        "`python -m experiments table`; minutes are those of the committed run.",
        "",
        "| id | recipe | claim | expected | reached | minutes | picture |",
        "|---|---|---|---|---|---|---|",
    ]
    number = lambda recipe: math.inf if recipe.ledger is None else recipe.ledger
    loaded = sorted(((load(slug), slug) for slug in slugs()), key=lambda pair: (number(pair[0].RECIPE), pair[1]))
    for module, slug in loaded:
        recipe, path = module.RECIPE, RESULTS / f"{slug}.json"
        page = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": {}, "minutes": "not run"}
        reached = []
        for name, bound in recipe.expect.items():
            value = page["figures"].get(name)
            mark = "" if value is not None and bound.holds(value) else " **fails**" if page["figures"] else ""
            reached.append(f"{value:.3g}{mark}" if value is not None else "-" + mark)
        image = path.with_suffix(".png")
        cells = (
            "" if recipe.ledger is None else recipe.ledger,
            f"[{title(module)}]({slug}.py), {recipe.paper}",
            recipe.claim,
            "<br>".join(f"{name} {bound}" for name, bound in recipe.expect.items()),
            "<br>".join(reached),
            page["minutes"],
            f"[png]({image.relative_to(ROOT).as_posix()})" if image.exists() else "",
        )
        lines.append("| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
    return "\n".join(lines) + "\n"
