"""Switch-DiT: the time switches experts on that say how much of its input every block of a DiT sees.

m = 1 + sum_{i in top k} g_i (x W_i + b_i), g = softmax(W code(t)), and x -> block(m x) + (1 - m) x. The experts start at
zero, so that the network starts as the DiT without them. Beside the loss, the gates of all layers are drawn to a prior by
their Jensen-Shannon divergence: at time t a window of k / M of all gates, which slides with t^4; which gate is which column
of the prior is matched by the times at which it is used.

On the digits, three trainings each of the switched DiT (k = 2 of M = 3) and of a dense one that has at least as many
parameters by its wider MLPs. The overlap of two times is the Jaccard index of the gates that they use, in all layers:
adjacent ones are 1/100 apart, far ones are the first and the last tenth.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import losses, networks, processes
from experiments.networks.digit_runs import CLASSES, EXAMPLE, LOSS, shades, test_loss, train
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=156,
    paper="arXiv:2403.09176",
    claim="starts as the dense DiT; adjacent times share more gates than far ones; not worse than a dense DiT of as many "
    "parameters; the prior knows no order of experts",
    expect={
        "error_at_start": at_most(0.0),
        "adjacent_overlap": at_least(0.9),
        "adjacent_minus_far_overlap": at_least(0.2),
        "loss_over_dense": at_most(1.0),
        "parameters_over_dense": at_most(1.0),
        "permutation_error": at_most(1e-5),
    },
    minutes=3,
)
K, M = 2, 3


def overlap(used, i, j):
    """The Jaccard index of the gates that times i and j use.   used: bool [times, gates]"""
    return ((used[i] & used[j]).sum(-1) / (used[i] | used[j]).sum(-1)).mean()


def run(preset):
    full = preset == "full"
    steps, batch, width, depth, seeds = (500, 64, 32, 3, 3) if full else (3, 8, 8, 1, 1)
    dit = lambda **fields: networks.from_linen(
        networks.DiT(width=width, depth=depth, heads=2, num_classes=CLASSES, **fields)
    )
    net, plain, dense = dit(route=networks.switch(M, K)), dit(), dit(expand=6)
    tapped = networks.tapped(net, read=[f"block_{i}/switch/gates" for i in range(depth)])
    make = lambda fn, aux: lambda p: diffjax.denoiser(fn, processes.rectified(), diffjax.from_velocity, p, aux=aux)
    prior = losses.task_prior(K)
    cases = {
        "switched": (net, make(tapped, True), losses.flow_matching(label_drop=0.0, penalty=prior)),
        "dense": (dense, make(dense, False), LOSS),
    }
    found, starts = {}, {}
    for name, (fn, model, loss) in cases.items():
        starts[name] = [fn.init(jax.random.key(seed), *EXAMPLE) for seed in range(seeds)]
        ends = [params for params, _ in train(model, loss, starts[name], steps=steps, batch=batch)]
        found[name] = ends, np.array([float(test_loss(model, p)) for p in ends])

    x, label = jax.random.normal(jax.random.key(5), (200, 8, 8, 1)), jnp.arange(200) % CLASSES
    t = jnp.linspace(0, 1, 200)
    random = networks.random_parameters(net.module, x, t, label)
    zero = lambda path, a: np.zeros_like(a) if path[-2].key == "switch" else a
    at_start = jax.tree_util.tree_map_with_path(zero, random)
    bare = {k: {n: v for n, v in p.items() if n != "switch"} for k, p in at_start.items()}
    gap = jnp.abs(jax.jit(net)(at_start, x, t, label) - jax.jit(plain)(bare, x, t, label)).max()

    gates = jax.jit(lambda p: tapped(p, x, t, label)[1])
    lines, order = np.arange(200), np.array([2, 0, 1])
    adjacent, far = [], []
    for params in found["switched"][0]:
        top = [np.asarray(g).argsort(-1).argsort(-1) >= M - K for g in losses.routers(gates(params), "gates")]
        used = np.concatenate(top, axis=-1)
        adjacent.append(overlap(used, lines[:-2], lines[2:]))
        far.append(overlap(used, lines[:20], lines[180:]))
    taps = gates(found["switched"][0][0])
    moved = {name: g[:, order] for name, g in taps.items()}
    return {
        "error_at_start": gap,
        "adjacent_overlap": min(adjacent),
        "adjacent_minus_far_overlap": min(np.subtract(adjacent, far)),
        "loss_over_dense": found["switched"][1].mean() / found["dense"][1].mean(),
        "loss_spread": found["switched"][1].std() / found["dense"][1].mean(),
        "parameters_over_dense": networks.parameter_count(starts["switched"][0])
        / networks.parameter_count(starts["dense"][0]),
        "permutation_error": jnp.abs(prior(moved, t) - prior(taps, t)).max(),
        "prior": prior(taps, t).mean(),
        "dense_loss": found["dense"][1].mean(),
        "gates_image": shades(np.concatenate([np.asarray(g) for g in losses.routers(taps, "gates")], axis=-1).T),
    }
