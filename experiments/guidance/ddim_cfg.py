"""DDIM with classifier-free guidance: the composition of four published parts, on digits.

Train one conditional model with the labels dropped 10 % of the time, once with the linear and once with the cosine
schedule. Draw with DDPM in 1000 steps without guidance, and with DDIM in 25 guided steps, which are 50 evaluations.
Guidance: pred = u + w (c - u); the paper's weight is w - 1. The judge reads 99 % of either set rightly, so that the gain
at w = 1.5 is about one standard error of 1000 samples; w = 2 gained up to 0.8 %, with two to four times the MMD of DDPM.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import data, guidance, losses, metrics, networks, processes, solvers, times, training
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=235,
    paper="arXiv:2412.14422",
    claim="guided DDIM beats unguided DDPM(1000) in class accuracy with 20x fewer evaluations and MMD at most 10 % worse",
    expect={
        "linear_accuracy_gain": at_least(0.0),
        "cosine_accuracy_gain": at_least(0.0),
        "evaluations_ratio": at_least(20),
        "linear_mmd_ratio": at_most(1.1),
        "cosine_mmd_ratio": at_most(1.1),
    },
    minutes=3,
)
WEIGHT = 1.5


class Net(nn.Module):
    """The MLP on flattened pictures."""

    width: int

    @nn.compact
    def __call__(self, x, t, cond=None):
        """`x` [B, 8, 8, 1]."""
        y = networks.MLP(width=self.width, depth=4, num_classes=10)(x.reshape(x.shape[0], -1), t, cond)
        return y.reshape(x.shape)


def train(process, digits, steps, width):
    """The denoiser with averaged parameters after `steps` batches of 128."""
    net = networks.from_linen(Net(width))
    model = lambda params: diffjax.denoiser(net, process, diffjax.from_v, params, null=10)
    params = net.init(jax.random.key(0), jnp.zeros((1, *digits.shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    optimizer = training.adamw(
        training.optimizer.linear_tail(2e-3, steps, warmup=steps // 10), clip=1.0, weight_decay=0.01
    )
    emas = {"mean": training.ema.decay(0.998 if steps > 500 else 0.9)}
    step = training.make_train_step(model, losses.v_prediction(label_drop=0.1), optimizer, emas=emas)
    state = training.init_state(params, optimizer, 1, emas=emas)
    with data.batches(digits, "train", 128, seed=0) as batches, open(os.devnull, "w") as quiet:
        end = training.fit(state, step, batches, steps=steps, devices=jax.devices()[:1], stream=quiet)
    return model(end.state.ema["mean"])


def run(preset):
    full = preset == "full"
    n, long, short, steps, width = (1000, 1000, 25, 3000, 128) if full else (20, 8, 4, 10, 16)
    digits = data.load("digits")
    real, other = digits.read("test"), digits.read("classifier")
    judge = metrics.classifier(other["x"], other["label"], steps=1500 if full else 5, width=32 if full else 4)
    mmd = metrics.mmd(real["x"])
    floor = abs(metrics.score(mmd, digits.read("train", len(real["x"]))["x"]))  # real against real
    label = jnp.arange(n) % 10

    out = {"judge_accuracy_on_real": judge.accuracy(real["x"], real["label"]), "mmd_floor": floor}
    for name, process in {"linear": processes.vp(), "cosine": processes.cosine()}.items():
        denoiser = train(process, digits, steps, width)
        guided = guidance.cfg(WEIGHT)(denoiser)
        score = {}
        for kind, d, solver in (
            ("ddpm", denoiser, solvers.ddpm(process, times.uniform(long))),
            ("ddim_cfg", guided, solvers.ddim(process, times.uniform(short))),
        ):
            x = diffjax.sample_chunks(jax.random.key(2), d.bind(label), solver, (n, *digits.shape), chunk=n)
            score[kind] = judge.accuracy(x, np.asarray(label)), metrics.score(mmd, x)
            out |= {f"{name}_{kind}_accuracy": score[kind][0], f"{name}_{kind}_mmd": score[kind][1]}
            out[f"{name}_{kind}_grid"] = np.clip(digits.transform.decode(x[:40]), 0, 16)
        out[f"{name}_accuracy_gain"] = score["ddim_cfg"][0] - score["ddpm"][0]
        out[f"{name}_mmd_ratio"] = max(score["ddim_cfg"][1], floor) / max(score["ddpm"][1], floor)
    return {**out, "evaluations_ratio": long / (2 * short)}
