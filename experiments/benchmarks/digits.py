"""What the main job reaches: the scores of a finished `diffjax train digits`, recorded; the README's table of them.

`python -m experiments.benchmarks.digits runs/digits-1` reads the scores that the run has written, and the seconds of its
training; `python tests/test_readme.py` then renders the newest record.
"""

from __future__ import annotations

import json
import pathlib
import sys

from experiments.benchmarks.choose import newest, rows_of
from experiments.benchmarks.measure import record

ROWS = {  # row of the table -> score of the run, with its floor
    "precision, classifier features": "precision_classifier",
    "recall, classifier features": "recall_classifier",
    "precision, pixels": "precision_pixels",
    "recall, pixels": "recall_pixels",
    "Frechet distance, random convolution": "frechet_randconv",
}
OTHER = ("label_accuracy", "classifier_test_accuracy", "nn", "near", "copies")


def report(run: pathlib.Path) -> dict[str, object]:
    """The figures of the table from a run's files."""
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    scores = {name: {k: found["scores"][name][k] for k in ("score", "floor", "ratio", "std")} for name in ROWS.values()}
    other = {name: found["other"][name] for name in OTHER}
    return {"steps": found["step"], "seconds": round(last["seconds"]), "n": found["n"], "scores": scores, **other}


def markdown() -> str:
    """The table of the README."""
    d = newest("digits")
    rows = [["score", "samples", "floor", "ratio", "deviation between seeds"]]
    accuracy, classifier = (f"{d[name]:.3f}" for name in OTHER[:2])
    rows += [["label accuracy, by a classifier trained on other pictures", accuracy, classifier, "", ""]]
    for words, name in ROWS.items():
        s = d["scores"][name]
        rows += [[words, f"{s['score']:.3f}", f"{s['floor']:.3f}", f"{s['ratio']:.2f}", f"{s['std']:.3f}"]]
    rows += [["distance to the nearest training picture over held-out's", f"{d['nn']:.3f}", "1", "", ""]]
    rows += [["share closer to training pictures than 95 % of held-out ones", f"{d['near']:.3f}", "0.05", "", ""]]
    return f"{d['steps']} steps on {d['cores']} CPU cores, {d['seconds']} s of training with compilation.\n\n{rows_of(rows)}"


if __name__ == "__main__":
    record("digits", report(pathlib.Path(sys.argv[1])))
