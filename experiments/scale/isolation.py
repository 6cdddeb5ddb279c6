"""What the recipes of this family share: training models of one architecture in isolation, and the floor of a score."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax import data, networks, training


class Net(nn.Module):
    """The residual MLP on flattened pictures or codes."""

    width: int
    depth: int
    classes: int

    @nn.compact
    def __call__(self, x, t, cond=None):
        """`x` [B, ...], `cond` labels [B]."""
        mlp = networks.MLP(width=self.width, depth=self.depth, num_classes=self.classes)
        return mlp(x.reshape(x.shape[0], -1), t, cond).reshape(x.shape)


def init(f, seed, shape):
    """Fresh parameters of a network of items of `shape` with a label."""
    return f.init(jax.random.key(seed), jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))


def train(model, loss, params, datasets, *, steps, batch, seeds, rate=3e-3, condition=training.condition):
    """Train one model per data set, without a word between them; their averaged parameters, a list.

    Run k draws its batches, its times and its noise from `seeds[k]` alone.
    """
    optimizer = training.adamw(training.optimizer.linear_tail(rate, steps, warmup=steps // 10), clip=1.0)
    emas = {"mean": training.ema.decay(0.995 if steps > 500 else 0.9)}
    step = training.make_train_step(model, loss, optimizer, emas=emas, condition=condition)
    states = [training.init_state(p, optimizer, seed, emas=emas) for p, seed in zip(params, seeds, strict=True)]
    streams = [data.batches(d, "train", batch, seed=seed, prefetch=0) for d, seed in zip(datasets, seeds, strict=True)]
    try:
        ends, _ = training.fit_isolated(
            states, step, streams, steps=steps, devices=jax.devices()[:1], per_dispatch=50 if steps > 50 else 1
        )
    finally:
        for stream in streams:
            stream.close()
    return [end.ema["mean"] for end in ends]


def cluster_and_label(batch):
    """The condition that a router is trained with."""
    return {"cluster": batch["cluster"], "label": batch["label"]}


def flops(params, steps, batch):
    """Training operations of a network of matrix products: 6 per parameter and item (forward, and twice backward)."""
    return 6 * training.state.count_params(params) * steps * batch


def stack(params):
    """Parameters side by side, for `experts.mixture`."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(a) for a in leaves]), *params)
