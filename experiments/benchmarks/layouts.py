"""How far float32 training drifts between layouts: 50 steps of a small transformer against the same on one device.

The sums are the same and their order is not. Eight CPU devices, in a process of its own; figures are the largest relative
difference of the losses and the largest difference of a parameter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

STEPS, BATCH, SIDE = 50, 16, 8
# name of the driver, (data, fsdp, model, sequence)
WAYS = {
    "data, mesh": ("mesh", (8, 1, 1, 1)),
    "data, pmap": ("pmap", (8, 1, 1, 1)),
    "data and fsdp, shard_map": ("shard_map", (2, 4, 1, 1)),
    "fsdp, mesh": ("mesh", (1, 8, 1, 1)),
    "model and sequence, mesh": ("mesh", (2, 1, 2, 2)),
}


def drift() -> dict[str, Any]:
    """Differences by optimizer and way."""
    import jax
    import numpy as np
    import optax

    import diffjax
    from diffjax import losses, networks, prediction, processes, times
    from diffjax.training import Layout, adamw, devices, init_state, make_train_step

    net = networks.DiT(width=32, depth=1, heads=4)
    rng = np.random.default_rng(0)
    rows = lambda i: {"x": np.roll(x, i, axis=1)}
    x = rng.normal(size=(BATCH, SIDE, SIDE, 1)).astype(np.float32)
    params = networks.random_parameters(net, x[:1], np.zeros(1, np.float32), gain=0.5)
    fn, process = networks.from_linen(net), processes.cosine()
    model = lambda p: diffjax.denoiser(fn, process, prediction.from_v, p)
    law, weight = times.LAWS["uniform"].build(), times.WEIGHTS["unit"].build()
    loss = losses.denoising_loss(times=law, space=prediction.to_x0, weight=weight)

    def run(name: str, sizes: tuple[int, ...], optimizer: Any) -> tuple[Any, Any]:
        layout = Layout(*sizes, rules=networks.partition_rules(net))
        step = make_train_step(model, loss, optimizer)
        own = jax.devices()[: layout.size]
        driver = devices.driver(name, step, layout=layout, devices=own, per_dispatch=STEPS)
        end, metrics = driver.step(driver.place(init_state(params, optimizer, 0)), [rows(i) for i in range(STEPS)])
        return np.asarray(metrics["loss"]), [np.asarray(a) for a in jax.tree.leaves(end.params)]

    report: dict[str, Any] = {}
    for label, optimizer in (("sgd", optax.sgd(0.05)), ("adam", adamw(1e-3, clip=1.0))):
        one, weights = run("mesh", (1, 1, 1, 1), optimizer)
        for way, (name, sizes) in WAYS.items():
            got, moved = run(name, sizes, optimizer)
            report[f"{label}, {way}"] = {
                "losses": float(f"{np.abs(got / one - 1).max():.1e}"),
                "parameters": float(f"{max(np.abs(a - b).max() for a, b in zip(moved, weights, strict=True)):.1e}"),
            }
    return report


if __name__ == "__main__":
    if sys.argv[1:] == ["drift"]:
        print(json.dumps(drift()))
    else:
        from experiments.benchmarks import collectives, measure

        measure.record("layouts", collectives.child("-m", "experiments.benchmarks.layouts", "drift"))
