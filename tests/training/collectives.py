"""Print the collectives of one training step under every driver, as JSON. Run by test_devices with default flags."""

import json
import re

import jax
import numpy as np
import optax
import toy

from diffjax.training import devices

WIDTH = {"f32": 4, "s32": 4, "f64": 8, "u32": 4, "pred": 1}


def payload(line):
    """Bytes of the operands: shapes on the left of the op's name."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", line.split(" all-reduce")[0].split("=", 1)[1])
    return sum(WIDTH[t] * int(np.prod([int(n) for n in dims.split(",") if n], dtype=int)) for t, dims in shapes)


def main():
    report = {}
    for name in devices.PARALLEL:
        for per_dispatch in (1, 4) if name == "mesh" else (4,):
            state, train_step = toy.make(optax.adamw(1e-3))
            driver = devices.driver(name, train_step, per_dispatch=per_dispatch)
            text = driver.lower(driver.place(state), toy.batch(0)).compile().as_text()
            lines = [s for s in text.splitlines() if re.search(r"= .* all-reduce(-start)?\(", s)]
            others = re.findall(r" (all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
            gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
            report[f"{name}-{per_dispatch}"] = {
                "count": len(lines) + len(others),
                "bytes": sum(map(payload, lines)),
                "gradient": gradient,
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
