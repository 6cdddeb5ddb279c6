"""`recommended` on trained networks: the distance to a fine trajectory from the same start, at the same evaluations.

    python -m experiments.benchmarks.solver_networks              # a class-conditional MLP, trained here on eight Gaussians
    python -m experiments.benchmarks.solver_networks RUN_FOLDER   # the model of a run, with classes

distance = ||x - x_fine|| of every item at t = 0, rms and median over the batch; x_fine is from 1000 steps of
`exp_ab3_eps`. Without guidance and with weight 3.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffjax
from diffjax import data, guidance, losses, networks, processes, solvers, times, training
from experiments.benchmarks import measure

EVALUATIONS = (5, 8, 10, 15, 20, 30, 50)
OTHERS = {
    "dpmpp_2m": ("karras", "log_snr"),
    "dpmpp_3m": ("log_snr",),
    "exp_ab3_eps": ("karras", "log_snr"),
    "exp_ab3_v": ("log_snr",),
    "exp_ab4_x0": ("log_snr",),
    "unipc2_x0": ("karras", "log_snr"),
    "unipc3_x0": ("karras", "log_snr"),
}
RUN = jax.jit(diffjax.sample)


@functools.cache
def plane(steps: int) -> Any:
    """A class-conditional denoiser of eight Gaussians on a ring, trained with the labels dropped one time in ten."""
    process, net = processes.cosine(), networks.from_linen(networks.MLP(width=128, depth=3, num_classes=8))
    model = lambda params: diffjax.denoiser(net, process, diffjax.from_v, params, null=8)
    read = data.load("gaussians").read("train")
    x, label = jnp.asarray(read["x"]), jnp.asarray(read["label"], jnp.int32)
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    step = training.make_train_step(model, losses.v_prediction(label_drop=0.1), adam)
    params = net.init(jax.random.key(0), x[:2], jnp.zeros(2), label[:2])

    def batch(i: Any) -> dict[str, Any]:
        k = jax.random.randint(jax.random.fold_in(jax.random.key(2), i), (256,), 0, len(x))
        return {"x": x[k], "label": label[k]}

    state = training.init_state(params, adam, jax.random.key(1))
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, i: step(s, batch(i)), s, jnp.arange(steps)))(state)
    return model(state.params), (2,), 8


def folder(path: str) -> Any:
    """The denoiser of a run, the shape of its items and its number of classes."""
    run = diffjax.load(path)
    if run.num_classes is None:
        raise ValueError(f"{path} holds a model without classes; guidance needs one with classes")
    return run.denoiser, run.shape, run.num_classes


def distances(
    denoiser: Any, shape: tuple[int, ...], classes: int, weight: float, n: int, counts: Any
) -> dict[str, Any]:
    """`[method] = [[rms, median] at every number of evaluations]`."""
    process = denoiser.process
    guided = denoiser if weight == 1 else guidance.cfg(weight)(denoiser)
    guided = guided.bind(jnp.arange(n) % classes)
    x = process.prior(jax.random.key(5), (n, *shape))
    fine = solvers.CATALOGUE["exp_ab3_eps"].build(process, times.log_snr(process, 1000))
    exact = np.asarray(RUN(jax.random.key(0), guided, fine, x), np.float64)
    made: dict[str, list[Any]] = {"recommended": [solvers.recommended(process, k, guidance=weight) for k in counts]}
    for name, grids in OTHERS.items():
        for grid in grids:
            spaced = [times.GRIDS[grid].build(process, k) for k in counts]
            made[f"{name} {grid}"] = [solvers.CATALOGUE[name].build(process, g) for g in spaced]
    padded = [
        solvers.pad(solvers.compact(s), max(counts), 1, 6) for group in made.values() for s in group
    ]  # compiled once
    end = np.array([RUN(jax.random.key(0), guided, s, x) for s in padded], np.float64)
    squared = ((end - exact) ** 2).reshape(len(made), len(counts), n, -1).sum(-1)
    both = np.sqrt(np.stack([squared.mean(-1), np.median(squared, axis=-1)], axis=-1))
    return {name: [[float(f"{v:.3g}") for v in pair] for pair in row] for name, row in zip(made, both, strict=True)}


def run(path: str | None = None, quick: bool = False) -> dict[str, Any]:
    """All distances; `quick`: a network that is hardly trained, two numbers of evaluations."""
    model = folder(path) if path else plane(20 if quick else 2000)
    counts, n = (EVALUATIONS[:2], 8) if quick else (EVALUATIONS, 128 if path else 256)
    report: dict[str, Any] = {"network": "run" if path else "plane", "evaluations": list(counts)}
    for weight in (1.0, 3.0):
        report[f"guidance {weight:g} [rms, median]"] = distances(*model, weight, n, counts)
    return report


if __name__ == "__main__":
    measure.record("solver_networks", run(*sys.argv[1:2]))
