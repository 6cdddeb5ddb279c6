"""Interleaved timing, the two networks that are timed, and the file of results."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import networks

RESULTS = pathlib.Path(__file__).parent / "results.jsonl"


def interleaved(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every case in every round, [rounds] each. The order turns, so that no case always follows another."""
    for f in cases.values():
        jax.block_until_ready(f())
    names, seconds = list(cases), {name: np.zeros(rounds) for name in cases}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(cases[name]())
            seconds[name][i] = time.perf_counter() - start
    return seconds


def ratio(seconds: dict[str, np.ndarray], over: str, under: str) -> dict[str, float]:
    """`over` against `under`: of the medians, and of the minima, which a busy machine disturbs least."""
    a, b = seconds[over], seconds[under]
    return {"median": round(float(np.median(a) / np.median(b)), 3), "min": round(float(a.min() / b.min()), 3)}


def mlp(batch: int = 512) -> tuple[Any, Any, jax.Array]:
    """`fn(params, x, t, cond)`, parameters and a state of the MLP for the plane: about 36 thousand parameters."""
    x = jax.random.normal(jax.random.key(0), (batch, 2))
    module = networks.MLP(width=44, depth=2)
    return _network(module, x)


def dit(batch: int = 16, side: int = 32, **fields: Any) -> tuple[Any, Any, jax.Array]:
    """The same of a small DiT for colour pictures."""
    x = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
    module = networks.DiT(**{"width": 128, "depth": 4, "heads": 4, "patch": 4, **fields})
    return _network(module, x)


def _network(module: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
    params = networks.random_parameters(module, x, jnp.zeros(x.shape[0]), gain=0.5)
    return networks.from_linen(module), jax.tree.map(jnp.asarray, params), x


def record(name: str, report: dict[str, Any]) -> None:
    """Print a report and append it to `results.jsonl`; of the machine only its cores and its JAX are told."""
    machine = {"cores": os.cpu_count(), "jax": jax.__version__, "backend": jax.default_backend()}
    line = {"benchmark": name, "date": datetime.date.today().isoformat(), **machine, **report}
    print(json.dumps(report, indent=1))
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
