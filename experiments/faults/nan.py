"""Bursts of NaN in the data: counted, skipped or stepped over, and never in the parameters.

What a run must be equal to, bit for bit: where bad batches are skipped, a run in which these steps count but do nothing; where
it goes back to a checkpoint, a run whose data never held the batches between that checkpoint and the end of the burst.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np

from diffjax import training
from diffjax.training import CheckpointStore, Diverged, FitResult
from experiments.faults import Row, job

TITLE = "NaN burst in the data"
STEPS, SAVE_EVERY, LIMIT = 96, 16, 8


class Edited:
    """Batches of which some are `bad`, full of NaN, and some are `gone`."""

    def __init__(self, batches: Any, bad: Collection[int] = (), gone: Collection[int] = ()) -> None:
        self._batches, self._bad, self._gone = batches, bad, gone

    def __iter__(self) -> Edited:
        return self

    def __next__(self) -> dict:
        while self._batches.batches_done in self._gone:
            next(self._batches)
        place, batch = self._batches.batches_done, next(self._batches)
        return {**batch, "x": np.full_like(batch["x"], np.nan)} if place in self._bad else batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def finite(state: Any) -> bool:
    """Whether parameters, averages and moments are."""
    trees = jax.tree.leaves((state.params, state.ema, state.opt_state))
    return all(bool(np.isfinite(np.asarray(a)).all()) for a in trees)


def trainer(folder: pathlib.Path) -> Callable[..., FitResult]:
    """`train(name, steps, bad=, gone=, state=, start=, ...)`, all by one compiled program."""
    made = job.make(32)

    def train(
        name: str,
        steps: int = STEPS,
        *,
        bad: Any = (),
        gone: Any = (),
        state: Any = None,
        start: int = 0,
        **options: Any,
    ) -> FitResult:
        where = folder / name
        with (
            CheckpointStore(where / "checkpoints", keep_latest=3, say=lambda text: None) as store,
            contextlib.closing(made.batches()) as stream,
        ):
            stream.set_state({**stream.get_state(), "batches": start})
            return training.fit(
                made.state if state is None else state, made.train_step, Edited(stream, bad, gone), steps=steps,
                store=store, save_every=SAVE_EVERY, per_dispatch=8, stream=io.StringIO(), log_every=8,
                metrics_file=where / "metrics.jsonl", devices=jax.devices()[:1], max_skipped=LIMIT, **options,
            )  # fmt: skip

    return train


def left_out(train: Callable[..., FitResult], bad: Collection[int]) -> Any:
    """The state of a run in which the steps of the bad batches count, and do nothing."""
    state = None
    for i in range(STEPS):
        if i in bad:
            counts = {**state.skipped, "total": state.skipped["total"] + 1}
            state = dataclasses.replace(state, step=state.step + 1, skipped=counts)
        elif i == 0 or i - 1 in bad:
            end = min([b for b in bad if b > i], default=STEPS)
            state = train(f"part{i}", end, state=state, start=i).state
    return state


def run(folder: pathlib.Path, quick: bool) -> Iterator[Row]:
    """Bursts that are skipped, that end a run, and that a run goes around; quick: one of each."""
    train = trainer(folder)
    bursts = [(20, 21, 45)] if quick else [(20, 21, 45), (5, 30, 31, 32, 33, 34, 35, 36, 77), (90, 91, 92)]
    good, counts = 0, []
    for i, bad in enumerate(bursts):
        found = train(f"skip{i}", bad=bad).state
        counts.append(int(found.skipped["total"]))
        good += finite(found) and counts[-1] == len(bad) and job.digest(found) == job.digest(left_out(train, bad))
    asked = [len(bad) for bad in bursts]
    yield Row(
        "NaN in a few batches, skipped", len(bursts), good,
        f"{counts} updates refused of {asked} bad ones; equal bit for bit to runs in which these steps do nothing",
    )  # fmt: skip

    held = 0
    try:
        train("long", bad=range(40, STEPS))
    except Diverged as error:
        with CheckpointStore(folder / "long" / "checkpoints") as store:
            last = store.restore(job.make(32).state)
        clean = train("until", 40).state
        held = int(job.digest(last.state.params) == job.digest(clean.params) and "not finite" in str(error))
    yield Row(
        "NaN without an end", 1, held,
        f"stopped after {LIMIT} in a row; the checkpoint holds the parameters of before the burst bit for bit",
    )  # fmt: skip

    good, cases = 0, [(36, 44)] if quick else [(36, 44), (36, 51), (16, 24), (60, 80)]
    notes = []
    for i, (first, after) in enumerate(cases):
        found = train(f"rewind{i}", bad=range(first, after), on_bad="rewind")
        begin, rewinds = first - first % SAVE_EVERY, (after - first) // LIMIT
        gone = range(begin, first + LIMIT * rewinds)
        rest = range(first + LIMIT * rewinds, after)  # too few to go back once more
        clean = train(f"clean{i}", bad=rest, gone=gone)
        events = [json.loads(line) for line in (folder / f"rewind{i}" / "metrics.jsonl").read_text().splitlines()]
        logged = sum("rewind" in line for line in events)
        same = job.digest(found.state) == job.digest(clean.state)
        good += finite(found.state) and same and found.rewinds == logged == rewinds
        notes.append(f"{after - first} bad: {found.rewinds} back, {int(found.state.skipped['total'])} skipped")
    yield Row(
        "NaN burst, back to the last good checkpoint", len(cases), good,
        f"{'; '.join(notes)}; equal bit for bit to runs without these data",
    )  # fmt: skip
