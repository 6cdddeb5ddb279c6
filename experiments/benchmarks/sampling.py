"""`sample` against a bare `lax.scan` of as many network calls; compilations; the cost of compiling.

Limits: time <= 1.05 at 50 steps, one compilation for all tables of one shape, (trace + compile) / forward <= 1.6 and flat.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import numerics as nu
from diffjax import processes, solvers, times
from experiments.benchmarks import measure

STEPS = 50
PROCESS = processes.cosine()


def draws(solver: Any) -> np.ndarray:
    """[n, 2] which of the two noises (shared, own) each row of a table draws."""
    rows = solver.rows
    shared = np.zeros(len(rows.t), bool) if rows.pz is None else (rows.pz != 0) | (rows.qz != 0)
    own = np.zeros(len(rows.t), bool) if rows.noise is None else rows.noise != 0
    return np.stack([shared, own], axis=1)


@functools.partial(jax.jit, static_argnames=("fn", "noisy"))
def bare(
    fn: Any, noisy: tuple[bool, bool], params: Any, key: Any, x: jax.Array, t: jax.Array, on: jax.Array
) -> jax.Array:
    """x <- fn(x, t_i) for every row, and the normals that the row draws, item by item."""
    keys = nu.item_keys(key, jnp.arange(x.shape[0])) if any(noisy) else None

    def body(x: jax.Array, row: Any) -> Any:
        t, i, on = row
        x = fn(params, x, jnp.broadcast_to(t, x.shape[:1]), None)
        for stream in (0, 1):
            if noisy[stream]:
                add = lambda x, stream=stream: x + 0.1 * nu.item_normal(keys, 2 * i + stream, x)
                x = jax.lax.cond(on[stream], add, lambda x: x, x)
        return x, None

    return jax.lax.scan(body, x, (t, jnp.arange(t.shape[0]), on))[0]


def cases(network: Any, solver: Any) -> dict[str, Any]:
    """The sampler and its baseline, each a function of no argument."""
    fn, params, x = network
    denoiser = diffjax.denoiser(fn, PROCESS, diffjax.from_v, params)
    key, on = jax.random.key(1), draws(solver)
    table = jax.tree.map(lambda r: jnp.asarray(r, jnp.float32 if r.dtype.kind == "f" else None), solver)
    bare_args = (fn, tuple(map(bool, on.any(0))), params, key, x, table.rows.t, jnp.asarray(on))
    return {"sample": lambda: SAMPLE(key, denoiser, table, x), "bare": lambda: bare(*bare_args)}


SAMPLE = jax.jit(diffjax.sample)


def build(name: str, n: int = STEPS) -> Any:
    # off the ends, where some of the methods have no finite coefficients
    return solvers.CATALOGUE[name].build(PROCESS, times.log_snr(PROCESS, n, start=0.98, stop=0.01))


def linear() -> list[str]:
    """The solvers whose rows are `table.Rows`."""
    return [name for name, card in solvers.CATALOGUE.items() if "nonlinear" not in card.flags]


def one_compilation() -> dict[str, int]:
    """Traces of a jitted `sample` over all linear solvers and three grids, padded to one shape."""
    fn, params, x = measure.mlp(32)
    denoiser = diffjax.denoiser(fn, PROCESS, diffjax.from_v, params)
    traces = []

    @jax.jit
    def run(solver: Any) -> Any:
        traces.append(1)
        return diffjax.sample(jax.random.key(0), denoiser, solver, x)

    tables = [build(name, n) for name in linear() for n in (5, 10, 20)]
    p, q = (max(t.rows._asdict()[f].shape[1] for t in tables) for f in ("px", "pd"))
    longest = max(t.evaluations for t in tables)
    for table in tables:
        run(solvers.pad(table, longest, p, q, noise=2))
    return {"tables": len(tables), "traces": len(traces), "executables": run._cache_size()}


def compile_seconds(f: Any, *args: Any) -> float:
    """Processor time to trace, lower and compile with empty caches; other processes do not count in it."""
    jax.clear_caches()
    start = time.process_time()
    jax.jit(lambda *a: f(*a)).lower(*args).compile()
    return time.process_time() - start


def compile_cost(network: Any, lengths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """(trace + compile) of `sample` over that of one forward, medians of interleaved repeats.

    The table that draws noise (`ddpm`) is also compared with a forward that draws one normal per item.
    """
    fn, params, x = network
    denoiser = diffjax.denoiser(fn, PROCESS, diffjax.from_v, params)
    key, t = jax.random.key(0), jnp.zeros(x.shape[0])
    forward = lambda params, x, t: fn(params, x, t, None)
    noisy = lambda key, params, x, t: (
        forward(params, x, t) + nu.item_normal(nu.item_keys(key, jnp.arange(x.shape[0])), 0, x)
    )
    tasks = {f"ddim {n}": (diffjax.sample, key, denoiser, build("ddim", n), x) for n in lengths}
    tasks["ddpm"] = (diffjax.sample, key, denoiser, build("ddpm"), x)
    tasks |= {"forward": (forward, params, x, t), "forward + normal": (noisy, key, params, x, t)}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            seconds[name].append(compile_seconds(*task))
    middle = {name: float(np.median(s)) for name, s in seconds.items()}
    report: dict[str, Any] = {f"ddim {n}": round(middle[f"ddim {n}"] / middle["forward"], 2) for n in lengths}
    report["ddpm over forward + normal"] = round(middle["ddpm"] / middle["forward + normal"], 2)
    return report | {"forward_seconds": round(middle["forward"], 3)}


def run(quick: bool = False) -> dict[str, Any]:
    """All ratios.   `quick`: a few solvers and rounds."""
    rounds = 3 if quick else 21
    names = ("ddim", "dpmpp_2m", "ddpm") if quick else tuple(linear())
    small = measure.mlp()
    report: dict[str, Any] = {"steps": STEPS, "mlp": {}, "dit": {}}
    for name in names:
        report["mlp"][name] = measure.ratio(measure.interleaved(cases(small, build(name)), rounds), "sample", "bare")
    if not quick:
        large = measure.dit()
        for name in ("ddim", "dpmpp_2m", "ddpm"):
            seconds = measure.interleaved(cases(large, build(name)), 5)
            report["dit"][name] = measure.ratio(seconds, "sample", "bare")
    report["one_compilation"] = one_compilation()
    lengths = (10, 1000) if quick else (10, 50, 250, 1000)
    report["compile_mlp"] = compile_cost(small, lengths, 1 if quick else 5)
    if not quick:
        report["compile_dit"] = compile_cost(large, lengths, 3)
    return report


if __name__ == "__main__":
    measure.record("sampling", run())
