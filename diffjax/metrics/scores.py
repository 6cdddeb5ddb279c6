"""Every score of a sample set beside its floor: what the same score gives real data of the same size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from diffjax.metrics.classify import c2st
from diffjax.metrics.features import FeatureExtractor, check_samples, pixels, random_convolution
from diffjax.metrics.gaussian import frechet
from diffjax.metrics.kernels import energy, kid, mmd
from diffjax.metrics.neighbours import density_coverage, precision_recall
from diffjax.metrics.streaming import score
from diffjax.metrics.transport import ASSIGNMENT_LIMIT, exact_w2, sliced_wasserstein
from diffjax.types import Metric

METRICS: tuple[Callable[..., Metric], ...] = (
    frechet, kid, mmd, energy, sliced_wasserstein, exact_w2, precision_recall, density_coverage, c2st,
)  # fmt: skip
NO_RATIO = ("kid", "kid_standard_error", "mmd", "energy", "c2st_p_value")  # floors around zero: look at differences
PARTS = {"kid": ("kid", "kid_standard_error"), "c2st": ("c2st_accuracy", "c2st_p_value")}


def _name(part: str, extractor: FeatureExtractor) -> str:
    """'frechet_pixels'; Inception's own names only for features of Inception."""
    if extractor.inception:
        return {"frechet": "fid"}.get(part, part) + f"_{extractor.name}"
    return f"{part.replace('kid', 'kernel')}_{extractor.name}"


def _method(build: Callable[..., Metric]) -> Callable[..., Metric]:
    """The function itself, where its options are set by `functools.partial`."""
    return build.func if isinstance(build, functools.partial) else build


def _parts(name: str, value: Any) -> dict[str, float]:
    """A score as named floats."""
    if not isinstance(value, dict):
        return {name: value}
    return dict(zip(PARTS.get(name, tuple(value)), value.values(), strict=True))


def distribution_scores(
    real_a: Any,
    real_b: Any,
    fake: Any,
    extractors: Sequence[FeatureExtractor] | None = None,
    metrics: Iterable[Callable[..., Metric]] = METRICS,
    floors: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every metric in every feature space for fake data and, as its floor, for real data of the same number.

    score = metric(real_a)(fake[:n])   floor = mean_j metric(real_a)(real_b[j n : (j + 1) n])   n = min(len(real_b), len(fake))

    Scores depend on the number of items, so both take `n` of them against the whole of `real_a`; shuffle sets that are
    sorted. `real_a`, `real_b`, and the data that trained an extractor, must be disjoint: features trained on the
    reference spoil the floor. All in one range. Exact transport is left out where the sets differ in size or hold more
    than 2000 items.

    Args: real_a: [N, ...] the reference.   real_b: [M, ...] other real items, cut
        into as many disjoint sets of n as they give: the floor is the mean over them.   fake: [K, ...] samples.   extractors:
        default pixels and, for pictures, the random convolution.   metrics: factories `(reference, extractor) ->
        Metric`, options set by `functools.partial`.
    Returns: plain data, ready for JSON: `{'n', 'reference', 'scores': {'frechet_pixels': {'score', 'floor', 'ratio'},
        ...}}`; a ratio is None for scores whose floor is about zero. 'fid' is only in the name of a score of Inception's
        features.
    Raises: ValueError: shapes that differ, NaN, too few items, two extractors of one name.
    """
    real_a = check_samples("real_a", real_a)
    real_b = check_samples("real_b", real_b, shape=real_a.shape[1:])
    fake = check_samples("fake", fake, shape=real_a.shape[1:])
    if extractors is None:
        extractors = [pixels()] + ([random_convolution()] if real_a.ndim == 4 and min(real_a.shape[1:3]) >= 4 else [])
    names = [e.name for e in extractors]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"extractors must have different names, at least one; got {names}")
    n = min(len(real_b), len(fake))
    sets = [real_b[i : i + n] for i in range(0, len(real_b) - n + 1, n)]
    transport = len(real_a) == n <= ASSIGNMENT_LIMIT
    metrics = [build for build in metrics if _method(build) is not exact_w2 or transport]
    out: dict[str, dict[str, float | None]] = {}
    for extractor in extractors:
        # features are taken once; the metrics then work on them as they are
        ref, made = extractor(real_a), extractor(fake[:n])
        reals = [extractor(x) for x in sets] if floors is None else []
        for build in metrics:
            metric, method = build(ref, pixels()), _method(build).__name__
            real = [_parts(method, score(metric, x)) for x in reals]
            for part, value in _parts(method, score(metric, made)).items():
                if floors is None:
                    floor = float(np.mean([found[part] for found in real]))
                else:
                    floor = floors["scores"][_name(part, extractor)]["floor"]
                ratio = value / floor if part not in NO_RATIO and floor > 0 else None
                out[_name(part, extractor)] = {"score": value, "floor": floor, "ratio": ratio}
    return {"n": n, "reference": len(real_a), "scores": out}


def average(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several results of `distribution_scores`, for example of several sample seeds, with their spread.

    Returns: the same layout, each entry with `std`, the standard deviation of its scores (0 for one result).
    Raises: ValueError: no results, or results of other scores or sizes.

    Example:
        >>> one = {"n": 4, "reference": 4, "scores": {"frechet_pixels": {"score": 2.0, "floor": 1.0, "ratio": 2.0}}}
        >>> average([one, one])["scores"]["frechet_pixels"]
        {'score': 2.0, 'floor': 1.0, 'ratio': 2.0, 'std': 0.0}
    """
    kinds = {(r["n"], r["reference"], tuple(r["scores"])) for r in results}
    if len(kinds) != 1:
        raise ValueError(f"results must be of one kind, at least one; got {len(results)} results of {len(kinds)} kinds")
    out = {}
    for name in results[0]["scores"]:
        scores = [r["scores"][name]["score"] for r in results]
        floor = float(np.mean([r["scores"][name]["floor"] for r in results]))
        mean = float(np.mean(scores))
        ratio = mean / floor if results[0]["scores"][name]["ratio"] is not None and floor > 0 else None
        out[name] = {"score": mean, "floor": floor, "ratio": ratio, "std": float(np.std(scores))}
    return {"n": results[0]["n"], "reference": results[0]["reference"], "scores": out}


def table(result: dict[str, Any], title: str | None = None) -> Table:
    """A rich table of `distribution_scores` or `average`: score, floor, ratio. Print it with `rich.print`.

    Example:
        >>> one = {"n": 4, "reference": 4, "scores": {"frechet_pixels": {"score": 2.0, "floor": 1.0, "ratio": 2.0}}}
        >>> table(one).row_count
        1
    """
    rows = Table(
        title=title or f"{result['n']} samples against {result['reference']} real items; floor: real against real"
    )
    spread = any("std" in entry for entry in result["scores"].values())
    for i, column in enumerate(("", "score", *(["+-"] if spread else []), "floor", "ratio")):
        rows.add_column(column, justify="right" if i else "left", no_wrap=True)
    show = lambda v: "-" if v is None or math.isnan(v) else f"{v:.4g}"
    for name, entry in result["scores"].items():
        rows.add_row(name, *(show(entry.get(k)) for k in ("score", *(["std"] if spread else []), "floor", "ratio")))
    return rows
