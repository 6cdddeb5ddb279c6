"""Forward pass and gradient of the DiT and the U-Net over the same networks in eager PyTorch, measured in one run.

Limits: DiT <= .5 forward and <= .85 with its gradient; U-Net <= 1 of both, at 16, 64 and 128 channels, with PyTorch's
convolutions channels-last. The outputs of both are compared first. Then attention and convolutions by form and size. Needs
torch, which the project does not depend on: `python -m pip install torch`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import networks
from diffjax.networks import attention, convolution
from experiments.benchmarks import measure

UNETS = {16: (64, 16), 64: (16, 16), 128: (8, 16)}  # channels of the first level -> batch, side of the picture


def ours(fn: Any, params: Any, x: jax.Array, t: jax.Array) -> dict[str, Callable[[], Any]]:
    """The compiled forward pass, and the loss with its gradient."""
    forward = jax.jit(fn)
    train = jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(fn(p, x, t)))))
    return {"forward": lambda: forward(params, x, t), "train": lambda: train(params)}


def theirs(fn: Any, params: Any, x: Any, t: Any) -> dict[str, Callable[[], Any]]:
    """The same, eagerly."""
    import torch

    from experiments.peers import torch_networks

    p = torch_networks.tensors(params)
    held = torch_networks.leaves(p)

    def forward() -> Any:
        with torch.no_grad():
            return fn(p, x, t)

    def train() -> Any:
        loss = fn(p, x, t).square().mean()
        return torch.autograd.grad(loss, held)

    return {"forward": forward, "train": train}


def ratios(name: str, mine: dict[str, Any], peer: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Times of ours over theirs, of each of the two passes."""
    cases = {f"{k} ours": f for k, f in mine.items()} | {f"{k} peer": f for k, f in peer.items()}
    seconds = measure.interleaved(cases, rounds)
    report = {k: measure.ratio(seconds, f"{k} ours", f"{k} peer") for k in mine}
    print(name, report, flush=True)
    return report


def against_torch(rounds: int) -> dict[str, Any]:
    """Both networks over their peers."""
    import torch

    from experiments.peers import torch_networks

    torch.set_num_threads(os.cpu_count() or 1)
    report: dict[str, Any] = {}
    fn, params, x = measure.dit(batch=16, side=32, width=256, depth=4, heads=4, patch=4)
    t = jnp.linspace(0.0, 1.0, x.shape[0])
    peer = theirs(
        lambda p, x, t: torch_networks.dit(p, x, t, heads=4, patch=4), params,
        torch.from_numpy(np.array(x)), torch.from_numpy(np.array(t)),
    )  # fmt: skip
    mine = ours(fn, params, x, t)
    np.testing.assert_allclose(mine["forward"](), peer["forward"]().numpy(), atol=1e-4)
    report["dit"] = ratios("dit", mine, peer, rounds)
    for width, (batch, side) in UNETS.items():
        module = networks.UNet(widths=(width, 2 * width), blocks=1, attention=(1,))
        x = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
        t = jnp.linspace(0.0, 1.0, batch)
        params = jax.tree.map(jnp.asarray, networks.random_parameters(module, x, t, gain=0.5))
        image = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)  # channels-last in memory
        peer = theirs(
            lambda p, x, t: torch_networks.unet(p, x, t, levels=2, blocks=1), params, image,
            torch.from_numpy(np.array(t)),
        )  # fmt: skip
        mine = ours(networks.from_linen(module), params, x, t)
        there = peer["forward"]().permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(mine["forward"](), there, atol=1e-3 * np.abs(there).max())
        report[f"unet {width}"] = ratios(f"unet {width}", mine, peer, rounds)
    return report


def convolutions(rounds: int) -> dict[str, Any]:
    """The gradient of four convolutions in a loop, by form, over that of `canonical`."""
    report = {}
    for side, channels, batch in ((8, 16, 64), (8, 64, 64), (16, 64, 16), (16, 128, 16), (32, 64, 8)):
        x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
        k = jax.random.normal(jax.random.key(1), (3, 3, channels, channels)) / (9 * channels) ** 0.5

        def steps(form: Any, x: Any = x, k: Any = k) -> Any:
            loss = lambda x, k: jnp.mean(jnp.square(form(x, k)))

            def step(carry: Any, _: Any) -> Any:
                g = jax.grad(loss, argnums=(0, 1))(*carry)
                return jax.tree.map(lambda a, b: a - 0.1 * b, carry, g), None

            run = jax.jit(lambda x, k: jax.lax.scan(step, (x, k), None, length=4)[0])
            return lambda: run(x, k)

        forms = {"canonical": convolution.canonical, "slices": convolution.slices, "native": convolution.native}
        seconds = measure.interleaved({name: steps(f) for name, f in forms.items()}, rounds)
        report[f"{side} x {channels}"] = {n: measure.ratio(seconds, n, "canonical") for n in ("slices", "native")}
        print(side, channels, report[f"{side} x {channels}"], flush=True)
    return report


def attentions(rounds: int) -> dict[str, Any]:
    """The two equal forms of attention by length, matrix products over einsum."""
    report = {}
    for n in (64, 256, 1024):
        q, k, v = jax.random.normal(jax.random.key(0), (3, max(1, 4096 // n), n, 4, 32))

        loss = lambda q, k, v: jnp.sum(jnp.square(attention.weighted(attention.softmax(attention.logits_of(q, k)), v)))
        made = {}
        for name, length in (("matmul", n), ("einsum", 0)):
            with mock.patch.object(attention, "MATMUL_LENGTH", length):
                made[name] = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
        seconds = measure.interleaved({name: functools.partial(f, q, k, v) for name, f in made.items()}, rounds)
        report[str(n)] = measure.ratio(seconds, "matmul", "einsum")
        print(n, report[str(n)], flush=True)
    return report


def run(quick: bool = False) -> dict[str, Any]:
    """All ratios.   `quick`: few rounds."""
    rounds = 3 if quick else 15
    return {
        "over_torch": against_torch(rounds),
        "gradient_in_a_loop_over_canonical": convolutions(3 if quick else 5),
        "attention_matmul_over_einsum": attentions(rounds),
    }


if __name__ == "__main__":
    measure.record("networks", run())
