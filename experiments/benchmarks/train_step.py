"""A training step (AdamW, clipping, guard, averages) against `value_and_grad` alone, and many small steps per dispatch.

Limit: <= 1.10 for the DiT with one average. Each further average is reported.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import diffjax
from diffjax import losses, processes
from diffjax.training import devices, ema, init_state, make_train_step
from diffjax.training.optimizer import adamw
from experiments.benchmarks import measure

PROCESS = processes.cosine()
DECAYS = (0.999, 0.99, 0.9)


def parts(network: Any, emas: int) -> tuple[Any, Any, Any]:
    """(state, train step, model) with that many averages."""
    fn, params, _ = network
    averages = {f"ema{i}": ema.decay(DECAYS[i]) for i in range(emas)}
    optimizer = adamw(1e-4, clip=1.0, weight_decay=0.01)
    model = lambda p: diffjax.denoiser(fn, PROCESS, diffjax.from_v, p)
    step = make_train_step(model, losses.v_prediction(), optimizer, emas=averages)
    return init_state(params, optimizer, 0, emas=averages), step, model


def grad_only(network: Any) -> Any:
    """Loss and gradient of the same batch, jitted: no update."""
    _, params, x = network
    _, step, model = parts(network, 0)
    mean = lambda p, key: step.loss(key, model(p), x, None)[0].mean()
    run = jax.jit(jax.value_and_grad(mean))
    return lambda: run(params, jax.random.key(0))


class Stepper:
    """A train step with its state, donated and kept between calls; `k` steps per call."""

    def __init__(self, network: Any, emas: int, k: int = 1) -> None:
        state, step, _ = parts(network, emas)
        self.driver = devices.mesh(step, devices=jax.devices()[:1], per_dispatch=k)
        self.state = self.driver.place(state)
        x = network[2]
        self.batches = self.driver.put({"x": jnp.stack([x] * k)})
        self.k = jnp.int32(k)

    def __call__(self) -> Any:
        """Run it."""
        self.state, metrics = self.driver.call(self.state, self.batches, self.k)
        return metrics, self.state.params


def run(quick: bool = False) -> dict[str, Any]:
    """All ratios.   `quick`: the MLP alone."""
    report: dict[str, Any] = {}
    if not quick:
        network = measure.dit()
        cases = {"grad": grad_only(network), **{f"{n} ema": Stepper(network, n) for n in (1, 2, 3)}}
        seconds = measure.interleaved(cases, 15)
        report["dit"] = {name: measure.ratio(seconds, name, "grad") for name in list(cases)[1:]}
    network = measure.mlp(64)
    sizes = (1, 4) if quick else (1, 4, 16)
    cases = {"grad": grad_only(network), **{f"{k} per dispatch": Stepper(network, 1, k) for k in sizes}}
    seconds = measure.interleaved(cases, 5 if quick else 201)
    for k in sizes:
        seconds[f"{k} per dispatch"] = seconds[f"{k} per dispatch"] / k
    report["mlp_per_step"] = {name: measure.ratio(seconds, name, "grad") for name in list(cases)[1:]}
    return report


if __name__ == "__main__":
    measure.record("train_step", run())
