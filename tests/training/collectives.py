"""The collectives of compiled training steps by kind, for every driver and layout.

As a program: print them as JSON, with `layouts` also those of a transformer in every layout.
"""

import json
import re
import sys

import jax
import numpy as np
import optax
import toy

import diffjax
from diffjax import losses, networks, prediction, processes, times
from diffjax.training import Layout, devices, ema, init_state, make_train_step

WIDTH = {"f32": 4, "s32": 4, "f64": 8, "u32": 4, "pred": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
DIT = {"width": 32, "heads": 4, "patch": 2, "num_classes": 4}
BATCH, SIDE = 16, 8


def collectives(text):
    """`kind -> (count, bytes of the results on a device)` of a compiled program; a loop's body counts once."""
    found = {}
    for shapes, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", text):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        n = sum(WIDTH[t] * int(np.prod([int(d) for d in dims.split(",") if d], dtype=int)) for t, dims in sizes)
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + 1, total + n)
    return found


def in_loops(text):
    """How many collectives lie in the body of a loop."""
    return sum("while/body" in line for line in text.splitlines() if re.search(rf" ({KINDS})(-start)?\(", line))


def of_toy(name, per_dispatch=1, accumulate=1):
    """The compiled step of the linear model with AdamW and two averages."""
    state, train_step = toy.make(optax.adamw(1e-3), accumulate=accumulate)
    driver = devices.driver(name, train_step, per_dispatch=per_dispatch)
    return driver.lower(driver.place(state), toy.batch(0, size=64)).compile().as_text()


def dit_parts(dtype=np.float32, **fields):
    """`(network, parameters, batch)` of a small diffusion transformer with labels."""
    net = networks.DiT(**{**DIT, "dtype": np.dtype(dtype), **fields})
    x = np.zeros((1, SIDE, SIDE, 1), dtype)
    params = networks.random_parameters(net, x, np.zeros(1, np.float32), np.zeros(1, np.int32))
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(BATCH, SIDE, SIDE, 1)).astype(dtype),
        "label": rng.integers(0, 4, BATCH).astype("i4"),
    }
    return net, jax.tree.map(lambda a: a.astype(dtype), params), batch


def dit_step(net, optimizer):
    """The training step of a `v` model on the cosine process, with one average."""
    process, fn = processes.cosine(), networks.from_linen(net)
    model = lambda params: diffjax.denoiser(fn, process, prediction.from_v, params, null=4)
    loss = losses.denoising_loss(
        times=times.LAWS["uniform"].build(), space=prediction.to_x0, weight=times.WEIGHTS["unit"].build()
    )
    return make_train_step(model, loss, optimizer, emas=AVERAGE)


AVERAGE = {"average": ema.decay(0.9)}


def of_dit(label):
    """Of the transformer of one block with SGD, whose state is small, in one of `LAYOUTS`."""
    net, params, batch = dit_parts(depth=1)
    optimizer = optax.sgd(0.1)
    name, sizes = LAYOUTS[label]
    layout = Layout(rules=networks.partition_rules(net), **sizes)
    driver = devices.driver(name, dit_step(net, optimizer), layout=layout, devices=jax.devices()[: layout.size])
    state = driver.place(init_state(params, optimizer, 0, emas=AVERAGE))
    return collectives(driver.lower(state, batch).compile().as_text())


LAYOUTS = {
    "fsdp": ("shard_map", {"fsdp": 8}),
    "data and fsdp": ("shard_map", {"data": 2, "fsdp": 4}),
    "fsdp by the compiler": ("mesh", {"fsdp": 8}),
    "model": ("mesh", {"data": 4, "model": 2}),
    "sequence": ("mesh", {"data": 4, "sequence": 2}),
    "data, fsdp and model": ("shard_map", {"data": 2, "fsdp": 2, "model": 2}),
}


def main():
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(toy.params()))
    report = {"gradient": gradient, "toy": {}, "accumulate": {}}
    for name in devices.PARALLEL:
        for per_dispatch in (1, 4) if name == "mesh" else (4,):
            report["toy"][f"{name}-{per_dispatch}"] = collectives(of_toy(name, per_dispatch))
        text = of_toy(name, accumulate=4)
        report["accumulate"][name] = {"messages": collectives(text), "in the loop": in_loops(text)}
    if sys.argv[1:] == ["layouts"]:
        report["dit"] = {label: of_dit(label) for label in LAYOUTS}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
